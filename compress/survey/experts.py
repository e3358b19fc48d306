"""What each expert of a block gives for its tokens, seen while the block runs."""

import inspect
from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from paredown.compress.errors import PareError
from paredown.compress.methods.base import Group
from paredown.compress.methods.structured.experts import ExpertStats
from paredown.compress.model.blocks import Block
from paredown.compress.model.trial import rows


class ExpertObserver:
    """Inside a `with` block, adds up what the experts of these groups give whenever the block runs.

    The module of experts is known by how it is called: with hidden states, with each token's experts, and with as many
    weights. It is called once more for each place among a token's experts, with that one expert and a weight of 1: so what
    an expert gives is what its class makes of it, biases included. That is as much work as the block's own call. With
    `logits` the router's products with its input are added up too.
    """

    def __init__(self, block: Block, groups: Sequence[Group], logits: bool = False) -> None:
        self._block, self._logits = block, logits
        self._products: dict[str, Tensor] = {}  # by group
        self._sums = {group.name: torch.zeros(3, group.units, dtype=torch.float64) for group in groups}
        self._groups = groups
        self._handles: list[RemovableHandle] = []
        self._told: dict[str, nn.Module] = {}  # by group: the outermost module that is called with a choice
        self._busy = False

    def __enter__(self) -> "ExpertObserver":
        for group in self._groups:
            for module in _holders(self._block, group):
                hook = partial(self._called, group, inspect.signature(module.forward))
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            if self._logits:
                self._handles.append(self._watched(group))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._handles:
            self._handles.pop().remove()

    def of(self, group: Group) -> ExpertStats:
        """What was seen of a group. Raises PareError if its experts are not called with a choice, or with no token."""
        count, norm, gated = self._sums[group.name]
        if not bool(count.sum() > 0):
            raise PareError(
                f"{group.name}: its experts are not told which tokens are theirs, so that what each gives cannot be seen. "
                "Choose by their weights alone (aimer), or remove blocks (paredown_depth)."
            )
        if self._logits and group.name not in self._products:
            raise PareError(
                f"{group.name}: what its router makes of a token cannot be seen, so that experts cannot be grouped by it. "
                "Remove experts without merging them (reap)."
            )
        reached = count.clamp_min(1)
        return ExpertStats(count, norm / reached, gated / reached, self._products.get(group.name))

    def _watched(self, group: Group) -> RemovableHandle:
        """Watch the module that holds the router's matrix, the last part."""
        path, _, name = group.parts[-1].name.removeprefix(self._block.prefix).rpartition(".")
        module = self._block.module.get_submodule(path)
        return module.register_forward_pre_hook(partial(self._routed, group, name))

    @torch.no_grad()
    def _routed(self, group: Group, name: str, module: nn.Module, args: Any) -> None:
        """Add up the products of the logits of one call, a bias beside the matrix included."""
        matrix, bias = module.get_parameter(name).float(), module._parameters.get("bias")
        matrix = (matrix if group.parts[-1].dim == 0 else matrix.T)[: group.units]  # (experts, in)
        given = next((a for a in args if isinstance(a, Tensor) and a.shape[-1] == matrix.shape[1]), None)
        if given is not None and not self._busy:
            logits = rows(given).float() @ matrix.T  # (tokens, experts)
            logits = logits if bias is None else logits + bias.float()[: group.units]
            self._products[group.name] = self._products.get(group.name, 0) + (logits.T @ logits).double().cpu()

    @torch.no_grad()
    def _called(self, group: Group, signature: inspect.Signature, module: nn.Module, args: Any, kwargs: Any) -> None:
        given = signature.bind(*args, **kwargs)
        names = choice(given.arguments)
        if names is None or self._busy or self._told.setdefault(group.name, module) is not module:
            return
        index, weights = (rows(given.arguments[name]) for name in names)  # (tokens, experts of a token)
        self._busy = True
        try:
            for place in range(index.shape[1]):
                one = index[:, place : place + 1]
                given.arguments |= {names[0]: one, names[1]: torch.ones_like(weights[:, :1])}
                output = module.forward(*given.args, **given.kwargs)
                norms = rows(output).double().norm(dim=1)  # (tokens,)
                self._add(group, one[:, 0], norms, weights[:, place].double())
        finally:
            self._busy = False

    def _add(self, group: Group, index: Tensor, norms: Tensor, weights: Tensor) -> None:
        real = (index >= 0) & (index < group.units)  # some classes send tokens past the last expert, to none
        seen = torch.stack([torch.ones_like(norms), norms, weights * norms])[:, real].cpu()  # (3, tokens)
        self._sums[group.name].index_add_(1, index[real].cpu().long(), seen)


def _holders(block: Block, group: Group) -> list[nn.Module]:
    """The modules inside that of a group that hold its experts' weights."""
    names = {view.owner for view in block.views() if view.expert is not None} & {part.name for part in group.parts}
    path = group.name.removeprefix(block.name).lstrip(".")
    held = {name.removeprefix(block.prefix) for name in names}
    return [
        module
        for name, module in block.module.named_modules()
        if name != path and f"{name}.".startswith(f"{path}." if path else "") and _inside(name, held)
    ]


def _inside(name: str, parameters: set[str]) -> bool:
    return bool(name) and any(parameter.startswith(f"{name}.") for parameter in parameters)


def choice(arguments: dict[str, Any]) -> tuple[str, str] | None:
    """The names of the arguments with each token's experts and with their weights; None if there are none."""
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor) and value.dim() >= 2}
    for index, chosen in tensors.items():
        if not chosen.is_floating_point():
            for weights, tensor in tensors.items():
                if tensor.is_floating_point() and tensor.shape == chosen.shape:
                    return index, weights
    return None
