"""What the user sees: progress on standard error, results on standard output."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import yaml
from rich.table import Table
from rich.text import Text

from paredown.compress.progress import BlockDone
from paredown.compress.recipe import Recipe, shipped_recipes
from paredown.compress.run.curve import LossCurve
from paredown.compress.run.plan import Plan
from paredown.evaluation.terminal import err_console, out_console


def show_block(done: BlockDone) -> None:
    """Print one line for a block: name, share kept, relative output error, seconds, peak memory."""
    err_console.print(
        f"[{done.index + 1:>3}/{done.total}] {done.name}  kept {done.kept:.3f}  "
        f"error {done.relative_error:.2e}  {done.seconds:.1f} s  peak {done.peak_memory / 1e9:.2f} GB",
        markup=False,
    )


@contextmanager
def now_line() -> Iterator[Callable[[str], None]]:
    """A status line at the bottom of a terminal: call it with the current step, or with "" to hide it."""
    if not err_console.is_terminal:
        yield lambda text: None
        return
    status = err_console.status("")

    def show(text: str) -> None:
        if not text:
            status.stop()
            return
        status.update(Text(text, style="dim"))
        status.start()

    try:
        yield show
    finally:
        status.stop()


def show_plan(plan: Plan) -> None:
    """Print a plan as a table."""
    table = Table(title=f"{plan.family}: {plan.blocks} blocks", title_justify="left", show_header=False, box=None)
    most = "at most " if plan.at_most else ""

    def share(parameters: int) -> str:
        return f"{parameters / max(plan.parameters, 1):.1%}"

    grows = "" if plan.shrinks or plan.at_most else "  the file does NOT shrink"
    rows = {
        "parameters": f"{plan.parameters:,}",
        "targeted": f"{share(plan.targeted_parameters)} of the model: {len(plan.targeted)} layers, "
        f"{plan.targeted_parameters:,} parameters",
        "not targeted": ", ".join(f"{share(count)} {why}" for why, count in plan.untargeted.items()) or "nothing",
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
    if plan.dense_export:
        rows["dense export"] = plan.dense_export
    if plan.remarks:
        rows["remarks"] = "\n".join(plan.remarks)
    for key, value in rows.items():
        table.add_row(key, value)
    out_console.print(table)


def show_curve(curve: LossCurve) -> None:
    """Print what several shares would lose as a table."""
    table = Table(box=None)
    for key in curve.rows[0] if curve.rows else ():
        table.add_column(key, justify="right")
    for row in curve.rows:
        table.add_row(*(str(value) if isinstance(value, int) else f"{value:.3g}" for value in row.values()))
    out_console.print(table)
    out_console.print(curve.caption, style="dim", markup=False)


def show_recipes() -> None:
    """Print the shipped recipes as a table."""
    table = Table("recipe", "method", "what it does", box=None)
    for name, recipe in shipped_recipes().items():
        table.add_row(name, recipe.method, recipe.description)
    out_console.print(table)


def show_recipe(name: str) -> None:
    """Print one recipe as YAML. Raises PareError if there is none of this name."""
    out_console.print(yaml.safe_dump(Recipe.load(name).to_dict(), sort_keys=False, allow_unicode=True), end="")


def _some(names: list[str], most: int = 6) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) + more) or "nothing"
