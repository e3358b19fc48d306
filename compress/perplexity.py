"""Token perplexity and its uncertainty. One number means little: every figure travels with its protocol (see Windows)."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from paredown.compress.errors import PareError

RESAMPLES = 1000
CHUNK_BYTES = 16 << 20  # of float32 logits at a time


def token_nll(logits: Tensor, ids: Tensor) -> Tensor:  # (batch, length - 1)
    """Negative log likelihood in nats of each next token, float32.

    logits (batch, length, vocabulary) any float dtype; ids (batch, length). Raises PareError if a loss is not finite.
    """
    return target_nll(logits[:, :-1], ids[:, 1:])


def target_nll(logits: Tensor, targets: Tensor) -> Tensor:  # (batch, positions)
    """As `token_nll`, of logits (batch, positions, vocabulary) that already stand before their targets."""
    flat, wanted = logits.flatten(0, 1), targets.flatten()  # (tokens, vocabulary), (tokens,)
    step = max(1, CHUNK_BYTES // (4 * flat.shape[-1]))
    parts = [
        nn.functional.cross_entropy(rows.float(), some, reduction="none")
        for rows, some in zip(flat.split(step), wanted.split(step), strict=True)
    ]
    losses = torch.cat(parts)
    if not torch.isfinite(losses).all():
        raise PareError("the model's loss is not finite: its logits overflow. Try --dtype bfloat16 or float32.")
    return losses.view(targets.shape)


def perplexity(nll: Tensor, seed: int = 0) -> dict[str, float]:
    """`exp` of the mean loss, with its standard error by bootstrap over windows.

    nll (windows, length - 1). Windows are resampled whole: tokens of one text are not independent.
    """
    per_window = nll.double().mean(1)  # (windows,)
    resampled = _bootstrap(per_window, seed).exp()  # (resamples,)
    return {"token_perplexity": float(per_window.mean().exp()), "stderr": _deviation(resampled)}


def paired_delta(before: Tensor, after: Tensor, seed: int = 0) -> dict[str, Any]:
    """How much the loss rose on the very same windows: the increase of log perplexity, and perplexity's ratio.

    before, after (windows, length - 1). `log_ratio` with its standard error and 95% interval by paired bootstrap.
    """
    rise = (after.double() - before.double()).mean(1)  # (windows,)
    resampled = _bootstrap(rise, seed)
    low, high = resampled.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    mean = float(rise.mean())
    return {
        "log_ratio": mean, "stderr": _deviation(resampled), "low": low, "high": high, "ratio": math.exp(mean),
        "windows": len(rise), "resamples": RESAMPLES,
    }  # fmt: skip


def _bootstrap(values: Tensor, seed: int) -> Tensor:  # (resamples,)
    """Means of `values` (n,) resampled with replacement."""
    generator = torch.Generator().manual_seed(seed)
    means = [values[torch.randint(len(values), (len(values),), generator=generator)].mean() for _ in range(RESAMPLES)]
    return torch.stack(means)


def _deviation(resampled: Tensor) -> float:
    return float(resampled.std())
