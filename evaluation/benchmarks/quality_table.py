"""The table of `quality`: rises with paired errors and ratios, for the terminal and for BENCHMARKS.md."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from paredown.compress.numerics.perplexity import bootstrap_means

BOOTSTRAP = 0  # its seed: the same windows are drawn for all rows
Entries = Sequence[Mapping[str, Any]]  # what is kept of the runs of one row, one a seed
Rises = Mapping[str, Sequence[Sequence[float]]]  # text -> of each seed, the rise of each window's loss


@dataclass(frozen=True)
class Figure:
    """A mean over seeds with its standard error by bootstrap over windows, and the smallest and largest of the seeds."""

    mean: float
    stderr: float | None
    low: float
    high: float

    def shown(self, digits: int) -> str:
        error = "" if self.stderr is None else f" ± {self.stderr:.{digits}f}"
        seeds = "" if self.low == self.high else f" ({self.low:.{digits}f} to {self.high:.{digits}f})"
        return f"{self.mean:.{digits}f}{error}{seeds}"


@dataclass(frozen=True)
class Line:
    """One row of the table. `ratios` are empty without a baseline."""

    label: str
    group: str
    rises: dict[str, Figure]  # text -> of log perplexity, in nats per token
    ratios: dict[str, Figure]  # text -> over the baseline's rise
    kept: float
    bytes: int
    seconds: dict[str, float]  # step -> mean over seeds


def line_of(label: str, group: str, entries: Entries, rises: Rises, baseline: Rises | None) -> Line:
    """The figures of one row from its runs, and from its and the baseline's rises."""
    of_text = {text: torch.tensor(values, dtype=torch.float64) for text, values in rises.items()}  # (seeds, windows)
    ratios = {}
    if baseline:
        ratios = {text: ratio(own, torch.tensor(baseline[text], dtype=torch.float64)) for text, own in of_text.items()}
    return Line(
        label, group, {text: figure(own) for text, own in of_text.items()}, ratios,
        mean([entry["kept"] for entry in entries]), round(mean([entry["bytes"]["after"] for entry in entries])),
        {step: mean([entry["seconds"].get(step, 0.0) for entry in entries]) for step in entries[0]["seconds"]},
    )  # fmt: skip


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def figure(rises: Tensor) -> Figure:
    """Of rises (seeds, windows). The windows are resampled, all seeds together; a single one has no error."""
    of_seeds = rises.mean(1)  # (seeds,)
    return Figure(
        float(rises.mean()), _deviation(bootstrap_means(rises.mean(0), BOOTSTRAP), rises),
        float(of_seeds.min()), float(of_seeds.max()),
    )  # fmt: skip


def ratio(rises: Tensor, others: Tensor) -> Figure:
    """Of rises over the baseline's, both (seeds, windows); their windows are resampled together."""
    resampled = bootstrap_means(rises.mean(0), BOOTSTRAP) / bootstrap_means(others.mean(0), BOOTSTRAP)  # (resamples,)
    of_seeds = rises.mean(1) / others.mean(1)  # (seeds,)
    mean = float(rises.mean() / others.mean())
    return Figure(mean, _deviation(resampled, rises), float(of_seeds.min()), float(of_seeds.max()))


def _deviation(resampled: Tensor, rises: Tensor) -> float | None:
    spread = float(resampled.std())
    return spread if rises.shape[1] > 1 and math.isfinite(spread) else None


def _headers(texts: Sequence[str]) -> list[str]:
    return ["", *(part for text in texts for part in (text, "ratio")), "kept", "MB", "seconds", "solver", "forward"]


def _cells(line: Line) -> list[str]:
    parts = [line.label]
    for text, rise in line.rises.items():
        parts += [rise.shown(4), line.ratios[text].shown(3) if text in line.ratios else ""]
    seconds = (f"{line.seconds.get(step, 0.0):.1f}" for step in ("total", "compress", "forward"))
    return [*parts, f"{line.kept:.3f}", f"{line.bytes / 1e6:.1f}", *seconds]


def _caption(dense: Mapping[str, float]) -> str:
    told = ", ".join(f"{text} {math.exp(loss):.2f}" for text, loss in dense.items())
    return f"rise of log perplexity over the dense model (perplexity: {told}), and its ratio to the baseline's"


def rich_table(lines: Sequence[Line], dense: Mapping[str, float], title: str) -> Table:
    """For the terminal; dense: the mean loss of the dense model on each text."""
    table = Table(*_headers(list(dense)), title=title, caption=_caption(dense), title_justify="left")
    for i, line in enumerate(lines):
        last = i + 1 == len(lines) or lines[i + 1].group != line.group
        table.add_row(*_cells(line), end_section=last)
    return table


def markdown(lines: Sequence[Line], dense: Mapping[str, float], title: str) -> str:
    """The same for BENCHMARKS.md."""
    headers = _headers(list(dense))
    rows = [headers, ["---"] * len(headers), *(_cells(line) for line in lines)]
    return "\n".join([f"{title}; {_caption(dense)}.", "", *(f"| {' | '.join(row)} |" for row in rows)])
