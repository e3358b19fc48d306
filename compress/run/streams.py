"""All hidden states that a run carries through the blocks, and the losses that they end in."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from paredown.compress.model.blocks import Block
from paredown.compress.model.stream import Stream, start
from paredown.compress.numerics.perplexity import paired_delta, perplexity
from paredown.compress.run.result import Result
from paredown.compress.text.windows import Windows

PROBE_TOKENS = 128


@dataclass(frozen=True)
class Streams:
    """The hidden states of each text at the block that the run has reached."""

    calibration: Stream  # through the compressed blocks
    dense: (
        Stream | None
    )  # the same text through the dense blocks, if the method or the reconstruction compares with them
    before: list[Stream]  # each evaluation text through the dense blocks
    after: list[Stream]  # each evaluation text through the compressed blocks
    probe: Stream  # the tokens that `verify` reads again, through the compressed blocks

    @classmethod
    def start(cls, job: Any, calibration: Tensor, evaluations: Sequence[Windows], result: Result) -> "Streams":
        """All streams before the first block; calibration (windows, length)."""
        source = job.source
        with result.timed("calibration"):
            stream = start(source, calibration)
            dense = stream.copy() if job.follows_dense else None
        with result.timed("evaluation"):
            before = [start(source, windows.ids) for windows in evaluations]
            after = [s.copy() for s in before]
            probe = start(source, probe_ids(calibration))
        return cls(stream, dense, before, after, probe)

    def named(self) -> dict[str, Stream]:
        """All streams by the names under which their states are saved."""
        lists = {"calibration": [self.calibration], "dense": [self.dense] if self.dense else []}
        lists |= {"before": self.before, "after": self.after, "probe": [self.probe]}
        return {f"{name}-{i}": stream for name, streams in lists.items() for i, stream in enumerate(streams)}


def advance(streams: Sequence[Stream], block: Block) -> None:
    """Run several streams through one block."""
    for stream in streams:
        stream.advance(block)


def evaluation_entry(windows: Windows, before: Tensor, after: Tensor) -> dict[str, Any]:
    """One element of the report's `evaluation`; before and after are losses per token (windows, length - 1), in nats."""
    return {
        **windows.provenance(),
        "before": perplexity(windows.of_text(before)),
        "after": perplexity(windows.of_text(after)),
        "paired_delta": paired_delta(windows.of_text(before), windows.of_text(after)),
    }


def probe_ids(ids: Tensor) -> Tensor:  # (1, at most PROBE_TOKENS)
    """The tokens whose losses a checkpoint records; ids (windows, length)."""
    return ids[:1, :PROBE_TOKENS]
