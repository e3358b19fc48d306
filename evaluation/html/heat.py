"""Heat maps: one number for each block and kind of layer."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from markupsafe import Markup

from paredown.evaluation.html.svg import picture
from paredown.evaluation.tables import layer_kind, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Grid = Mapping[tuple[int, str], float]  # (block, kind) -> value


@dataclass(frozen=True)
class Scale:
    """How values become colours and words."""

    label: str
    log: bool = False
    share: bool = False  # values from 0 to 1, in percent

    def told(self, value: float) -> str:
        return f"{value:.1%}" if self.share else number(value)


def block_of(name: str) -> int | None:
    """The number of the block that a layer lies in: 3 of `model.layers.3.mlp.experts.7.up_proj`; None outside all blocks."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found[1]) if found else None


def grid_of(values: Mapping[str, float | None]) -> Grid:
    """Values of layers by block and kind; the mean where a block holds several of a kind, such as experts."""
    cells: dict[tuple[int, str], list[float]] = {}
    for name, value in values.items():
        block = block_of(name)
        if block is not None and value is not None:
            cells.setdefault((block, layer_kind(name)), []).append(value)
    return {cell: fmean(several) for cell, several in cells.items()}


def varies(grid: Grid) -> bool:
    """Whether a map of it would show more than one colour."""
    return len(grid) > 1 and max(grid.values()) - min(grid.values()) > 0.002 * abs(max(grid.values()))


def heat_map(name: str, title: str, grid: Grid, scale: Scale) -> Markup:
    """Blocks from left to right, kinds of layers from top to bottom; each cell says its value when it is pointed at."""
    kinds = list(dict.fromkeys(kind for _, kind in grid))
    blocks = range(max(block for block, _ in grid) + 1)
    titles = [f"block {b}, {k}: {scale.told(grid[b, k]) if (b, k) in grid else 'none'}" for k in kinds for b in blocks]

    def draw(figure: "Figure") -> None:
        _draw(figure, grid, blocks, kinds, scale)

    return picture(name, title, (7.2, max(1.5, 0.9 + 0.24 * len(kinds))), draw, titles)


def _draw(figure: "Figure", grid: Grid, blocks: Sequence[int], kinds: Sequence[str], scale: Scale) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm, Normalize
    from numpy import array, geomspace, linspace, ma, nan

    values = ma.masked_invalid(array([[grid.get((block, kind), nan) for block in blocks] for kind in kinds]))
    low, high = float(values.min()), float(values.max())
    if scale.log:
        values, low = ma.maximum(values, high * 1e-6), max(low, high * 1e-6)
    norm = (LogNorm if scale.log and high > low else Normalize)(low, high)
    axes = figure.add_subplot()
    colours = colormaps["viridis"].resampled(64)  # every colour of the bar is an element of the SVG
    cells = axes.pcolormesh(values, norm=norm, cmap=colours, linewidth=0.4, edgecolor="face")
    cells.set_gid("cells")
    axes.set_yticks([i + 0.5 for i in range(len(kinds))], kinds)
    axes.set_ylim(len(kinds), 0)
    step = max(1, round(len(blocks) / 16))
    axes.set_xticks([b + 0.5 for b in blocks[::step]], [str(b) for b in blocks[::step]])
    axes.set_xlabel("block")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(cells, ax=axes, label=scale.label if len(kinds) > 3 else "", pad=0.02, fraction=0.05)
    if bar.solids is not None:
        bar.solids.set(rasterized=False, edgecolor="face")
    bar.outline.set_visible(False)
    bar.ax.minorticks_off()
    ticks = (geomspace if scale.log else linspace)(low, high, 4)
    bar.set_ticks(ticks.tolist(), labels=[scale.told(tick) for tick in ticks])
