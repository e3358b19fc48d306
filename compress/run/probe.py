"""How long a job takes on this machine: it is done on the model's first block and on random tokens, timed, and multiplied."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from paredown.compress.checkpoint.writer import CheckpointWriter
from paredown.compress.errors import PareError
from paredown.compress.job import Job
from paredown.compress.methods.base import BlockMethod, GroupMethod, SublayerMethod
from paredown.compress.model.stream import BATCH_TOKENS, start
from paredown.compress.numerics.moments import GRADIENT_NEEDS, INPUT_NEEDS, Need
from paredown.compress.run.first_block import Pruned, Reduced, first_blocks
from paredown.compress.run.open import embedding_rows
from paredown.compress.run.result import Result
from paredown.compress.shape_job import ShapeJob, block_numbers, resolve
from paredown.compress.survey.depth import STEP, divergences, worth_trying
from paredown.compress.survey.gradients import backward, head_gradients
from paredown.compress.survey.widths import WINDOWS
from paredown.compress.text.windows import Windows

QUICK = 4.0  # seconds: a block that takes less is done a second time, warm and on twice the text
STEPS = 4  # of a reconstruction
PER_BLOCK = ("read", "write", "calibration", "compress", "reconstruct", "evaluation")


def walk_seconds(
    job: Job | ShapeJob, calibration: Windows, evaluations: Sequence[Windows], known: Collection[int] = ()
) -> dict[str, float]:
    """Seconds of each step of the walk over the whole model, by the names of the report; tasks and verifying are not in it.

    `known`: numbers of the evaluation texts that need not go through the dense model's blocks again. Raises PareError if what
    the job does cannot be told from one block, and whatever the job raises on it.
    """
    method = job.method
    if isinstance(method, SublayerMethod) or (isinstance(method, BlockMethod) and method.reads == "merges"):
        raise PareError(f"how long {job.recipe.method} tries this and that cannot be told from one block")
    if isinstance(job, Job) and job.allocation.reads == "sensitivities":
        raise PareError(f"how long allocation {job.strategy} tries every layer cannot be told from one block")
    with TemporaryDirectory(prefix="paredown-") as place:
        probe = _Probe.of(job, Path(place), calibration, evaluations)
        first = probe.walk(1)
        second = probe.walk(2) if first.seconds["walk"] < QUICK else None
        return probe.multiplied(first, second, known)


@dataclass(frozen=True)
class _Measured:
    """One walk over the first block."""

    windows: int  # that calibrated
    scored: int  # tokens
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class _Probe:
    """The same job on a model of the first block, or of two where one is to go."""

    whole: Job | ShapeJob
    job: Job | ShapeJob
    place: Path
    calibration: Windows
    evaluations: Sequence[Windows]

    @classmethod
    def of(cls, job: Job | ShapeJob, place: Path, calibration: Windows, evaluations: Sequence[Windows]) -> "_Probe":
        recipe, by_depth = job.recipe, isinstance(job.method, BlockMethod)
        changes: dict[str, Any] = {"calibration": recipe.calibration.model_copy(update={"domain": None})}
        if recipe.reconstruct:
            changes["reconstruct"] = recipe.reconstruct.model_copy(update={"steps": STEPS})
        if by_depth:
            changes["options"] = {**{k: v for k, v in recipe.options.items() if k != "kept"}, "blocks": 1}
        source = first_blocks(job.source, 2 if by_depth else 1, place / "model")
        own = resolve(source, recipe.model_copy(update=changes), job.format)
        return cls(job, own, place, calibration, evaluations)

    def walk(self, batches: int) -> _Measured:
        """Do the job on random tokens: so many batches to calibrate, and to score."""
        spec = self.job.recipe.reconstruct
        ids = self._random(self.calibration, batches, spec.batch if spec else 1)
        texts = [replace(text, ids=self._random(text, batches)) for text in self.evaluations[:1]]
        kind: Any = Reduced if isinstance(self.job, ShapeJob) else Pruned
        began = perf_counter()
        with CheckpointWriter(self.place / "out") as writer:
            walk = kind(self.job, Windows(ids, "random", "", ""), texts, writer)
            seconds = walk.run().seconds
        seconds["walk"] = perf_counter() - began
        seconds["evaluation"] -= seconds["score"]
        return _Measured(len(ids), sum(text.ids.numel() for text in texts), seconds)

    def multiplied(self, first: _Measured, second: _Measured | None, known: Collection[int]) -> dict[str, float]:
        """Seconds of each step for the whole model and all text."""
        last, told = second or first, self.whole
        text, tokens = len(self.calibration.ids) / last.windows, [text.ids.numel() for text in self.evaluations]
        again = sum(number for i, number in enumerate(tokens) if i in known)
        heads = sum(tokens) / max(last.scored, 1)
        passes = heads - again / max(last.scored, 1) / 2  # of the two models, the dense one's is known
        once = {name: last.seconds.get(name, 0.0) for name in PER_BLOCK}
        solved = once["compress"]
        if second is not None:  # what grows with the text, and what does not
            more = max(solved - first.seconds.get("compress", 0.0), 0.0) / (second.windows - first.windows or 1)
            solved += more * (len(self.calibration.ids) - second.windows)
        steps = told.recipe.reconstruct.steps / STEPS if told.recipe.reconstruct else 0.0
        counts = self._counts()
        total = {
            "read": counts.all * once["read"],
            "survey": self._survey(last),
            "calibration": counts.walked * once["calibration"] * text,
            "compress": counts.kept * solved,
            "reconstruct": counts.kept * once["reconstruct"] * steps,
            "evaluation": counts.walked * once["evaluation"] * passes
            + last.seconds["score"] * heads
            + last.seconds["start"],
            "write": counts.kept * once["write"],
        }
        return {name: seconds for name, seconds in total.items() if seconds > 0}

    def _counts(self) -> "_Counts":
        """How many times what was measured happens."""
        sizes = [sum(map(block_numbers, job.blocks)) for job in (self.whole, self.job)]
        times = sizes[0] / sizes[1]  # a block of another size is taken to cost by its size
        if drop := self._dropped():  # a text goes through a block that stays twice, through one that goes once
            stay = len(self.whole.blocks) - drop
            return _Counts(times, (2 * stay + drop) / 3, stay)
        return _Counts(times, times, times)

    def _survey(self, last: _Measured) -> float:
        """Seconds of the survey."""
        job, measured = self.job, last.seconds.get("survey", 0.0)
        if isinstance(job.method, BlockMethod):
            return self._depth(job.method)
        surveyed, most = len(self.calibration.surveyed), job.method.gradient_windows if self._gradients() else None
        if isinstance(job.method, GroupMethod) and job.method.uneven:
            most = WINDOWS
        times, wanted = self._counts().all, min(surveyed, most or surveyed)
        if not self._gradients():
            return times * measured * wanted / last.windows
        windows = min(last.windows, most or last.windows)
        began, head, passes = self._backward(windows)
        solved = max(measured - began - head - passes, 0.0)  # what is chosen from the moments, whatever the text
        return began + times * solved + (head + times * passes) * wanted / windows

    def _backward(self, windows: int) -> tuple[float, float, float]:
        """Seconds to start, of the output head, and of the block, by a survey of gradients alone."""
        job, source = self.job, self.job.source
        ids = self._random(self.calibration, 1)[:windows]
        needs, layers = self._gradients(), self._layers()
        inputs = job.surveyed & INPUT_NEEDS if isinstance(job, Job) else frozenset()
        clock = Result()
        with clock.timed("start"):
            stream = start(source, ids)
        behind = stream.copy()
        with clock.timed("head"):
            head_gradients(source, behind, job.method.labels)
        with clock.timed("both"):
            for _ in backward(source, stream, layers, inputs, needs, self.place, job.method.labels):
                pass
        began, head, both = (clock.seconds[name] for name in ("start", "head", "both"))
        part = windows / len(ids)
        return began, head * part, max(both - head, 0.0) * part

    def _gradients(self) -> frozenset[Need]:
        """The moments of output gradients that its survey takes."""
        return self.job.surveyed & GRADIENT_NEEDS if isinstance(self.job, Job) else self.job.gradients

    def _layers(self) -> set[str]:
        if isinstance(self.job, ShapeJob):
            return {group.reader for group in self.job.all_groups}
        return {view.name for view in self.job.targets_within()}

    def _depth(self, method: BlockMethod) -> float:
        """Seconds of the choice among the blocks: how often a text goes through a block, and through the head."""
        source, block, count = self.job.source, self.job.blocks[0], len(self.whole.blocks)
        ids = self._random(self.calibration, 1)
        stream = start(source, ids)
        dense = stream.copy()
        clock = Result()
        with source.loaded(block), clock.timed("block"):
            stream.advance(block)
        with clock.timed("head"):
            divergences(source, dense, [stream])
        whole = len(self.calibration.ids)
        windows = whole if method.reads == "states" else min(method.windows, whole)
        passes, heads = depth_counts(count, self._dropped(), method.reads)
        # a divergence reads two models' predictions at every few positions, a loss one's at all
        each = clock.seconds["head"] * (STEP / 2 if method.reads == "loss" else 1)
        return (passes * clock.seconds["block"] + heads * each) * windows / len(ids)

    def _dropped(self) -> int:
        return self.whole.drop if isinstance(self.whole, ShapeJob) else 0

    def _random(self, like: Windows, batches: int, least: int = 1) -> Tensor:  # (windows, length)
        """Tokens of the model, as many as some batches have, no more than the text has."""
        source, length = self.job.source, like.ids.shape[1]
        per_batch = max(1, BATCH_TOKENS[source.device.type] // length)
        windows = min(max(batches * per_batch, least), max(len(like.ids), 1))
        return torch.randint(
            embedding_rows(source.model), (windows, length), generator=torch.Generator().manual_seed(0)
        )


@dataclass(frozen=True)
class _Counts:
    """For how many blocks something is done, as a multiple of what was measured."""

    all: float
    walked: float  # by the texts
    kept: float


def depth_counts(count: int, drop: int, reads: str) -> tuple[float, int]:
    """How many passes of the text through one block a choice of blocks takes, about, and how many through the head.

    A trial goes on, on average, from the middle of the blocks that are left.
    """
    if reads == "nothing":
        return 0.0, 0
    if reads == "states":
        return float(count), 0
    passes, heads, left = 0.0, 0, set(range(count))
    tried = set(left)
    for _ in range(drop):
        passes += len(left) + len(tried) * len(left) / 2
        heads += len(tried)
        left.remove(min(tried))  # one of them is the best
        tried = worth_trying(dict.fromkeys(tried, 0.0), left)
    return passes, heads
