"""Which attention and MLPs go: again and again what costs least by the loss of the model without it.

One block's weights are in memory at a time; hidden states are in host memory.
"""

import math
from collections.abc import Callable, Collection, Sequence
from functools import partial

import torch
from torch import Tensor

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.methods.base import SublayerMethod
from paredown.compress.model.blocks import Block
from paredown.compress.model.stream import Stream, start
from paredown.compress.model.sublayers import Sublayer, silent
from paredown.compress.progress import ignore
from paredown.compress.survey.depth import losses, worth_trying
from paredown.compress.survey.rounds import Rounds, Values

WHOLE = ""  # in a round: the model as it is before its choice


@torch.no_grad()
def chosen_sublayers(
    source: ModelSource,
    all_blocks: Sequence[Block],
    ids: Tensor,
    method: SublayerMethod,
    candidates: Sequence[Sublayer],
    numbers: int,
    note: Callable[[str], None] = ignore,
    doing: Callable[[str], None] = ignore,
    rounds: Rounds | None = None,
) -> list[Sublayer]:
    """Those of the candidates that go, in the order of the choice: as many as the method drops, or about `numbers` large.

    ids (windows, length) is the calibration text; `note` is told each step, `doing` what is under way; `rounds` those of
    the same choice that are known. Raises PareError if whichever goes, the logits overflow.
    """
    first, gone = start(source, ids[: method.windows]), list[Sublayer]()
    tried, rounds = {sublayer.name for sublayer in candidates}, rounds or Rounds()
    while not _enough(method, gone, numbers):
        left = [s for s in candidates if s not in gone]
        trying = [s for s in left if s.name in tried]
        measure = partial(_round, source, all_blocks, first, gone, trying, doing)
        by_name = dict(rounds.values(len(gone), measure))
        before = by_name.pop(WHOLE)
        costs = {s.name: method.cost(by_name[s.name], before, s.numbers) for s in left if s.name in by_name}
        best = min((s for s in left if s.name in costs), key=lambda s: costs[s.name])
        if not math.isfinite(by_name[best.name]):
            raise PareError("whatever is removed, the model's logits overflow: try --dtype bfloat16 or float32.")
        gone.append(best)
        tried = worth_trying(costs, {s.name for s in left if s is not best})
        note(f"survey, depth: {best.name} goes, loss {before:.4f} -> {by_name[best.name]:.4f}")
    doing("")
    return gone[:-1] if _overshoots(method, gone, numbers) else gone


def _enough(method: SublayerMethod, gone: Sequence[Sublayer], numbers: int) -> bool:
    return len(gone) == method.drop if method.drop is not None else sum(s.numbers for s in gone) >= numbers


def _overshoots(method: SublayerMethod, gone: Sequence[Sublayer], numbers: int) -> bool:
    """Whether without the last choice what goes is nearer to `numbers`."""
    if method.drop is not None or len(gone) < 2:
        return False
    total = sum(s.numbers for s in gone)
    return total - numbers > numbers - (total - gone[-1].numbers)


def _round(
    source: ModelSource,
    all_blocks: Sequence[Block],
    first: Stream,
    gone: Collection[Sublayer],
    tried: Sequence[Sublayer],
    doing: Callable[[str], None],
) -> Values:
    """The loss of the model without those `gone`, called WHOLE, and without one more of the `tried`, by its name.

    `first` stands before the first block. A trial begins as a copy before its block, so that what leads there is run once.
    """
    whole = first.copy()
    trials: dict[str, Stream] = {}
    for block in all_blocks:
        doing(f"depth, choice {len(gone) + 1}: block {block.index + 1} of {len(all_blocks)}")
        with source.loaded(block), silent(block, [s.name for s in gone if s.block == block.index]):
            for trial in trials.values():
                trial.advance(block)
            for name in (s.name for s in tried if s.block == block.index):
                trials[name] = whole.copy()
                with silent(block, [name]):
                    trials[name].advance(block)
            whole.advance(block)
    return dict(zip((WHOLE, *trials), losses(source, [whole, *trials.values()]), strict=True))
