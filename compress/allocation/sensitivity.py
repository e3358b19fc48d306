"""ASVD: no layer alone may raise the model's loss above one threshold. Yuan et al. 2023, section 3.3 (arXiv 2312.05821)."""

from dataclasses import dataclass

from paredown.compress.allocation.base import ALLOCATIONS, Allocation, Budget, Options, option_for
from paredown.compress.allocation.shares import options_for
from paredown.compress.errors import PareError


@ALLOCATIONS.register("sensitivity")
@dataclass(frozen=True)
class Sensitivity(Allocation):
    """Each layer takes its smallest measured share whose loss is at most one threshold.

    The threshold is the lowest that meets the budget, of which a little may remain unspent; where any share can be kept,
    all are raised in proportion to spend it.
    """

    reads = "sensitivities"

    def allocate(self, budget: Budget) -> Options:
        """Raises PareError if no threshold meets the budget."""
        losses = budget.sensitivities
        for threshold in sorted({loss for measured in losses.values() for loss in measured.values()}):
            shares = {
                layer.name: min((s for s, loss in losses.get(layer.name, {}).items() if loss <= threshold), default=1.0)
                for layer in budget.layers
            }
            options = {layer.name: option_for(layer, shares[layer.name]) for layer in budget.layers}
            stored = sum(
                layer.size if options[layer.name] is None else layer.within(shares[layer.name] * layer.size).numbers
                for layer in budget.layers
            )
            if stored <= budget.numbers:
                return options_for(budget, shares)
        raise PareError(f"no measured share of the layers leaves only {budget.kept:g} of them: ask for more with kept.")
