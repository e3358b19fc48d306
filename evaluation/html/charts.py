"""Charts of a report: losses predicted and measured, divergence by position, reconstruction, bytes and seconds by part."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from paredown.evaluation.html.svg import AFTER, BEFORE, INK, LINE, SERIES, picture
from paredown.evaluation.schema import Layer, PositionDivergence
from paredown.evaluation.tables import bytes_text, layer_kind, number, seconds_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

THIN: dict[str, Any] = {"markersize": 3, "linewidth": 1.4}


def losses_chart(layers: Sequence[Layer]) -> Markup | None:
    """Measured against predicted loss of every layer that has both, in the colour of its kind; None if there are none."""
    points: dict[str, list[tuple[float, float]]] = {}
    for layer in layers:
        predicted, measured = layer.get("predicted_loss"), layer.get("measured_loss")
        if predicted and measured:
            points.setdefault(layer_kind(layer["name"]), []).append((predicted, measured))
    if not points:
        return None

    def draw(figure: "Figure") -> None:
        axes = figure.add_subplot()
        ends = [loss for pairs in points.values() for pair in pairs for loss in pair]
        span = (min(ends) / 1.3, max(ends) * 1.3)
        axes.plot(span, span, color=INK, linewidth=0.8, linestyle="--", label="as predicted")
        for i, (kind, pairs) in enumerate(points.items()):
            across, up = zip(*pairs, strict=True)
            axes.scatter(across, up, s=16, color=SERIES[i % len(SERIES)], label=kind, alpha=0.85)
        axes.set(xscale="log", yscale="log", xlim=span, ylim=span, xlabel="predicted loss", ylabel="measured loss")
        plain_ticks(axes.xaxis, axes.yaxis)
        axes.set_aspect("equal")
        figure.legend(loc="outside right upper")

    return picture("losses", "Measured against predicted loss of each layer", (6.4, 3.8), draw)


def position_chart(texts: Mapping[str, Sequence[PositionDivergence]]) -> Markup:
    """Mean KL by position in the window, with standard errors: one curve for each text."""

    def draw(figure: "Figure") -> None:
        axes = figure.add_subplot()
        for i, (text, bins) in enumerate(texts.items()):
            middles = [(b["first"] + b["last"]) / 2 for b in bins]
            colour, errors = SERIES[i % len(SERIES)], [b["kl_stderr"] or 0.0 for b in bins]
            axes.errorbar(middles, [b["kl_mean"] for b in bins], errors, label=text, color=colour, marker="o", **THIN)
        axes.set(xlabel="tokens before it in the window", ylabel="KL, nats")
        _calm(figure, axes, len(texts))

    return picture("positions", "KL divergence by position in the window", (7.2, 2.6), draw)


def lines_chart(
    name: str,
    title: str,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    across: str,
    up: str,
    *,
    log: bool = False,
) -> Markup:
    """Curves of (x, y) by name."""

    def draw(figure: "Figure") -> None:
        axes = figure.add_subplot()
        for i, (label, points) in enumerate(curves.items()):
            x, y = zip(*points, strict=True)
            marker = "o" if len(points) < 60 else None
            axes.plot(x, y, color=SERIES[i % len(SERIES)], label=label, marker=marker, **THIN)
        axes.set(xlabel=across, ylabel=up, yscale="log" if log else "linear")
        _calm(figure, axes, len(curves), log=log)

    return picture(name, title, (7.2, 2.6), draw)


def pairs_chart(title: str, parts: Mapping[str, tuple[float, float]]) -> Markup:
    """Bytes before and after of each part, as pairs of horizontal bars."""

    def draw(figure: "Figure") -> None:
        axes = figure.add_subplot()
        for i, (before, after) in enumerate(parts.values()):
            axes.barh(i - 0.19, before, 0.36, color=BEFORE, label="before" if i == 0 else None)
            axes.barh(i + 0.19, after, 0.36, color=AFTER, label="after" if i == 0 else None)
            axes.annotate(bytes_text(before), (before, i - 0.19), (3, 0), textcoords="offset points", va="center")
            axes.annotate(bytes_text(after), (after, i + 0.19), (3, 0), textcoords="offset points", va="center")
        _bars(axes, list(parts), max(max(pair) for pair in parts.values()))
        figure.legend(loc="outside upper left", ncols=2)

    return picture("bytes", title, (7.2, 0.55 + 0.42 * len(parts)), draw)


def seconds_chart(title: str, steps: Mapping[str, float]) -> Markup:
    """Seconds of each step, as horizontal bars."""

    def draw(figure: "Figure") -> None:
        axes = figure.add_subplot()
        for i, spent in enumerate(steps.values()):
            axes.barh(i, spent, 0.62, color=AFTER)
            axes.annotate(seconds_text(spent), (spent, i), (3, 0), textcoords="offset points", va="center")
        _bars(axes, list(steps), max(steps.values()))

    return picture("seconds", title, (7.2, 0.3 + 0.25 * len(steps)), draw)


def _calm(figure: "Figure", axes: "Axes", curves: int, *, log: bool = False) -> None:
    """A grid in place of ticks, a vertical scale from zero unless it is logarithmic, and a legend for several curves."""
    if log:
        plain_ticks(axes.yaxis)
    else:
        axes.set_ylim(bottom=0)
    axes.grid(axis="y")
    axes.tick_params(length=0)
    if curves > 1:
        figure.legend(loc="outside upper left", ncols=min(3, curves))


def plain_ticks(*log_axes: "Axis") -> None:
    """Numbers in place of powers of ten, which only a renderer of mathematics could show."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis in log_axes:
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1.0,) if high > 30 * low else (1.0, 2.0, 5.0), numticks=9))
        axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        axis.set_minor_formatter(NullFormatter())


def _bars(axes: "Axes", labels: Sequence[str], longest: float) -> None:
    """Names at the left, no scale: every bar says its value, for which room is left."""
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlim(0, longest * 1.18 or 1)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines["bottom"].set_visible(False)
    axes.spines["left"].set_color(LINE)
