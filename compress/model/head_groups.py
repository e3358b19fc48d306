"""Heads as units of a block, found by trying which entries of weights belong together.

Those are key/value heads with their query heads, and heads of a state space, as in Mamba-2, or of linear attention, which
have a convolution.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from paredown.compress.methods.base import Group, Kind, Part
from paredown.compress.model.blocks import Block, View
from paredown.compress.model.calls import Call
from paredown.compress.model.groups import coupled, holds, own_names
from paredown.compress.model.stream import Stream
from paredown.compress.model.trial import Module32, Trial, rows

SEED = 2
SHARED = -1  # in the place of a unit's number: of none, or of all

Owners = Mapping[str, Tensor]  # of each entry the unit that it belongs to, or SHARED; by name


@torch.no_grad()
def head_groups(stream: Stream, block: Block) -> list[Group]:
    """The key/value heads of a block, whose weights are in memory, each with all query heads that read it, or the heads of a
    state space; [] if it has none.

    The reader is a linear layer whose input at a token is made of what others give for earlier tokens. Of these and of the
    module's own parameters every entry that acts on some columns of the reader and on no others belongs to the unit that
    these columns are; units are the smallest sets of columns for which every entry belongs to one unit or to all. What is
    called a group has passed the same trials on the first batch of the `stream` as MLP channels: the output stays as it is
    where all parts are permuted alike, and does not where the reader's are alone. Heads that all share one key and value are
    none. `config_key` is "" in all of them: see `with_keys`.
    """
    trial = Trial.of(stream, block)
    ordinary = {trial.path(v): v for v in block.views() if v.expert is None and v.control is None}
    views = [ordinary[path] for path in trial.outputs if path in ordinary]  # in the order in which they are called
    found = (_group_of(trial, views[:i], reader) for i, reader in enumerate(views))
    return [group for group in found if group is not None and holds(stream, block, group)]


def _group_of(trial: Trial, before: Sequence[View], reader: View) -> Group | None:
    """The heads that this layer reads, if it reads heads; `before` are the layers called before it."""
    path = _around(trial, before, reader)
    if path is None:
        return None
    inside = [v for v in trial.block.views() if v.expert is None and v is not reader and _within(trial.path(v), path)]
    if not _Graph(trial, path, trial.calls[path], inside, reader, {}, {}).mixing():
        return None
    module = Module32(trial, path)
    linear = {name for v in [*inside, reader] for name in own_names(module, v)}
    own = {name: tensor for name, tensor in module.tensors.items() if name in module.parameters - linear}
    graph = _Graph(trial, path, module.call, inside, reader, module.tensors, own)
    if not graph.mixing():
        return None
    for units in (u for u in range(reader.shape[1], 1, -1) if reader.shape[1] % u == 0):
        owners = graph.owners(units)
        for parts in _layouts(module, graph, inside, owners, units) if owners else ():
            every = (
                *parts,
                Part(own_names(module, reader)[0], 0 if reader.layout == "conv1d" else 1, graph.columns // units),
            )
            if coupled(module, every, units):
                head = trial.block.prefix + (f"{path}." if path else "")
                named = tuple(replace(part, name=head + part.name) for part in every)
                return Group(head.rstrip("."), _kind(own, parts), units, named, reader.name, "")
    return None


def _kind(own: Mapping[str, Tensor], parts: Sequence[Part]) -> Kind:
    """A state space has a convolution and, for each head, numbers of its own, such as how fast it forgets.

    `own` are the module's parameters outside of linear layers.
    """
    mine = {part.name for part in parts} & own.keys()
    convolved = any(own[name].dim() > 1 for name in mine)
    numbers = any(name.rpartition(".")[2] not in ("weight", "bias") for name in mine)
    return "ssm_heads" if convolved and numbers else "kv_groups"


def _around(trial: Trial, before: Sequence[View], reader: View) -> str | None:
    """The path of the nearest module that holds the reader and a layer called before it."""
    path = trial.path(reader)
    while path:
        path = path.rpartition(".")[0]
        if path in trial.calls and any(_within(trial.path(v), path) for v in before):
            return path
    return None


def _within(path: str, outer: str) -> bool:
    return not outer or path.startswith(f"{outer}.")


class _Graph:
    """One run of a module up to the reader, in which the other linear layers give any numbers: what acts on what is known."""

    def __init__(
        self,
        trial: Trial,
        path: str,
        call: Call,
        layers: Sequence[View],
        reader: View,
        tensors: Mapping[str, Tensor],
        own: Mapping[str, Tensor],
    ) -> None:
        generator = torch.Generator().manual_seed(SEED)
        self.outputs: dict[str, Tensor] = {}  # of the layers that were called, by their full name (..., out)
        self.own = {name: tensor.clone().requires_grad_() for name, tensor in own.items()}
        self.columns = reader.shape[1]

        def any_numbers(name: str, output: Tensor) -> Tensor:
            numbers = torch.randn(output.shape, generator=generator).to(output.device, output.dtype).requires_grad_()
            self.outputs[name] = numbers
            return numbers.clone()

        given = {trial.path(v): lambda output, name=v.name: any_numbers(name, output) for v in layers}
        with torch.enable_grad():
            self.input = trial.input_of(reader, path, call, given, {**tensors, **self.own})

    def mixing(self) -> dict[str, Tensor]:
        """The layers some of whose outputs at earlier tokens act on the reader's input at the last one, and which (out,)."""
        if self.input is None or not self.input.requires_grad:
            return {}
        last = torch.zeros(rows(self.input).shape)
        last[-1] = 1.0
        found = self._gradients(last, self.outputs)
        earlier = {name: (rows(gradient)[:-1] != 0).any(0) for name, gradient in found.items()}
        return {name: acts for name, acts in earlier.items() if bool(acts.any())}

    def owners(self, units: int) -> Owners | None:
        """Of each layer's outputs, and of each entry of the module's own parameters, the unit that it belongs to.

        None if there is an output that acts on several units, and not on all. A parameter's entry may seem to act on none:
        what is added to all keys has no effect, but for rounding.
        """
        unit = torch.arange(self.columns) // (self.columns // units)  # (in,)
        first, last = self._acting(unit == 0), self._acting(unit == units - 1)
        number = {name: torch.zeros_like(acts, dtype=torch.int64) for name, acts in first.items()}
        single = {name: torch.ones_like(acts) for name, acts in first.items()}
        for bit in range((units - 1).bit_length()):
            one, other = (self._acting((unit >> bit) % 2 == value) for value in (1, 0))
            if any(bool((one[n] & other[n] & ~(first[n] & last[n])).any()) for n in self.outputs):
                return None
            for name in number:
                number[name] += one[name] << bit
                single[name] &= one[name] ^ other[name]
        return {name: torch.where(single[name], number[name], SHARED) for name in number}

    def _acting(self, columns: Tensor) -> dict[str, Tensor]:
        """Which outputs of the layers, and entries of the module's own parameters, act on some of these columns (in,)."""
        found = self._gradients(columns, {**self.outputs, **self.own})
        return {n: (rows(g) != 0).any(0) if n in self.outputs else g != 0 for n, g in found.items()}

    def _gradients(self, where: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of a sum of the reader's input where this (in,) or (tokens, in) is not zero, each entry weighed by some number."""
        assert self.input is not None
        numbers = torch.randn(rows(self.input).shape, generator=torch.Generator().manual_seed(SEED))
        weights = (numbers * where).view(self.input.shape).to(self.input.device, self.input.dtype)
        found = torch.autograd.grad(
            self.input, list(leaves.values()), weights, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return dict(zip(leaves, found, strict=True))


def _layouts(
    module: Module32, graph: _Graph, layers: Sequence[View], owners: Owners, units: int
) -> Iterator[tuple[Part, ...]]:
    """Where the units may lie, by parameters' names within the module, but for the reader's.

    Of outputs that act on all units some may belong to one nevertheless, if a norm over all of them follows: it has weights
    that belong to one, and as many.
    """
    own = [_parts(name, owners[name], units) for name in graph.own]
    norms = {len(owners[name]): owners[name] for name in graph.own if bool((owners[name] != SHARED).all())}
    normed = {
        n: norms.get(len(o), o) if n in graph.outputs and bool((o == SHARED).all()) else o for n, o in owners.items()
    }
    same = all(torch.equal(normed[name], owners[name]) for name in owners)
    for belongs in [owners] if same else [owners, normed]:
        written = [part for view in layers for part in _written(module, view, belongs, units)]
        parts = [part for part in [*own, *written] if part is not None]
        if len(parts) == len(own) + len(written) and _attends(graph, belongs):
            yield tuple(p for some in parts for p in some)


def _written(module: Module32, layer: View, owners: Owners, units: int) -> list[list[Part] | None]:
    """Where the units lie in a layer's weight and in its bias; [] if it was not called."""
    if layer.name not in owners:
        return []
    weight, bias = own_names(module, layer)
    parts = _parts(weight, owners[layer.name], units, 1 if layer.layout == "conv1d" else 0)
    return [parts, [replace(p, name=bias, dim=0) for p in parts or ()] if bias in module.tensors else []]


def _attends(graph: _Graph, owners: Owners) -> bool:
    """Whether what belongs to units acts on other tokens in part, as keys and values do, and in part not, as queries do."""
    mixing = graph.mixing()
    held = {name: owners[name] != SHARED for name in graph.outputs}
    keys = any(bool((held[name] & acts).any()) for name, acts in mixing.items())
    return keys and any(bool((own & ~mixing.get(name, torch.zeros_like(own))).any()) for name, own in held.items())


def _parts(name: str, owners: Tensor, units: int, dim: int | None = None) -> list[Part] | None:
    """Where the units lie in a parameter, of each of whose entries the owner is known; None if no `Part` can say it.

    `dim`: the owners (entries,) are those along this dimension.
    """
    if dim is not None:
        return _along(name, owners, units, dim)
    if bool((owners == SHARED).all()):
        return []
    for dim in range(owners.dim()):
        lines = owners.movedim(dim, 0).flatten(1) if owners.dim() > 1 else owners[:, None]
        if bool((lines == lines[:, :1]).all()):
            return _along(name, lines[:, 0], units, dim)
    return None


def _along(name: str, owners: Tensor, units: int, dim: int) -> list[Part] | None:
    first = [*(owners == 0).tolist(), False]
    starts = [i for i, own in enumerate(first) if own and not (i and first[i - 1])]
    parts = [Part(name, dim, first.index(False, start) - start, start) for start in starts]
    told = torch.full_like(owners, SHARED)
    for part in parts:
        numbers = torch.arange(units, device=owners.device).repeat_interleave(part.width)
        if part.first + len(numbers) > len(owners):
            return None
        told[part.first : part.first + len(numbers)] = numbers
    return parts if torch.equal(told, owners) else None
