"""The result of `bench` as tables, for a terminal and for Markdown."""

from rich.console import Group
from rich.text import Text

from paredown.evaluation.decoding import largest
from paredown.evaluation.report import listed, markdown_table, screen_table
from paredown.evaluation.schema import BatchSpeed, BenchResult, ModelKey, Phase, PhaseSpeed, Spread
from paredown.evaluation.tables import Labels, Rows, base_name, bytes_text, number

PHASES: tuple[Phase, ...] = ("prefill", "decode")


def render_bench(result: BenchResult) -> Group:
    """The result for a terminal."""
    head = Text.assemble((base_name(result["model"]), "bold"), f"  {_headline(result)}")
    return Group(head, *map(screen_table, _tables(result)), *listed("Notes", result["notes"]))


def bench_markdown(result: BenchResult) -> str:
    """The result as Markdown, with the chart `bench.svg` from the same folder."""
    name = base_name(result["model"])
    parts = [f"# Speed of {name}", f"{_headline(result)}.", "![tokens per second](bench.svg)"]
    parts += map(markdown_table, _tables(result))
    if result["notes"]:
        parts.append("\n".join(f"- {note}" for note in result["notes"]))
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return "\n\n".join([*parts, f"{result['date']}, {versions}"]) + "\n"


def labels_of(result: BenchResult) -> Labels:
    """The names to show for the model it is compared with and for the model in question."""
    name, against = base_name(result["model"]), base_name(result["against"]) if result["against"] else ""
    return (against, name) if against != name else (f"{against} (against)", name)


def end_to_end_rows(result: BenchResult) -> Rows:
    """Two rows for each batch size: prefill and decode, in tokens per second."""
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
            cells += [_ratio(row["ratio"][phase] if row["ratio"] else None)] if compared else []
            cells += [_joules(row, compared) if phase == "decode" else ""] if energy else []
            rows.append(tuple(cells))
    return Rows("Tokens per second (higher is better)", tuple(headers), tuple(rows), tuple(_protocol(result, compared)))


def _protocol(result: BenchResult, compared: bool) -> list[str]:
    """How the speeds were measured, and the largest error of the logits."""
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


def memory_rows(result: BenchResult) -> Rows:
    """A row for each quantity; for the cache and the peak a row for each batch size."""
    names = shown_names(result)
    memory = result["memory"]
    on_cpu = result["device"]["type"] != "cuda"
    growth = [bytes_text(memory[key]["growth_bytes"]) for key in names if "growth_bytes" in memory[key]]
    rows = [("weights and buffers", *(bytes_text(memory[key]["weights_bytes"]) for key in names))]
    if growth:
        rows.append((f"{'resident' if on_cpu else 'allocated'} growth by loading", *growth))
    for row in result["end_to_end"]:
        batch = row["batch"]
        cache = (bytes_text(batch * memory[key]["cache_bytes_per_sequence"]) for key in names)
        rows.append((f"cache, batch {batch}", *cache))
        if any(row[key]["peak_bytes"] is not None for key in names):
            rows.append((f"peak allocated, batch {batch}", *(_bytes(row[key]["peak_bytes"]) for key in names)))
    length = result["settings"]["context"] + result["settings"]["decode"]
    notes = [f"cache: for {length} tokens a sequence"]
    if growth and on_cpu:
        notes.append("resident growth: of the process, with what the libraries take at their first use")
    return Rows("Memory", ("", *names.values()), tuple(rows), tuple(notes))


def layer_rows(result: BenchResult) -> Rows:
    """A row for each kind and shape of layer and each number of tokens, in microseconds."""
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


def _tables(result: BenchResult) -> list[Rows]:
    tables = [end_to_end_rows(result), memory_rows(result)]
    return tables + ([layer_rows(result)] if result["layers"] else [])


def _headline(result: BenchResult) -> str:
    against = f"against {base_name(result['against'])}, " if result["against"] else ""
    device = result["device"]
    threads = f", threads: {device['threads']}" if device.get("threads") else ""
    return f"{against}{result['dtype']} on {device['name']}{threads}"


def shown_names(result: BenchResult) -> dict[ModelKey, str]:
    """The name to show for each key of the result, the model it is compared with first."""
    against, model = labels_of(result)
    return {"against": against, "model": model} if result["against"] is not None else {"model": model}


def _worst_error(result: BenchResult, key: ModelKey) -> float:
    return max(largest(row[key]["relative_error"]) for row in result["end_to_end"])


def _rate(speed: PhaseSpeed) -> str:
    rate = speed["tokens_per_second"]
    return f"{three_digits(rate['median'])} ({three_digits(rate['low'])}–{three_digits(rate['high'])})"


def _micros(seconds: Spread | None) -> str:
    if seconds is None:
        return ""
    median, low, high = (three_digits(t * 1e6) for t in (seconds["median"], seconds["low"], seconds["high"]))
    return f"{median} ({low}–{high})"


def three_digits(value: float) -> str:
    """Rounded to three digits, but whole from 100 on: `1,234`, `12.0`."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _joules(row: BatchSpeed, compared: bool) -> str:
    keys: tuple[ModelKey, ...] = ("against", "model") if compared else ("model",)
    joules = (row[key]["joules_per_token"] for key in keys)
    return ", ".join("" if value is None else number(value) for value in joules)


def _bytes(count: int | None) -> str:
    return "" if count is None else bytes_text(count)
