"""What a choice among the blocks reads: how little each changes, or by how much the model departs without it.

One block's weights are in memory at a time; hidden states are in host memory.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.methods.base import BlockMethod, Profile
from paredown.compress.model.blocks import Block
from paredown.compress.model.calls import Recorder, recorders
from paredown.compress.model.removal import check_removable
from paredown.compress.model.rest import materialised_rest
from paredown.compress.model.stream import Stream, hidden_bytes, next_token_nll, start
from paredown.compress.progress import Counted, ignore
from paredown.compress.survey.merged import Merging
from paredown.compress.survey.rounds import Rounds, Values

STEP = 4  # of how many positions one prediction is compared
SHORTLIST = 12  # blocks that are tried again after all were

Key = TypeVar("Key", int, str)


def profile(
    source: ModelSource,
    all_blocks: Sequence[Block],
    ids: Tensor,
    method: BlockMethod,
    drop: int,
    note: Callable[[str], None] = ignore,
    doing: Callable[[str], None] = ignore,
    rounds: Rounds | None = None,
) -> Profile:
    """Measure what the method `reads` of the dense model's blocks, `drop` of which are to go.

    ids (windows, length) is the calibration text; `note` is told each step, `doing` what is under way; `rounds` those of
    the same choice that are known. Raises PareError for a model whose blocks cannot be removed.
    """
    check_removable(source, all_blocks)
    if method.reads == "states":
        return _states(source, all_blocks, ids, note)
    if method.reads == "merges":
        return Profile(similar=Merging.of(source, all_blocks, ids[: method.windows], note, doing).similarity)
    if method.reads in ("divergence", "loss"):
        choice = _Choice(source, all_blocks, start(source, ids[: method.windows]), method.reads == "loss", drop, doing)
        return Profile(removals=list(choice.removals(rounds or Rounds(), note)))
    return Profile()


def profile_bytes(source: ModelSource, method: BlockMethod, count: int, windows: int, length: int) -> int:
    """Bytes of the hidden states that `profile` has in memory at once, for a model of `count` blocks.

    Divergences and merges take a copy of those of the method's windows for each block, besides the dense model's.
    """
    if method.reads in ("divergence", "loss", "merges"):
        return (count + 2) * hidden_bytes(source, min(method.windows, windows) * length)
    return 2 * hidden_bytes(source, windows * length) if method.reads == "states" else 0


@torch.no_grad()
def _states(source: ModelSource, all_blocks: Sequence[Block], ids: Tensor, note: Callable[[str], None]) -> Profile:
    """How alike a block's input and output are, and the last tokens' hidden states before each block and at the end."""
    stream = start(source, ids)
    similarity, last = [], [_last(stream)]
    for block in all_blocks:
        before = stream.hidden.copy()
        with source.loaded(block):
            stream.advance(block)
        similarity.append(_mean_cosine(before, stream.hidden))
        last.append(_last(stream))
        note(Counted.block("survey, depth", block.index, len(all_blocks)))
    return Profile(similarity, torch.stack(last, 1))


def _last(stream: Stream) -> Tensor:  # (windows, hidden)
    return torch.cat([hidden[:, -1].float() for hidden in stream.hidden])


def _mean_cosine(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Mean over tokens of the cosine between hidden states (batch, length, hidden)."""
    cosines = [
        torch.cosine_similarity(x.float(), y.float(), dim=-1).double() for x, y in zip(before, after, strict=True)
    ]
    return float(torch.cat(cosines).mean())


@dataclass
class _Choice:
    """Which `drop` blocks go: again and again the one whose absence raises KL(dense || model) least.

    Or the loss of the model itself, in the place of the KL. `first` stands before the first block.
    """

    source: ModelSource
    all_blocks: Sequence[Block]
    first: Stream
    by_loss: bool
    drop: int
    doing: Callable[[str], None]
    dense: Stream | None = None  # behind the last block

    @torch.no_grad()
    def removals(self, rounds: Rounds, note: Callable[[str], None]) -> Iterator[tuple[int, float]]:
        """The blocks that go, in order, each with the KL after it.

        In each round all blocks are loaded once: every trial goes through a block while it is in memory. After a round the
        SHORTLIST best are tried again, and all that are left once few of those are left.
        """
        what = "loss" if self.by_loss else "KL"
        kept, tried = list(self.all_blocks), {block.index for block in self.all_blocks}
        for n in range(1, self.drop + 1):
            values = rounds.values(n - 1, partial(self._round, kept, tried, n))
            found = {int(index): value for index, value in values.items()}
            best = min(found, key=found.__getitem__)
            kept = [block for block in kept if block.index != best]
            tried = worth_trying(found, {block.index for block in kept})
            said = f"survey, depth: {n} of {self.drop} blocks chosen, the last one {best}, {what} {found[best]:.3g}"
            note(Counted(said, "survey, depth", n, self.drop))
            yield best, found[best]
        self.doing("")

    def _round(self, kept: Sequence[Block], tried: Collection[int], n: int) -> Values:
        """What is lost without each of the blocks that are `tried`. Raises PareError if it is not finite of any."""
        what = f"depth, choice {n} of {self.drop}"
        whole, trials = _try_each(self.source, kept, self.first, tried, self.doing, what)
        streams = list(trials.values())
        if self.by_loss:
            values = losses(self.source, streams)
        else:
            if self.dense is None:  # the rounds before may have been another run's
                self.dense = whole if len(kept) == len(self.all_blocks) else self._through()
            values = divergences(self.source, self.dense, streams)
        if not any(map(math.isfinite, values)):
            raise PareError("whichever block is removed, the model's logits overflow: try --dtype bfloat16 or float32.")
        return dict(zip(map(str, trials), values, strict=True))

    def _through(self) -> Stream:
        return _try_each(self.source, self.all_blocks, self.first, (), self.doing, "depth, the dense model")[0]


def worth_trying(found: Mapping[Key, float], left: set[Key]) -> set[Key]:
    """The next candidates, after a round that found these divergences."""
    shortlist = sorted(left & found.keys(), key=found.__getitem__)[:SHORTLIST]
    return set(shortlist) if len(shortlist) >= SHORTLIST // 2 else left


def _try_each(
    source: ModelSource,
    kept: Sequence[Block],
    first: Stream,
    tried: Collection[int],
    doing: Callable[[str], None],
    what: str,
) -> tuple[Stream, dict[int, Stream]]:
    """The stream that went through all `kept` blocks, and those that went through all but one of the `tried`, by it.

    `first` stands before the first block. A trial begins as a copy before its block, so that what leads there is run once.
    """
    whole = first.copy()
    trials: dict[int, Stream] = {}
    for i, block in enumerate(kept):
        doing(f"{what}: block {i + 1} of {len(kept)}")
        with source.loaded(block):
            for trial in trials.values():
                trial.advance(block)
            if block.index in tried:
                trials[block.index] = whole.copy()
            whole.advance(block)
    return whole, trials


@torch.no_grad()
def divergences(source: ModelSource, dense: Stream, streams: Sequence[Stream], step: int = STEP) -> list[float]:
    """KL(dense || model) of next-token predictions, in nats per token: the mean over every `step`-th position.

    All stand behind the last block, of the same windows; the model's own final norm and head read them. A stream with
    logits that overflow has infinite divergence.
    """
    totals = torch.zeros(len(streams), dtype=torch.float64)
    count = 0
    with materialised_rest(source, embedding=False), recorders(source) as layers:
        for i, ids in enumerate(dense.ids):
            # two distributions of each position are in memory at once
            at_once = max(1, dense.head_tokens // (2 * len(ids)))
            for positions in torch.arange(0, ids.shape[1] - 1, step, device=source.device).split(at_once):
                wanted = _log_probabilities(source, layers[-1], dense, i, positions)
                for n, stream in enumerate(streams):
                    got = _log_probabilities(source, layers[-1], stream, i, positions)
                    totals[n] += (wanted.exp() * (wanted - got)).sum(-1).double().sum().cpu()
                count += wanted.shape[:2].numel()
    return [kl if math.isfinite(kl) else math.inf for kl in (totals / count).tolist()]


@torch.no_grad()
def losses(source: ModelSource, streams: Sequence[Stream]) -> list[float]:
    """The mean loss per token, in nats, of streams that stand behind the last block; infinite where logits overflow."""
    found = []
    with materialised_rest(source, embedding=False), recorders(source) as layers:
        for stream in streams:
            total, count = 0.0, 0
            for hidden, ids in zip(stream.hidden, stream.ids, strict=True):
                layers[-1].output = hidden.to(stream.device, copy=True)
                nll = next_token_nll(source.model, ids.to(stream.device), stream.head_tokens)
                total, count = total + float(nll.double().sum()), count + nll.numel()
            found.append(total / count if math.isfinite(total) else math.inf)
    return found


def _log_probabilities(source: ModelSource, last: Recorder, stream: Stream, i: int, positions: Tensor) -> Tensor:
    """Of the next token behind these positions of batch `i` (batch, positions, vocabulary), float32."""
    last.output = stream.hidden[i].to(stream.device, copy=True)
    ids = stream.ids[i].to(stream.device)
    logits: Tensor = source.model(ids, use_cache=False, logits_to_keep=positions).logits
    if logits.shape[1] != len(positions):  # a class that gives all of them
        logits = logits[:, positions]
    return logits.float().log_softmax(-1)
