"""How far a compressed model's next-token distributions are from the dense model's, on the same tokens.

With p of the dense model and q of the compressed one, at each position: KL(p || q) = sum p log(p / q), as llama.cpp's
`--kl-divergence`; the Jensen-Shannon divergence, half the sum of both distances to m = (p + q) / 2, at most ln 2 (2409.11233
proposes it, because perplexity hides what tasks lose); and whether both models like the same token best.
Logits are float32, their sums float64; exponentials are of differences only, so that nothing overflows.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from paredown.compress.numerics.perplexity import bootstrap_means, deviation

# Of one model's float32 logits at a time, by type of device; about eight tensors of this size are alive. On a CPU they
# stay in its cache, which is three times as fast.
CHUNK_BYTES = {"cpu": 1 << 19, "cuda": 1 << 26}
LEAST = -1e4  # nats below the largest logit: a token that is masked with -inf, or with the least number of a dtype
TINY = 1e-37
RUN = 256
POSITION_BINS = 16


class TokenDivergence(NamedTuple):
    """One number for each predicted token, all (windows, targets)."""

    kl: Tensor  # float64, in nats
    js: Tensor  # float64, in nats
    same_top: Tensor  # bool


def token_divergence(dense: Tensor, logits: Tensor, chunk_bytes: int | None = None) -> TokenDivergence:
    """The divergence at each position of logits (batch, positions, vocabulary), of any float dtype and without NaN.

    `chunk_bytes` of each model's logits, by default CHUNK_BYTES, are widened to float32 at a time.
    """
    if dense.shape != logits.shape:
        raise ValueError(f"the logits are not of the same tokens: {tuple(dense.shape)} and {tuple(logits.shape)}")
    step = max(1, (chunk_bytes or CHUNK_BYTES[logits.device.type]) // (4 * logits.shape[-1]))
    parts = [
        _rows(some.float(), others.float())
        for row, other_row in zip(dense, logits, strict=True)
        for some, others in zip(row.split(step), other_row.split(step), strict=True)
    ]
    kl, js, same = (torch.cat(part).view(logits.shape[:2]).cpu() for part in zip(*parts, strict=True))
    return TokenDivergence(kl, js, same)


def _rows(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # (n,) each
    """KL, Jensen-Shannon and agreement of the distributions that logits a and b (n, vocabulary) stand for.

    With p = e^a / P and q = e^b / Q: KL = sum p (a - b) + ln Q - ln P, and 2 JS = sum p ln p + sum q ln q - sum 2m ln m.
    """
    same = a.argmax(-1) == b.argmax(-1)
    a, b = ((x - x.amax(-1, keepdim=True)).clamp_(min=LEAST) for x in (a, b))
    p, q = a.exp(), b.exp()  # not yet divided by their sums
    sum_p, sum_q = _sum(p), _sum(q)
    own = _sum(p * a) / sum_p - sum_p.log() + _sum(q * b) / sum_q - sum_q.log()
    kl = _sum(a.sub_(b).mul_(p)) / sum_p + sum_q.log() - sum_p.log()
    both = p.mul_((1 / sum_p).float()[:, None]).add_(q.mul_((1 / sum_q).float()[:, None]))  # 2m
    js = math.log(2) + (own - _sum(both.clamp_(min=TINY).log().mul_(both))) / 2
    return kl.clamp(min=0), js.clamp(0, math.log(2)), same  # rounding may leave them a little outside


def _sum(x: Tensor) -> Tensor:  # (n,) float64
    """Sums of the rows of x (n, vocabulary): in float32 over runs of RUN numbers, in float64 over the many runs."""
    whole = x.shape[-1] // RUN * RUN
    runs = x[:, :whole].unflatten(-1, (-1, RUN)).sum(-1)  # (n, runs)
    total: Tensor = runs.sum(-1, dtype=torch.float64) + x[:, whole:].sum(-1, dtype=torch.float64)
    return total


def divergence(tokens: TokenDivergence, before: int = 1, seed: int = 0) -> dict[str, Any]:
    """The figures of one text, for the report; standard errors by bootstrap over windows, None for a single window.

    `before`: how many tokens stand in the window before the first predicted one.
    """
    kl = tokens.kl
    median, p99, p999 = np.quantile(kl.flatten().numpy(), [0.5, 0.99, 0.999]).tolist()
    mean, stderr = mean_over_windows(kl, seed)
    js, js_stderr = mean_over_windows(tokens.js, seed)
    top, top_stderr = mean_over_windows(tokens.same_top, seed)
    return {
        "kl_mean": mean, "kl_stderr": stderr, "kl_median": median, "kl_p99": p99, "kl_p999": p999,
        "kl_max": float(kl.max()), "js_mean": js, "js_stderr": js_stderr, "top1_agreement": top,
        "top1_stderr": top_stderr, "tokens": kl.numel(), "by_position": _by_position(kl, before, seed),
    }  # fmt: skip


def mean_over_windows(values: Tensor, seed: int = 0) -> tuple[float, float | None]:
    """The mean of values (windows, targets), and its standard error by bootstrap over windows; None for a single one."""
    per_window = values.double().mean(1)
    return float(per_window.mean()), deviation(bootstrap_means(per_window, seed), len(per_window))


def _by_position(kl: Tensor, before: int, seed: int) -> list[dict[str, Any]]:
    """The mean KL by the number of tokens that the model sees before the predicted one, in at most POSITION_BINS bins."""
    entries = []
    for columns in torch.arange(kl.shape[1]).tensor_split(min(POSITION_BINS, kl.shape[1])):
        first, last = int(columns[0]), int(columns[-1])
        mean, stderr = mean_over_windows(kl[:, first : last + 1], seed)
        entries.append({"first": first + before, "last": last + before, "kl_mean": mean, "kl_stderr": stderr})
    return entries
