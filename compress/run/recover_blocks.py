"""Tune a finished checkpoint block by block, each towards the dense block's output on what the tuned ones before hand on."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.model.blocks import Block, blocks
from paredown.compress.model.stream import hidden_size, start
from paredown.compress.progress import Counted, Measured, Progress
from paredown.compress.recipe import HiddenSpec, ReconstructSpec
from paredown.compress.recovery.reconstruct import tuned
from paredown.compress.recovery.trainable import trained_of
from paredown.compress.text.windows import Windows


@dataclass
class Blockwise:
    """The blocks of `source` beside those of `teacher`, on windows ids (windows, length), the last of which are held out."""

    source: ModelSource
    teacher: ModelSource
    ids: Tensor
    pruned: frozenset[str]  # names of dense weights whose zeros stay
    spec: ReconstructSpec
    seed: int
    progress: Progress

    @torch.no_grad()
    def run(self, numbers: dict[str, Tensor], done: int) -> Iterator[dict[str, Any]]:
        """Tune all blocks but the first `done`, and yield what a report says of each once it is tuned.

        `numbers`, by full name, are weights that differ from those in the files; a tuned block's are put into them.
        Raises PareError if the training of a block diverges.
        """
        ours, theirs = start(self.source, self.ids), start(self.teacher, self.ids)
        both = list(zip(blocks(self.source), blocks(self.teacher), strict=True))
        for block, dense in both:
            inputs = list(theirs.hidden)
            with self.teacher.loaded(dense):
                theirs.advance(dense)
            with self.source.loaded(block):
                chosen = trained_of(block, self.pruned)
                for name, parameter in chosen.parameters.items():
                    parameter.copy_(numbers.get(block.prefix + name, parameter))
                if block.index >= done:
                    show = self._shown(block, len(both))
                    error = tuned(block, ours, inputs, theirs.hidden, chosen, self.spec, self.seed, show)
                    numbers |= {block.prefix + n: p.detach().cpu().clone() for n, p in chosen.parameters.items()}
                    self.progress.note(f"reconstructed {block.name}: error {error.before:.2e} -> {error.after:.2e}")
                    self.progress.measured(Measured("reconstruct", block.index, asdict(error), block.name))
                    trained = sum(p.numel() for p in chosen.parameters.values())
                    yield {"block": block.name, **asdict(error), "trained": trained}
                ours.advance(block)
        self.progress.doing("")

    def _shown(self, block: Block, count: int) -> Callable[[int], None]:
        steps = self.spec.steps

        def show(step: int) -> None:
            words = f"tuning {block.name}, step {step} of {steps}"
            self.progress.doing(Counted(words, "tuning blocks", block.index * steps + step, count * steps))

        return show


def check_paired(source: ModelSource, teacher: ModelSource) -> None:
    """Raise PareError unless each block of the checkpoint has one of the teacher's that it stands for."""
    ours, theirs = ([len(blocks(model)), hidden_size(model)] for model in (source, teacher))
    if ours != theirs:
        raise PareError(
            f"recover: reconstruct tunes block by block, and {source.id} has {ours[0]} blocks of width {ours[1]}, "
            f"{teacher.id} {theirs[0]} of width {theirs[1]}. Name its own dense model, or take distill alone."
        )


def check_compared(spec: HiddenSpec | None, source: ModelSource, teacher: ModelSource) -> None:
    """Raise PareError if hidden states are to be compared that have not one size, or blocks that have no counterparts."""
    ours, theirs = ([len(blocks(model)), hidden_size(model)] for model in (source, teacher))
    if spec and ours[1] != theirs[1]:
        raise PareError(
            f"recover: distill.hidden compares hidden states, and those of {source.id} have {ours[1]} numbers, of "
            f"{teacher.id} {theirs[1]}. Leave hidden out."
        )
    if spec and spec.every and ours[0] != theirs[0]:
        raise PareError(
            f"recover: distill.hidden.every compares block by block, and {source.id} has {ours[0]} blocks, {teacher.id} "
            f"{theirs[0]}. Leave every out: the last block's output is compared then."
        )


def blocks_told(entries: Sequence[Mapping[str, Any]], spec: ReconstructSpec, text: Windows) -> dict[str, Any]:
    """What a report says of all blocks together."""
    tokens = max(entry["steps"] for entry in entries) * min(spec.batch, len(text.ids)) * text.length
    same = [entry["block"] for entry in entries if entry["after"] >= entry["before"]]
    return {
        "step": "reconstruct",
        "trained": sum(entry["trained"] for entry in entries),
        "steps": max(entry["steps"] for entry in entries),
        "tokens": tokens,
        "passes": round(tokens / text.tokens, 3),
        "curve": [],
        "before": sum(entry["before"] for entry in entries) / len(entries),
        "after": sum(entry["after"] for entry in entries) / len(entries),
        "best_tokens": tokens,
        "stopped": "every block was tuned",
        "blocks": list(entries),
        "remarks": [f"the error of {', '.join(same)} did not fall: as before"] if same else [],
    }
