"""Results on standard output, as tables."""

from typing import TYPE_CHECKING

import yaml
from rich.table import Table

from paredown.compress.recipe import Recipe, shipped_names
from paredown.evaluation.terminal import in_words, out_console

if TYPE_CHECKING:
    from paredown.compress.run.curve import LossCurve
    from paredown.compress.run.plan import Plan


def show_plan(plan: "Plan") -> None:
    """Print a plan as a table."""
    table = Table(title=f"{plan.family}: {plan.blocks} blocks", title_justify="left", show_header=False, box=None)
    most = "at most " if plan.at_most else ""

    def share(parameters: int) -> str:
        return f"{parameters / max(plan.parameters, 1):.1%}"

    grows = "" if plan.shrinks or plan.at_most else "  the file does NOT shrink"
    free = "" if plan.disk_free is None else f", {plan.disk_free / 1e6:,.0f} MB are free there"
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
        "disk needed": f"{plan.bytes_after / 1e6:,.1f} MB" + free,
        "memory needed": f"{plan.memory / 1e6:,.0f} MB above what the libraries take",
    }
    if plan.seconds:
        parts = sorted(plan.seconds.items(), key=lambda part: -part[1])
        told = ", ".join(f"{name} {in_words(seconds)}" for name, seconds in parts if seconds >= 1)
        rows["time"] = f"about {in_words(sum(plan.seconds.values()))} as busy as this machine is now ({told})"
    if not plan.known_family:
        rows["family"] = "not one that we test: blocks were found by structure"
    if plan.dense_export:
        rows["dense export"] = plan.dense_export
    if plan.engines:
        rows["runs in"] = "\n".join(f"{name}: {how}" for name, how in plan.engines.items())
    if plan.remarks:
        rows["remarks"] = "\n".join(plan.remarks)
    for key, value in rows.items():
        table.add_row(key, value)
    out_console.print(table)


def show_curve(curve: "LossCurve") -> None:
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
    for name in shipped_names():
        recipe = Recipe.outline(name)
        table.add_row(name, recipe.method if recipe.compresses else "recover", recipe.description)
    out_console.print(table)


def show_recipe(name: str) -> None:
    """Print one recipe as YAML. Raises PareError if there is none of this name."""
    out_console.print(yaml.safe_dump(Recipe.outline(name).to_dict(), sort_keys=False, allow_unicode=True), end="")


def _some(names: list[str], most: int = 6) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) + more) or "nothing"
