"""The recipe's key `allocation`, which is read before any strategy is imported."""

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from paredown.compress.allocation.base import Allocation


class AllocationSpec(BaseModel):
    """A strategy and the strategy's own options."""

    model_config = ConfigDict(extra="allow", frozen=True)

    strategy: str

    def build(self) -> "Allocation":
        """Raises PareError listing every fault."""
        from paredown.compress.allocation.base import ALLOCATIONS

        return ALLOCATIONS.build(self.strategy, self.model_extra or {})
