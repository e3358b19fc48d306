"""The result of `bench` as a bar chart: an SVG with colours for light and for dark pages."""

from collections.abc import Mapping, Sequence
from html import escape

from paredown.evaluation.schema import BatchSpeed, BenchResult, ModelKey, Phase
from paredown.evaluation.speed_report import PHASES, shown_names, three_digits

WIDTH, PANEL, TOP, BAR, PITCH, GAP = 760, 190, 58, 38, 56, 44
STYLE = """
  text { font-family: system-ui, sans-serif; font-size: 12px; fill: #1f2328 }
  .paper { fill: #ffffff; stroke: #d0d7de }
  .small { font-size: 11px; fill: #59636e }
  .title { font-size: 14px; font-weight: 600 }
  .axis { stroke: #d0d7de }
  .against { fill: #8c959f }
  .model { fill: #0969da }
  .spread { stroke: #1f2328; stroke-width: 1.5 }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc }
    .paper { fill: #0d1117; stroke: #3d444d }
    .small { fill: #9198a1 }
    .axis { stroke: #3d444d }
    .against { fill: #656c76 }
    .model { fill: #4493f8 }
    .spread { stroke: #f0f6fc }
  }
"""


def bench_svg(result: BenchResult) -> str:
    """Bars of tokens per second by batch size: a panel for prefill and one for decode, each with its own scale from zero."""
    names = shown_names(result)
    rows = result["end_to_end"]
    wide = max(WIDTH, 80 + len(rows) * (len(names) * PITCH + GAP))
    height = TOP + len(PHASES) * (PANEL + 50) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {height}" width="{wide}" height="{height}" '
        f'role="img" aria-label="tokens per second by batch">',
        f"<style>{STYLE}</style>",
        f'<rect class="paper" x="0.5" y="0.5" width="{wide - 1}" height="{height - 1}" rx="6"/>',
        *_legend(names, result),
    ]
    for index, phase in enumerate(PHASES):
        parts += _panel(phase, rows, list(names), TOP + index * (PANEL + 50), wide)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _legend(names: Mapping[ModelKey, str], result: BenchResult) -> list[str]:
    used = result["settings"]
    settings = (
        f"{result['device']['name']}, {result['dtype']}, context {used['context']}, {used['decode']} tokens decoded"
    )
    parts, x = [f'<text class="small" x="20" y="46">{escape(settings)}</text>'], 20
    for key, name in names.items():
        parts.append(f'<rect class="{key}" x="{x}" y="15" width="12" height="12" rx="2"/>')
        parts.append(f'<text x="{x + 18}" y="25">{escape(name)}</text>')
        x += 18 + 8 * len(name) + 24
    return parts


def _panel(phase: Phase, rows: Sequence[BatchSpeed], keys: Sequence[ModelKey], top: float, wide: float) -> list[str]:
    """One phase: bars with the median above, a line from the smallest to the largest repeat, and the ratio below."""
    highest = max(row[key][phase]["tokens_per_second"]["high"] for row in rows for key in keys)
    floor, tall = top + PANEL, PANEL - 52
    parts = [
        f'<text class="title" x="20" y="{top + 18}">{phase}, tokens per second</text>',
        f'<line class="axis" x1="20" y1="{floor}" x2="{wide - 20}" y2="{floor}"/>',
    ]
    step = (wide - 40) / len(rows)
    for place, row in enumerate(rows):
        middle = 20 + step * (place + 0.5)
        for index, key in enumerate(keys):
            rate = row[key][phase]["tokens_per_second"]
            x = middle + (index - len(keys) / 2) * PITCH + (PITCH - BAR) / 2
            y, low, high = (floor - tall * value / highest for value in (rate["median"], rate["low"], rate["high"]))
            parts += [
                f'<rect class="{key}" x="{x:.1f}" y="{y:.1f}" width="{BAR}" height="{floor - y:.1f}" rx="2"/>',
                f'<line class="spread" x1="{x + BAR / 2:.1f}" y1="{low:.1f}" x2="{x + BAR / 2:.1f}" y2="{high:.1f}"/>',
                f'<text x="{x + BAR / 2:.1f}" y="{high - 6:.1f}" text-anchor="middle">{three_digits(rate["median"])}</text>',
            ]
        ratio = f", {row['ratio'][phase]:.2f}x" if row["ratio"] else ""
        parts.append(
            f'<text class="small" x="{middle:.1f}" y="{floor + 17}" text-anchor="middle">batch {row["batch"]}{ratio}</text>'
        )
    return parts
