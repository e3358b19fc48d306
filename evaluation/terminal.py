"""What a person sees of long work: notes and a progress bar with the time left, on standard error."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

out_console = Console()
err_console = Console(stderr=True, highlight=False)


def in_words(seconds: float) -> str:
    """Hours, minutes and seconds: 0:01:05."""
    return str(timedelta(seconds=round(seconds)))


def show_note(text: str) -> None:
    """A line worth reading."""
    err_console.print(text, style="dim")


@contextmanager
def step_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar; what it yields is called with (steps done, steps)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err_console, transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
