"""One run of a block, recorded, whose modules can be called again by themselves: with other inputs, outputs or weights.

What the weights of a block have to do with each other is tried so, whatever its classes are called.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from paredown.compress.checkpoint.configs import first_line
from paredown.compress.errors import PareError
from paredown.compress.model.blocks import Block, View
from paredown.compress.model.calls import Call
from paredown.compress.model.stream import Stream

SEED = 0
LARGE = 100.0  # no activation function, softmax or norm is linear so far out


class _Reached(Exception):
    """Stops a run where what was asked for is known."""


@dataclass
class Trial:
    """What the modules of a block were given in one run, and what its linear layers gave. Paths are those in the block.

    Linear layers that are called more than once, or with a single token, are left out.
    """

    block: Block
    calls: dict[str, Call] = field(default_factory=dict)  # the first one of each module that holds others, by path
    inputs: dict[str, Tensor] = field(default_factory=dict)  # of each linear layer, by path, in order of the calls
    outputs: dict[str, Tensor] = field(default_factory=dict)
    repeated: set[str] = field(default_factory=set)  # linear layers that are called more than once

    @classmethod
    @torch.no_grad()
    def of(cls, stream: Stream, block: Block) -> "Trial":
        """Run the block, whose weights are in memory, on the first batch of the stream, which does not move."""
        trial = cls(block)
        linears = {id(v.module) for v in block.views() if v.expert is None and v.control is None}
        handles = []
        for path, module in block.module.named_modules():
            if id(module) in linears:
                handles.append(module.register_forward_hook(trial._keep_product(path)))
            elif next(module.children(), None) is not None:
                handles.append(module.register_forward_pre_hook(trial._keep_call(path), with_kwargs=True))
        with _removed(handles):
            stream.call(block, 0, stream.hidden[0].to(stream.device, copy=True))
        for path in trial.repeated & trial.outputs.keys():
            del trial.inputs[path], trial.outputs[path]
        return trial

    def path(self, view: View) -> str:
        """Where the block holds this layer."""
        return view.name.removeprefix(self.block.prefix)

    @torch.no_grad()
    def made_of(self, path: str, writers: Sequence[View], reader: View) -> bool:
        """Whether the reader's input at a token is made of nothing but the writers' outputs at the same token.

        The module at `path` is given something else, and the writers give what they gave, but for the first token.
        """
        before, names = self.inputs[self.path(reader)], [self.path(v) for v in writers]
        given = {name: _always(_other_first_row(self.outputs[name])) for name in names}
        after = self.input_of(reader, path, self.calls[path].mapped(_otherwise), given)
        if after is None or after.shape != before.shape:
            return False
        (first, *rest), (old_first, *old_rest) = (rows(t) for t in (after, before))
        return torch.equal(torch.stack(rest), torch.stack(old_rest)) and not torch.equal(first, old_first)

    def input_of(
        self,
        reader: View,
        path: str,
        call: Call,
        given: Mapping[str, Callable[[Tensor], Tensor]],
        parameters: Mapping[str, Tensor] | None = None,
    ) -> Tensor | None:
        """What the reader gets in the module at `path`, which runs no further; None if it does not come so far.

        Linear layers in `given`, by path, give what that makes of their output, if it is one tensor; `parameters` are by name
        within the module.
        """
        seen: list[Tensor] = []

        def stop(module: nn.Module, args: Any) -> None:
            seen.append(args[0])
            raise _Reached

        layers = {name: self.block.module.get_submodule(name) for name in given}
        handles = [layers[name].register_forward_hook(_giving(made)) for name, made in given.items()]
        handles.append(reader.module.register_forward_pre_hook(stop))
        # a class may fail where layers give something else than it asked them for
        with _removed(handles), suppress(_Reached, RuntimeError, IndexError):
            self.run(path, call, parameters)
        return seen[0] if seen else None

    @torch.no_grad()
    def added(self, reader: View) -> bool:
        """Whether the part of the block that the reader lies in gives what the reader gives, but for what is linear.

        Or the block itself, if the reader lies in no part of it. A product so large that nothing bounded can follow it is
        doubled.
        """
        path = self.path(reader)
        outer = next((p for p in _prefixes(path) if p in self.calls), "")
        bias = 0.0 if reader.bias is None else reader.bias
        size = float((self.outputs[path] - bias).float().square().mean().sqrt())
        if size == 0:
            return False
        given = []
        for factor in (0.0, LARGE / size, 2 * LARGE / size):
            handle = reader.module.register_forward_hook(lambda m, args, y, by=factor: y + by * (y - bias))
            with _removed([handle]):
                given.append(self.run(outer, self.calls[outer]).float())
        before, once, twice = given
        return bool((twice - 2 * once + before).norm() <= 0.05 * (twice - before).norm())

    def run(self, path: str, call: Call, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """The output of the module at `path`, with `parameters` by name within it in place of its own."""
        module = self.block.module.get_submodule(path)
        own = call.mapped(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf)
        result = torch.func.functional_call(module, dict(parameters or {}), own.args, own.kwargs)
        output: Tensor = result[0] if isinstance(result, tuple | list) else result
        return output

    def _keep_call(self, path: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
            call = Call(args, kwargs).mapped(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf)
            self.calls.setdefault(path, call)

        return keep

    def _keep_product(self, path: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            if path in self.outputs:
                self.repeated.add(path)
            elif len(rows(output)) > 1:
                self.inputs[path], self.outputs[path] = args[0].clone(), output.clone()

        return keep


class Module32:
    """A module of a block as it was called in a trial, computing in float32: so exactly that what matters can be told."""

    def __init__(self, trial: Trial, path: str) -> None:
        self.trial, self.path = trial, path
        module = trial.block.module.get_submodule(path)
        self.parameters = set(dict(module.named_parameters()))
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        generator = torch.Generator().manual_seed(SEED)
        self.tensors = {
            name: _uneven(t.float(), generator) if name in self.parameters and t.dim() == 1 else t.float()
            for name, t in tensors.items()
            if t.is_floating_point()
        }
        self.call = trial.calls[path].mapped(lambda leaf: leaf.float() if _floating(leaf) else leaf)

    def output(self, changed: Mapping[str, Tensor] | None = None) -> Tensor:
        """The module's output, with tensors `changed` by their name within the module. Raises PareError if it fails."""
        try:
            return self.trial.run(self.path, self.call, {**self.tensors, **(changed or {})}).float()
        except (RuntimeError, TypeError, IndexError) as fault:
            name = (self.trial.block.prefix + self.path).rstrip(".")
            raise PareError(
                f"{name} cannot be run in float32, in which its units are told apart: {type(fault).__name__}: "
                f"{first_line(fault)} Remove blocks instead (paredown_depth), or use a low-rank method."
            ) from fault


def rows(x: Tensor) -> Tensor:
    """(..., features) -> (tokens, features)"""
    return x.reshape(-1, x.shape[-1])


def _prefixes(path: str) -> Iterator[str]:
    """a, a.b, a.b.c"""
    parts = path.split(".")
    return (".".join(parts[: n + 1]) for n in range(len(parts)))


def _uneven(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """A bias or scale in which no two entries are alike, so that it matters which is which; many are trained to nothing."""
    noise = torch.randn(tensor.shape, generator=generator).to(tensor.device)
    return tensor * (1 + 0.2 * noise) + 0.1 * noise.flip(0)


def _other_first_row(x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    noise = torch.randn(x.shape[-1], generator=generator).to(x.device)
    changed = rows(x).clone()
    changed[0] += (noise * x.float().square().mean().sqrt()).to(x.dtype)
    return changed.view(x.shape)


def _otherwise(leaf: Any) -> Any:
    """Other values in a tensor of numbers; infinities stay."""
    if not _floating(leaf):
        return leaf
    generator = torch.Generator().manual_seed(SEED)
    return leaf * (0.5 + torch.rand(leaf.shape, generator=generator)).to(leaf.device, leaf.dtype)


def _floating(leaf: Any) -> TypeGuard[Tensor]:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _always(output: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda own: output


def _giving(made: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    return lambda module, args, own: made(own) if isinstance(own, Tensor) else own


@contextmanager
def _removed(handles: Sequence[Any]) -> Iterator[None]:
    """Remove these hooks afterwards, whatever happens."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
