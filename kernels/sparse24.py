"""2:4 weights as values and 2-bit column indices: 9 bits per 16-bit weight instead of 16.

Of every 4 neighbouring weights of a row exactly 2 are kept. `values` holds the kept ones in their natural order,
`indices` one nibble per group, `i0 | i1 << 2` with `i0 < i1` the kept columns of the group. 64 columns have 16 groups
and 8 bytes of indices, read as 4 little-endian words of 16 bits: nibble j of word t is that of group 4 j + t. In this
order a lane of a GPU's sparse tensor core finds the indices that it supplies in one load (see sparse24_mma.py), so that
a checkpoint's tensors are a kernel's. A row that ends inside such a block is filled up with the pair (0, 1).

These are the reference functions: plain torch, exact, any device and any floating dtype.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

# Elements of the dense matrix that are built at a time. The largest temporary is their int64 columns: 4 bytes per
# element, 2 MiB, so that a block stays in a core's cache.
BLOCK = 1 << 19
VALID_NIBBLES = tuple(i0 | i1 << 2 for i1 in range(4) for i0 in range(i1))
PAD = 0 | 1 << 2  # the nibble of a group past the last column


@torch.no_grad()
def pack24(weight: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Store only what `keep` marks, exactly 2 of every 4 along `in`.

    weight (..., out, in), floating; keep (..., out, in), bool; in divisible by 4.
    Returns values (..., out, in / 2) of weight's dtype, bit for bit, and indices (..., out, index_bytes(in)) uint8.
    Raises ValueError naming the first row and group that does not keep 2 of 4.
    """
    if keep.shape != weight.shape or keep.dtype != torch.bool:
        raise ValueError(f"keep must be bool and shaped like weight {tuple(weight.shape)}, not {_told(keep)}")
    inner = weight.shape[-1]
    if inner % 4:
        raise ValueError(f"2:4 needs an input width that is divisible by 4, not {inner}")
    lead, groups = weight.shape[:-1], inner // 4
    rows, kept = weight.reshape(-1, inner), keep.reshape(-1, inner)
    values = weight.new_empty(len(rows), inner // 2)
    size = (len(rows), 2 * index_bytes(inner))
    nibbles = torch.full(size, PAD, dtype=torch.uint8, device=weight.device)  # (row, group), whole blocks of 16
    table = _nibble_of_mask(weight.device)
    for part in _blocks(len(rows), inner):
        # a group's 4 bools read as one integer; the product gathers them in its highest byte
        masks = kept[part].contiguous().view(torch.int32) * 0x01020408 >> 24 & 15  # (row, group)
        found = table[masks]
        if bool((found == 255).any()):
            row, group = (found == 255).nonzero()[0].tolist()
            raise ValueError(
                f"row {part.start + row}, columns {4 * group} to {4 * group + 3}: keep marks "
                f"{int(masks[row, group]).bit_count()} of 4 weights, and 2:4 needs exactly 2"
            )
        nibbles[part, :groups] = found
        columns = torch.stack((found & 3, found >> 2), dim=-1).long()  # (row, group, 2)
        values[part] = rows[part].reshape(-1, groups, 4).gather(-1, columns).flatten(-2)
    nibbles = _turned(nibbles)
    indices = nibbles[:, 0::2] | nibbles[:, 1::2] << 4  # (row, byte)
    return values.reshape(*lead, inner // 2), indices.reshape(*lead, indices.shape[-1])


@torch.no_grad()
def unpack24(values: Tensor, indices: Tensor) -> Tensor:
    """The dense weight (..., out, in) of `pack24`: dropped positions are +0.0. Block by block, in one buffer.

    values (..., out, in / 2); indices (..., out, index_bytes(in)) uint8.
    Raises ValueError if their shapes do not belong together.
    """
    inner = 2 * values.shape[-1]
    expected = (*values.shape[:-1], index_bytes(inner))
    if inner % 4 or tuple(indices.shape) != expected or indices.dtype != torch.uint8:
        raise ValueError(f"values {tuple(values.shape)} need uint8 indices {expected}, not {_told(indices)}")
    dense = values.new_zeros(*values.shape[:-1], inner)
    if values.is_meta:
        return dense
    pairs = values.reshape(-1, inner // 4, 2)  # (row, group, 2)
    codes = indices.reshape(-1, expected[-1])
    groups = dense.view(-1, inner // 4, 4)
    for part in _blocks(len(groups), inner):
        nibbles = _turned(torch.stack((codes[part] & 15, codes[part] >> 4), dim=-1).flatten(-2))
        nibbles = nibbles[:, : inner // 4]  # (row, group)
        columns = torch.stack((nibbles & 3, nibbles >> 2), dim=-1).long()  # (row, group, 2)
        groups[part].scatter_(-1, columns, pairs[part])
    return dense


def sparse24_matmul(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` of a packed weight (out, in). Bit-equal to `F.linear` with the dense weight.

    x (..., in); values (out, in / 2); indices (out, index_bytes(in)); bias (out,). Returns (..., out).
    """
    return F.linear(x, unpack24(values, indices), bias)


def index_bytes(in_features: int) -> int:
    """Bytes of indices in a row: 8 for every 64 columns begun."""
    return 8 * -(-in_features // 64)


def count_invalid24(indices: Tensor) -> int:
    """How many nibbles of `indices` (..., bytes) name no pair of columns: 0 unless the data is damaged."""
    seen = torch.bincount(indices.flatten(), minlength=256).view(16, 16)  # (high, low)
    valid = torch.zeros(16, dtype=torch.bool, device=indices.device)
    valid[list(VALID_NIBBLES)] = True
    return int(seen.sum(0)[~valid].sum() + seen.sum(1)[~valid].sum())


def _turned(nibbles: Tensor) -> Tensor:
    """From the order of groups to that of the words, and back: the 16 of a block as a 4 x 4 matrix, transposed."""
    squares: Tensor = nibbles.unflatten(-1, (-1, 4, 4))
    return squares.transpose(-1, -2).flatten(-3)


def _nibble_of_mask(device: torch.device) -> Tensor:
    """(16,) uint8: which nibble stores a group whose 4 keep bits read as a number; 255 if they are not two."""
    table = torch.full((16,), 255, dtype=torch.uint8)
    for nibble in VALID_NIBBLES:
        table[1 << (nibble & 3) | 1 << (nibble >> 2)] = nibble
    return table.to(device)


def _blocks(rows: int, inner: int) -> list[slice]:
    step = max(1, BLOCK // max(1, inner))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _told(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"
