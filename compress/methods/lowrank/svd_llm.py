"""SVD-LLM: the least error of the layer's output on its own inputs. Wang et al. 2024 (arXiv 2403.07378)."""

from dataclasses import dataclass
from typing import ClassVar

from paredown.compress.methods import register
from paredown.compress.methods.lowrank.base import Factorized
from paredown.compress.numerics.factorize import Metric
from paredown.compress.numerics.moments import InputStats


@register("svd_llm")
@dataclass(frozen=True)
class SVDLLM(Factorized):
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    def metric(self, stats: InputStats) -> Metric:
        return Metric(input=stats.gram)
