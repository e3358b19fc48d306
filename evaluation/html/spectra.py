"""Singular values of factored layers, and where they were cut."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup

from paredown.evaluation.html.charts import plain_ticks
from paredown.evaluation.html.heat import block_of
from paredown.evaluation.html.svg import INK, SERIES, picture
from paredown.evaluation.schema import Layer
from paredown.evaluation.tables import layer_kind

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def spectra_chart(layers: Sequence[Layer]) -> Markup | None:
    """Of the first, the middle and the last block with spectra: a curve for each kind, a dot where it was cut.

    None if no layer has one.
    """
    blocks: dict[int, dict[str, Layer]] = {}
    for layer in layers:
        if "spectrum" in layer:
            blocks.setdefault(block_of(layer["name"]) or 0, {})[layer_kind(layer["name"])] = layer
    if not blocks:
        return None
    numbers = sorted(blocks)
    shown = sorted({numbers[0], numbers[len(numbers) // 2], numbers[-1]})
    kinds = list(dict.fromkeys(kind for number in shown for kind in blocks[number]))

    def draw(figure: "Figure") -> None:
        panels, legend = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0], {}
        for axes, number in zip(panels, shown, strict=True):
            for kind, layer in blocks[number].items():
                colour, curve = SERIES[kinds.index(kind) % len(SERIES)], _relative(layer)
                legend[kind] = axes.plot(*zip(*curve.items(), strict=True), color=colour, linewidth=1.2)[0]
                if (cut := layer.get("rank", 0)) in curve:
                    axes.plot(cut, curve[cut], "o", markersize=5, color=colour, markeredgecolor=INK)
            axes.set(yscale="log", xlabel="rank", xlim=(0, None), title=f"block {number}")
            axes.grid(axis="y")
            axes.tick_params(length=0, which="both")
        panels[0].set_ylabel("singular value, of the first")
        plain_ticks(panels[0].yaxis)
        figure.legend(list(legend.values()), list(legend), loc="outside lower center", ncols=min(4, len(legend)))

    return picture("spectra", "Singular values by rank, and where they were cut", (7.2, 3.4), draw)


def _relative(layer: Layer) -> dict[int, float]:
    """Singular values by rank, relative to the first; without zeros, which a logarithm has not."""
    spectrum = layer["spectrum"]
    pairs = zip(spectrum["ranks"], spectrum["energy"], strict=True)
    return {rank: (energy / spectrum["energy"][0]) ** 0.5 for rank, energy in pairs if energy > 0}
