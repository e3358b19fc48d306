"""M-SMoE: experts become part of those that are chosen most and that the router likes for the same tokens. Li et al. 2023.

(arXiv 2310.01334, "Merge, Then Compress"; their low-rank step is left to a further stage.) With f_j the share of the
choices that fall on expert j, and H (tokens, experts) the router's logits:
- dominant are the experts with the highest f; each other one, j, joins the dominant expert i with the highest cosine of H_:i
  and H_:j;
- the hidden channels of j are permuted to match those of i: P = argmax <vec(W_i), vec(P W_j)>, over all of an expert's
  matrices;
- the dominant expert becomes sum f_j P_j W_j / sum f_j over its group.

As many stay in every layer; the paper also spreads the number over layers by f. The paper keeps the router whole and sends
the tokens of a group's members to the merged expert. An ordinary smaller checkpoint has one row for each expert: that of the
dominant one stays, and the others go. The authors' code aligns all experts with the first one of the layer, and not with
the dominant one.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from paredown.compress.errors import PareError
from paredown.compress.methods.base import register
from paredown.compress.methods.structured.experts import ExpertMethod, Experts, Merged, outputs_of
from paredown.compress.numerics.matching import matched


@register("mc_smoe")
@dataclass(frozen=True)
class McSmoe(ExpertMethod):
    reads_logits: ClassVar[bool] = True
    merges: ClassVar[bool] = True

    def scores(self, experts: Experts) -> Tensor:
        return outputs_of(experts).count

    def compress(self, units: Experts, keep: int) -> Merged:  # type: ignore[override]  # as of ExpertMethod
        if not units.channels:
            raise PareError(
                f"{units.group.name}: the hidden channels of its experts cannot be told, so that two experts cannot be "
                "aligned. Remove experts without merging them (reap)."
            )
        stay = super().compress(units, keep).keep
        into = _joined(units, stay)
        order = torch.arange(units.channels[0].shape[1]).repeat(len(stay), 1)  # (experts, channels)
        for expert in (~stay).nonzero()[:, 0].tolist():
            order[expert] = _aligned(units, int(into[expert]), expert)
        return Merged(stay, into=into, weights=outputs_of(units).count, order=order)


def _joined(experts: Experts, stay: Tensor) -> Tensor:  # (experts,)
    """The expert that each becomes part of: of those that stay, the one for whose tokens the router likes it most."""
    products = outputs_of(experts).logits
    assert products is not None
    lengths = products.diagonal().clamp_min(1e-300).sqrt()
    cosines = products / lengths[:, None] / lengths  # (experts, experts)
    into = cosines.masked_fill(~stay, -torch.inf).argmax(1)
    return torch.where(stay, torch.arange(len(stay)), into)


def _aligned(experts: Experts, to: int, expert: int) -> Tensor:  # (channels,)
    """The order of an expert's channels in which they match those of another one best."""
    return matched(sum((_of(t, to) @ _of(t, expert).T for t in experts.channels), torch.zeros(())))


def _of(part: Tensor, expert: int) -> Tensor:  # (channels, numbers)
    return part[expert].float().flatten(1)
