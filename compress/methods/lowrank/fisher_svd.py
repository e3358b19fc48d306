"""Two-sided Fisher: the error weighed by the input's moment and by that of the output's gradient.

The Kronecker-factored curvature of Martens & Grosse 2015 (arXiv 1503.05671) as the metric of a truncated SVD.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from paredown.compress.methods import register
from paredown.compress.methods.lowrank.base import Factorized
from paredown.compress.numerics.factorize import Metric
from paredown.compress.numerics.moments import InputStats


@register("fisher_svd")
@dataclass(frozen=True)
class FisherSVD(Factorized):
    labels: Literal["data", "sampled"] = "data"  # empirical Fisher, or the true one by the model's own draws

    needs: ClassVar[frozenset[str]] = frozenset({"gram", "output_gradient"})

    def metric(self, stats: InputStats) -> Metric:
        return Metric(stats.gram, stats.gradient("output_gradient"), stats.gradient("output_gradient_diagonal"))
