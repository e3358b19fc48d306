"""The model card, README.md of a checkpoint: the short form of report.html, with the metadata that the Hub reads."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, metadata_load

from paredown.compress.text.corpora import NAMED
from paredown.evaluation.report import (
    facts,
    listed,
    markdown_table,
    portable_command,
    recipe_words,
    results,
)
from paredown.evaluation.schema import BytesChange, ExportResult, Report, check_report
from paredown.evaluation.tables import Rows, base_name, bytes_text, is_local, share, text_name

CARD = "README.md"
# What a card says of the text and the law of a model, which compression does not change.
CARRIED = ("license", "license_name", "license_link", "language", "datasets", "pipeline_tag")
# The Hub knows four relations to a base model: adapter, merge, quantized and finetune. Fewer bytes for the same function is
# what it calls quantized; a finetune was taught something else.
RELATION = "quantized"
HERE = "."  # the folder that the card's example is run in, until the checkpoint has a name on the Hub


def carried_over(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """What the card of the model in `folder` says that holds for the compressed model too, and a warning if it is damaged."""
    path = folder / CARD
    try:
        known = (metadata_load(path) or {}) if path.is_file() else {}
    except (OSError, ValueError, yaml.YAMLError) as fault:
        reason = str(fault).splitlines()[0]
        return {}, [
            f"the metadata in {CARD} of the model cannot be read, and its licence is not in the new card: {reason}"
        ]
    return {key: known[key] for key in CARRIED if known.get(key)}, []


def model_card(report: Report, carried: Mapping[str, Any] | None = None, export: ExportResult | None = None) -> str:
    """The card of a run: metadata, an example, scores, how it was made, and limits.

    carried: of the source's card, see `carried_over`. `export`: how the run's checkpoint was converted afterwards, if it was.
    """
    name, recipe = base_name(report["model"]), report["recipe"]
    format: str = report.get("format") or "packed"
    remark = ""
    if export:
        remark = f" It was scored as {format} weights, which `paredown export` then stored as {export['format']} ones."
        format, size = export["format"], {**report["bytes"], "after": export["bytes"]["after"]}
        report = cast(Report, {**report, "bytes": size})
    tables = "\n\n".join(markdown_table(rows) for rows in results(report))
    own = {"eval_results": _eval_results(report), "model_name": f"{name}-{recipe.get('name') or recipe.get('method')}"}
    text = report["calibration"]["source"] if report["calibration"] else ""
    citation = f" The method is from: {recipe['citation']}." if recipe.get("citation") else ""
    sections = [
        f"# {name}, compressed with paredown",
        f"`{name}` after post-training compression by {recipe_words(recipe)}.{citation}{remark}",
        _example(format),
        *_engines(export or report),
        f"## Before and after\n\n{tables}",
        f"## How it was made\n\n{_provenance(report)}",
        f"## Limits\n\n{_limits(format, report['bytes'])}",
    ]
    return _written(_metadata(report["model"]["id"], recipe, format, carried or {}, text, own), sections)


def export_card(old: Path, result: ExportResult, record: Mapping[str, Any]) -> str:
    """The card of an export of the checkpoint in `old`: with the scores of its report, if it has one.

    `record`: as in paredown.json, which `model` it is and by what `recipe` it was compressed.
    """
    carried, _ = carried_over(old)
    if report := _report_of(old):
        return model_card(report, carried, result)
    model, recipe, size = record["model"], record.get("recipe") or {}, result["bytes"]
    name = base_name(model)
    cells = (bytes_text(size["before"]), bytes_text(size["after"]), share(size["after"], size["before"]))
    rows = Rows("Size", ("", "before", "after", "kept"), (("checkpoint", *cells),))
    how = f", compressed by {recipe_words(recipe)}" if recipe else ""
    sections = [
        f"# {name}, converted with paredown",
        f"The weights of `{name}`{how}, stored as {result['format']}. Nothing was scored.",
        _example(result["format"]),
        *_engines(result),
        markdown_table(rows),
        f"## Limits\n\n{_limits(result['format'], size)}",
    ]
    return _written(_metadata(str(model["id"]), recipe, result["format"], carried, "", {}), sections)


def _report_of(folder: Path) -> Report | None:
    """The report in a folder; None where there is none, or one that somebody has changed into something else."""
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        check_report(report)
    except (OSError, ValueError):  # a PareError is one
        return None
    return cast(Report, report)


def named(card: str, repository: str) -> str:
    """The card with an example that loads the checkpoint from the Hub."""
    return card.replace(f'from_pretrained("{HERE}")', f'from_pretrained("{repository}")').replace(IN_FOLDER, "")


def loading_code(format: str) -> str:
    """Python that loads the checkpoint and writes a few words. Packed weights need `import paredown.compress`."""
    register = "import paredown.compress  # transformers learns the packed format\n" if format == "packed" else ""
    return f"""{register}from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{HERE}")
model = AutoModelForCausalLM.from_pretrained("{HERE}")
ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=20)[0]))"""


IN_FOLDER = "In this folder:\n\n"
# what runs the formats that are for other engines
COMMANDS = {
    "deci": f"vllm serve {HERE} --trust-remote-code",
    "gguf": "llama-cli -m model.gguf",
    "onnx": """python -c 'import onnxruntime as o; print(o.InferenceSession("model.onnx").run(0, {"input_ids": [[1]]}))'""",
}


def _example(format: str) -> str:
    if format in COMMANDS:
        return f"## Load it\n\n{IN_FOLDER}```sh\n{COMMANDS[format]}\n```"
    note = (
        "The first line registers the packed format with transformers. Without it transformers refuses the checkpoint "
        "with a ValueError; it never loads something else in its place."
        if format == "packed"
        else "This is an ordinary checkpoint: anything that reads the original reads this one."
    )
    return f"## Load it\n\n{IN_FOLDER}```python\n{loading_code(format)}\n```\n\n{note}"


def _engines(told: Report | ExportResult) -> list[str]:
    """The section on what runs the checkpoint; none where that is not told."""
    lines = [f"- {name}: {how}" for name, how in told.get("engines", {}).items()]
    return ["## What runs it\n\n" + "\n".join(lines)] if lines else []


def _metadata(
    model: str, recipe: Mapping[str, Any], format: str, carried: Mapping[str, Any], text: str, own: Mapping[str, Any]
) -> ModelCardData:
    """The Hub's metadata. A local folder is no base model, because the Hub could not link to it."""
    base = {} if is_local(model) else {"base_model": model, "base_model_relation": RELATION}
    known = carried.get("datasets") or []
    datasets = [*([known] if isinstance(known, str) else known), *filter(None, [hub_dataset(text)])]
    # under another library's name the Hub shows no example of its own, which would fail without the import
    library = {"packed": "paredown", "gguf": "gguf", "onnx": "onnx"}.get(format, "transformers")
    tags = ["paredown", "model-compression", *filter(None, (recipe.get("method"), recipe.get("name")))]
    own = {**own, "datasets": list(dict.fromkeys(datasets)) or None, "tags": list(dict.fromkeys(tags))}
    return ModelCardData(**{"pipeline_tag": "text-generation", **carried, **base, **own, "library_name": library})


def hub_dataset(text: str) -> str | None:
    """The Hub's name of a dataset that a corpus comes from; None for other text."""
    if text in NAMED:
        return NAMED[text].path
    return text if re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not is_local(text) else None


def _eval_results(report: Report) -> list[EvalResult]:
    """What the Hub shows beside the model: perplexity after compression, and the tasks."""
    found = []
    for entry in report["evaluation"]:
        found.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=hub_dataset(entry["corpus"]) or base_name(entry["corpus"]),
                dataset_name=text_name(entry),
                dataset_split=entry["split"],
                metric_type="perplexity",
                metric_name=f"token perplexity, windows of {entry['length']}",
                metric_value=round(entry["after"]["token_perplexity"], 4),
            )
        )
    for task, metrics in report["tasks"].items():
        for metric, score in metrics.items():
            kind = "accuracy" if metric.startswith("acc") else metric
            found.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=task,
                    dataset_name=f"{task} (lm-eval)",
                    metric_type=kind,
                    metric_name=metric,
                    metric_value=round(score["after"], 4),
                )
            )
    return found


def _written(data: ModelCardData, sections: Sequence[str]) -> str:
    text = "\n\n".join(sections)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n"))


def _provenance(report: Report) -> str:
    """The command, the base model, the facts of the run, fallbacks and warnings, as Markdown."""
    revision = f", revision `{report['model']['revision']}`" if report["model"]["revision"] else ""
    typed = report.get("command")
    command = f"```bash\n{portable_command(typed)}\n```\n\n" if typed else ""
    told = [f"Base model: `{base_name(report['model'])}`{revision}", *facts(report)]
    lists = [*_counted("Fallbacks", report["fallbacks"]), *_counted("Warnings", report.get("warnings", []))]
    return command + "\n".join([*(f"- {fact}" for fact in told), *lists])


def _counted(title: str, lines: Sequence[str]) -> list[str]:
    """As `listed`, in Markdown."""
    items = [text.plain.strip() for text in listed(title, lines)]
    return [f"- {items[0]}", *(f"  - {item}" for item in items[1:])] if items else []


def _limits(format: str, size: BytesChange) -> str:
    lines = [
        "Zeros are not bytes, and bytes are not speed until measured: this card claims the bytes in the table above, "
        "and no speed.",
        "The figures hold for the texts, tasks and token counts named beside them. Other languages, subjects and "
        "longer contexts may lose more: measure on your own text before you rely on the model.",
        "Whatever the original does wrong, this model may do too, and compression can change whom it wrongs.",
    ]
    if format == "dense" and size["after"] > 0.99 * size["before"]:
        lines.insert(
            1, "This dense checkpoint stores what was removed like any other number: it is as large as the original."
        )
    return "\n".join(f"- {line}" for line in lines)
