"""2:4 weights stored as values and 2-bit column indices: 9 bits per 16-bit weight instead of 16.

In each group of 4 neighbouring weights of a row exactly 2 are kept. `values` holds the kept weights in column order.
`indices` holds one nibble (4 bits) per group, `i0 | i1 << 2`, where `i0 < i1` are the kept columns of the group.

Indices are stored in blocks of 64 columns. A block has 16 groups and takes 8 bytes, read as 4 little-endian 16-bit
words: nibble j of word t belongs to group 4 j + t. In this order a lane of a sparse tensor core loads all the indices
that it has to supply at once (see sparse24_mma.py), so the kernels read the tensors of a checkpoint as they are. If a
row ends inside a block, the remaining groups get the pair (0, 1).

These are the reference functions: plain torch, exact, for any device and any floating dtype.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

# Elements of the dense matrix that are processed at a time. The largest temporary, the int64 column numbers, takes 4
# bytes per element: 2 MiB, which fits into the cache of a CPU core.
BLOCK = 1 << 19
VALID_NIBBLES = tuple(i0 | i1 << 2 for i1 in range(4) for i0 in range(i1))
PAD = 0 | 1 << 2  # the nibble of groups beyond the last column


@torch.no_grad()
def pack24(weight: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Store only the weights that `keep` marks: exactly 2 of every 4 along `in`.

    weight (..., out, in), floating; keep (..., out, in), bool; `in` divisible by 4.
    Returns values (..., out, in / 2), bit for bit in the dtype of weight, and indices (..., out, index_bytes(in)) uint8.
    Raises ValueError if shapes or dtypes do not fit; if a group does not keep 2 of 4, it names the first such group.
    """
    if keep.shape != weight.shape or keep.dtype != torch.bool:
        raise ValueError(f"keep must be bool and shaped like weight {tuple(weight.shape)}, not {_describe(keep)}")
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
        # the 4 bools of a group are read as one integer; the multiplication collects their bits in its highest byte
        masks = kept[part].contiguous().view(torch.int32) * 0x01020408 >> 24 & 15  # (row, group)
        pairs = table[masks]
        if bool((pairs == 255).any()):
            row, group = (pairs == 255).nonzero()[0].tolist()
            raise ValueError(
                f"row {part.start + row}, columns {4 * group} to {4 * group + 3}: keep marks "
                f"{int(masks[row, group]).bit_count()} of 4 weights, and 2:4 needs exactly 2"
            )
        nibbles[part, :groups] = pairs
        columns = torch.stack((pairs & 3, pairs >> 2), dim=-1).long()  # (row, group, 2)
        values[part] = rows[part].reshape(-1, groups, 4).gather(-1, columns).flatten(-2)
    nibbles = _transposed(nibbles)
    indices = nibbles[:, 0::2] | nibbles[:, 1::2] << 4  # (row, byte)
    return values.reshape(*lead, inner // 2), indices.reshape(*lead, indices.shape[-1])


@torch.no_grad()
def unpack24(values: Tensor, indices: Tensor) -> Tensor:
    """Rebuild the dense weight (..., out, in) that `pack24` stored. Weights that were not kept are +0.0.

    values (..., out, in / 2); indices (..., out, index_bytes(in)) uint8.
    Raises ValueError if the two shapes do not fit each other.
    """
    inner = 2 * values.shape[-1]
    expected = (*values.shape[:-1], index_bytes(inner))
    if inner % 4 or tuple(indices.shape) != expected or indices.dtype != torch.uint8:
        raise ValueError(f"values {tuple(values.shape)} need uint8 indices {expected}, not {_describe(indices)}")
    dense = values.new_zeros(*values.shape[:-1], inner)
    if values.is_meta:
        return dense
    pairs = values.reshape(-1, inner // 4, 2)  # (row, group, 2)
    codes = indices.reshape(-1, expected[-1])
    groups = dense.view(-1, inner // 4, 4)
    for part in _blocks(len(groups), inner):
        groups[part].scatter_(-1, _columns(codes[part], inner // 4), pairs[part])
    return dense


@torch.no_grad()
def kept24(dense: Tensor, indices: Tensor) -> Tensor:
    """The numbers of a dense matrix (..., out, in) at the places that `indices` name: (..., out, in / 2)."""
    inner = dense.shape[-1]
    groups = dense.reshape(-1, inner // 4, 4)
    codes = indices.reshape(-1, indices.shape[-1])
    kept = [groups[p].gather(-1, _columns(codes[p], inner // 4)).flatten(-2) for p in _blocks(len(groups), inner)]
    values = torch.cat(kept) if kept else dense.new_empty(0)
    return values.reshape(*dense.shape[:-1], inner // 2)


def sparse24_matmul(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` for a packed weight (out, in). Bit-equal to `F.linear` with the dense weight.

    x (..., in); values (out, in / 2); indices (out, index_bytes(in)); bias (out,). Returns (..., out).
    """
    return F.linear(x, unpack24(values, indices), bias)


def index_bytes(in_features: int) -> int:
    """Bytes of indices per row: 8 for every 64 columns, the last block rounded up."""
    return 8 * -(-in_features // 64)


def count_invalid24(indices: Tensor) -> int:
    """How many nibbles of `indices` (..., bytes) are not a valid pair of columns: 0 unless the data is damaged."""
    counts = torch.bincount(indices.flatten(), minlength=256).view(16, 16)  # (high, low)
    valid = torch.zeros(16, dtype=torch.bool, device=indices.device)
    valid[list(VALID_NIBBLES)] = True
    return int(counts.sum(0)[~valid].sum() + counts.sum(1)[~valid].sum())


def _columns(codes: Tensor, groups: int) -> Tensor:
    """The two kept columns of each group, (row, group, 2) int64, of rows of indices (row, bytes)."""
    nibbles = _transposed(torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2))[:, :groups]  # (row, group)
    return torch.stack((nibbles & 3, nibbles >> 2), dim=-1).long()


def _transposed(nibbles: Tensor) -> Tensor:
    """Nibbles in group order to word order, or back: the 16 of each block are transposed as a 4 x 4 matrix."""
    squares: Tensor = nibbles.unflatten(-1, (-1, 4, 4))
    return squares.transpose(-1, -2).flatten(-3)


def _nibble_of_mask(device: torch.device) -> Tensor:
    """(16,) uint8: for the 4 keep bits of a group, read as a number, the nibble to store; 255 unless exactly 2 are set."""
    table = torch.full((16,), 255, dtype=torch.uint8)
    for nibble in VALID_NIBBLES:
        table[1 << (nibble & 3) | 1 << (nibble >> 2)] = nibble
    return table.to(device)


def _blocks(rows: int, inner: int) -> list[slice]:
    step = max(1, BLOCK // max(1, inner))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"
