"""What the person sees: progress on standard error, results on standard output."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from paredown.compress.recipe import Recipe, shipped_recipes
from paredown.compress.run.pipeline import BlockDone
from paredown.compress.run.plan import Plan

out_console = Console()
err_console = Console(stderr=True, highlight=False)


def show_note(text: str) -> None:
    err_console.print(text, style="dim")


def show_block(done: BlockDone) -> None:
    """One line per block: name, share kept, relative output error, seconds, peak memory."""
    err_console.print(
        f"[{done.index + 1:>3}/{done.total}] {done.name}  kept {done.kept:.3f}  "
        f"error {done.relative_error:.2e}  {done.seconds:.1f} s  peak {done.peak_memory / 1e9:.2f} GB",
        markup=False,
    )


@contextmanager
def now_line() -> Iterator[Callable[[str], None]]:
    """A line below the others that says what is being done, on a terminal; an empty text takes it away."""
    if not err_console.is_terminal:
        yield lambda text: None
        return
    status = err_console.status("")

    def tell(text: str) -> None:
        if not text:
            status.stop()
            return
        status.update(Text(text, style="dim"))
        status.start()

    try:
        yield tell
    finally:
        status.stop()


@contextmanager
def step_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error, told `(done, total)`."""
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


def show_plan(plan: Plan) -> None:
    table = Table(title=f"{plan.family}: {plan.blocks} blocks", title_justify="left", show_header=False, box=None)
    most = "at most " if plan.at_most else ""
    grows = "" if plan.shrinks or plan.at_most else "  the file does NOT shrink"
    rows = {
        "parameters": f"{plan.parameters:,}",
        "targeted": f"{len(plan.targeted)} layers, {plan.targeted_parameters:,} parameters",
        "kept of these": f"{most}{plan.kept_parameters:,}" + (", as the calibration text will tell" if most else ""),
        "of these dense": _some(plan.stay_dense),
        "left as they are": _some(plan.left_out),
        "no method sees": _some(plan.unsupported),
        "bytes": f"{plan.bytes_before / 1e6:,.1f} MB -> {most}{plan.bytes_after / 1e6:,.1f} MB{grows}",
        "disk needed": f"{plan.bytes_after / 1e6:,.1f} MB",
        "memory needed": f"{plan.memory / 1e6:,.0f} MB above what the libraries take",
    }
    if not plan.known_family:
        rows["family"] = "not one that we test: blocks were found by structure"
    for key, value in rows.items():
        table.add_row(key, value)
    out_console.print(table)


def show_recipes() -> None:
    table = Table("recipe", "method", "what it does", box=None)
    for name, recipe in shipped_recipes().items():
        table.add_row(name, recipe.method, recipe.description)
    out_console.print(table)


def show_recipe(name: str) -> None:
    out_console.print(yaml.safe_dump(Recipe.load(name).to_dict(), sort_keys=False, allow_unicode=True), end="")


def _some(names: list[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) + more) or "nothing"
