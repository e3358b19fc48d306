"""Training by low-rank adapters that are part of the stored weights at every step, so that nothing is lost by merging them.

Hu et al. 2022, LoRA (arXiv 2106.09685); of a weight with a mask M, Munoz et al. 2024, SQFT (arXiv 2410.03750):

    W' = W + M * (alpha / rank) B A

The model computes with W' as the checkpoint stores it: in its form, and rounded to its dtype. Each factor of a factored
weight has a pair of its own, so that its rank stays what it is. By the chain rule, with G the gradient of what is stored,
zero where M is, the pairs' gradients are (alpha / rank) G A^T and (alpha / rank) B^T G. Optimizer and saved states hold the
pairs alone; beside them a copy of the weights is in memory, and one layer's gradient.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.model.blocks import Block, blocks
from paredown.compress.model.targets import select
from paredown.compress.recipe import LoraSpec
from paredown.compress.recovery.trainable import LEAST_SIZE, Trainable, Weight, keep_of
from paredown.compress.storage.masked import kept_places, spread, values_at
from paredown.compress.storage.modules import PACKED
from paredown.compress.storage.spec import Spec


@dataclass(frozen=True)
class Place:
    """A stored matrix, or as many as there are experts in it, that gets a pair."""

    name: str  # of the parameter
    shape: tuple[int, ...]  # (..., rows, columns)
    masked: bool = False  # the parameter holds the values that a packed mask keeps of it

    def numbers(self, rank: int) -> int:
        """Of the pairs."""
        *experts, rows, columns = self.shape
        return math.prod(experts) * rank * (rows + columns)


@dataclass(frozen=True)
class _Layer:
    """What `select` chooses from."""

    name: str
    control: str | None
    places: tuple[Place, ...]


def places(source: ModelSource, spec: LoraSpec) -> list[Place]:
    """The matrices in the blocks that get pairs: those of a larger rank. Raises PareError if there are none, as `select`."""
    within = blocks(source)[-spec.last :] if spec.last else blocks(source)
    layers = [layer for block in within for layer in _layers(block, source.modules)]
    chosen, _ = select(layers, spec.targets, (), "lm_head")
    found = [place for layer in chosen for place in layer.places if min(place.shape[-2:]) > spec.rank]
    if not found:
        raise PareError(
            f"recover: lora has rank {spec.rank}, and no stored matrix of its targets a larger one. Lower it."
        )
    return found


def _layers(block: Block, specs: Mapping[str, Spec]) -> Iterable[_Layer]:
    for path, module in block.module.named_modules():
        if isinstance(module, PACKED):
            name = block.prefix + path
            yield _Layer(name, None, tuple(_packed_places(name, module, specs[name])))
    for view in block.views():
        if not view.expert:  # the first of its parameter's experts, or of no experts
            place = Place(view.stored_name, tuple(view.tensor.shape))
            yield _Layer(view.owner, view.control, (place,))


def _packed_places(name: str, module: nn.Module, spec: Spec) -> Iterable[Place]:
    for part, tensor in module.named_parameters(recurse=False):
        if part == "values":
            yield Place(f"{name}.{part}", spec.shape, masked=True)
        elif part != "bias":
            yield Place(f"{name}.{part}", tuple(tensor.shape))


@dataclass
class Pair:
    """What is added to one stored matrix."""

    parameter: nn.Parameter  # of the model, in the dtype of its products
    base: Tensor  # as the checkpoint stores it, without what is added
    down: Weight  # A (..., rank, columns)
    up: Weight  # B (..., rows, rank)
    scale: float
    keep: Tensor | None  # of a dense weight, where it may differ from zero
    owner: Any = None  # the packed module, where the parameter holds the values that a mask keeps

    def receive(self, parameter: Tensor) -> None:
        """Take over the gradient of one backward pass, and free the model's."""
        assert parameter.grad is not None
        gradient = self._as_matrix(parameter.grad.float()) * self.scale  # (..., rows, columns)
        parameter.grad = None
        for master, own in (
            (self.down.master, self.up.master.mT @ gradient),
            (self.up.master, gradient @ self.down.master.mT),
        ):
            master.grad = own if master.grad is None else master.grad.add_(own)

    @torch.no_grad()
    def show(self) -> None:
        """Let the model have the sum."""
        self.parameter.copy_(self.sum())

    def sum(self) -> Tensor:
        """What is to be stored, float32."""
        change = self.scale * (self.up.master @ self.down.master)
        if self.owner is not None:
            keep = kept_places(self.owner.kind, self.owner.tensors(), self.owner.spec.shape)
            change = values_at(self.owner.kind, change, keep)
        elif self.keep is not None:
            change = change * self.keep
        return self.base.float() + change

    def _as_matrix(self, gradient: Tensor) -> Tensor:
        if self.owner is not None:
            return spread(self.owner.kind, self.owner.tensors(), gradient, self.owner.spec.shape)
        return gradient if self.keep is None else gradient * self.keep


class Adapted(Trainable):
    """A model of which pairs are trained, under the names `<parameter>.lora_A` and `<parameter>.lora_B`."""

    pairs: dict[str, Pair]  # by the name of the parameter

    def __init__(
        self,
        model: Any,
        inside: tuple[str, ...],
        chosen: Sequence[Place],
        pruned: frozenset[str],
        products: torch.dtype,
        spec: LoraSpec,
        seed: int,
    ) -> None:
        """Takes the model over. `inside`: prefixes of its blocks; A is drawn from `seed`, and B is zeros; see `Trainable`."""
        self._open(model, inside)
        parameters, self.weights, self.pairs = dict(model.named_parameters()), {}, {}
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        for number, place in enumerate(chosen):
            self._add(number, place, parameters[place.name], place.name in pruned, spec, seed)
        self._narrow(products)
        for pair in self.pairs.values():
            pair.parameter.requires_grad_(True)
            pair.parameter.register_post_accumulate_grad_hook(pair.receive)

    def _add(self, n: int, place: Place, parameter: nn.Parameter, pruned: bool, spec: LoraSpec, seed: int) -> None:
        """The `n`-th pair."""
        *experts, rows, columns = place.shape
        generator = torch.Generator().manual_seed(seed * 1000003 + n)
        drawn = torch.randn(*experts, spec.rank, columns, generator=generator) / math.sqrt(columns)
        down = self._half(f"{place.name}.lora_A", parameter, drawn)
        up = self._half(f"{place.name}.lora_B", parameter, torch.zeros(*experts, rows, spec.rank))
        module = self.model.get_submodule(place.name.rpartition(".")[0])
        keep = None if isinstance(module, PACKED) else keep_of(parameter, pruned)
        base, owner = parameter.detach().clone(), module if place.masked else None
        self.pairs[place.name] = Pair(parameter, base, down, up, spec.alpha / spec.rank, keep, owner)

    def _half(self, name: str, parameter: nn.Parameter, start: Tensor) -> Weight:
        half = Weight(name, parameter, start.to(parameter.device), torch.float32, None)
        self.weights[name] = half
        return half

    def groups(self) -> list[dict[str, Any]]:
        """For an optimizer: a first step of B, on A as it is, changes the weight by as much of its size as the rate says."""
        found = []
        for pair in self.pairs.values():
            down = _rms(pair.down.master)
            up = max(_rms(pair.base, pair.keep), LEAST_SIZE) / (down * math.sqrt(pair.down.master.shape[-2]))
            found += [{"params": [pair.down.master], "size": down}, {"params": [pair.up.master], "size": up}]
        return found

    def show(self) -> None:
        """Let the model have all sums."""
        for pair in self.pairs.values():
            pair.show()

    @torch.no_grad()
    def take(self, numbers: Mapping[str, Tensor]) -> None:
        """Take these numbers over, by name: of pairs, or of the weights to which they are added."""
        own = dict(self.model.named_parameters())
        for name, tensor in numbers.items():
            if name in self.weights:
                self.weights[name].master.copy_(tensor)
            elif name in self.pairs:
                self.pairs[name].base.copy_(tensor)
            else:
                own[name].copy_(tensor)
        self.show()

    @torch.no_grad()
    def stored(self, numbers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the checkpoint is to store of the weights with these pairs, by name, on the CPU."""
        self.take(numbers)
        return {name: pair.sum().to(pair.base.dtype).cpu() for name, pair in self.pairs.items()}


def _rms(tensor: Tensor, keep: Tensor | None = None) -> float:
    count = tensor.numel() if keep is None else int(keep.sum())
    return math.sqrt(float(tensor.double().square().sum()) / max(count, 1))
