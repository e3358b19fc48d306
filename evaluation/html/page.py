"""report.html: the report as one page that needs nothing else. A pure function of the report."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from paredown.evaluation.html import svg
from paredown.evaluation.html.charts import lines_chart, losses_chart, pairs_chart, position_chart, seconds_chart
from paredown.evaluation.html.headline import headline_tiles, lead_words, recipe_name
from paredown.evaluation.html.heat import Scale, block_of, grid_of, heat_map, varies
from paredown.evaluation.html.render import render
from paredown.evaluation.html.spectra import spectra_chart
from paredown.evaluation.recovery_words import recovery_lines
from paredown.evaluation.report import calibration_words, portable_command, scores
from paredown.evaluation.schema import Layer, Report, check_report
from paredown.evaluation.tables import (
    Rows,
    base_name,
    bytes_text,
    kinds_text,
    layer_rows,
    number,
    rank_rows,
    seconds_text,
    size_rows,
    text_name,
)

PAGE = "report.html"


@dataclass(frozen=True)
class Chart:
    """A picture with its caption."""

    title: str
    note: str
    svg: Markup


def report_page(report: Report) -> str:
    """The page. Without matplotlib it has tables in place of pictures, and says what to install."""
    drawn = svg.installed()
    return render(
        "report.html",
        title=f"{base_name(report['model'])}, {recipe_name(report)}",
        lead=lead_words(report),
        tiles=headline_tiles(report),
        warnings=report.get("warnings", []),
        fallbacks=report["fallbacks"],
        scores=scores(report),
        score_charts=_score_charts(report) if drawn else [],
        samples=_samples(report),
        layers=[rows for rows in (_kinds(report), rank_rows(report["layers"])) if rows],
        layer_charts=_layer_charts(report) if drawn else [],
        every_layer=_every_layer(report["layers"]),
        size=replace(size_rows(report), title=""),
        size_charts=_size_charts(report) if drawn else [],
        parts_rows=_parts_rows(report, drawn),
        time=_time_rows(report, drawn),
        time_charts=_time_charts(report) if drawn else [],
        command=portable_command(report.get("command") or ""),
        provenance=_provenance(report),
        recipe=yaml.safe_dump(dict(report["recipe"]), sort_keys=False, allow_unicode=True, width=100).strip(),
        schema=report["schema"],
        install="" if drawn else svg.HOW_TO_INSTALL,
    )


def write_page(folder: Path) -> Path:
    """Make report.html of `folder` again from its report.json. Raises PareError if that is no report."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    check_report(report)
    path = folder / PAGE
    path.write_text(report_page(report), encoding="utf-8", newline="\n")
    return path


def _score_charts(report: Report) -> list[Chart]:
    """KL by position in the window."""
    texts = {text_name(e): e["divergence"]["by_position"] for e in report["evaluation"] if "divergence" in e}
    if not any(texts.values()):
        return []
    note = "Mean over the tokens of a stretch, ± one standard error."
    return [Chart("KL divergence by position in the window.", note, position_chart(texts))]


def _samples(report: Report) -> Rows:
    """How both models go on after a few prompts."""
    rows = ((s["prompt"], s.get("before", ""), s["after"]) for s in report.get("samples", []))
    return Rows("", ("prompt", "before", "after"), tuple(rows), ("The likeliest token each time.",))


def _kinds(report: Report) -> Rows | None:
    return layer_rows(report["layers"]) if report["layers"] else None


def _layer_charts(report: Report) -> list[Chart]:
    """Heat maps of errors and kept shares, losses as predicted, and what reconstruction gained."""
    layers = report["layers"]
    charts = []
    errors = grid_of({layer["name"]: layer["relative_error"] for layer in layers})
    if varies(errors):
        picture = heat_map("errors", "Relative error by block and kind", errors, Scale("relative error", log=True))
        charts.append(Chart("Relative error by block and kind of layer.", "Point at a cell for its value.", picture))
    kept = grid_of({layer["name"]: layer["kept"] for layer in layers} or _kept_units(report))
    if varies(kept):
        picture = heat_map("kept", "Kept share by block and kind", kept, Scale("kept", share=True))
        charts.append(Chart("Kept share by block and kind of layer.", "", picture))
    if spectra := spectra_chart(layers):
        note = "In the method's own metric, of some blocks; a dot is the rank that was kept."
        charts.append(Chart("Singular values, and where they were cut.", note, spectra))
    if losses := losses_chart(layers):
        charts.append(
            Chart("Loss as predicted on the dense model, and as measured.", "A point for each layer.", losses)
        )
    for i, step in enumerate(report.get("recovery", [])):
        curve = {"held-out text": [(point[0], point[1]) for point in step["curve"]]}
        if curve["held-out text"]:
            picture = lines_chart(f"recovery-{i}", "Recovery", curve, "tokens seen", "KL from the teacher, nats")
            charts.append(Chart("Divergence from the teacher while the model was trained.", "Held-out text.", picture))
    if tuned := report.get("reconstruction"):
        blocks = [(block_of(entry["block"]) or 0, entry) for entry in tuned]
        curves = {
            "before tuning": [(float(i), entry["before"]) for i, entry in blocks],
            "after tuning": [(float(i), entry["after"]) for i, entry in blocks],
        }
        picture = lines_chart("tuned", "Error of each block", curves, "block", "error of the output", log=True)
        charts.append(Chart("Error of each block's output, before and after it was tuned.", "", picture))
    return charts


def _kept_units(report: Report) -> dict[str, float | None]:
    """Share of units that stay of each group, where blocks have sizes of their own."""
    sizes = report["structure"].get("sizes", {}) if "structure" in report else {}
    return {name: after / before for name, (before, after) in sizes.items()}


def _every_layer(layers: Sequence[Layer]) -> Rows:
    headers = ("layer", "method", "kept", "rank", "relative error", "seconds")
    rows = (
        (
            layer["name"],
            layer["method"],
            f"{layer['kept']:.1%}",
            str(layer.get("rank", "")),
            "" if layer["relative_error"] is None else number(layer["relative_error"]),
            f"{layer['seconds']:.1f}",
        )
        for layer in layers
    )
    return Rows("", headers, tuple(rows))


def _size_charts(report: Report) -> list[Chart]:
    parts = _large_parts(report)
    if not parts:
        return []
    return [Chart("Bytes on disk by part.", "", pairs_chart("Bytes by part, before and after", parts))]


def _large_parts(report: Report) -> dict[str, tuple[int, int]]:
    """Bytes before and after of each part, the largest first; parts below a hundredth of the whole in one."""
    parts = sorted(report.get("parts", []), key=lambda part: -part["before"])
    least = report["bytes"]["before"] / 100
    large = {p["part"]: (p["before"], p["after"]) for p in parts if max(p["before"], p["after"]) >= least}
    small = [part for part in parts if part["part"] not in large]
    rest = {"all else": (sum(p["before"] for p in small), sum(p["after"] for p in small))}
    return large | rest if small else large


def _parts_rows(report: Report, drawn: bool) -> Rows:
    """Bytes by part, where no picture tells of them."""
    parts = {} if drawn else _large_parts(report)
    rows = ((part, bytes_text(before), bytes_text(after)) for part, (before, after) in parts.items())
    return Rows("Bytes by part", ("part", "before", "after"), tuple(rows))


def _steps(report: Report) -> dict[str, float]:
    """Seconds by step, the longest first, with what no step took; `forward` is contained in others."""
    seconds: Mapping[str, Any] = report["seconds"]
    steps = {step: spent for step, spent in seconds.items() if step not in ("total", "forward")}
    steps["all else"] = seconds["total"] - sum(steps.values())
    longest = sorted(steps.items(), key=lambda step: -step[1])
    return {step: spent for step, spent in longest if spent >= 0.05} or dict(longest[:1])


def _time_charts(report: Report) -> list[Chart]:
    return [Chart("Time by step.", "", seconds_chart("Seconds by step", _steps(report)))]


def _time_rows(report: Report, drawn: bool) -> Rows:
    peak: Mapping[str, Any] = report["peak_memory_bytes"]
    rows = [("time in all", seconds_text(report["seconds"]["total"]))]
    rows += [] if drawn else [(step, seconds_text(spent)) for step, spent in _steps(report).items()]
    rows += [(f"peak memory, {place}", bytes_text(count)) for place, count in peak.items() if count]
    return Rows("", ("", ""), tuple(rows))


def _provenance(report: Report) -> list[tuple[str, str]]:
    """What is needed to do it again."""
    model, device = report["model"], report.get("device")
    threads = f", {device['threads']} threads" if device and "threads" in device else ""
    facts = [
        ("Model", f"{base_name(model)} ({model['family']}, {model['parameters']:,} parameters)"),
        ("Revision", model["revision"] or ""),
        ("Calibration", calibration_words(report["calibration"])),
        *(("Recovery", line) for line in recovery_lines(report)),
        ("Format", report.get("format", "")),
        *(("Runs in", f"{name}: {how}") for name, how in report.get("engines", {}).items()),
        ("Left dense", kinds_text(report.get("left_dense", []))),
        ("Seen by no method", kinds_text(report.get("unsupported", []))),
        ("Date", report.get("date", "")),
        ("Device", f"{device['name']} ({device['type']}{threads})" if device else ""),
        ("Precision", report.get("dtype", "")),
        ("Versions", ", ".join(f"{name} {version}" for name, version in report["versions"].items())),
        ("Citation", str(report["recipe"].get("citation") or "")),
    ]
    return [(name, value) for name, value in facts if value]
