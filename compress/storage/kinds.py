"""How a weight can be stored: all kinds by name, and what is counted and packed by them.

A new kind is one class (see `kind`), known by its name in KINDS.
"""

import math

from torch import Tensor

from paredown.compress.errors import PareError, did_you_mean
from paredown.compress.storage.factor_kinds import Cur, LowRank, Pifa, with_lowrank
from paredown.compress.storage.kind import Kind, Mask
from paredown.compress.storage.mask_kinds import Bitmap, Sparse24
from paredown.compress.storage.spec import DENSE, Spec, told

# Of checkpoints. In format 2 the indices of 2:4 weights lie in the order that kernels/sparse24.py describes. Format 1 was
# never released.
FORMAT_VERSION = 2

MASKS: dict[str, type[Mask]] = {"sparse24": Sparse24, "bitmap": Bitmap}
KINDS: dict[str, type[Kind]] = {
    **MASKS,
    "lowrank": LowRank,
    "pifa": Pifa,
    "cur": Cur,
    "sparse24_lowrank": with_lowrank(Sparse24),
    "bitmap_lowrank": with_lowrank(Bitmap),
}


def kind_of(name: str) -> type[Kind]:
    """The kind of this name. Raises PareError for a name that this version does not know."""
    if name not in KINDS:
        raise PareError(
            f"unknown kind of packed weight {told(name)}.{did_you_mean(str(name), KINDS)} This version knows "
            f"{', '.join(KINDS)}; a newer paredown may have written this checkpoint: pip install -U paredown."
        )
    return KINDS[name]


def pack(kind: str, weight: Tensor, keep: Tensor) -> dict[str, Tensor]:
    """The tensors to store of `weight` ([experts,] out, in); `keep` (bool, same shape) marks the values that are stored.

    Raises PareError for an unknown kind, ValueError for a kind without a mask and for a `keep` that does not fit the kind
    (sparse24 keeps exactly 2 of 4).
    """
    if kind not in MASKS:
        kind_of(kind)
        raise ValueError(f"{kind} stores no mask; masks are stored as {', '.join(MASKS)}")
    return MASKS[kind].pack(weight, keep)


def stored_numbers(spec: Spec) -> int:
    """Parameters of a weight of this spec: numbers in the model's dtype that it stores, with those of a bias that it adds."""
    if spec.kind == DENSE:
        return spec.size if spec.values is None else spec.values
    kind = kind_of(spec.kind)
    numbers = sum(math.prod(size) for name, size in kind.sizes(spec).items() if kind.tensors[name] is None)
    return numbers + (spec.shape[-2] if spec.bias else 0)


def stored_bytes(spec: Spec, element_size: int) -> int:
    """Bytes of a weight of this spec, with those of a bias that it adds; `element_size` is that of the model's dtype."""
    if spec.kind == DENSE:
        return spec.size * element_size
    kind = kind_of(spec.kind)
    index = sum(
        math.prod(size) * dtype.itemsize
        for name, size in kind.sizes(spec).items()
        if (dtype := kind.tensors[name]) is not None
    )
    return index + stored_numbers(spec) * element_size
