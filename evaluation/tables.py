"""The numbers of a report as tables of text, which the screen and the model card both print."""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from paredown.evaluation.schema import Layer, Report

Labels = tuple[str, str]  # column headers of the dense model and of the compressed one
BEFORE_AFTER: Labels = ("before", "after")


@dataclass(frozen=True)
class Rows:
    """One table: its title, column headers, rows of cells, and notes to print below it."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def perplexity_rows(evaluation: Sequence[Mapping[str, Any]], labels: Labels = BEFORE_AFTER) -> Rows:
    """Token perplexity on each text, with the protocol as notes. Only entries with `before` give a table of two models."""
    compared = any(entry.get("before") for entry in evaluation)
    rows = [_perplexity_row(entry, compared) for entry in evaluation]
    headers = ("text", *labels, "ratio", "log ratio, paired", "95 % interval") if compared else ("text", "perplexity")
    return Rows("Token perplexity (lower is better)", headers, tuple(rows), tuple(map(protocol, evaluation)))


def _perplexity_row(entry: Mapping[str, Any], compared: bool) -> tuple[str, ...]:
    after = plus_minus(entry["after"]["token_perplexity"], entry["after"].get("stderr"))
    if not compared:
        return (text_name(entry), after)
    if not entry.get("before"):
        return (text_name(entry), "", after, "", "", "")
    before = plus_minus(entry["before"]["token_perplexity"], entry["before"].get("stderr"))
    ratio = entry["after"]["token_perplexity"] / entry["before"]["token_perplexity"]
    delta = entry.get("paired_delta") or {}
    change = plus_minus(delta["log_ratio"], delta.get("stderr"), signed=True) if "log_ratio" in delta else ""
    interval = f"{delta['low']:+.4f} to {delta['high']:+.4f}" if {"low", "high"} <= delta.keys() else ""
    return (text_name(entry), before, after, f"{ratio:.4f}", change, interval)


def divergence_rows(evaluation: Sequence[Mapping[str, Any]]) -> Rows | None:
    """How far both models' predictions are apart on each text, in the words of llama.cpp's table; None without any."""
    known = [(text_name(entry), entry["divergence"]) for entry in evaluation if entry.get("divergence")]
    if not known:
        return None
    labels = ("KL mean", "median", "99 %", "99.9 %", "max", "Jensen-Shannon", "same top token, %")
    headers = ("", *(name for name, _ in known))
    columns = [_divergence_cells(figures) for _, figures in known]
    rows = tuple((label, *cells) for label, cells in zip(labels, zip(*columns, strict=True), strict=True))
    note = (
        "KL divergence of the compressed model's next token from the dense one's, on the tokens of the perplexity; nats"
    )
    return Rows("Divergence from the dense model (lower is better)", headers, rows, (note,))


def word_rows(evaluation: Sequence[Mapping[str, Any]], labels: Labels = BEFORE_AFTER) -> Rows | None:
    """Word perplexity on each text that has documents; None without any."""
    known = [(text_name(entry), entry["words"]) for entry in evaluation if entry.get("words")]
    if not known:
        return None
    compared = any("before" in figures for _, figures in known)
    rows = tuple((name, *_word_cells(figures)) for name, figures in known)
    headers = ("text", *labels, "log ratio, paired") if compared else ("text", "perplexity")
    notes = tuple(
        f"{text_name(entry)}: {found['words']:,} words in {found['documents']:,} documents, in rolling windows as long as "
        f"the model allows, as lm-eval's wikitext; sha256 of the text {short(entry['sha256'])}"
        for entry in evaluation
        if (found := entry.get("words"))
    )
    return Rows("Word perplexity (lower is better)", headers, rows, notes)


def _word_cells(figures: Mapping[str, Any]) -> tuple[str, ...]:
    """Word perplexity of one model, or of both and the change."""
    of_models = [figures[key] for key in ("before", "after") if key in figures]
    both = (plus_minus(one["word_perplexity"], one["stderr"]) for one in of_models)
    change = [plus_minus(figures["log_ratio"], figures["stderr"], signed=True)] if len(of_models) > 1 else []
    return (*both, *change)


def _divergence_cells(figures: Mapping[str, Any]) -> tuple[str, ...]:
    top, stderr = 100 * figures["top1_agreement"], figures.get("top1_stderr")
    return (
        plus_minus(figures["kl_mean"], figures.get("kl_stderr")),
        *(f"{figures[key]:.4f}" for key in ("kl_median", "kl_p99", "kl_p999", "kl_max")),
        plus_minus(figures["js_mean"], figures.get("js_stderr")),
        plus_minus(top, None if stderr is None else 100 * stderr),
    )


def protocol(entry: Mapping[str, Any]) -> str:
    """What one perplexity was measured on, so that it can be reproduced."""
    bos = f", BOS token: {entry['bos']}" if entry.get("bos") else ""
    note = f". {entry['note']}" if entry.get("note") else ""
    return (
        f"{text_name(entry)}: {entry['tokens']:,} tokens in windows of {entry['length']:,} that do not overlap{bos}, "
        f"sha256 of the text {short(entry['sha256'])}{note}"
    )


def task_rows(tasks: Mapping[str, Mapping[str, Mapping[str, Any]]], labels: Labels = BEFORE_AFTER) -> Rows:
    """lm-eval scores by task and metric: of one model (`TaskScore`), or before and after (`TaskComparison`)."""
    flat = [(task, metric, score) for task, metrics in tasks.items() for metric, score in metrics.items()]
    if all("value" in score for _, _, score in flat):
        rows = [(task, metric, plus_minus(score["value"], score["stderr"])) for task, metric, score in flat]
        return Rows("Tasks (lm-eval)", ("task", "metric", "score"), tuple(rows), _opening(flat))
    headers = ("task", "metric", *labels, "change, paired", "lost", "won")
    cells = tuple((task, metric, *_task_cells(score)) for task, metric, score in flat)
    return Rows("Tasks (lm-eval), with answers lost and won", headers, cells, _opening(flat))


def _opening(flat: Sequence[tuple[str, str, Mapping[str, Any]]]) -> tuple[str, ...]:
    """A note that names the rule for the BOS token, as the windows of perplexity have one."""
    rules = dict.fromkeys(score["bos"] for _, _, score in flat if score.get("bos"))
    return tuple(f"Tasks: BOS token: {rule}" for rule in rules)


def _task_cells(score: Mapping[str, Any]) -> tuple[str, ...]:
    change = plus_minus(score["after"] - score["before"], score["paired_stderr"], signed=True)
    flips = (score.get("correct_to_wrong"), score.get("wrong_to_correct"))
    return (
        plus_minus(score["before"], score["stderr_before"]),
        plus_minus(score["after"], score["stderr_after"]),
        change,
        *("" if count is None else f"{count:,}" for count in flips),
    )


def size_rows(report: Report) -> Rows:
    """Bytes of the weights on disk, and the number of targeted parameters, before and after."""
    before, after = report["bytes"]["before"], report["bytes"]["after"]
    counts = report["parameters"]
    rows = (
        ("checkpoint", bytes_text(before), bytes_text(after), share(after, before)),
        (
            "targeted parameters",
            f"{counts['targeted']:,}",
            f"{counts['kept']:,}",
            share(counts["kept"], counts["targeted"]),
        ),
    )
    targeted = share(counts["targeted"], counts["total"])
    note = f"{counts['targeted']:,} of {counts['total']:,} parameters were targeted ({targeted})"
    return Rows("Size", ("", "before", "after", "kept"), rows, (note,))


def layer_kind(name: str) -> str:
    """The last two parts of a name that are no numbers: `self_attn.q_proj` of `model.layers.3.self_attn.q_proj`."""
    return ".".join([part for part in name.split(".") if not part.isdigit()][-2:])


def bytes_by_part(before: Mapping[str, int], after: Mapping[str, int]) -> list[dict[str, Any]]:
    """Bytes of tensors by kind of the layer that they belong to: `{part, before, after}`, as in a report."""
    parts: dict[str, dict[str, Any]] = {}
    for key, tensors in (("before", before), ("after", after)):
        for name, count in tensors.items():
            part = layer_kind(name.rpartition(".")[0] or name)
            parts.setdefault(part, {"part": part, "before": 0, "after": 0})[key] += count
    return list(parts.values())


def layer_rows(layers: Sequence[Layer]) -> Rows:
    """A row for each kind of layer: models have hundreds of layers but only a dozen kinds. Below: the worst one."""
    methods = list(dict.fromkeys(layer["method"] for layer in layers))
    headers = ("layers", "count", *(("method",) if len(methods) > 1 else ()), "kept", "error", "worst", "seconds")
    notes = [
        "error: share of the output's energy on the calibration text that is wrong; mean and worst of a kind. "
        "kept: mean of a kind"
    ]
    errors = {layer["name"]: error for layer in layers if (error := layer["relative_error"]) is not None}
    if errors:
        worst = max(errors, key=errors.__getitem__)
        notes.insert(0, f"worst: {number(errors[worst])} {worst}")
    grouped = _grouped(layers, layer_kind).items()
    rows = tuple(_kind_row(kind, members, several=len(methods) > 1) for kind, members in grouped)
    return Rows(f"Layers, by {methods[0]}" if len(methods) == 1 else "Layers", headers, rows, tuple(notes))


def rank_rows(layers: Sequence[Layer], name: Callable[[str], str] = layer_kind) -> Rows | None:
    """Ranks, and predicted beside measured losses, of the factored layers; None if there are none.

    A row for all layers whose `name(layer)` is the same: by default for each kind of layer.
    """
    factored = [layer for layer in layers if layer.get("rank")]
    if not factored:
        return None
    headers = ("ranks", "stored as", "rank", "predicted", "measured", "ratio")
    note = (
        "losses, and measured / predicted: in the method's own metric, as a share of dropping the weight, means where a "
        "row is of several layers. Predicted on the dense model, where ranks were spread by it; measured on what was stored"
    )
    rows = tuple(_rank_row(group, members) for group, members in _grouped(factored, name).items())
    return Rows("Ranks and losses", headers, rows, (note,))


def _rank_row(name: str, layers: Sequence[Layer]) -> tuple[str, ...]:
    low, high = min(layer["rank"] for layer in layers), max(layer["rank"] for layer in layers)
    stored = ", ".join(dict.fromkeys(layer["kind"] for layer in layers))
    measured = [loss for layer in layers if (loss := layer.get("measured_loss")) is not None]
    both = [(loss, layer["measured_loss"]) for layer in layers if (loss := layer.get("predicted_loss"))]
    predicted = [loss for loss, _ in both]
    cells = ("" if not losses else number(fmean(losses)) for losses in (predicted, measured))
    ratio = f"{fmean(loss or 0.0 for _, loss in both) / fmean(predicted):.2f}" if both else ""
    return (name, stored, f"{low}" if low == high else f"{low}-{high}", *cells, ratio)


def _grouped(layers: Sequence[Layer], name: Callable[[str], str]) -> dict[str, list[Layer]]:
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(name(layer["name"]), []).append(layer)
    return groups


def _kind_row(kind: str, layers: Sequence[Layer], *, several: bool) -> tuple[str, ...]:
    """`several`: the methods of its layers have a column."""
    methods = ", ".join(dict.fromkeys(layer["method"] for layer in layers))
    errors = [error for layer in layers if (error := layer["relative_error"]) is not None]
    return (
        kind,
        str(len(layers)),
        *((methods,) if several else ()),
        f"{fmean(layer['kept'] for layer in layers):.1%}",
        number(fmean(errors)) if errors else "",
        number(max(errors)) if errors else "",
        f"{math.fsum(layer['seconds'] for layer in layers):.1f}",
    )


def kinds_text(names: Sequence[str]) -> str:
    """`mlp.gate 32, lm_head 1`."""
    return ", ".join(f"{kind} {count}" for kind, count in Counter(map(layer_kind, names)).items())


def text_name(entry: Mapping[str, Any]) -> str:
    """`wikitext2 (test)`; for a file only its name."""
    name = base_name(entry["corpus"])
    return f"{name} ({entry['split']})" if entry.get("split") else name


def plus_minus(value: float, stderr: float | None, *, signed: bool = False) -> str:
    """`value ± stderr`, both rounded so that the error shows two digits; `signed` puts a plus before a positive value."""
    sign = "+" if signed else ""
    if stderr is None or stderr <= 0:
        return f"{value:{sign}.4f}" + ("" if stderr is None else " ± 0")
    places = min(8, max(0, 1 - math.floor(math.log10(stderr))))
    return f"{value:{sign},.{places}f} ± {stderr:,.{places}f}"


def number(value: float) -> str:
    return f"{value:.3g}"


def share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else ""


def bytes_text(count: float) -> str:
    """Decimal units: `13.48 GB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def seconds_text(seconds: float) -> str:
    """`8.2 s`, `5 min 12 s`, `3 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return (
        f"{int(seconds // 60)} min {int(seconds % 60)} s" if seconds < 3600 else f"{minutes // 60} h {minutes % 60} min"
    )


def short(digest: str | None) -> str:
    return digest[:12] if digest else "unknown"


def base_name(model: Mapping[str, Any] | str) -> str:
    """A name on the Hub as it is; of a local path the last part, because the rest describes somebody's machine."""
    name = str(model["id"] if isinstance(model, Mapping) else model)
    return last_part(name) if is_local(name) else name


def is_local(name: str) -> bool:
    """Whether a model or text is named by a path on this machine."""
    return name.startswith(("/", "~", ".")) or "\\" in name or Path(name).exists()


def last_part(path: str) -> str:
    """The file or folder name at the end of a path of any operating system; of `.` the name of the current folder."""
    parts = [part for part in re.split(r"[/\\]", path) if part and part != "."]
    return parts[-1] if parts and parts[-1] not in ("..", "~") else Path(path).expanduser().resolve().name
