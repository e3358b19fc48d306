"""Two-sided Fisher: the error weighed by the input's moment and by that of the output's gradient.

The Kronecker-factored curvature of Martens & Grosse 2015 (arXiv 1503.05671) as the metric of a truncated SVD.
"""

from dataclasses import dataclass

from paredown.compress.methods.base import register
from paredown.compress.methods.lowrank.base import Factorized
from paredown.compress.numerics.metric import Metric
from paredown.compress.numerics.moments import Labels, Need, Stats


@register("fisher_svd")
@dataclass(frozen=True)
class FisherSVD(Factorized):
    labels: Labels = "data"  # empirical Fisher, or the true one with tokens drawn from the model

    needs = frozenset({Need.GRAM, Need.OUTPUT_GRADIENT})

    def metric(self, stats: Stats) -> Metric:
        return Metric(
            stats.inputs.gram, stats.gradient(Need.OUTPUT_GRADIENT), stats.gradient(Need.OUTPUT_GRADIENT_DIAGONAL)
        )
