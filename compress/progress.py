"""What a run says while it works: the `paredown` logger, and the callbacks through which a display or a notebook follows it.

The logger is silent until the application configures logging, as libraries should be.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import monotonic

logger = logging.getLogger("paredown")
logger.addHandler(logging.NullHandler())


@dataclass(frozen=True)
class BlockDone:
    """What is known of a block once it is compressed and written."""

    index: int
    total: int  # blocks of the model
    name: str
    kept: float  # share of the targeted weights
    relative_error: float  # mean over the block's layers
    seconds: float
    peak_memory: int  # bytes, of the process so far


@dataclass(frozen=True)
class Measured:
    """Numbers of a step that is done, for logs: what they are of, such as `distill`, which step, and values by name."""

    of: str
    step: int
    values: Mapping[str, float]
    name: str = ""  # of what was measured, such as a block


class Counted(str):
    """A sentence on a step of which there are many: what they belong to, how many are done, and how many there are."""

    phase: str
    done: int
    total: int

    def __new__(cls, text: str, phase: str, done: int, total: int) -> "Counted":
        counted = super().__new__(cls, text)
        counted.phase, counted.done, counted.total = phase, done, total
        return counted

    @classmethod
    def block(cls, phase: str, index: int, total: int) -> "Counted":
        """That the block `index` of `total` is done."""
        return cls(f"{phase}: block {index + 1} of {total}", phase, index + 1, total)


@dataclass
class Pace:
    """How long steps of one kind take, by those that were done here: what an earlier run did counts for nothing."""

    phase: str
    total: int
    done: int
    clock: Callable[[], float] = monotonic  # seconds
    _first: int = field(init=False)
    _began: float = field(init=False)
    _last: float = field(init=False)  # when the last step was done

    def __post_init__(self) -> None:
        self._first, self._began, self._last = self.done, self.clock(), self.clock()

    def reach(self, done: int) -> None:
        """So many steps are done now."""
        if done > self.done:
            self.done, self._last = done, self.clock()

    @property
    def left(self) -> float | None:
        """Seconds until all are done; None before one was done here."""
        if self.done == self._first:
            return None
        each = (self._last - self._began) / (self.done - self._first)
        return max(each * (self.total - self.done) - (self.clock() - self._last), 0.0)


def ignore(_: object) -> None:
    pass


@dataclass(frozen=True)
class Progress:
    """The callbacks of a run: what it has done, what is worth keeping, what it is doing now, and numbers for logs."""

    block: Callable[[BlockDone], None] = ignore  # after each block
    note: Callable[[str], None] = logger.info  # a sentence worth keeping: a choice, a fallback, a warning
    doing: Callable[[str], None] = ignore  # the step under way, for a status line; "" once there is none
    measured: Callable[[Measured], None] = ignore  # numbers of a step
