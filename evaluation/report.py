"""The report of a compression as tables for a terminal and as a model card. `schema.py` lists its keys."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCardData
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from paredown.evaluation.schema import SCHEMA, Calibration, CalibrationText, EvalResult, Report, Structure, check_report
from paredown.evaluation.tables import (
    BEFORE_AFTER,
    Rows,
    base_name,
    bytes_text,
    is_local,
    kinds_text,
    last_part,
    layer_rows,
    perplexity_rows,
    rank_rows,
    seconds_text,
    short,
    size_rows,
    task_rows,
)

__all__ = [
    "SCHEMA",
    "check_report",
    "listed",
    "loading_code",
    "markdown_table",
    "model_card",
    "render",
    "render_eval",
    "screen_table",
]

SHOWN = 12  # fallbacks or warnings on a screen or card; report.json holds them all


def render(report: Report) -> Group:
    """The report for a terminal: scores, sizes, layers, time and memory, fallbacks and warnings."""
    head = Text.assemble((base_name(report["model"]), "bold"), "  ", recipe_words(report["recipe"]))
    tables = [screen_table(rows) for rows in _results(report)]
    if report["layers"]:
        tables.append(screen_table(layer_rows(report["layers"])))
    if ranks := rank_rows(report["layers"]):
        tables.append(screen_table(ranks))
    facts = [Text(line) for line in _facts(report)]
    return Group(
        head,
        *tables,
        *facts,
        *listed("Fallbacks", report["fallbacks"]),
        *listed("Warnings", report.get("warnings", [])),
    )


def render_eval(result: EvalResult) -> Group:
    """The scores of `evaluate` for a terminal: of one model, or of two side by side where `against` names the dense one."""
    name = base_name(result["model"])
    against = base_name(result["against"]) if result.get("against") else None
    labels = (f"{against} (dense)", name if name != against else f"{name} (compressed)") if against else BEFORE_AFTER
    tables = [perplexity_rows(result["evaluation"], labels)] if result["evaluation"] else []
    tables += [task_rows(result["tasks"], labels)] if result["tasks"] else []
    head = Text.assemble((name, "bold"), f"  against {against}" if against else "")
    return Group(head, *map(screen_table, tables), *listed("Notes", result.get("notes", [])))


def model_card(report: Report) -> str:
    """README.md of the checkpoint: metadata for the Hub, loading code, scores, how it was made, and limits."""
    name, recipe = base_name(report["model"]), recipe_words(report["recipe"])
    results = "\n\n".join(markdown_table(rows) for rows in _results(report))
    sections = [
        _front_matter(report),
        f"# {name}, compressed with paredown",
        f"`{name}` after post-training compression by {recipe}.{_citation(report['recipe'])}",
        f"## Load it\n\n```python\n{loading_code(report)}\n```\n\n{_loading_note(report)}",
        f"## Before and after\n\n{results}",
        f"## How it was made\n\n{_provenance(report)}",
        *_ranks(report),
        f"## Limits\n\n{_limits(report)}",
    ]
    return "\n\n".join(sections) + "\n"


def loading_code(report: Report, folder: str = "path/to/this/folder") -> str:
    """Python that loads the checkpoint. Packed weights need `import paredown.compress`; dense ones need no paredown."""
    register = "" if report.get("format") == "dense" else "import paredown.compress\n"
    return (
        f"{register}from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({folder!r})"
    )


def recipe_words(recipe: Mapping[str, Any]) -> str:
    """`recipe wanda-2-4 (wanda, sparsity 2:4)`."""
    options = ", ".join(f"{key} {value}" for key, value in (recipe.get("options") or {}).items())
    method = ", ".join(part for part in (str(recipe.get("method") or ""), options) if part)
    return f"recipe {recipe['name']} ({method})" if recipe.get("name") else method


def _results(report: Report) -> list[Rows]:
    tables = [perplexity_rows(report["evaluation"])] if report["evaluation"] else []
    tables += [task_rows(report["tasks"])] if report["tasks"] else []
    return [*tables, size_rows(report)]


def _facts(report: Report) -> list[str]:
    """Calibration, time, memory, versions, and the matrices that were not compressed: a line each."""
    seconds: Mapping[str, Any] = report["seconds"]
    peak: Mapping[str, Any] = report["peak_memory_bytes"]
    steps = ", ".join(f"{step} {seconds_text(spent)}" for step, spent in seconds.items() if step != "total")
    memory = ", ".join(f"{place} {bytes_text(count)}" for place, count in peak.items() if count)
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        f"Calibration: {_calibration(report['calibration'])}",
        f"Time: {seconds_text(seconds['total'])} ({steps})",
        f"Peak memory: {memory or 'not measured'}",
    ]
    lines += [f"Versions: {versions}"] if versions else []
    lines += [f"Shape: {shape_words(report)}"] if "structure" in report else []
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


def _calibration(calibration: Calibration | None) -> str:
    if calibration is None:
        return "none, the method needs no data"
    domain = calibration.get("domain")
    return _windows(calibration) + (f"; gradients on {_windows(domain)}" if domain else "")


def _windows(calibration: CalibrationText) -> str:
    source = base_name(calibration["source"])
    split = f" ({calibration['split']})" if calibration.get("split") else ""
    seed = f", seed {calibration['seed']}" if calibration.get("seed") is not None else ""
    bos = f", BOS token: {calibration['bos']}" if calibration.get("bos") else ""
    return (
        f"{source}{split}, {calibration['sequences']:,} sequences of {calibration['length']:,} tokens{bos}{seed}, "
        f"sha256 of the text {short(calibration['sha256'])}"
    )


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


def _front_matter(report: Report) -> str:
    """The Hub's metadata. A local folder is no base model, because the Hub could not link to it."""
    model_id, recipe = report["model"]["id"], report["recipe"]
    data = ModelCardData(
        base_model=None if is_local(model_id) else model_id,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["paredown", "model-compression", *filter(None, (recipe.get("method"), recipe.get("name")))],
    )
    return f"---\n{data.to_yaml()}\n---"


def _citation(recipe: Mapping[str, Any]) -> str:
    return f" The method is from: {recipe['citation']}." if recipe.get("citation") else ""


def _loading_note(report: Report) -> str:
    if report.get("format") == "dense":
        return "This is an ordinary checkpoint: anything that reads the original reads this one."
    return (
        "The first line registers the packed format with transformers. Without it transformers refuses the checkpoint "
        "with a ValueError; it never loads something else in its place."
    )


def _provenance(report: Report) -> str:
    """The command, the base model, the facts of the run, fallbacks and warnings, as Markdown."""
    revision = f", revision `{report['model']['revision']}`" if report["model"]["revision"] else ""
    typed = report.get("command")
    command = f"```bash\n{portable_command(typed)}\n```\n\n" if typed else ""
    facts = [f"Base model: `{base_name(report['model'])}`{revision}", *_facts(report)]
    lists = [*_counted("Fallbacks", report["fallbacks"]), *_counted("Warnings", report.get("warnings", []))]
    return command + "\n".join([*(f"- {fact}" for fact in facts), *lists])


def _ranks(report: Report) -> list[str]:
    """A table of every factored layer, which a reader can unfold; nothing without factored layers."""
    rows = rank_rows(report["layers"], name=str)
    table = rows and markdown_table(rows)
    return [f"<details><summary>Each layer's rank and loss</summary>\n\n{table}\n\n</details>"] if table else []


def _counted(title: str, lines: Sequence[str]) -> list[str]:
    """As `listed`, in Markdown."""
    items = [text.plain.strip() for text in listed(title, lines)]
    return [f"- {items[0]}", *(f"  - {item}" for item in items[1:])] if items else []


def portable_command(command: str) -> str:
    """The command without the folders of the machine that it ran on: of each absolute path, the last part."""
    words = []
    for word in shlex.split(command):
        option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
        words.append(option + equals + (last_part(value) if value.startswith(("/", "~")) else value))
    return shlex.join(words)


def _limits(report: Report) -> str:
    size = report["bytes"]
    lines = [
        "Zeros are not bytes, and bytes are not speed until measured: this card claims the bytes in the table above, "
        "and no speed.",
        "The figures hold for the texts, tasks and token counts named beside them. Other languages, subjects and "
        "longer contexts may lose more: measure on your own text before you rely on the model.",
        "Whatever the original does wrong, this model may do too, and compression can change whom it wrongs.",
    ]
    if report.get("format") == "dense" and size["after"] > 0.99 * size["before"]:
        lines.insert(
            1, "This dense checkpoint stores what was removed like any other number: it is as large as the original."
        )
    return "\n".join(f"- {line}" for line in lines)
