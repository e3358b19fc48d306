"""The report of a compression as tables for a terminal. `schema.py` lists its keys."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from paredown.evaluation.recovery_words import recovery_lines
from paredown.evaluation.schema import (
    SCHEMA,
    Calibration,
    CalibrationText,
    EvalResult,
    Report,
    Sample,
    Structure,
    check_report,
)
from paredown.evaluation.seeds import seed_rows
from paredown.evaluation.tables import (
    BEFORE_AFTER,
    Rows,
    base_name,
    bytes_text,
    divergence_rows,
    kinds_text,
    last_part,
    layer_rows,
    perplexity_rows,
    rank_rows,
    seconds_text,
    short,
    size_rows,
    task_rows,
    word_rows,
)

__all__ = [
    "SCHEMA",
    "check_report",
    "listed",
    "markdown_table",
    "render",
    "render_eval",
    "screen_table",
]

SHOWN = 12  # fallbacks or warnings on a screen or card; report.json holds them all


def render(report: Report) -> Group:
    """The report for a terminal: scores, sizes, layers, time and memory, fallbacks and warnings."""
    head = Text.assemble((base_name(report["model"]), "bold"), "  ", recipe_words(report["recipe"]))
    tables = [screen_table(rows) for rows in results(report)]
    if report["layers"]:
        tables.append(screen_table(layer_rows(report["layers"])))
    if ranks := rank_rows(report["layers"]):
        tables.append(screen_table(ranks))
    return Group(
        head,
        *tables,
        *sample_texts(report.get("samples", [])),
        *map(Text, facts(report)),
        *listed("Fallbacks", report["fallbacks"]),
        *listed("Warnings", report.get("warnings", [])),
    )


def render_eval(result: EvalResult) -> Group:
    """The scores of `evaluate` for a terminal: of one model, or of two side by side where `against` names the dense one."""
    name = base_name(result["model"])
    against = base_name(result["against"]) if result.get("against") else None
    labels = (f"{against} (dense)", name if name != against else f"{name} (compressed)") if against else BEFORE_AFTER
    tables = [perplexity_rows(result["evaluation"], labels)] if result["evaluation"] else []
    further = (word_rows(result["evaluation"], labels), divergence_rows(result["evaluation"]))
    tables += [rows for rows in further if rows]
    tables += [task_rows(result["tasks"], labels)] if result["tasks"] else []
    head = Text.assemble((name, "bold"), f"  against {against}" if against else "")
    samples = sample_texts(result.get("samples", []))
    return Group(head, *map(screen_table, tables), *samples, *listed("Notes", result.get("notes", [])))


def recipe_words(recipe: Mapping[str, Any]) -> str:
    """`recipe wanda-2-4 (wanda, sparsity 2:4)`."""
    options = ", ".join(f"{key} {value}" for key, value in (recipe.get("options") or {}).items())
    method = ", ".join(part for part in (str(recipe.get("method") or ""), options) if part)
    return f"recipe {recipe['name']} ({method})" if recipe.get("name") else method


def results(report: Report) -> list[Rows]:
    """The tables of what came of it: scores, and sizes."""
    return [*scores(report), size_rows(report)]


def scores(report: Report) -> list[Rows]:
    """The tables of what was scored before and after."""
    tables = [perplexity_rows(report["evaluation"])] if report["evaluation"] else []
    further = (word_rows(report["evaluation"]), divergence_rows(report["evaluation"]))
    tables += [rows for rows in further if rows]
    tables += [task_rows(report["tasks"])] if report["tasks"] else []
    return tables + [rows for rows in (seed_rows(report.get("seeds", [])),) if rows]


def facts(report: Report) -> list[str]:
    """Calibration, time, memory, versions, and the matrices that were not compressed: a line each."""
    seconds: Mapping[str, Any] = report["seconds"]
    peak: Mapping[str, Any] = report["peak_memory_bytes"]
    steps = ", ".join(f"{step} {seconds_text(spent)}" for step, spent in seconds.items() if step != "total")
    memory = ", ".join(f"{place} {bytes_text(count)}" for place, count in peak.items() if count)
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        f"Calibration: {calibration_words(report['calibration'])}",
        f"Time: {seconds_text(seconds['total'])} ({steps})",
        f"Peak memory: {memory or 'not measured'}",
    ]
    lines += [f"Versions: {versions}"] if versions else []
    lines += [f"Shape: {shape_words(report)}"] if "structure" in report else []
    lines += recovery_lines(report)
    uncompressed = {"Left dense": report.get("left_dense"), "Seen by no method": report.get("unsupported")}
    return lines + [f"{title}: {len(names)} ({kinds_text(names)})" for title, names in uncompressed.items() if names]


def shape_words(report: Report) -> str:
    """What was removed whole: `24 of 30 blocks, without 21, 22`, `intermediate_size 1120 in place of 1536`."""
    structure = report["structure"]
    before, stay = structure["blocks_before"], structure["blocks"]
    words = [f"{key} {after} in place of {size}" for key, (size, after) in structure["units"].items()]
    words += _uneven_words(structure)
    if gone := [str(i) for i in range(before) if i not in stay]:
        words.insert(0, f"{len(stay)} of {before} blocks, without {', '.join(gone)}")
    words += [f"{', '.join(map(str, group))} became one block" for group in structure.get("merged", [])]
    return "; ".join(words)


def _uneven_words(structure: Structure) -> list[str]:
    """In which blocks differ."""
    sizes, absent = structure.get("sizes", {}), structure.get("absent", [])
    words = [f"without {', '.join(absent)}"] if absent else []
    if sizes:
        before, after = (sorted(pair[i] for pair in sizes.values()) for i in (0, 1))
        share = f"{sum(after) / sum(before):.1%} of all"
        words.append(
            f"{_span(after)} units in {len(sizes)} groups in place of {_span(before)} ({share}, per-layer sizes)"
        )
    return words


def _span(counts: Sequence[int]) -> str:
    return str(counts[0]) if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"


def calibration_words(calibration: Calibration | None) -> str:
    """Which text a method measured the model on, and how much of it."""
    if calibration is None:
        return "none, the method needs no data"
    domain, texts = calibration.get("domain"), calibration.get("sources") or [calibration]
    return "; ".join(map(_windows, texts)) + (f"; gradients on {_windows(domain)}" if domain else "")


def _windows(calibration: CalibrationText) -> str:
    source = base_name(calibration["source"])
    split = f" ({calibration['split']})" if calibration.get("split") else ""
    seed = f", seed {calibration['seed']}" if calibration.get("seed") is not None else ""
    bos = f", BOS token: {calibration['bos']}" if calibration.get("bos") else ""
    return (
        f"{source}{split}, {calibration['sequences']:,} sequences of {calibration['length']:,} tokens{bos}{seed}, "
        f"sha256 of the text {short(calibration['sha256'])}"
    )


def sample_texts(samples: Sequence[Sample]) -> list[Text]:
    """How the models go on after each prompt, one below the other."""
    if not samples:
        return []
    lines = [Text("Samples, the likeliest token each time", style="italic")]
    for sample in samples:
        lines.append(Text(f"{sample['prompt']!r}", style="bold"))
        lines += [Text(f"  before: {sample['before']!r}")] if "before" in sample else []
        lines.append(Text(f"  after:  {sample['after']!r}"))
    return [*lines, Text()]


def screen_table(rows: Rows) -> Group:
    table = Table(title=Text(rows.title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for position, header in enumerate(rows.headers):
        table.add_column(Text(header), justify="left" if position == 0 else "right", overflow="fold")
    for row in rows.rows:
        table.add_row(*map(Text, row))
    return Group(table, *(Text(note, style="dim") for note in rows.notes), Text())


def listed(title: str, lines: Sequence[str]) -> list[Text]:
    """A heading with the number of lines, then the first `SHOWN` of them; nothing for no lines."""
    if not lines:
        return []
    more = [Text(f"  and {len(lines) - SHOWN} more in the JSON")] if len(lines) > SHOWN else []
    return [Text(f"{title}: {len(lines)}", style="bold"), *(Text(f"  {line}") for line in lines[:SHOWN]), *more]


def markdown_table(rows: Rows) -> str:
    lines = [rows.headers, ("---",) * len(rows.headers), *rows.rows]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    notes = "".join(f"\n\n{note}." for note in rows.notes)
    return f"**{rows.title}**\n\n{table}{notes}"


def portable_command(command: str) -> str:
    """The command without the folders of the machine that it ran on: of each absolute path, the last part."""
    words = []
    for word in shlex.split(command):
        option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
        words.append(option + equals + (last_part(value) if value.startswith(("/", "~")) else value))
    return shlex.join(words)
