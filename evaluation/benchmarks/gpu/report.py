"""The results of the programme: gpu.json to continue from, gpu.md to paste, and a short table for the terminal."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from paredown.evaluation.benchmarks.gpu.figures import Figures
from paredown.evaluation.benchmarks.gpu.programme import Outcome
from paredown.evaluation.report import markdown_table
from paredown.evaluation.schema import Surroundings
from paredown.evaluation.tables import Rows

SCHEMA = 1  # of gpu.json
REHEARSED = "A rehearsal on a CPU, in miniature: its figures mean nothing."


def write(folder: Path, head: dict[str, Any], outcomes: Sequence[Outcome]) -> None:
    """Write gpu.json and gpu.md into `folder`, each in one rename. head: as `heading` returns it."""
    content = {**head, "parts": [asdict(outcome) for outcome in outcomes]}
    _replace(folder / "gpu.json", json.dumps(content, indent=1))
    _replace(folder / "gpu.md", markdown(head, outcomes))


def heading(surroundings: Surroundings, minutes: float, rehearsal: bool) -> dict[str, Any]:
    """What is the same for all parts of a run: device, date, versions and time."""
    return {"schema": SCHEMA, "rehearsal": rehearsal, "minutes": minutes, **surroundings}


def earlier(folder: Path, head: dict[str, Any]) -> dict[str, Outcome]:
    """The outcomes by name that an earlier run on the same device with the same versions left in `folder`."""
    file = folder / "gpu.json"
    raw = json.loads(file.read_text()) if file.exists() else {}
    if any(raw.get(key) != head[key] for key in ("schema", "rehearsal", "device", "versions")):
        return {}
    return {part["name"]: Outcome(**{**part, "figures": _figures(part["figures"])}) for part in raw["parts"]}


def _figures(raw: dict[str, Any]) -> Figures:
    tables = tuple(
        Rows(one["title"], tuple(one["headers"]), tuple(map(tuple, one["rows"])), tuple(one["notes"]))
        for one in raw["tables"]
    )
    listed = {key: tuple(raw[key]) for key in ("missed", "faults", "notes")}
    return Figures(raw["headline"], raw["numbers"], tables, **listed)


def _replace(file: Path, text: str) -> None:
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text)
    os.replace(partial, file)


def summary(outcomes: Sequence[Outcome]) -> Rows:
    """A row for each part."""
    rows = tuple(
        (
            one.name,
            one.state,
            f"{one.seconds:.0f} of {one.budget:.0f}" if one.budget else "",
            "; ".join(filter(None, (one.figures.headline, one.reason))),
            f"{len(one.figures.missed)}" if one.figures.missed else "",
        )
        for one in outcomes
    )
    return Rows("Programme", ("part", "state", "seconds", "figure", "missed bars"), rows)


def markdown(head: dict[str, Any], outcomes: Sequence[Outcome]) -> str:
    """A page with all figures."""
    versions = ", ".join(f"{name} {version}" for name, version in head["versions"].items())
    parts = [f"# {head['device']['name']}", f"{head['date']}, {versions}."]
    if head["rehearsal"]:
        parts.append(REHEARSED)
    parts.append(markdown_table(summary(outcomes)))
    parts += [section for outcome in outcomes if outcome.state != "skipped" for section in _section(outcome)]
    return "\n\n".join(parts) + "\n"


def _section(one: Outcome) -> list[str]:
    parts = [f"## {one.title}", f"For {one.goes_to}; log: {one.name}.log." if one.goes_to else f"Log: {one.name}.log."]
    found = one.figures
    parts += [markdown_table(table) for table in found.tables]
    for title, lines in (("Wrong", found.faults), ("Bars missed", found.missed), ("Notes", found.notes)):
        if lines:
            parts.append("\n".join([f"{title}:", "", *(f"- {line}" for line in lines)]))
    return parts
