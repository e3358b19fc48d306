"""How far a student's next-token probabilities are from a teacher's, of which the largest few are known.

The teacher's probabilities p_1..p_k of its k likeliest tokens, and r = 1 - sum p_i of all others together, are a distribution
over k + 1 events; the student's q_1..q_k and 1 - sum q_i are another over the same events (Hinton et al. 2015, arXiv
1503.02531; the rest as one event: its divergence is a lower bound of that of all tokens). Losses are in nats a token.

With a teacher's `share` t below 1 the target is between the two (Shing et al. 2025, TAID, arXiv 2501.16937): proportional to
q^(1-t) p^t, with no gradient through this q. Over all tokens that is the softmax of the interpolated logits; here it is taken
over the k + 1 events, so that t = 0 is the student and t = 1 the teacher as they are known here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Loss = Literal["forward", "reverse", "mixed"]
LEAST_REST = 1e-6  # of the mass of all other tokens: below it float32 knows no difference from 1
POSITIONS = 512  # whose logits are in float32 at once


@dataclass(frozen=True)
class TopK:
    """The likeliest tokens of each position (..., k), the logs of their probabilities, and of the rest (...)."""

    indices: Tensor
    log_probs: Tensor
    rest: Tensor

    @classmethod
    def joined(cls, parts: "Sequence[TopK]", dim: int = 0) -> "TopK":
        """Those of several parts, one after another along a dimension."""
        return cls(
            torch.cat([part.indices for part in parts], dim),
            torch.cat([part.log_probs for part in parts], dim),
            torch.cat([part.rest for part in parts], dim),
        )

    def part(self, begin: int, end: int) -> "TopK":
        """Of the positions from `begin` on, before `end`."""
        return TopK(self.indices[begin:end], self.log_probs[begin:end], self.rest[begin:end])

    def flat(self, device: torch.device) -> "TopK":
        """All positions in one dimension (positions, k), on the device, in float32."""
        return TopK(
            self.indices.flatten(0, -2).to(device).long(),
            self.log_probs.flatten(0, -2).to(device).float(),
            self.rest.flatten().to(device).float(),
        )


def top_k(logits: Tensor, k: int, temperature: float = 1.0) -> TopK:
    """The k likeliest of logits (..., vocabulary) divided by the temperature; all of a smaller vocabulary."""
    scaled = _scaled(logits, temperature)
    values, indices = scaled.topk(min(k, logits.shape[-1]), dim=-1)
    log_probs = values - scaled.logsumexp(-1, keepdim=True)  # (..., k)
    return TopK(indices.int(), log_probs, _rest(log_probs))


def divergence(
    logits: Tensor, target: TopK, loss: Loss = "forward", temperature: float = 1.0, share: float = 1.0
) -> Tensor:  # (positions,)
    """The divergence of a student's logits (positions, vocabulary) from `target`, times the temperature's square.

    forward: sum p log(p / q), reverse: sum q log(q / p), mixed: their mean. `share`: of the teacher in the target.
    """
    scaled = _scaled(logits, temperature)
    known = scaled.gather(-1, target.indices) - scaled.logsumexp(-1, keepdim=True)  # (positions, k)
    q = torch.cat([known, _rest(known)[:, None]], -1)  # (positions, k + 1)
    p = torch.cat([target.log_probs, target.rest[:, None]], -1).log_softmax(-1)  # stored with fewer digits
    p = p if share == 1 else torch.lerp(q.detach(), p, share).log_softmax(-1)
    forward, reverse = (p.exp() * (p - q)).sum(-1), (q.exp() * (q - p)).sum(-1)
    chosen = {"forward": forward, "reverse": reverse, "mixed": (forward + reverse) / 2}[loss]
    return chosen * temperature**2


def mean_divergence(
    logits: Tensor, target: TopK, loss: Loss = "forward", temperature: float = 1.0, share: float = 1.0
) -> Tensor:
    """The mean over all positions of logits (..., vocabulary), float32: a part of them is widened at a time."""
    rows, flat = logits.flatten(0, -2), target.flat(logits.device)
    total = torch.zeros((), device=logits.device)
    for begin in range(0, len(rows), POSITIONS):
        end = begin + POSITIONS
        part = rows[begin:end], flat.part(begin, end)
        total = total + checkpoint(divergence, *part, loss, temperature, share, use_reentrant=False).sum()
    return total / len(rows)


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    return logits.float() if temperature == 1 else logits.float() / temperature


def _rest(log_probs: Tensor) -> Tensor:  # (...)
    """The log of the mass that these (..., k) leave to all other tokens."""
    return torch.log1p(-log_probs.exp().sum(-1).clamp(max=1 - LEAST_REST))
