"""What a person sees while a command works: one live line on a terminal, lines that stay in a log, or nothing at all."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO

import typer
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from paredown.compress.progress import BlockDone, Counted, Pace, logger
from paredown.evaluation.terminal import err_console, in_words, show_note


class Screen:
    """The callbacks of a run. `live` is the line at the bottom of a terminal, None for a log; `quiet` shows nothing."""

    def __init__(self, title: str = "", live: Progress | None = None, quiet: bool = False) -> None:
        self.title, self.live, self.quiet = title, live, quiet
        self.pace: Pace | None = None
        self._line = live.add_task(title, total=None, step="", pace=None) if live else None

    def block(self, done: BlockDone) -> None:
        """A line for a block that is done: name, share kept, relative output error, seconds, peak memory, time left."""
        if self.pace is not None:
            self.pace.reach(self.pace.done + 1)
        left = f"  {in_words(self.pace.left)} left" if self.pace and self.pace.left else ""
        if not self.quiet:
            err_console.print(
                f"[{done.index + 1:>3}/{done.total}] {done.name}  kept {done.kept:.3f}  error {done.relative_error:.2e}  "
                f"{done.seconds:.1f} s  peak {done.peak_memory / 1e9:.2f} GB{left}",
                markup=False,
            )

    def note(self, text: str) -> None:
        """A line worth keeping. Of steps that are counted a terminal keeps none: its live line counts them."""
        left = ""
        if isinstance(text, Counted):
            self.count(text.phase, text.done, text.total)
            left = f", {in_words(self.pace.left)} left" if self.pace and self.pace.left else ""
        if not self.quiet and not (self.live and isinstance(text, Counted)):
            show_note(text + left)

    def doing(self, text: str) -> None:
        """What is under way; "" once nothing is."""
        if isinstance(text, Counted):
            self.count(text.phase, text.done, text.total)
        elif text:
            logger.debug(text)
        if self.live and self._line is not None:
            self.live.update(self._line, step="" if isinstance(text, Counted) else text)

    def bar(self, done: int, total: int) -> None:
        """So many steps of the only kind that there is are done."""
        self.count(self.title, done, total)

    def count(self, phase: str, done: int, total: int) -> None:
        """So many steps of one kind are done."""
        if self.pace is None or (self.pace.phase, self.pace.total) != (phase, total) or done < self.pace.done:
            self.pace = Pace(phase, total, done)
            if self.live and self._line is not None:
                self.live.reset(self._line, description=phase, total=total, step="", pace=self.pace)
        self.pace.reach(done)
        if self.live and self._line is not None:
            self.live.update(self._line, completed=done)


class TimeLeft(ProgressColumn):
    """The time left by all steps that were done here. rich's own column forgets what is older than half a minute."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        pace: Pace | None = task.fields["pace"]
        left = None if pace is None else pace.left
        return Text("" if left is None else f"{in_words(left)} left", style="progress.remaining")


@contextmanager
def screen(title: str = "", quiet: bool = False, verbose: bool = False) -> Iterator[Screen]:
    """What a long command shows. `title` names its steps where a run does not; `verbose` shows the logger `paredown` too."""
    if quiet and verbose:
        raise typer.BadParameter("--quiet shows less and --verbose shows more: give one of them.")
    if quiet:
        with redirect_stderr(StringIO()):  # libraries draw bars of their own
            yield Screen(title, quiet=True)
        return
    with _logged(verbose):
        if not err_console.is_terminal:
            yield Screen(title)
            return
        step = TextColumn("{task.fields[step]}", style="dim", table_column=Column(ratio=1, no_wrap=True))
        columns = (
            TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TimeLeft(), step,
        )  # fmt: skip
        with Progress(*columns, console=err_console, transient=True, expand=True) as live:
            yield Screen(title, live)


@contextmanager
def _logged(verbose: bool) -> Iterator[None]:
    """While the `with` block runs, what the logger `paredown` says stands on standard error, if a person asked for it."""
    if not verbose:
        yield
        return
    handler, level = RichHandler(console=err_console, show_path=False, rich_tracebacks=False), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
