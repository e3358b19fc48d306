"""A loaded model as numbers that can be trained: what its checkpoint stores, in float32 beside the model's own.

A packed weight trains the values that its mask keeps, its factors or its pivots, through the products that it has: zeros take
no memory and cannot come back. A dense weight with zeros keeps them by a mask of its gradient. Products are in the model's
dtype; gradients are added up, and steps are taken, in float32 (mixed precision as in Micikevicius et al. 2018, arXiv
1710.03740).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paredown.compress.model.blocks import Block
from paredown.compress.recovery.reconstruct import Chosen
from paredown.compress.storage.modules import PACKED, PackedLinear
from paredown.compress.storage.unpacked import keep_unpacked

PRUNED = 0.1  # share of zeros from which on a dense weight counts as pruned
LEAST_SIZE = 1e-3  # root mean square, of a tensor that is zeros or nearly


@dataclass
class Weight:
    """One tensor that is trained."""

    name: str
    parameter: nn.Parameter  # of the model, in the dtype of its products
    master: Tensor  # float32
    stored: torch.dtype  # in the checkpoint
    keep: Tensor | None  # bool: False where it stays zero; None: everywhere

    def receive(self, parameter: Tensor) -> None:
        """Take over the gradient of one backward pass, and free the model's."""
        gradient = parameter.grad
        assert gradient is not None
        wide = gradient.float() if self.keep is None else gradient.float() * self.keep
        self.master.grad = wide if self.master.grad is None else self.master.grad.add_(wide)
        parameter.grad = None

    @torch.no_grad()
    def show(self) -> None:
        """Let the model have the master's numbers."""
        self.parameter.copy_(self.master)

    def result(self) -> Tensor:
        """A copy of the numbers as the checkpoint stores them."""
        return self.master.detach().to(self.stored, copy=True)


class Trainable:
    """The weights of a model that are trained, by name. The model computes as when it is used: without dropout."""

    def __init__(
        self,
        model: Any,
        inside: tuple[str, ...],
        pruned: frozenset[str],
        products: torch.dtype,
        embeddings: bool = False,
        frozen: tuple[str, ...] = (),
    ) -> None:
        """Takes the model over.

        `inside`: prefixes of its `blocks`, all of whose weights are trained; outside them vectors, and with `embeddings` what
        embeds tokens and the head. `pruned`: names of dense weights whose zeros stay, beside those with PRUNED of zeros.
        `frozen`: prefixes of blocks that stay as they are.
        """
        self._open(model, inside)
        outer = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
        own = {f"{name}.{part}" for name, m in model.named_modules() if isinstance(m, PACKED) for part in m.parts}
        self.weights: dict[str, Weight] = {}
        for name, parameter in model.named_parameters():
            wanted = embeddings if id(parameter) in outer else name.startswith(inside) or parameter.dim() == 1
            wanted = wanted and not name.startswith(frozen)
            parameter.requires_grad_(wanted and parameter.is_floating_point())
            if parameter.requires_grad:
                keep = None if name in own else keep_of(parameter, name in pruned)
                master = parameter.detach().float().clone()
                self.weights[name] = Weight(name, parameter, master, parameter.dtype, keep)
        self._narrow(products)
        for weight in self.weights.values():
            weight.parameter.register_post_accumulate_grad_hook(weight.receive)

    def _open(self, model: Any, inside: tuple[str, ...]) -> None:
        """Make the model one whose weights may change at each step."""
        self.model = model.eval()
        keep_unpacked(model, False)
        self.blocks: list[nn.Module] = [model.get_submodule(prefix.rstrip(".")) for prefix in inside]
        for module in model.modules():
            if isinstance(module, PackedLinear) and module.group is not None:
                module.group.dissolve()

    def _narrow(self, products: torch.dtype) -> None:
        """Let the model compute in this dtype."""
        usual = self.model.dtype
        for parameter in self.model.parameters():  # and no buffer: rotary tables stay in float32
            if parameter.dtype == usual:  # some classes keep a few in float32
                parameter.data = parameter.data.to(products)

    @property
    def numbers(self) -> int:
        """How many numbers are trained."""
        return sum(weight.master.numel() for weight in self.weights.values())

    @property
    def masters(self) -> list[Tensor]:
        return [weight.master for weight in self.weights.values()]

    def groups(self) -> list[dict[str, Any]]:
        """For an optimizer: each master with its `size`, the root mean square of its numbers that may differ from zero."""
        return [{"params": [w.master], "size": _size(w)} for w in self.weights.values()]

    def show(self) -> None:
        """Let the model have the masters' numbers."""
        for weight in self.weights.values():
            weight.show()

    def results(self) -> dict[str, Tensor]:
        """A copy of all numbers as the checkpoint stores them, by name, on the CPU."""
        return {name: weight.result().cpu() for name, weight in self.weights.items()}

    @torch.no_grad()
    def take(self, numbers: Mapping[str, Tensor]) -> None:
        """Take these numbers over, by name; a weight that is not trained takes its own too."""
        own = dict(self.model.named_parameters())
        for name, tensor in numbers.items():
            own[name].copy_(tensor)
            if name in self.weights:
                self.weights[name].master.copy_(tensor)

    def stored(self, numbers: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What the checkpoint is to store, given what `results` gave."""
        return numbers

    def checkpointed(self) -> None:
        """Compute activations inside blocks again in the backward pass, in place of keeping them."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        renamed = getattr(self.model, "activation_checkpointing_enable", None)  # after transformers 5.17
        (renamed or self.model.gradient_checkpointing_enable)({"use_reentrant": False})
        for module in self.model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True  # of the block alone: what is in it has no dropout still


def trained_of(block: Block, pruned: frozenset[str]) -> Chosen:
    """All that a block in memory stores: parts of packed weights, dense weights with masks of their zeros, vectors.

    Parameters that others share are not among them. `pruned` is as in `Trainable`.
    """
    packed = {f"{name}.{part}" for name, m in block.module.named_modules() if isinstance(m, PACKED) for part in m.parts}
    own = block.module.named_parameters()
    trained = {name: p for name, p in own if p.is_floating_point() and block.prefix + name not in block.shared}
    found = {name: keep_of(p, block.prefix + name in pruned) for name, p in trained.items() if name not in packed}
    return Chosen(trained, {name: keep for name, keep in found.items() if keep is not None})


def pruned_layers(names: Iterable[str], layers: Mapping[str, Any]) -> frozenset[str]:
    """Those of the weights `names` that a record's layers say were pruned."""
    sparse = {name for name, layer in layers.items() if layer.get("sparsity") is not None}
    owners = {name.rpartition(".")[0] for name in sparse}  # of an expert: its fused parameter
    return frozenset(name for name in names if name in owners or name.removesuffix(".weight") in sparse)


def keep_of(parameter: Tensor, pruned: bool) -> Tensor | None:
    """Where a dense weight may differ from zero; None: everywhere. `pruned`: its zeros stay, however few they are."""
    if parameter.dim() < 2:
        return None
    nonzero = parameter.detach() != 0
    share = 1 - int(nonzero.sum()) / max(nonzero.numel(), 1)
    return nonzero if pruned or share >= PRUNED else None


def _size(weight: Weight) -> float:
    count = weight.master.numel() if weight.keep is None else int(weight.keep.sum())
    return max(float((weight.master.double().square().sum() / max(count, 1)).sqrt()), LEAST_SIZE)
