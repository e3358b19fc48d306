"""The last matrices of the experts that stay, fitted to what the whole mixture gave. Ours.

With y_t what the dense experts give for a token t, w_te the router's weights among those that stay, h_te the hidden
channels of expert e, and D_e its last matrix:

    minimise over all D_e at once   sum_t |y_t - sum_e w_te D_e h_te|^2 + sum_e damping mean(diag H_e) |D_e - D_e0|^2
    H_e = sum_t w_te^2 h_te h_te^T

by conjugate gradients from D_e0, with the blocks H_e, damped, as preconditioner. Each step is one pass over the text: what
couples a token's experts is what they give for it, and products of the channels of two experts are never held. float32.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from paredown.compress.methods.base import Group
from paredown.compress.methods.structured.experts import Fit
from paredown.compress.model.blocks import Block, View
from paredown.compress.model.calls import Call
from paredown.compress.model.stream import Stream
from paredown.compress.model.trial import rows
from paredown.compress.survey.experts import choice
from paredown.compress.survey.products import ProductMode, routed


@dataclass(frozen=True)
class Fitted:
    """The last matrices (experts, out, in), float32, and the square error of the experts' output, of the output's squares."""

    weights: Tensor
    before: float
    after: float


class _Unseen(Exception):
    """What an expert is called with is not known."""


@dataclass
class _Used:
    """One expert in one batch."""

    tokens: Tensor  # which (rows,)
    channels: Tensor  # h (rows, channels)
    shares: Tensor  # w (rows, 1)


class _Inputs(ProductMode):
    """The inputs of these views' products, by expert."""

    def __init__(self, views: list[View]) -> None:
        super().__init__(views)
        self.found: dict[int, Tensor] = {}

    def on_product(self, view: View, x: Tensor, output: Tensor, expert: int | None = None) -> None:
        assert view.expert is not None
        x = x if expert is None else x[routed(x)]
        if len(x):
            self.found[view.expert] = x


@dataclass
class ExpertFit:
    """A group of experts of a dense `block`, and the smaller `target`, which has all its weights; both are in memory."""

    block: Block
    target: Block
    group: Group
    views: list[View] = field(init=False)  # of the last matrices

    def __post_init__(self) -> None:
        owner = self.group.inner[-1].name if self.group.inner else ""
        self.views = [v for v in self.target.views() if v.expert is not None and self._own(v.owner) == self._own(owner)]

    @staticmethod
    def bytes(experts: int, out: int, channels: int) -> int:
        """Bytes that the fit of so many last matrices (out, channels) takes: nine copies of all, and their H."""
        return 4 * experts * (9 * out * channels + channels**2) + 24 * channels**2

    @torch.no_grad()
    def fitted(self, stream: Stream, fit: Fit) -> Fitted | None:
        """The fit on the text of the dense model's `stream`, which stands before the block and does not move.

        None if it cannot be told which tokens an expert gets, and how much it counts for each.
        """
        try:
            return self._fitted(stream, fit) if self.views else None
        except _Unseen:
            return None

    def _fitted(self, stream: Stream, fit: Fit) -> Fitted:
        start = torch.stack([v.weight.float() for v in self.views])  # (experts, out, in)
        slope, grams = torch.zeros_like(start), start.new_zeros(len(start), start.shape[2], start.shape[2])
        missed = total = 0.0
        for used, lost, output in self._batches(stream):
            missed, total = missed + float(lost.square().sum()), total + float(output.square().sum())
            for e, u in used.items():
                weighted = u.shares * u.channels
                grams[e] += weighted.T @ weighted
                slope[e] += lost[u.tokens].T @ weighted
        damp = fit.damping * grams.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)[:, None, None]  # (experts, 1, 1)

        def curvature(step: Tensor) -> Tensor:
            return self._curvature(stream, step) + damp * step

        change, left = _solved(slope, curvature, _factored(grams, damp), fit.rounds)
        after = missed - float((change * (slope + left)).sum()) - float((damp * change.square()).sum())
        return Fitted(start + change, missed / max(total, 1e-300), max(after, 0.0) / max(total, 1e-300))

    def _curvature(self, stream: Stream, step: Tensor) -> Tensor:
        """What the slope loses where the matrices move by a `step`, both (experts, out, in)."""
        result = torch.zeros_like(step)
        for used, lost, _ in self._batches(stream):
            moved = torch.zeros_like(lost)
            for e, u in used.items():
                moved.index_add_(0, u.tokens, u.shares * (u.channels @ step[e].T))
            for e, u in used.items():
                result[e] += moved[u.tokens].T @ (u.shares * u.channels)
        return result

    def _batches(self, stream: Stream) -> Iterator[tuple[dict[int, _Used], Tensor, Tensor]]:
        """Of each batch: the experts in use, what the smaller experts' output lacks, and the dense one's (tokens, out)."""
        mixture, experts = self._own(self.group.name), self._own(self.group.inner[-1].name).rpartition(".")[0]
        small = self.target.module.get_submodule(mixture)
        for i in range(len(stream.hidden)):
            dense = _Kept(self.block.module.get_submodule(experts))
            with _Kept(self.block.module.get_submodule(mixture)) as whole, dense:
                stream.output(self.block, i)
            with _Kept(self.target.module.get_submodule(experts)) as now, _Inputs(self.views) as inputs:
                small(*whole.args, **whole.kwargs)
            used = {e: _used(now, e, x) for e, x in inputs.found.items()}
            yield used, dense.output - now.output, dense.output

    def _own(self, name: str) -> str:
        """A full name, within the block."""
        return name.removeprefix(self.block.name).removeprefix(".")


def _factored(grams: Tensor, damp: Tensor) -> Tensor:
    """Lower factors of the damped matrices (experts, channels, channels), in their place; float64, one at a time."""
    for gram, more in zip(grams, damp, strict=True):
        damped = gram.double() + float(more) * torch.eye(len(gram), dtype=torch.float64, device=gram.device)
        gram.copy_(torch.linalg.cholesky(damped))
    return grams


def _solved(
    slope: Tensor, curvature: Callable[[Tensor], Tensor], factors: Tensor, rounds: int
) -> tuple[Tensor, Tensor]:
    """Conjugate gradients: the change where the slope is nearly zero, and what is left of the slope (experts, out, in)."""
    change, left = torch.zeros_like(slope), slope.clone()
    step = near = _preconditioned(left, factors)
    size = float((left * near).sum())
    for _ in range(rounds):
        if size <= 0:
            break
        bent = curvature(step)
        length = size / float((step * bent).sum())
        change += length * step
        left -= length * bent
        near, before = _preconditioned(left, factors), size
        size = float((left * near).sum())
        step = near + size / before * step
    return change, left


def _preconditioned(slope: Tensor, factors: Tensor) -> Tensor:
    return torch.stack([torch.cholesky_solve(s.T, factor).T for s, factor in zip(slope, factors, strict=True)])


class _Kept:
    """Inside a `with` block, keeps what a module was last called with, and what it gave."""

    output: Tensor  # (tokens, out), float32

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __enter__(self) -> "_Kept":
        self._handles = (
            self._module.register_forward_pre_hook(self._called, with_kwargs=True),
            self._module.register_forward_hook(self._gave),
        )
        return self

    def __exit__(self, *fault: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _called(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        call = Call(args, kwargs).mapped(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf)
        self.args, self.kwargs = call.args, call.kwargs

    def _gave(self, module: nn.Module, args: Any, output: Tensor | Sequence[Tensor]) -> None:
        self.output = rows(output if isinstance(output, Tensor) else output[0]).float()

    def chosen(self) -> tuple[Tensor, Tensor]:
        """Each token's experts and their weights, with which a module of experts was called (tokens, experts of a token)."""
        given = inspect.signature(self._module.forward).bind(*self.args, **self.kwargs).arguments
        names = choice(given)
        if names is None:
            raise _Unseen
        return rows(given[names[0]]), rows(given[names[1]]).float()


def _used(experts: _Kept, expert: int, x: Tensor) -> _Used:
    index, weights = experts.chosen()
    hits = index.T.eq(expert)  # by place among a token's experts, then by token: the order in which they are called
    if int(hits.sum()) != len(x):
        raise _Unseen
    return _Used(hits.nonzero()[:, 1], x.float(), weights.T[hits][:, None])
