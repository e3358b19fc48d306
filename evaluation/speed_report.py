"""A measurement of speed as `speed.measure` returns it: tables for the screen and for Markdown, and bars as SVG."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.text import Text

from paredown.evaluation.report import listed, markdown_table, screen_table
from paredown.evaluation.tables import Labels, Rows, base_name, bytes_text, number

PHASES = ("prefill", "decode")


def render_bench(result: Mapping[str, Any]) -> Group:
    """The result for a terminal."""
    head = Text.assemble((base_name(result["model"]), "bold"), f"  {_headline(result)}")
    return Group(head, *map(screen_table, _tables(result)), *listed("Notes", result["notes"]))


def bench_markdown(result: Mapping[str, Any]) -> str:
    """The same as Markdown, with the picture that lies beside it."""
    name = base_name(result["model"])
    parts = [f"# Speed of {name}", f"{_headline(result)}.", "![tokens per second](bench.svg)"]
    parts += map(markdown_table, _tables(result))
    if result["notes"]:
        parts.append("\n".join(f"- {note}" for note in result["notes"]))
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    return "\n\n".join([*parts, f"{result['date']}, {versions}"]) + "\n"


def labels_of(result: Mapping[str, Any]) -> Labels:
    """How the model that is held against and the model itself are called."""
    name, against = base_name(result["model"]), base_name(result["against"]) if result["against"] else ""
    return (against, name) if against != name else (f"{against} (against)", name)


def end_to_end_rows(result: Mapping[str, Any]) -> Rows:
    compared = result["against"] is not None
    against, model = labels_of(result)
    energy = any(row["model"]["joules_per_token"] is not None for row in result["end_to_end"])
    headers = ["batch", "phase", *([against] if compared else []), model, *(["ratio"] if compared else [])]
    headers += ["J/token" if not compared else "J/token, both"] if energy else []
    rows = []
    for row in result["end_to_end"]:
        for phase in PHASES:
            cells = [str(row["batch"]), phase]
            cells += [_rate(row["against"][phase])] if compared else []
            cells += [_rate(row["model"][phase])]
            cells += [_ratio(row["ratio"][phase])] if compared else []
            cells += [_joules(row, compared) if phase == "decode" else ""] if energy else []
            rows.append(tuple(cells))
    return Rows("Tokens per second (higher is better)", tuple(headers), tuple(rows), tuple(_protocol(result, compared)))


def _protocol(result: Mapping[str, Any], compared: bool) -> list[str]:
    used = result["settings"]
    modes = " and ".join(dict.fromkeys(row["decode_mode"] for row in result["end_to_end"]))
    turns = ", the two models in turn" if compared else ""
    lines = [
        f"median (smallest–largest) of {used['repeats']} repeats{turns}; {used['context']} random tokens of context, "
        f"then {used['decode']} decoded one by one ({modes}); prefill eager, wall time",
        "decoded logits against a plain forward, largest relative error: "
        + ", ".join(f"{name} {_worst_error(result, key):.1e}" for key, name in shown_names(result).items()),
    ]
    return lines + (["ratio: tokens per second over those of the other model, of medians"] if compared else [])


def memory_rows(result: Mapping[str, Any]) -> Rows:
    """A line for each quantity, and of the cache and the peak one for each batch."""
    names = shown_names(result)
    told = result["memory"]
    on_cpu = result["device"]["type"] != "cuda"
    loaded = all("growth_bytes" in told[key] for key in names)
    rows = [("weights and buffers", *(bytes_text(told[key]["weights_bytes"]) for key in names))]
    if loaded:
        grown = "resident" if on_cpu else "allocated"
        rows.append((f"{grown} growth by loading", *(bytes_text(told[key]["growth_bytes"]) for key in names)))
    for row in result["end_to_end"]:
        batch = row["batch"]
        cache = (bytes_text(batch * told[key]["cache_bytes_per_sequence"]) for key in names)
        rows.append((f"cache, batch {batch}", *cache))
        if any(row[key]["peak_bytes"] is not None for key in names):
            rows.append((f"peak allocated, batch {batch}", *(_bytes(row[key]["peak_bytes"]) for key in names)))
    length = result["settings"]["context"] + result["settings"]["decode"]
    notes = [f"cache: for {length} tokens a sequence"]
    if loaded and on_cpu:
        notes.append("resident growth: of the process, with what the libraries take at their first use")
    return Rows("Memory", ("", *names.values()), tuple(rows), tuple(notes))


def layer_rows(result: Mapping[str, Any]) -> Rows:
    compared = any(timing["against_seconds"] for layer in result["layers"] for timing in layer["timings"])
    headers = ["layer", "out x in", "count", "tokens", *(["dense", "layer", "ratio"] if compared else ["layer"])]
    rows = []
    for layer in result["layers"]:
        for timing in layer["timings"]:
            first = timing is layer["timings"][0]
            cells = [layer["kind"], f"{layer['out']} x {layer['in']}", str(layer["count"])] if first else ["", "", ""]
            cells += [str(timing["tokens"]), *([_micros(timing["against_seconds"])] if compared else [])]
            cells += [_micros(timing["seconds"]), *([_ratio(timing["ratio"])] if compared else [])]
            rows.append(tuple(cells))
    worst = max((t["relative_error"] for layer in result["layers"] for t in layer["timings"]), default=0.0)
    graphs = {timing["graph"] for layer in result["layers"] for timing in layer["timings"]}
    how = (
        "CUDA graphs, L2 cache flushed" if graphs == {True} else "eager" if graphs == {False} else "partly CUDA graphs"
    )
    baselines = dict.fromkeys(layer["against"] for layer in result["layers"] if layer["against"])
    notes = [f"microseconds, median (smallest–largest); {how}; one layer of middle size stands for its kind"]
    notes += [f"dense: {' or '.join(baselines)}; ratio: its time over the layer's"] if compared else []
    notes.append(f"outputs against a float32 product with the unpacked weight, largest relative error {worst:.1e}")
    return Rows("Layers", tuple(headers), tuple(rows), tuple(notes))


def _tables(result: Mapping[str, Any]) -> list[Rows]:
    tables = [end_to_end_rows(result), memory_rows(result)]
    return tables + ([layer_rows(result)] if result["layers"] else [])


def _headline(result: Mapping[str, Any]) -> str:
    against = f"against {base_name(result['against'])}, " if result["against"] else ""
    device = result["device"]
    threads = f", threads: {device['threads']}" if device.get("threads") else ""
    return f"{against}{result['dtype']} on {device['name']}{threads}"


def shown_names(result: Mapping[str, Any]) -> dict[str, str]:
    """Key in the result -> how it is called, the other model first."""
    against, model = labels_of(result)
    return {"against": against, "model": model} if result["against"] is not None else {"model": model}


def _worst_error(result: Mapping[str, Any], key: str) -> float:
    return float(max(max(row[key]["relative_error"].values()) for row in result["end_to_end"]))


def _rate(timing: Mapping[str, Any]) -> str:
    rate = timing["tokens_per_second"]
    return f"{three_digits(rate['median'])} ({three_digits(rate['low'])}–{three_digits(rate['high'])})"


def _micros(seconds: Mapping[str, float] | None) -> str:
    if seconds is None:
        return ""
    median, low, high = (three_digits(seconds[key] * 1e6) for key in ("median", "low", "high"))
    return f"{median} ({low}–{high})"


def three_digits(value: float) -> str:
    """Three digits, or all before the point: `1,234`, `12.0`."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _joules(row: Mapping[str, Any], compared: bool) -> str:
    found = [row[key]["joules_per_token"] for key in (("against", "model") if compared else ("model",))]
    return ", ".join("" if value is None else number(value) for value in found)


def _bytes(count: int | None) -> str:
    return "" if count is None else bytes_text(count)
