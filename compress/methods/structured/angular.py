"""The n blocks in a row between whose ends the hidden states turn least go. Gromov et al. 2024 (arXiv 2403.17887).

d(l, n) = E[arccos cos(x_l, x_l+n)] / pi over windows, where x_l is the last token's hidden state before block l; the blocks
l to l + n - 1 go where d is least. The last block may be among them: the paper spares it only in its simpler strategy, which
removes the deepest blocks without measuring (`tail` with `keep_last`).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from paredown.compress.methods.base import BlockMethod, Profile, register


@register("angular")
@dataclass(frozen=True)
class Angular(BlockMethod):
    reads = "states"

    def choose(self, profile: Profile, count: int, drop: int) -> list[int]:
        assert profile.last is not None
        first = int(distances(profile.last, drop).argmin())
        return list(range(first, first + drop))


def distances(last: Tensor, n: int) -> Tensor:  # (blocks + 1 - n,)
    """d(l, n) for each l, in units of pi, of hidden states `last` (windows, blocks + 1, hidden)."""
    x = last.double()
    cosine = torch.cosine_similarity(x[:, :-n], x[:, n:], dim=-1)  # (windows, blocks + 1 - n)
    return cosine.clamp(-1, 1).acos().mean(0) / math.pi
