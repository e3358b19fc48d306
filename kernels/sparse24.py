"""2:4 weights as values and 2-bit column indices: 9 bits per 16-bit weight instead of 16.

Of every 4 neighbouring weights of a row exactly 2 are kept. `values` holds the kept ones in their natural order,
`indices` one nibble per group, `i0 | i1 << 2` with `i0 < i1` the kept columns of the group; byte `b` of a row holds
group `2b` in its low and group `2b + 1` in its high nibble (0 where a row ends in the middle of a byte).

These are the reference functions: plain torch, exact, any device and any floating dtype.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

# Elements of the dense matrix that are built at a time. The largest temporary is their int64 columns: 4 bytes per
# element, 2 MiB, so that a block stays in a core's cache.
BLOCK = 1 << 19
VALID_NIBBLES = tuple(i0 | i1 << 2 for i1 in range(4) for i0 in range(i1))


@torch.no_grad()
def pack24(weight: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Store only what `keep` marks, exactly 2 of every 4 along `in`.

    weight (..., out, in), floating; keep (..., out, in), bool; in divisible by 4.
    Returns values (..., out, in / 2) of weight's dtype, bit for bit, and indices (..., out, ceil(in / 8)) uint8.
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
    nibbles = torch.zeros(len(rows), groups + groups % 2, dtype=torch.uint8, device=weight.device)  # (row, even groups)
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
    indices = nibbles[:, 0::2] | nibbles[:, 1::2] << 4  # (row, byte)
    return values.reshape(*lead, inner // 2), indices.reshape(*lead, indices.shape[-1])


@torch.no_grad()
def unpack24(values: Tensor, indices: Tensor) -> Tensor:
    """The dense weight (..., out, in) of `pack24`: dropped positions are +0.0. Block by block, in one buffer.

    values (..., out, in / 2); indices (..., out, ceil(in / 8)) uint8.
    Raises ValueError if their shapes do not belong together.
    """
    inner = 2 * values.shape[-1]
    expected = (*values.shape[:-1], -(-inner // 8))
    if inner % 4 or tuple(indices.shape) != expected or indices.dtype != torch.uint8:
        raise ValueError(f"values {tuple(values.shape)} need uint8 indices {expected}, not {_told(indices)}")
    dense = values.new_zeros(*values.shape[:-1], inner)
    if values.is_meta:
        return dense
    pairs = values.reshape(-1, inner // 4, 2)  # (row, group, 2)
    codes = indices.reshape(-1, expected[-1])
    groups = dense.view(-1, inner // 4, 4)
    for part in _blocks(len(groups), inner):
        nibbles = torch.stack((codes[part] & 15, codes[part] >> 4), dim=-1).flatten(-2)[:, : inner // 4]  # (row, group)
        columns = torch.stack((nibbles & 3, nibbles >> 2), dim=-1).long()  # (row, group, 2)
        groups[part].scatter_(-1, columns, pairs[part])
    return dense


def sparse24_matmul(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` of a packed weight (out, in). Bit-equal to `F.linear` with the dense weight.

    x (..., in); values (out, in / 2); indices (out, ceil(in / 8)); bias (out,). Returns (..., out).
    """
    return F.linear(x, unpack24(values, indices), bias)


def count_invalid24(indices: Tensor, in_features: int) -> int:
    """How many nibbles of `indices` (..., ceil(in / 8)) name no pair of columns: 0 unless the data is damaged."""
    whole = indices if in_features % 8 == 0 else indices[..., :-1]
    seen = torch.bincount(whole.flatten(), minlength=256).view(16, 16)  # (high, low)
    valid = torch.zeros(16, dtype=torch.bool, device=indices.device)
    valid[list(VALID_NIBBLES)] = True
    bad = int(seen.sum(0)[~valid].sum() + seen.sum(1)[~valid].sum())
    if in_features % 8:  # the last byte of a row: one group and an empty high nibble
        last = indices[..., -1].int()
        bad += int((~valid[last & 15]).sum() + (last >> 4 != 0).sum())
    return bad


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
