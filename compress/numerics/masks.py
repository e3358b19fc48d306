"""Sparsity and masks: a fraction is removed, in exact counts, or `n:m` keeps n of every m weights."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from einops import rearrange
from pydantic import PlainValidator
from torch import Tensor, nn

from paredown.compress.errors import PareError

Within = Literal["row", "layer"]
SMALL_GROUP = 8  # up to this m, weights are ranked by pairwise comparisons: many times faster than topk on a CPU


@dataclass(frozen=True)
class NofM:
    """Keep `n` of every `m` neighbouring weights of a row (papers that count the pruned ones agree for 2:4 only)."""

    n: int
    m: int

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


ROWS_AT_ONCE = 256  # few enough that temporaries stay in cache


def row_wise(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`function(*tensors)` of a function that treats each row alone, ROWS_AT_ONCE rows a call: several times faster."""
    return torch.cat([function(*parts) for parts in zip(*(t.split(ROWS_AT_ONCE) for t in tensors), strict=True)])


def parse_sparsity(value: object) -> float | NofM:
    """`0.5` -> half is removed; `"2:4"` -> 2 of 4 are kept. Raises PareError for anything else."""
    if isinstance(value, NofM):
        return value
    if isinstance(value, str) and (found := re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", value)):
        n, m = int(found[1]), int(found[2])
        if not 1 <= n <= m:
            raise PareError(f"sparsity {value!r} keeps {n} of {m}: n must lie between 1 and m, as in '2:4'.")
        return NofM(n, m)
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise PareError(f"sparsity {value!r} is neither a fraction like 0.5 nor a pattern like '2:4'.") from None
    if isinstance(value, int) and not isinstance(value, bool) and value >= 60:
        n, m = divmod(value, 60)
        raise PareError(f'sparsity {value}: YAML reads an unquoted {n}:{m} as {value}. Quote it: sparsity: "{n}:{m}".')
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1:
        return float(value)
    raise PareError(f"sparsity {value!r} must be a fraction removed in [0, 1), or a pattern like '2:4'.")


Sparsity = Annotated[float | NofM, PlainValidator(parse_sparsity)]  # the fraction removed, or n:m


def keep_mask(score: Tensor, sparsity: Sparsity, within: Within = "row") -> Tensor:
    """Which weights to keep, bool (out, in): those of the highest scores; of equal scores the first.

    For a fraction, scores are compared within each row or over the whole layer, of which exactly
    `round(sparsity * size)` weights are removed. For `n:m` they are compared within each group. Raises PareError if m
    does not divide the width.
    """
    if isinstance(sparsity, NofM):
        return _keep_n_of_m(score, sparsity)
    if within == "layer":
        return _keep_fraction(score.reshape(1, -1), sparsity).view_as(score)
    return _keep_fraction(score, sparsity)


def largest(weight: Tensor, sparsity: Sparsity) -> Tensor:
    """The weight (out, in) with zeros but where `keep_mask` of its magnitudes over the layer keeps it; float32 or float64.

    Unlike there, of equal magnitudes at the border of a fraction none stays, which takes less than half of the time.
    """
    if isinstance(sparsity, NofM):
        return weight * _keep_n_of_m(weight.abs(), sparsity)
    removed = round(sparsity * weight.numel())
    if not removed:
        return weight.clone()
    return nn.functional.hardshrink(weight, float(_smallest(weight.abs().reshape(1, -1), removed)))


def kept_count(shape: tuple[int, ...], sparsity: Sparsity) -> int:
    """How many weights of a matrix stay."""
    size = math.prod(shape)
    return size * sparsity.n // sparsity.m if isinstance(sparsity, NofM) else size - round(sparsity * size)


def check_width(width: int, sparsity: Sparsity) -> None:
    """Raises PareError if rows of this width cannot be cut into groups of m."""
    if isinstance(sparsity, NofM) and width % sparsity.m:
        raise PareError(
            f"sparsity {sparsity} needs an input width divisible by {sparsity.m}, and this layer has {width}. "
            "Leave the layer out with targets.skip, or choose a fraction such as 0.5."
        )


def masked(weight: Tensor, keep: Tensor) -> Tensor:  # (out, in)
    """The kept weights bit for bit, and +0.0 elsewhere."""
    # as integers, so that a removed negative weight becomes +0.0 and not -0.0
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    return row_wise(lambda part, stays: part.view(bits) * stays, weight.contiguous(), keep).view(weight.dtype)


def _keep_n_of_m(score: Tensor, pattern: NofM) -> Tensor:
    check_width(score.shape[-1], pattern)
    n, m = pattern.n, pattern.m
    groups = rearrange(score, "out (group m) -> out group m", m=m)
    if m > SMALL_GROUP:
        order = groups.argsort(dim=-1, descending=True, stable=True)[..., :n]
        keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, True)
        return rearrange(keep, "out group m -> out (group m)")
    removed = beaten_in_group(torch.stack([groups[..., j] for j in range(m)]), n)  # (m, out, group)
    return rearrange(~removed, "m out group -> out (group m)")


def beaten_in_group(scores: Tensor, n: int) -> Tensor:
    """Which of m scores are not among the n highest; of equal scores the first counts as higher. (m, ...) bool.

    scores (m, ...): they are compared along the first axis.
    """
    if len(scores) == 4 and n == 2:
        # of the pairs' winners the lower and of their losers the higher: one of these is the second
        winners, losers = torch.maximum(scores[:2], scores[2:]), torch.minimum(scores[:2], scores[2:])
        second = torch.maximum(torch.minimum(winners[0], winners[1]), torch.maximum(losers[0], losers[1]))
        beaten = scores < second
        if int(torch.count_nonzero(beaten)) * 2 == beaten.numel():  # not so where scores are equal
            return beaten
    # as often each is beaten: by all before it, but for what the comparisons change
    beaten = torch.arange(len(scores), dtype=torch.uint8, device=scores.device)
    beaten = beaten.view(-1, *[1] * (scores.dim() - 1)).expand(scores.shape).contiguous()
    for j in range(1, len(scores)):
        wins = (scores[j] > scores[:j]).view(torch.uint8)  # (j, ...)
        beaten[:j] += wins
        for won in wins:
            beaten[j] -= won
    return beaten >= n


def _keep_fraction(score: Tensor, sparsity: float) -> Tensor:
    """Remove the `round(sparsity * width)` lowest of each row; of equal scores the last."""
    width = score.shape[-1]
    removed = round(sparsity * width)
    if removed == 0:
        return torch.ones_like(score, dtype=torch.bool)
    threshold = _smallest(score, removed)  # (rows, 1): the highest removed score
    keep = score > threshold
    missing = (width - removed) - keep.sum(-1, keepdim=True)  # (rows, 1): how many of those at the threshold must stay
    if bool((missing > 0).any()):
        ties = score == threshold
        keep |= ties & (ties.cumsum(-1, dtype=torch.int32) <= missing)
    return keep


def _smallest(score: Tensor, k: int) -> Tensor:
    """The k-th smallest of each row, (rows, 1)."""
    if score.device.type != "cpu" or score.dtype not in (torch.float32, torch.float64):
        return score.kthvalue(k, dim=-1, keepdim=True).values
    # the same number several times sooner: numpy partitions with the processor's vector instructions
    return torch.from_numpy(np.partition(score.detach().numpy(), k - 1, axis=-1)[:, k - 1 : k].copy())
