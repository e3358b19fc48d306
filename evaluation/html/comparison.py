"""Finished runs side by side as one page, with a picture of what each costs and loses."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from paredown.evaluation.compare import Cost, Group, Loss
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


def pareto(name: str, group: Group, text: str, cost: Cost, loss: Loss) -> Markup:
    """A point for each run and one for the dense model, with errors and the front."""
    points = [
        (run.name, price, lost) for run in group.runs if (price := run.cost(cost)) and (lost := run.loss(loss, text))
    ]
    dense = {"bytes": group.bytes, "parameters": group.parameters, "latency": None}[cost]

    def draw(figure: "Figure") -> None:
        axes = figure.add_subplot()
        marks = [(price, lost.value) for _, price, lost in points]
        wide, tall = (max(ends) - min(ends) for ends in zip(*marks, strict=True))
        front = _front(marks)
        axes.plot(
            *zip(*front, strict=True), color=svg.INK, linestyle="--", linewidth=0.8, alpha=0.5, drawstyle="steps-post"
        )
        for label, price, lost in points:
            axes.errorbar(price, lost.value, lost.stderr or 0.0, fmt="o", markersize=5, color=svg.AFTER, linewidth=1.2)
            above = any(0 < y - lost.value < 0.06 * tall and abs(x - price) < 0.2 * wide for x, y in marks)
            _name(axes, label, price, lost.value, -10 if above else 5)
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

    return svg.picture(name, f"{LOSSES[loss]} against {COSTS[cost]} of each run", (7.2, 4.2), draw)


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def _name(axes: Any, label: str, across: float, up: float, higher: int = 5) -> None:
    """Write the name beside a point, `higher` than it by so many points of type."""
    axes.annotate(label, (across, up), (6, higher), textcoords="offset points", fontsize=8)
