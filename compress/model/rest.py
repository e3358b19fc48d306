"""The weights outside the decoder blocks: in memory while the model's own forward runs around the blocks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from paredown.compress.checkpoint.source import ModelSource, set_tensor
from paredown.compress.model.blocks import blocks


@contextmanager
def materialised_rest(source: ModelSource, embedding: bool = True, head: bool = True) -> Iterator[None]:
    """Inside the `with` block all weights outside the decoder blocks are in memory.

    `embedding` and `head` say whether these two, the large ones, are needed.
    """
    left_out = [name_of(source.model, "get_input_embeddings")] * (not embedding)
    left_out += [name_of(source.model, "get_output_embeddings")] * (not head)
    left_out = [] if source.tied else left_out  # tied weights are one tensor, which is needed in both cases
    names = [n for n in names_outside(source) if n.rpartition(".")[0] not in left_out]
    source.materialise("", names)
    tie(source)
    original = source.model.get_input_embeddings()
    if not embedding and not source.tied:
        source.model.set_input_embeddings(ConstantEmbedding(original.weight, 0.0, source))
    try:
        yield
    finally:
        source.model.set_input_embeddings(original)
        source.release("", names)
        tie(source)


@contextmanager
def imitated_rest(source: ModelSource) -> Iterator["ConstantEmbedding"]:
    """Inside the `with` block constants that take no memory stand for all weights outside the decoder blocks.

    Yields what stands for the embedding: its `value` may be changed. The head's logits are zeros, or NaN for inputs with NaN.
    """
    names = names_outside(source)
    for name in names:
        like = source.parameters[name]
        value = torch.full((), float(like.dim() < 2), dtype=like.dtype, device=source.device)
        set_tensor(source.model, name, value.expand(like.shape))
    tie(source)
    embedding, head = source.model.get_input_embeddings(), source.model.get_output_embeddings()
    imitation = ConstantEmbedding(embedding.weight, 1.0, source)
    source.model.set_input_embeddings(imitation)
    if head is not None:
        source.model.set_output_embeddings(_Head(head))
    try:
        yield imitation
    finally:
        source.model.set_input_embeddings(embedding)
        if head is not None:
            source.model.set_output_embeddings(head)
        source.release("", names)
        tie(source)


def names_outside(source: ModelSource) -> list[str]:
    """Names of the weights outside the decoder blocks."""
    inside = tuple(block.prefix for block in blocks(source))
    return [name for name in source.parameters if not name.startswith(inside)]


def tie(source: ModelSource) -> None:
    """Let tied parameters be one tensor again."""
    for copy, original in source.tied.items():
        path, _, leaf = copy.rpartition(".")
        source.model.get_submodule(path)._parameters[leaf] = source.model.get_parameter(original)


def name_of(model: Any, getter: str) -> str:
    """The dotted name of the module that `model.get_input_embeddings()` (or output) returns."""
    wanted = getattr(model, getter)()
    return next((name for name, module in model.named_modules() if module is wanted), "lm_head")


class ConstantEmbedding(nn.Module):
    """Takes the place of an embedding: each number of its output is `value` times a number that differs along a token."""

    def __init__(self, weight: Tensor, value: float, source: ModelSource) -> None:
        """weight (vocabulary, hidden) of the embedding."""
        super().__init__()
        self.value = value
        row = torch.linspace(-1, 1, weight.shape[1], device=source.device).to(source.dtype)
        self.row: Tensor
        self.register_buffer("row", row, persistent=False)
        self.__dict__["weight"] = row.expand(weight.shape)  # some models read its dtype

    def forward(self, ids: Tensor) -> Tensor:
        row = self.row * self.value
        return row.expand(*ids.shape, -1).clone()


class _Head(nn.Module):
    """Takes the place of an output head, a linear."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.__dict__["weight"] = head.weight
        self.bias = getattr(head, "bias", None)
        self.vocabulary = len(head.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        return (0 * hidden.sum(-1, keepdim=True)).expand(*hidden.shape[:-1], self.vocabulary)
