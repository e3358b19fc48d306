"""One trial of a sweep: the settings of `compress` as JSON on standard input, a line on standard output for what is done.

echo '{"model": "my-model", "recipe": "wanda-50", "out": "pruned"}' | python -m paredown.compress.run.trial
"""

import json
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from paredown.compress.errors import PareError
from paredown.compress.progress import BlockDone
from paredown.compress.run.compress import compress


def run_trial(settings: Mapping[str, Any], say: Callable[[str], None]) -> str | None:
    """Run `compress` by these settings; `say` gets a line for what is done. Returns what went wrong, if anything."""
    folder = settings.get("task_folder")
    asked = {**settings, "task_folder": None if folder is None else Path(folder)}
    try:
        compress(**asked, progress=lambda done: say(_line(done)), note=lambda text: say(text))
    except PareError as fault:
        return "\n".join([str(fault), *getattr(fault, "__notes__", ())])
    return None


def main() -> int:
    """0 for done; 1 with a message."""
    signal.signal(signal.SIGTERM, _stop)
    fault = run_trial(json.load(sys.stdin), _say)
    if fault is not None:
        _say(f"error: {fault}")
    return 0 if fault is None else 1


def _stop(number: int, frame: Any) -> None:
    """Leave through the `with` blocks, so that they can clean up."""
    sys.exit(128 + number)


def _line(done: BlockDone) -> str:
    return f"[{done.index + 1}/{done.total}] {done.name}  kept {done.kept:.3f}  error {done.relative_error:.2e}"


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
