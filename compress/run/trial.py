"""One trial of a sweep: the settings of `compress` as JSON on standard input, a line on standard output for what is done.

echo '{"model": "my-model", "recipe": "wanda-50", "out": "pruned"}' | python -m paredown.compress.run.trial
"""

import json
import signal
import sys
from pathlib import Path
from typing import Any

from paredown.compress.errors import PareError
from paredown.compress.progress import BlockDone
from paredown.compress.run.compress import compress


def main() -> int:
    """0 for done; 1 with a message."""
    signal.signal(signal.SIGTERM, _stop)
    settings = json.load(sys.stdin)
    folder = settings.pop("task_folder", None)
    try:
        compress(
            **settings,
            task_folder=None if folder is None else Path(folder),
            progress=_show,
            note=lambda text: _say(text),
        )
    except PareError as fault:
        _say("\n".join([f"error: {fault}", *getattr(fault, "__notes__", ())]))
        return 1
    return 0


def _stop(number: int, frame: Any) -> None:
    """Leave through the `with` blocks, so that they can clean up."""
    sys.exit(128 + number)


def _show(done: BlockDone) -> None:
    _say(f"[{done.index + 1}/{done.total}] {done.name}  kept {done.kept:.3f}  error {done.relative_error:.2e}")


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
