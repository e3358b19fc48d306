"""How a command ends: a message on standard error, and an exit code."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from paredown.compress.errors import PareError


class _Stopped(BaseException):
    """Raised by Ctrl-C, SIGTERM and SIGHUP. Typer catches KeyboardInterrupt, and not this."""


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP raise _Stopped, so that `with` blocks can clean up. `nohup` still protects from SIGHUP."""

    def stop(number: int, frame: Any) -> None:
        raise _Stopped

    numbers = [signal.SIGINT, signal.SIGTERM]
    if sys.platform != "win32" and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn a PareError and an interruption into a message on standard error and an exit code, as every command does."""
    try:
        with _interruptible():
            yield
    except PareError as fault:
        print(f"error: {fault}", *_notes(fault), sep="\n", file=sys.stderr)
        sys.exit(1)
    except _Stopped as stopped:
        print("interrupted:", *(_notes(stopped) or ["nothing was written"]), file=sys.stderr)
        sys.exit(130)


def _notes(fault: BaseException) -> list[str]:
    return getattr(fault, "__notes__", [])
