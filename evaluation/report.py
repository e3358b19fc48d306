"""The report of a compression: how it looks on the screen, and the model card. `schema.py` says what it holds."""

import shlex
from collections.abc import Mapping
from typing import Any

import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from paredown.evaluation.schema import SCHEMA, check_report
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

# A screen shows so many fallbacks and warnings; report.json holds them all.
SHOWN = 12


def render(report: Mapping[str, Any]) -> Group:
    """The report for a terminal: what was done, the price, the gain, and what deserves a second look."""
    head = Text.assemble((base_name(report["model"]), "bold"), "  ", recipe_words(report["recipe"]))
    tables = [screen_table(rows) for rows in _results(report)]
    if report["layers"]:
        tables.append(screen_table(layer_rows(report["layers"])))
    if ranks := rank_rows(report["layers"]):
        tables.append(screen_table(ranks))
    facts = [Text(line) for line in _facts(report)]
    return Group(
        head, *tables, *facts, *listed("Fallbacks", report["fallbacks"]), *listed("Warnings", _warnings(report))
    )


def render_eval(result: Mapping[str, Any]) -> Group:
    """The figures of `{model, evaluation, tasks}` for a terminal.

    With `against` (the dense model) entries are as in a report and stand beside it; without, an evaluation holds
    `after` alone and a metric of a task `{value, stderr}`. `notes` (list of str) may follow.
    """
    name = base_name(result["model"])
    against = base_name(result["against"]) if result.get("against") else None
    labels = (f"{against} (dense)", name if name != against else f"{name} (compressed)") if against else BEFORE_AFTER
    parts = [
        rows(result[key], labels)
        for key, rows in (("evaluation", perplexity_rows), ("tasks", task_rows))
        if result.get(key)
    ]
    head = Text.assemble((name, "bold"), f"  against {against}" if against else "")
    return Group(head, *map(screen_table, parts), *listed("Notes", result.get("notes", [])))


def model_card(report: Mapping[str, Any]) -> str:
    """README.md of the checkpoint: front matter, loading, the table, how it was made, and where its claims end."""
    name, recipe = base_name(report["model"]), recipe_words(report["recipe"])
    results = "\n\n".join(markdown_table(rows) for rows in _results(report))
    sections = [
        _front_matter(report),
        f"# {name}, compressed with paredown",
        f"`{name}` after post-training compression by {recipe}.{_citation(report['recipe'])}",
        f"## Load it\n\n```python\n{loading_code(report)}\n```\n\n{_loading_note(report)}",
        f"## Before and after\n\n{results}",
        f"## How it was made\n\n{_made(report)}",
        *_ranks(report),
        f"## Limits\n\n{_limits(report)}",
    ]
    return "\n\n".join(sections) + "\n"


def loading_code(report: Mapping[str, Any], folder: str = "path/to/this/folder") -> str:
    """Python that loads the checkpoint: ours must be imported for packed weights, and for dense ones need not exist."""
    ours = "" if report.get("format") == "dense" else "import paredown.compress\n"
    return (
        f"{ours}from transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained({folder!r})"
    )


def recipe_words(recipe: Mapping[str, Any]) -> str:
    """`recipe wanda-2-4 (wanda, sparsity 2:4)`."""
    options = ", ".join(f"{key} {value}" for key, value in (recipe.get("options") or {}).items())
    method = ", ".join(part for part in (str(recipe.get("method") or ""), options) if part)
    return f"recipe {recipe['name']} ({method})" if recipe.get("name") else method


def _results(report: Mapping[str, Any]) -> list[Rows]:
    parts = [size_rows(report)]
    if report["tasks"]:
        parts.insert(0, task_rows(report["tasks"]))
    if report["evaluation"]:
        parts.insert(0, perplexity_rows(report["evaluation"]))
    return parts


def _facts(report: Mapping[str, Any]) -> list[str]:
    """Calibration, time, memory, versions, and the matrices that were not compressed, a line each."""
    seconds, peak = report["seconds"], report["peak_memory_bytes"]
    steps = ", ".join(f"{step} {seconds_text(taken)}" for step, taken in seconds.items() if step != "total")
    memory = ", ".join(f"{place} {bytes_text(count)}" for place, count in peak.items() if count)
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        f"Calibration: {_calibration(report['calibration'])}",
        f"Time: {seconds_text(seconds['total'])} ({steps})",
        f"Peak memory: {memory or 'not measured'}",
    ]
    lines += [f"Versions: {versions}"] if versions else []
    passed_over = {"Left dense": report.get("left_dense"), "Seen by no method": report.get("unsupported")}
    return lines + [f"{title}: {len(names)} ({kinds_text(names)})" for title, names in passed_over.items() if names]


def _calibration(calibration: Mapping[str, Any] | None) -> str:
    if calibration is None:
        return "none, the method needs no data"
    source = base_name(calibration["source"])
    split = f" ({calibration['split']})" if calibration.get("split") else ""
    seed = f", seed {calibration['seed']}" if calibration.get("seed") is not None else ""
    return (
        f"{source}{split}, {calibration['sequences']:,} sequences of {calibration['length']:,} tokens{seed}, "
        f"sha256 of the text {short(calibration['sha256'])}"
    )


def _warnings(report: Mapping[str, Any]) -> list[str]:
    return list(report.get("warnings") or [])


def screen_table(rows: Rows) -> Group:
    table = Table(title=Text(rows.title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for position, header in enumerate(rows.headers):
        table.add_column(Text(header), justify="left" if position == 0 else "right", overflow="fold")
    for row in rows.rows:
        table.add_row(*map(Text, row))
    return Group(table, *(Text(note, style="dim") for note in rows.notes), Text())


def listed(title: str, lines: list[Any]) -> list[Text]:
    """A list with its count, or nothing; a long tail is left to --json and what is kept of it."""
    if not lines:
        return []
    more = [Text(f"  and {len(lines) - SHOWN} more in the JSON")] if len(lines) > SHOWN else []
    return [Text(f"{title}: {len(lines)}", style="bold"), *(Text(f"  {_line(line)}") for line in lines[:SHOWN]), *more]


def _line(entry: Any) -> str:
    return ", ".join(f"{key} {value}" for key, value in entry.items()) if isinstance(entry, Mapping) else str(entry)


def markdown_table(rows: Rows) -> str:
    lines = [rows.headers, ("---",) * len(rows.headers), *rows.rows]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    notes = "".join(f"\n\n{note}." for note in rows.notes)
    return f"**{rows.title}**\n\n{table}{notes}"


def _front_matter(report: Mapping[str, Any]) -> str:
    """The Hub's metadata; a folder of one's own is no base model that the Hub could link to."""
    model_id, recipe = report["model"]["id"], report["recipe"]
    base = {} if is_local(model_id) else {"base_model": model_id}
    tags = ["paredown", "model-compression", *dict.fromkeys(filter(None, (recipe.get("method"), recipe.get("name"))))]
    facts = {**base, "library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    return "---\n" + yaml.safe_dump(facts, sort_keys=False) + "---"


def _citation(recipe: Mapping[str, Any]) -> str:
    return f" The method is from: {recipe['citation']}." if recipe.get("citation") else ""


def _loading_note(report: Mapping[str, Any]) -> str:
    if report.get("format") == "dense":
        return "This is an ordinary checkpoint: anything that reads the original reads this one."
    return (
        "The first line registers the packed format with transformers. Without it transformers refuses the checkpoint "
        "with a ValueError; it never loads something else in its place."
    )


def _made(report: Mapping[str, Any]) -> str:
    revision = f", revision `{report['model']['revision']}`" if report["model"]["revision"] else ""
    command = f"```bash\n{portable_command(report['command'])}\n```\n\n" if report.get("command") else ""
    facts = [f"Base model: `{base_name(report['model'])}`{revision}", *_facts(report)]
    lists = [*_counted("Fallbacks", report["fallbacks"]), *_counted("Warnings", _warnings(report))]
    return command + "\n".join([*(f"- {fact}" for fact in facts), *lists])


def _ranks(report: Mapping[str, Any]) -> list[str]:
    """Every factored layer, folded away."""
    rows = rank_rows(report["layers"], name=str)
    table = rows and markdown_table(rows)
    return [f"<details><summary>Each layer's rank and loss</summary>\n\n{table}\n\n</details>"] if table else []


def _counted(title: str, lines: list[Any]) -> list[str]:
    told = [text.plain.strip() for text in listed(title, lines)]
    return [f"- {told[0]}", *(f"  - {line}" for line in told[1:])] if told else []


def portable_command(command: str) -> str:
    """The command with the folders of the machine it ran on taken off its paths."""
    words = []
    for word in shlex.split(command):
        option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
        words.append(option + equals + (last_part(value) if value.startswith(("/", "~")) else value))
    return shlex.join(words)


def _limits(report: Mapping[str, Any]) -> str:
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
