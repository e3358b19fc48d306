"""A model's first blocks as a model of their own, and walks over it that time apart what is done once for a model."""

from pathlib import Path

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.model.blocks import blocks
from paredown.compress.model.reshape import reshaped
from paredown.compress.run.journal import State
from paredown.compress.run.pipeline import Run
from paredown.compress.run.result import Result
from paredown.compress.run.smaller import SmallerRun
from paredown.compress.run.streams import Streams


def first_blocks(source: ModelSource, count: int, folder: Path) -> ModelSource:
    """A model of the first blocks of another, in a folder of links to its files and a config of its own.

    Raises PareError if no config of the family describes it, or if the system makes no links.
    """
    config = source.config if len(blocks(source)) == count else reshaped(source, range(count), {}).config
    try:
        folder.mkdir(parents=True)
        for path in source.folder.iterdir():
            if path.is_file() and path.name != "config.json":
                (folder / path.name).symlink_to(path.resolve())
        (folder / "config.json").write_text(config.to_json_string(), encoding="utf-8")
    except OSError as fault:
        raise PareError(f"{folder} cannot hold links to the model's files ({fault.strerror}).") from fault
    return ModelSource(folder, source.id, dtype=source.dtype, device=source.device)


class _Apart:
    """Times apart what a walk does once for a model, not once for a block."""

    def start(self, result: Result, state: State | None) -> Streams:
        with result.timed("start"):
            streams: Streams = super().start(result, state)  # type: ignore[misc]
        for name in ("calibration", "evaluation"):  # to which all that was done for them so far is counted
            result.seconds[name] = 0.0
        return streams

    def score(self, streams: Streams, result: Result) -> None:
        with result.timed("score"):
            super().score(streams, result)  # type: ignore[misc]


class Pruned(_Apart, Run):
    """A walk that edits single weights."""


class Reduced(_Apart, SmallerRun):
    """A walk that removes blocks or units."""
