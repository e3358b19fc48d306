"""Weights with any mask, stored as a bitmap and the kept values: 1 bit per weight plus 16 bits per kept weight.

Bit `j` of byte `i` of a row says whether column `8 i + j` is kept (bits beyond the last column are 0). `values` holds
the kept weights of all rows, row after row, in column order.

These are the reference functions: plain torch, exact, for any device and any floating dtype.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 1 << 19  # elements of the dense matrix that are processed at a time: they fit into the cache of a CPU core
MOST_VALUES = 2**31 - 1  # the kernels address values with int32


@torch.no_grad()
def pack_bitmap(weight: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Store only the weights that `keep` marks.

    weight (..., out, in), floating; keep (..., out, in), bool. Zeros that are kept are stored like any other value.
    Returns values (kept,), bit for bit in the dtype of weight, and bitmap (..., out, ceil(in / 8)) uint8.
    Raises ValueError if keep is not bool or not shaped like weight.
    """
    if keep.shape != weight.shape or keep.dtype != torch.bool:
        raise ValueError(
            f"keep must be bool and shaped like weight {tuple(weight.shape)}, not {keep.dtype} {tuple(keep.shape)}"
        )
    inner = weight.shape[-1]
    rows, kept = weight.reshape(-1, inner), keep.reshape(-1, inner)
    parts = _blocks(len(rows), inner)
    values = torch.cat([rows[p][kept[p]] for p in parts]) if parts else weight.new_empty(0)  # (kept,)
    bits = F.pad(kept.view(torch.uint8), (0, -inner % 8)).reshape(len(rows), -(-inner // 8), 8)  # (row, byte, 8)
    bitmap = bits[..., 0].clone()
    for j in range(1, 8):
        bitmap |= bits[..., j] << j
    return values, bitmap.reshape(*weight.shape[:-1], bitmap.shape[-1])


@torch.no_grad()
def unpack_bitmap(values: Tensor, bitmap: Tensor, in_features: int) -> Tensor:
    """Rebuild the dense weight (..., out, in) that `pack_bitmap` stored. Weights that were not kept are +0.0.

    values (kept,); bitmap (..., out, ceil(in / 8)) uint8.
    Raises ValueError if the bitmap has another width than `in_features` needs, or marks another number of weights than
    `values` holds.
    """
    if bitmap.dtype != torch.uint8 or bitmap.shape[-1] != -(-in_features // 8) or values.dim() != 1:
        raise ValueError(
            f"{in_features} columns need 1-D values and a uint8 bitmap of {-(-in_features // 8)} bytes per row, "
            f"not values {tuple(values.shape)} and {bitmap.dtype} {tuple(bitmap.shape)}"
        )
    dense = values.new_zeros(*bitmap.shape[:-1], in_features)
    if values.is_meta:
        return dense
    ends = [0, *count_bits(bitmap).flatten().cumsum(0).tolist()]  # values before each row
    if ends[-1] != len(values):
        raise ValueError(f"the bitmap marks {ends[-1]} weights and {len(values)} values are stored")
    rows, codes = dense.view(-1, in_features), bitmap.reshape(-1, bitmap.shape[-1])
    for part in _blocks(len(rows), in_features):
        keep = _keep(codes[part], in_features)
        rows[part].masked_scatter_(keep, values[ends[part.start] : ends[part.stop]])
    return dense


@torch.no_grad()
def kept_values(dense: Tensor, bitmap: Tensor) -> Tensor:
    """The numbers of a dense matrix (..., out, in) that `bitmap` (..., out, ceil(in / 8)) marks: (kept,)."""
    rows, codes = dense.reshape(-1, dense.shape[-1]), bitmap.reshape(-1, bitmap.shape[-1])
    kept = [rows[p][_keep(codes[p], dense.shape[-1])] for p in _blocks(len(rows), dense.shape[-1])]
    return torch.cat(kept) if kept else dense.new_empty(0)


def bitmap_matmul(x: Tensor, values: Tensor, bitmap: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` for a packed weight (out, in). Bit-equal to `F.linear` with the dense weight.

    x (..., in); values (kept,); bitmap (out, ceil(in / 8)); bias (out,). Returns (..., out).
    """
    return F.linear(x, unpack_bitmap(values, bitmap, x.shape[-1]), bias)


def count_bits(bitmap: Tensor) -> Tensor:
    """How many bits are set in each row: (..., bytes) uint8 -> (...) int64.

    The bits of a byte are summed in place: by twos, by fours, then all 8.
    """
    pairs = bitmap - ((bitmap >> 1) & 0x55)
    nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return ((nibbles + (nibbles >> 4)) & 0x0F).sum(-1, dtype=torch.int64)


@torch.no_grad()
def row_starts(bitmap: Tensor, most_values: int = MOST_VALUES) -> Tensor:
    """Where the values of each row start, and in the last place how many there are in all.

    bitmap (out, bytes) uint8. Returns (out + 1,) int32. A layer computes it once, when it is loaded.
    Raises ValueError if there are more than `most_values` values.
    """
    ends = count_bits(bitmap).cumsum(0)
    # the count is copied from the device only if it can be too large: torch.compile and CUDA graphs forbid such a copy
    if 8 * bitmap.numel() > most_values and not ends.is_meta and int(ends[-1]) > most_values:
        raise ValueError(f"{int(ends[-1])} values are stored, and kernels count up to {most_values}")
    return F.pad(ends, (1, 0)).to(torch.int32)


def _keep(codes: Tensor, in_features: int) -> Tensor:
    """(row, in) bool of rows of a bitmap (row, bytes)."""
    shifts = torch.arange(8, dtype=torch.uint8, device=codes.device)
    return ((codes.unsqueeze(-1) >> shifts) & 1).view(torch.bool).flatten(-2)[:, :in_features]


def _blocks(rows: int, inner: int) -> list[slice]:
    step = max(1, BLOCK // max(1, inner))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
