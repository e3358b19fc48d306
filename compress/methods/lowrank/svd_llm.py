"""SVD-LLM: the least error of the layer's output on its own inputs. Wang et al. 2024 (arXiv 2403.07378)."""

from dataclasses import dataclass

from paredown.compress.methods.base import register
from paredown.compress.methods.lowrank.base import Factorized
from paredown.compress.numerics.metric import Metric
from paredown.compress.numerics.moments import Need, Stats


@register("svd_llm")
@dataclass(frozen=True)
class SVDLLM(Factorized):
    needs = frozenset({Need.GRAM})

    def metric(self, stats: Stats) -> Metric:
        return Metric(input=stats.inputs.gram)
