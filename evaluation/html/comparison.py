"""Finished runs side by side as one page, with a picture of what each costs and loses."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from paredown.evaluation.compare import Cost, Group, Loss, Run, Value
from paredown.evaluation.compare_tables import heading, tables
from paredown.evaluation.html import svg
from paredown.evaluation.html.page import Chart
from paredown.evaluation.html.render import render
from paredown.evaluation.tables import bytes_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COSTS: dict[Cost, str] = {
    "bytes": "weights on disk",
    "parameters": "parameters",
    "latency": "seconds per decoded token",
}
LOSSES: dict[Loss, str] = {"perplexity": "rise of log perplexity, nats", "kl": "KL from the dense model, nats"}

SHORT = 16  # characters beside a point


def comparison_page(groups: Sequence[Group], cost: Cost = "bytes", loss: Loss = "perplexity") -> str:
    """The page. Without matplotlib it has the tables only, and says what to install."""
    drawn = svg.installed()
    parts = [
        {
            "title": heading(group),
            "charts": _charts(i, group, cost, loss) if drawn and len(group.runs) > 1 else [],
            "tables": tables(group),
            "remarks": group.remarks,
        }
        for i, group in enumerate(groups)
    ]
    return render(
        "comparison.html", title="Runs side by side", groups=parts, install="" if drawn else svg.HOW_TO_INSTALL
    )


def _charts(number: int, group: Group, cost: Cost, loss: Loss) -> list[Chart]:
    return [
        Chart(
            f"{LOSSES[loss].capitalize()}, against {COSTS[cost]}.",
            f"{text}. Bars: one standard error. Dashed: runs that no other beats.",
            pareto(f"pareto-{number}-{i}", group, text, cost, loss),
        )
        for i, text in enumerate(group.texts)
    ]


@dataclass(frozen=True)
class _Point:
    """One run in the picture."""

    series: str  # its recipe, where several runs have it
    label: str
    price: float
    lost: Value


def pareto(name: str, group: Group, text: str, cost: Cost, loss: Loss) -> Markup:
    """A point for each run and one for the dense model, with errors and the front.

    Where recipes were run several times, each has a colour and a line, and a point says in what it differs.
    """
    points = _points(group, text, cost, loss)
    series = list(dict.fromkeys(point.series for point in points))
    dense = {"bytes": group.bytes, "parameters": group.parameters, "latency": None}[cost]

    def draw(figure: "Figure") -> None:
        axes = figure.add_subplot()
        marks = [(point.price, point.lost.value) for point in points]
        wide, tall = (max(ends) - min(ends) for ends in zip(*marks, strict=True))
        front = _front(marks)
        axes.plot(
            *zip(*front, strict=True), color=svg.INK, linestyle="--", linewidth=0.8, alpha=0.5, drawstyle="steps-post"
        )
        for i, recipe in enumerate(series):
            colour = svg.SERIES[i % len(svg.SERIES)] if recipe else svg.AFTER
            own = sorted(
                (point.price, point.lost.value, point.lost.stderr or 0.0) for point in points if point.series == recipe
            )
            line = "o-" if recipe else "o"
            prices, losses, errors = zip(*own, strict=True)
            axes.errorbar(prices, losses, errors, fmt=line, markersize=5, color=colour, linewidth=1.2, label=recipe)
        for point, (price, lost) in zip(points, marks, strict=True):
            above = any(0 < y - lost < 0.06 * tall and abs(x - price) < 0.2 * wide for x, y in marks)
            _name(axes, point.label, price, lost, -10 if above else 5)
        if dense:
            axes.plot(dense, 0, "D", markersize=5, color=svg.BEFORE)
            _name(axes, "dense", dense, 0)
        axes.set(xlabel=COSTS[cost], ylabel=LOSSES[loss])
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        axes.margins(x=0.12)
        if cost == "bytes":
            axes.xaxis.set_major_formatter(lambda value, _: bytes_text(value))
        axes.grid()
        axes.tick_params(length=0)
        if any(series):
            figure.legend(loc="outside upper left", ncols=min(4, len(series)))

    return svg.picture(name, f"{LOSSES[loss]} against {COSTS[cost]} of each run", (7.2, 4.2), draw)


def _points(group: Group, text: str, cost: Cost, loss: Loss) -> list[_Point]:
    """The runs that have both figures. Each is called by its own name unless all recipes were run several times."""
    methods, names = [run.method for run in group.runs], group.differing()
    several = all(methods.count(method) > 1 for method in methods)

    def label(run: Run) -> str:
        return ", ".join(str(run.options[name]) for name in names if name in run.options)

    several = several and all(0 < len(label(run)) <= SHORT for run in group.runs)
    return [
        _Point(run.method if several else "", label(run) if several else run.name, price, lost)
        for run in group.runs
        if (price := run.cost(cost)) and (lost := run.loss(loss, text))
    ]


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def _name(axes: Any, label: str, across: float, up: float, higher: int = 5) -> None:
    """Write the name beside a point, `higher` than it by so many points of type."""
    axes.annotate(label, (across, up), (6, higher), textcoords="offset points", fontsize=8)
