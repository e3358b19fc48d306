"""Blocks that are sums of several of the dense model's, and how near a model of such blocks comes to the dense one."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from paredown.compress.checkpoint.source import ModelSource, set_tensor
from paredown.compress.errors import PareError
from paredown.compress.methods.base import Mix
from paredown.compress.model.blocks import Block
from paredown.compress.model.calls import recorders
from paredown.compress.model.rest import materialised_rest
from paredown.compress.model.stream import Stream, start
from paredown.compress.progress import ignore


def merged(source: ModelSource, all_blocks: Sequence[Block], mix: Mix) -> dict[str, Tensor]:
    """The parameters of a block, which is in memory, as the sum that `mix` says, by full name; {} if it stays as it is.

    Sums are float64, the results have the block's own dtypes. Raises PareError for blocks of other shapes.
    """
    if len(mix) == 1:
        return {}
    (index, weight), *others = mix
    block, sums = all_blocks[index], dict[str, Tensor]()
    check_alike([all_blocks[i] for i, _ in mix])
    for name, own in block.module.named_parameters():
        total = weight * own.double()
        for i, share in others:
            other = all_blocks[i].prefix + name
            total.add_(source.read([other])[other].to(own.device).double(), alpha=share)
        sums[block.prefix + name] = total.to(own.dtype)
    return sums


def check_alike(some: Sequence[Block]) -> None:
    """Raises PareError if the weights of these blocks cannot be added: their shapes differ, or others use them too."""
    first, *others = some
    shapes = {name: p.shape for name, p in first.module.named_parameters()}
    for block in others:
        if {name: p.shape for name, p in block.module.named_parameters()} != shapes:
            raise PareError(
                f"{first.name} and {block.name} have weights of different shapes and cannot be merged: leave one out with "
                "lowest or highest, or remove blocks with greedy_depth."
            )
    if shared := next((b for b in some if any(b.prefix + name in b.shared for name in shapes)), None):
        raise PareError(f"{shared.name} shares weights with other blocks and cannot be merged: use greedy_depth.")


@contextmanager
def _loaded(source: ModelSource, all_blocks: Sequence[Block], mix: Mix) -> Iterator[Block]:
    """Inside the `with` block, the weights of a merged block are in memory; yields it."""
    block = all_blocks[mix[0][0]]
    with source.loaded(block):
        for name, tensor in merged(source, all_blocks, mix).items():
            set_tensor(source.model, name, tensor)
        yield block


@dataclass
class Merging:
    """The dense model's hidden states before each block and at the end. One block is in memory at a time."""

    source: ModelSource
    all_blocks: Sequence[Block]
    note: Callable[[str], None] = ignore
    doing: Callable[[str], None] = ignore
    before: list[Stream] = field(default_factory=list)
    last: list[Tensor] = field(default_factory=list)  # of each batch (windows, length * hidden)
    known: dict[tuple[Mix, ...], float] = field(default_factory=dict)

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        source: ModelSource,
        all_blocks: Sequence[Block],
        ids: Tensor,
        note: Callable[[str], None],
        doing: Callable[[str], None],
    ) -> "Merging":
        """Run the text, ids (windows, length), through the dense model."""
        merging, stream = cls(source, all_blocks, note, doing), start(source, ids)
        for block in all_blocks:
            doing(f"depth, the dense model: block {block.index + 1} of {len(all_blocks)}")
            merging.before.append(stream.copy())
            with source.loaded(block):
                stream.advance(block)
        merging.last = list(_last_states(source, stream))
        return merging

    @torch.no_grad()
    def similarity(self, stay: Sequence[Mix]) -> float:
        """Mean over windows of the cosine between the last hidden states of the dense model and of one made of `stay`.

        The hidden states of all of a window's tokens are one vector, behind the final norm. Those before the first block
        that is not the dense model's are not computed again.
        """
        key = tuple(stay)
        if key not in self.known:
            self.known[key] = self._measured(stay)
            self.note(f"survey, depth: {len(stay)} blocks, similarity {self.known[key]:.4f}")
        return self.known[key]

    def _measured(self, stay: Sequence[Mix]) -> float:
        same = next((i for i, mix in enumerate(stay) if mix != ((i, 1.0),)), len(stay) - 1)
        stream = self.before[same].copy()
        for n, mix in enumerate(stay[same:], same):
            self.doing(f"depth, trying to merge: block {n + 1} of {len(stay)}")
            with _loaded(self.source, self.all_blocks, mix) as block:
                stream.advance(block)
        found = zip(_last_states(self.source, stream), self.last, strict=True)
        return float(torch.cat([torch.cosine_similarity(a, b, dim=-1) for a, b in found]).mean())


def _last_states(source: ModelSource, stream: Stream) -> Iterator[Tensor]:  # (windows, length * hidden)
    """Of each batch, behind the last block and the model's own final norm, float64."""
    with materialised_rest(source, embedding=False, head=False), recorders(source) as layers:
        for hidden, ids in zip(stream.hidden, stream.ids, strict=True):
            layers[-1].output = hidden.to(stream.device, copy=True)
            states = source.model.base_model(ids.to(stream.device), use_cache=False).last_hidden_state
            yield states.double().flatten(1).cpu()
