"""Token perplexity and its uncertainty. One number means little: each is reported with its protocol (see Windows).

`exp(mean loss)` over the `length - 1` targets of each window, as in GPTQ, SparseGPT and Wanda. Whole windows are resampled:
tokens of one text are not independent. Two models are resampled together, so that the text's difficulty cancels.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from paredown.compress.errors import PareError

RESAMPLES = 1000
CHUNK_BYTES = 16 << 20  # of float32 logits at a time
DRAWS_AT_ONCE = 4_000_000


def token_nll(logits: Tensor, ids: Tensor, chunk_bytes: int = CHUNK_BYTES) -> Tensor:  # (batch, length - 1)
    """Negative log likelihood in nats of each next token, float32.

    logits (batch, length, vocabulary) any float dtype, `chunk_bytes` of which are widened to float32 at a time;
    ids (batch, length). Raises PareError if a loss is not finite.
    """
    return target_nll(logits[:, :-1], ids[:, 1:], chunk_bytes)


def target_nll(logits: Tensor, targets: Tensor, chunk_bytes: int = CHUNK_BYTES) -> Tensor:  # (batch, positions)
    """As `token_nll`, for logits (batch, positions, vocabulary) already aligned with `targets` (batch, positions)."""
    if logits.shape[:2] != targets.shape or not targets.numel():
        raise ValueError(
            f"wanted logits (b, n, vocabulary) and targets (b, n): {tuple(logits.shape)}, {tuple(targets.shape)}"
        )
    step = max(1, chunk_bytes // (4 * logits.shape[-1]))
    targets = targets.to(logits.device)
    # row by row: flattening logits without their last position would copy them all
    parts = [
        nn.functional.cross_entropy(some.float(), wanted, reduction="none")
        for row, row_targets in zip(logits, targets, strict=True)
        for some, wanted in zip(row.split(step), row_targets.split(step), strict=True)
    ]
    losses = torch.cat(parts).view(targets.shape)
    finite = torch.isfinite(losses)
    if not finite.all():
        row, column = (~finite).nonzero()[0].tolist()
        raise PareError(
            f"the model's loss is not finite for {int((~finite).sum())} of {losses.numel()} tokens, the first of them "
            f"{float(losses[row, column])} at position {column} of window {row} of the batch: its logits overflow. "
            "Try --dtype bfloat16 or float32."
        )
    return losses


def perplexity(nll: Tensor, seed: int = 0) -> dict[str, Any]:
    """`token_perplexity`, `exp` of the mean loss, with its `stderr` by bootstrap over windows: None for a single one.

    nll (windows, length - 1).
    """
    per_window = nll.double().mean(1)  # (windows,)
    resampled = bootstrap_means(per_window, seed).exp()  # (resamples,)
    return {"token_perplexity": float(per_window.mean().exp()), "stderr": deviation(resampled, len(per_window))}


def paired_delta(before: Tensor, after: Tensor, seed: int = 0) -> dict[str, Any]:
    """How much the loss rises on the same windows: the increase of log perplexity, and the ratio of both perplexities.

    before, after (windows, length - 1). `log_ratio` in nats per token with its standard error and 95% interval, `low` to
    `high`, by paired bootstrap; a single window has no `stderr` (None) and no interval.
    """
    if before.shape != after.shape:
        raise ValueError(f"the losses are not of the same windows: {tuple(before.shape)} and {tuple(after.shape)}")
    rise = (after.double() - before.double()).mean(1)  # (windows,)
    resampled = bootstrap_means(rise, seed)
    mean = float(rise.mean())
    interval = {}
    if len(rise) > 1:
        low, high = resampled.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        interval = {"low": low, "high": high}
    return {
        "log_ratio": mean, "stderr": deviation(resampled, len(rise)), **interval, "ratio": math.exp(mean),
        "windows": len(rise), "resamples": RESAMPLES, "seed": seed,
    }  # fmt: skip


def bootstrap_means(values: Tensor, seed: int, draws_at_once: int = DRAWS_AT_ONCE) -> Tensor:  # (resamples,)
    """Means of `values` (n,) resampled with replacement; `draws_at_once` bounds the memory, and changes no number."""
    values = values.cpu()
    generator = torch.Generator().manual_seed(seed)
    means = []
    for some in torch.arange(RESAMPLES).split(max(1, draws_at_once // len(values))):
        picks = torch.randint(len(values), (len(some), len(values)), generator=generator)  # (some, n)
        means.append(values[picks].mean(1))  # (some,)
    return torch.cat(means)


def deviation(resampled: Tensor, windows: int) -> float | None:
    """The standard error that resampled means give; None for a single window."""
    spread = float(resampled.std())
    return spread if windows > 1 and math.isfinite(spread) else None
