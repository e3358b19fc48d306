"""One file per paper. A method is a frozen dataclass whose fields are the recipe's options; `@register` names it.

To add one, write a file in `pruning/` or `lowrank/`: nothing else changes. Outside the package, write a Python file for
`--plugin`, or list a module of an installed package under the entry point group `paredown.methods`.
"""

from paredown.compress.methods.base import (
    METHODS,
    BlockMethod,
    Choice,
    Damping,
    GroupMethod,
    Method,
    SublayerMethod,
    WeightMethod,
    register,
)
from paredown.compress.methods.pruning.base import MASKS, UPDATES, Mask, Pruner, Update

__all__ = [
    "MASKS",
    "METHODS",
    "UPDATES",
    "BlockMethod",
    "Choice",
    "Damping",
    "GroupMethod",
    "Mask",
    "Method",
    "Pruner",
    "SublayerMethod",
    "Update",
    "WeightMethod",
    "build",
    "register",
]


def build(name: str, options: dict[str, object]) -> Method:
    """The method `name` with its options. Raises PareError listing every fault at once."""
    return METHODS.build(name, options)
