"""What every walk over a model's blocks has: its job, its text, where it writes, and how it is saved and scored."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.writer import CheckpointWriter
from paredown.compress.job import Format
from paredown.compress.machine import peak_memory
from paredown.compress.model.blocks import Block, known
from paredown.compress.progress import BlockDone, Counted, Progress
from paredown.compress.recipe import Recipe
from paredown.compress.run.baseline import Baseline
from paredown.compress.run.journal import Journal, State
from paredown.compress.run.result import Result
from paredown.compress.run.score_cache import ScoreCache
from paredown.compress.run.scoring import compare, evaluation_entry
from paredown.compress.run.streams import Streams, probe_ids
from paredown.compress.text.windows import Windows


class Task(Protocol):
    """What a record or a report says of any job."""

    @property
    def source(self) -> ModelSource: ...
    @property
    def recipe(self) -> Recipe: ...
    @property
    def format(self) -> Format: ...
    @property
    def follows_dense(self) -> bool: ...


@dataclass
class Walk:
    """One compression: what is done, on which text, and where it goes."""

    job: Any  # a Task, of the subclass's own type
    calibration: Windows
    evaluations: list[Windows]
    writer: CheckpointWriter
    progress: Progress = field(default_factory=Progress)
    journal: Journal | None = None
    dense: ModelSource | None = None  # the model before any stage, which scores are compared with; None: the job's own
    cache: ScoreCache | None = None  # of the dense model's scores

    def remark_on_family(self, result: Result) -> None:
        if not known(self.job.source):
            family = self.job.source.family
            result.fallbacks.append(f"family {family!r} is not one we test: blocks were found by structure")

    @property
    def baseline(self) -> Baseline:
        return Baseline(self.dense or self.job.source, self.cache, self.progress.note)

    def start(self, result: Result, state: State | None) -> Streams:
        """All streams before the first block, or where an interrupted run stopped."""
        known = {i for i, windows in enumerate(self.evaluations) if self.dense or self.baseline.has(windows)}
        streams = Streams.start(self.job, self.calibration.ids, self.evaluations, result, known)
        if state:
            state.restore(streams.saved(state.facts["streams"]))
        return streams

    def score(self, streams: Streams, result: Result) -> None:
        """The losses of all texts behind the last block, and how far both models are apart on them."""
        source = self.job.source
        self.progress.doing("scoring the dense model" if len(streams.before) < len(self.evaluations) else "")
        before = self.baseline.behind(self.evaluations, streams.before)
        self.progress.doing("comparing both models' predictions")
        result.evaluation = [
            evaluation_entry(windows, compare(dense, after, self.dense or source, source))
            for windows, dense, after in zip(self.evaluations, before, streams.after, strict=True)
        ]
        self.progress.doing("")
        ids = probe_ids(self.calibration.ids)
        result.probe = {"ids": ids[0].tolist(), "nll": streams.probe.nll(source)[0].tolist()}

    def save(
        self,
        done: int,
        total: int,
        streams: Streams,
        result: Result,
        measured: Callable[[], tuple[Any, Mapping[str, Tensor]]],
    ) -> None:
        """Save the state after `done` blocks of `total`, with what was `measured` before, if the journal says it is time."""
        self.progress.doing(Counted(f"{done} of {total} blocks are done", "compressing", done, total))
        if self.journal is None or not self.journal.due(done == total):
            return
        self.progress.doing("saving what is done so far")
        state = result.state()
        state["seconds"]["total"] = state["seconds"].get("total", 0.0) + self.journal.seconds
        facts, losses = measured()
        tensors = {f"survey/{name}": values for name, values in losses.items()}
        saved = {"blocks": done, "survey": facts, "result": state}
        self.journal.save(saved, streams.named(), tensors, done == total)


def summary(block: Block, total: int, result: Result, seconds: float) -> BlockDone:
    """What a display shows of a block that is done."""
    layers = [layer for layer in result.layers if layer["name"].startswith(block.prefix)]
    kept, error = (
        sum(layer[key] or 0.0 for layer in layers) / max(len(layers), 1) for key in ("kept", "relative_error")
    )
    return BlockDone(block.index, total, block.name, kept if layers else 1.0, error, seconds, peak_memory()["host"])
