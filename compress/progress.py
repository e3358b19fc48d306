"""What a run says while it works: the `paredown` logger, and the callbacks through which a display or a notebook follows it.

The logger is silent until the application configures logging, as libraries should be.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

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


def ignore(_: object) -> None:
    pass


@dataclass(frozen=True)
class Progress:
    """The three callbacks of a run: what it has done, what is worth keeping, and what it is doing now."""

    block: Callable[[BlockDone], None] = ignore  # after each block
    note: Callable[[str], None] = logger.info  # a sentence worth keeping: a choice, a fallback, a warning
    doing: Callable[[str], None] = ignore  # the step under way, for a status line; "" once there is none
