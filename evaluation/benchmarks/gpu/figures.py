"""What the commands of the programme printed, as figures: one small parser for each part.

Every parser takes the log of its part, also one that breaks off, and returns what it found.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from paredown.evaluation.speed_report import three_digits
from paredown.evaluation.tables import Rows

FACTORING_BAR = 3.0  # seconds for a block of Llama-3-8B's shape, in float32 or better
WHOLE_BAR = 600.0  # seconds for the whole model of that shape
BARRED = "llama-3-8b"  # the shape that both are for


@dataclass(frozen=True)
class Figures:
    """headline: the one figure to remember. missed: bars that were not reached. faults: what is wrong.

    numbers: all figures as plain data for JSON. tables: the same for people.
    """

    headline: str = ""
    numbers: Any = None
    tables: tuple[Rows, ...] = ()
    missed: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())


def records(log: str) -> list[dict[str, Any]]:
    """The JSON objects among the lines."""
    return [json.loads(line) for line in log.splitlines() if line.startswith("{") and line.endswith("}")]


def sections(log: str) -> Iterator[tuple[str, str]]:
    """Each command of a log with what it printed."""
    for section in re.split(r"^\$ ", log, flags=re.MULTILINE)[1:]:
        command, _, printed = section.partition("\n")
        yield command, printed


def ceilings(log: str) -> Figures:
    """Of `evaluation.benchmarks.ceilings`."""
    found = [record for record in records(log) if "ceiling" in record]
    facts: dict[str, Any] = next((record["facts"] for record in records(log) if "facts" in record), {})
    rates = {record["ceiling"]: _rate(record) for record in found}
    told = ("copy on the device", "bfloat16 product")
    rows = tuple((name, rate) for name, rate in rates.items())
    about = tuple((name, str(value)) for name, value in facts.items() if name not in ("device", "date", "versions"))
    tables = (Rows("Device", ("fact", ""), about), Rows("Ceilings", ("what", "rate, of medians"), rows))
    headline = ", ".join(f"{name} {rates[name]}" for name in told if name in rates)
    return Figures(headline, {"facts": facts, "ceilings": found}, tables if found else ())


def _rate(record: dict[str, Any]) -> str:
    giga = record["rate"] / 1e9
    rate = f"{three_digits(giga)} GB/s" if record["unit"] == "bytes" else f"{three_digits(giga / 1000)} TFLOP/s"
    return rate + (f" ({record['of_sheet']:.0%} of the data sheet)" if record["of_sheet"] else "")


CASE = re.compile(r"^(.+?) +(\d+) x (\d+) +(\w+) +(ok|\d+ FAULTS)$", re.MULTILINE)


def selftest(log: str) -> Figures:
    """Of `kernels.selftest`: every case must be right, and the operators."""
    cases = CASE.findall(log)
    bad = [f"{name} {out} x {inner} {dtype}: {found}" for name, out, inner, dtype, found in cases if found != "ok"]
    named = re.findall(r"^    (\S.*: .*)$", log, re.MULTILINE)
    further = dict(re.findall(r"^(operators|SparseGPT sweep): (.*)$", log, re.MULTILINE))
    bad += [f"{what}: {found}" for what, found in further.items() if found != "ok"]
    right = sum(verdict == "ok" for *_, verdict in cases)
    headline = f"{right} of {len(cases)} cases right" if cases else ""
    headline += "".join(f", {what} {'ok' if found == 'ok' else 'WRONG'}" for what, found in further.items())
    numbers = {"right": right, "cases": len(cases), **further, "faults": named}
    return Figures(headline, numbers, faults=tuple(bad), notes=tuple(named[:30]))


def sanitizer(log: str) -> Figures:
    """Of `kernels.selftest --small --sanitize`."""
    plain = selftest(log)
    verdict = re.search(r"^compute-sanitizer: (.*)$", log, re.MULTILINE)
    found = re.findall(r"^=+ (ERROR SUMMARY: .*|Invalid .*|.*Error: .*)$", log, re.MULTILINE)
    if verdict is None:
        return Figures("", plain.numbers, faults=plain.faults, notes=tuple(found[:10]))
    bad = () if verdict[1] == "clean" else (f"compute-sanitizer: {verdict[1]}",)
    return Figures(
        f"compute-sanitizer: {verdict[1]}", plain.numbers, faults=(*plain.faults, *bad), notes=tuple(found[:10])
    )


def kernels(log: str) -> Figures:
    """Of `kernels.benchmark`: the rows of its table."""
    lines = [line for line in log.splitlines() if line.startswith("|") and "---" not in line]
    header, rows = [], []
    for line in lines:
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if cells[0] == "what":
            header = cells
        else:
            rows.append(tuple(cells))
    missed = [f"{row[0]} {row[1]}, {row[2]} tokens: {row[-1]}" for row in rows if "MISSED" in row[-1]]
    met = sum("met" in row[-1] for row in rows)
    whole = next((f"{row[0]}: {row[-1]}" for row in rows if row[1] == "all"), "")
    headline = (f"{met} of {met + len(missed)} bars met" + (f"; {whole}" if whole else "")) if rows else ""
    left_out = dict.fromkeys(re.findall(r"left out, because .*", log))
    tables = (Rows("Decode kernels", tuple(header), tuple(rows)),) if rows else ()
    return Figures(headline, {"header": header, "rows": rows}, tables, tuple(missed), (), tuple(left_out)[:20])


def devices(log: str) -> Figures:
    """Of `evaluation.benchmarks.devices`."""
    found = records(log)
    headers = ("recipe", "loss, dense", "loss", "of a rise of", "mask agrees", "weights differ", "s, device", "s, CPU")
    rows = tuple(
        (
            one["recipe"], f"{one['dense']:+.4f}", f"{one['loss']:+.4f}", f"{one['rise']:.3f}",
            "" if one["masks"] is None else f"{one['masks']:.2%}", f"{one['weights']:.2%}",
            f"{one['seconds']:.1f}", f"{one['against_seconds']:.1f}",
        )
        for one in found
    )  # fmt: skip
    worst = max((abs(one["loss"]) for one in found), default=0.0)
    right = sum(not one["wrong"] for one in found)
    headline = (
        f"{right} of {len(found)} recipes equal the CPU's; largest difference of the loss {worst:.4f}" if found else ""
    )
    faults = [f"{one['recipe']}: {fault}" for one in found for fault in one["wrong"]]
    notes = ("device less CPU, in nats per token",)
    return Figures(
        headline, found, (Rows("Device beside CPU", headers, rows, notes),) if found else (), (), tuple(faults)
    )


BLOCK = re.compile(r"^\[ *(\d+)/(\d+)\].*?([\d.]+) s  peak", re.MULTILINE)
SIZE = re.compile(r"^(peak .*?|libraries, resident)  +(\d+) MB(?: \(planned (\d+) MB)?", re.MULTILINE)


def footprints(log: str) -> Figures:
    """Of `evaluation.benchmarks.footprint`, once for each recipe; seconds per block where a run did not end."""
    found, missed = [], []
    for command, printed in sections(log):
        recipe = re.search(r"--recipe (\S+)", command)
        if recipe is not None:
            found.append({"recipe": recipe[1], **_footprint(printed)})
            projected = found[-1]["seconds"] or found[-1]["projected"]
            if projected and projected > WHOLE_BAR and BARRED in command:
                missed.append(f"{recipe[1]}: {projected:.0f} s, bar {WHOLE_BAR:.0f} s")
    done = [one for one in found if one["seconds"] or one["blocks"]]
    headers = ("recipe", "seconds", "blocks", "s/block", "peak, host", "peak, device", "planned", "planned / measured")
    rows = tuple(_footprint_row(one) for one in done)
    headline = ", ".join(f"{row[0]} {row[1]}" for row in rows)
    notes = ("peak of the host: above the libraries; seconds in brackets: so far, and as the blocks so far let expect",)
    return Figures(headline, found, (Rows("A whole model", headers, rows, notes),) if rows else (), tuple(missed))


def _footprint(printed: str) -> dict[str, Any]:
    """Seconds, bytes and blocks of one run; None for what it did not come to print."""
    blocks = [(int(index), int(total), float(seconds)) for index, total, seconds in BLOCK.findall(printed)]
    total = re.search(r"^total +([\d.]+) s", printed, re.MULTILINE)
    parts = re.search(r"^seconds +(.*)$", printed, re.MULTILINE)
    sizes = {name.strip(): (int(size), int(planned or 0)) for name, size, planned in SIZE.findall(printed)}
    host = sizes.get("peak above them")
    per_block = sum(seconds for *_, seconds in blocks) / len(blocks) if blocks else None
    return {
        "seconds": float(total[1]) if total else None,
        "blocks": blocks[-1][0] if blocks else 0,
        "of": blocks[-1][1] if blocks else None,
        "seconds_per_block": per_block,
        "projected": per_block * blocks[-1][1] if per_block else None,
        "host_megabytes": host[0] if host else None,
        "planned_megabytes": host[1] if host else None,
        "device_megabytes": next((size for name, (size, _) in sizes.items() if name.startswith("peak on")), None),
        "parts": parts[1] if parts else None,
    }


def _footprint_row(one: dict[str, Any]) -> tuple[str, ...]:
    host, planned, device = (one[f"{name}_megabytes"] for name in ("host", "planned", "device"))
    spent = sum(size or 0 for size in (host, device))
    return (
        one["recipe"],
        f"{one['seconds']:.0f} s" if one["seconds"] else f"(unfinished; {one['projected']:.0f} s for all blocks)",
        f"{one['blocks']} of {one['of']}",
        f"{one['seconds_per_block']:.2f}" if one["seconds_per_block"] else "",
        *(f"{size:,} MB" if size else "" for size in (host, device, planned)),
        f"{planned / spent:.2f}" if planned and spent else "",
    )


LINEAR = re.compile(r"^  (\d+ x \d+), (.+?): ([\d.]+) s$", re.MULTILINE)
FACTORED = re.compile(r"^one block, (.+?): ([\d.]+) s \(", re.MULTILINE)


def _factored(command: str, printed: str) -> list[dict[str, Any]]:
    """The metrics of one run of the factorizers; `seconds` of a block is None where it did not come to an end."""
    precision = re.search(r"--precision (\w+)", command)
    blocks = {metric: float(seconds) for metric, seconds in FACTORED.findall(printed)}
    linears: dict[str, list[str]] = {}
    for size, metric, seconds in LINEAR.findall(printed):
        linears.setdefault(metric, []).append(f"{size}: {seconds}")
    return [
        {
            "metric": metric,
            "precision": precision[1] if precision else "",
            "linears": ", ".join(each),
            "seconds": blocks.get(metric),
        }
        for metric, each in linears.items()
    ]


def _seconds(value: float | None) -> str:
    return "unfinished" if value is None else f"{value:.2f}"


def solvers(log: str) -> Figures:
    """Of `evaluation.benchmarks.solvers` and `evaluation.benchmarks.factorizers`."""
    found = records(log)
    swept, profiles = ([one for one in found if key in one] for key in ("loop", "profile"))
    factored = [one for command, printed in sections(log) for one in _factored(command, printed)]
    tables, headlines = [], []
    if swept:
        tables.append(_sweep_table(swept))
        loop, kernel, factor = (_of_block(swept, key) for key in ("loop", "kernel", "factor_float64"))
        headlines.append(f"sweep of a block {loop:.2f} s, by the kernel {kernel:.2f} s; its factors {factor:.2f} s")
    if profiles:
        tables.append(_profile_table(profiles))
    if factored:
        rows = [(one["metric"], one["precision"], one["linears"], _seconds(one["seconds"])) for one in factored]
        headers = ("metric", "precision", "each linear, seconds", "block, seconds")
        tables.append(Rows("Factoring one block", headers, tuple(rows)))
    whole = [one for one in factored if one["seconds"] is not None]
    if whole:
        best = min(whole, key=lambda one: (one["metric"] != "two-sided", one["seconds"]))
        headlines.append(f"factoring {best['seconds']:.2f} s, {best['metric']}, {best['precision']}")
    missed = _slow(whole) if BARRED in log else ()
    return Figures(
        "; ".join(headlines), {"sweep": swept, "profiles": profiles, "factoring": factored}, tuple(tables), missed
    )


def _of_block(swept: list[dict[str, Any]], key: str) -> float:
    return float(sum(one["count"] * one[key] for one in swept))


def _sweep_table(swept: list[dict[str, Any]]) -> Rows:
    keys = ("factor_float64", "factor_float32", "loop", "kernel")
    rows = [(f"{one['out']} x {one['in']}", str(one["count"]), *(f"{one[key]:.3f}" for key in keys)) for one in swept]
    whole = ("block", "", *(f"{_of_block(swept, key):.3f}" for key in keys))
    headers = ("weight", "in a block", "factor, float64", "factor, float32", "sweep, Python loop", "sweep, kernel")
    return Rows("SparseGPT, seconds", headers, (*rows, whole), ("block: as if no layers shared their inputs",))


def _profile_table(profiles: list[dict[str, Any]]) -> Rows:
    rows = []
    for one in profiles:
        measured = one["busy"] is not None
        busy = f"{one['busy']:.4f} ({one['busy'] / one['seconds']:.0%})" if measured else ""
        longest = ", ".join(f"{name} {seconds:.4f}" for name, seconds in one["longest"].items())
        launches = f"{one['launches']:,}" if measured else ""
        rows.append((one["profile"], f"{one['out']} x {one['in']}", f"{one['seconds']:.4f}", busy, launches, longest))
    headers = ("sweep", "weight", "seconds", "device busy", "launches", "longest kernels, seconds")
    return Rows("Where the time of a sweep goes", headers, tuple(rows))


def _slow(factored: list[dict[str, Any]]) -> tuple[str, ...]:
    """The metrics in which no precision reaches the bar."""
    best: dict[str, float] = {}
    for one in factored:
        best[one["metric"]] = min(one["seconds"], best.get(one["metric"], one["seconds"]))
    return tuple(
        f"factoring a block, {metric}: {seconds:.2f} s, bar {FACTORING_BAR:g} s"
        for metric, seconds in best.items()
        if seconds >= FACTORING_BAR
    )


def decoding(log: str) -> Figures:
    """Of `evaluation.benchmarks.decode --json`."""
    found = [record for record in records(log) if "end_to_end" in record]
    rows = [_decode_row(result["model"], row) for result in found for row in result["end_to_end"]]
    headers = (
        "model",
        "batch",
        "mode",
        "dense tokens/s",
        "packed tokens/s",
        "decode",
        "prefill",
        "J/token dense, packed",
    )
    verdicts = re.findall(r"^decoding, dense time / ours: (.*)$", log, re.MULTILINE)
    headline = ", ".join(f"{row[0]} batch {row[1]}: {row[5]}" for row in rows)
    notes = tuple(dict.fromkeys(note for result in found for note in result["notes"]))
    if rows and not any(row[-1] for row in rows):
        notes += ("no energy: pynvml is missing, or the driver has no counter",)
    table = Rows(
        "Decoding, packed beside dense", headers, tuple(rows), ("decode, prefill: dense time / ours, of medians",)
    )
    missed = tuple(f"decoding {verdict}" for verdict in verdicts if verdict.endswith("MISSED"))
    return Figures(headline, found, (table,) if rows else (), missed, (), notes)


def _decode_row(name: str, row: dict[str, Any]) -> tuple[str, ...]:
    speeds = [three_digits(row[key]["decode"]["tokens_per_second"]["median"]) for key in ("against", "model")]
    joules = [row[key]["joules_per_token"] for key in ("against", "model")]
    return (
        name, str(row["batch"]), row["decode_mode"], *speeds,
        f"{row['ratio']['decode']:.2f}x", f"{row['ratio']['prefill']:.2f}x",
        "" if None in joules else ", ".join(f"{one:.3g}" for one in joules),
    )  # fmt: skip


def serving(log: str) -> Figures:
    """Of `evaluation.benchmarks.serving`."""
    found = records(log)
    sizes = {one["form"]: one["weight_bytes"] for one in found if "weight_bytes" in one}
    speeds = {(one["form"], one["batch"]): one["tokens_per_second"]["median"] for one in found if "batch" in one}
    pairs = [
        (n, speeds["dense", n], speed)
        for (form, n), speed in speeds.items()
        if form == "packed" and ("dense", n) in speeds
    ]
    rows = tuple((str(n), three_digits(dense), three_digits(own), f"{own / dense:.2f}x") for n, dense, own in pairs)
    last = next((one for one in found if "agreed" in one), None)
    notes = [f"weights of {form}: {size / 1e6:,.0f} MB" for form, size in sizes.items()]
    if last:
        notes += [
            f"log probabilities differ by {last['largest_difference']:.4f} at most, {last['mean_difference']:.4f} in the mean"
        ]
        notes += [f"greedy tokens before the first other one: {last['agreed']:.0%}"]
    table = Rows("vLLM, packed beside dense", ("batch", "dense tokens/s", "packed tokens/s", "packed / dense"), rows)
    headline = ", ".join(f"batch {row[0]}: {row[3]}" for row in rows)
    return Figures(headline, found, (table,) if rows else (), notes=tuple(notes))


def recovery(log: str) -> Figures:
    """Of `paredown recover`: what it did, and each text's perplexity as dense, compressed and recovered."""
    found = re.findall(r"^(?:Recovery: .*|\S+: perplexity .* recovered;.*)$", log, re.M)
    texts = [line.split("; ", 1)[0] for line in found if not line.startswith("Recovery")]
    return Figures("; ".join(texts)[:120], found)
