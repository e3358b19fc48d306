"""All hidden states that a run carries through the blocks."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from paredown.compress.model.blocks import Block
from paredown.compress.model.stream import Stream, start
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
    before: dict[int, Stream]  # evaluation texts through the dense blocks, by their number: those not known beforehand
    after: list[Stream]  # each evaluation text through the compressed blocks
    probe: Stream  # the tokens that `verify` reads again, through the compressed blocks

    @classmethod
    def start(
        cls,
        job: Any,
        calibration: Tensor,
        evaluations: Sequence[Windows],
        result: Result,
        known: Collection[int] = (),
    ) -> "Streams":
        """All streams before the first block; calibration (windows, length).

        `known`: numbers of evaluation texts that need not go through the dense blocks.
        """
        source = job.source
        with result.timed("calibration"):
            stream = start(source, calibration)
            dense = stream.copy() if job.follows_dense else None
        with result.timed("evaluation"):
            after = [start(source, windows.ids) for windows in evaluations]
            before = {i: stream.copy() for i, stream in enumerate(after) if i not in known}
            probe = start(source, probe_ids(calibration))
        return cls(stream, dense, before, after, probe)

    def named(self) -> dict[str, Stream]:
        """All streams by the names under which their states are saved."""
        lists = {"calibration": [self.calibration], "dense": [self.dense] if self.dense else []}
        lists |= {"after": self.after, "probe": [self.probe]}
        all_of = {f"{name}-{i}": stream for name, streams in lists.items() for i, stream in enumerate(streams)}
        return all_of | {f"before-{i}": stream for i, stream in self.before.items()}

    def saved(self, names: Collection[str]) -> dict[str, Stream]:
        """As `named`, for a run that goes on from a state with these names; a dense stream that it lacks is dropped."""
        for i in [i for i in self.before if f"before-{i}" not in names]:
            del self.before[i]
        return self.named()


def advance(streams: Iterable[Stream], block: Block) -> None:
    """Run several streams through one block."""
    for stream in streams:
        stream.advance(block)


def probe_ids(ids: Tensor) -> Tensor:  # (1, at most PROBE_TOKENS)
    """The tokens whose losses a checkpoint records; ids (windows, length)."""
    return ids[:1, :PROBE_TOKENS]
