"""Finished runs side by side as tables, for a terminal and for a page."""

from collections.abc import Sequence
from dataclasses import replace

from rich.console import Group as Lines
from rich.text import Text

from paredown.evaluation.compare import Group, Run, Value
from paredown.evaluation.report import listed, screen_table
from paredown.evaluation.tables import Rows, bytes_text, plus_minus

FRONT = "*"
LONG = 16  # characters of a name


def render_comparison(groups: Sequence[Group]) -> Lines:
    """All groups for a terminal."""
    parts: list[Lines | Text] = []
    if len(groups) > 1:
        parts.append(Text(f"{len(groups)} groups: runs of different models or texts are not compared.\n", style="bold"))
    for group in groups:
        parts.append(Text(heading(group), style="bold"))
        parts += [screen_table(_broken(rows)) for rows in tables(group)]
        parts += listed("Remarks", group.remarks)
    return Lines(*parts)


def _broken(rows: Rows) -> Rows:
    """Long names of runs in several lines, at the signs that join their parts, so that none breaks inside a word."""
    names = (row[0].replace("_", "_\n") if len(row[0]) > LONG else row[0] for row in rows.rows)
    return replace(rows, rows=tuple((name, *row[1:]) for name, row in zip(names, rows.rows, strict=True)))


def heading(group: Group) -> str:
    """`SmolLM2-135M: 5 runs`."""
    return f"{group.model}: {len(group.runs)} run{'s' if len(group.runs) > 1 else ''}"


def tables(group: Group) -> list[Rows]:
    """What each run cost and lost; tasks, if any were scored; and the options in which the runs differ."""
    found = [_figures(group)]
    found += [_tasks(group)] if any(run.tasks for run in group.runs) else []
    return found + ([_options(group)] if group.differing() else [])


def _figures(group: Group) -> Rows:
    best = {id(run) for run in group.front("bytes", "perplexity")} if len(group.runs) > 1 else set()
    letters = [f"{chr(97 + i)}: " if len(group.texts) > 1 else "" for i in range(len(group.texts))]
    headers = ["run", "on disk", "params"]
    for letter in letters:
        headers += [f"{letter}log ratio", f"{letter}KL"]
    timed = any(run.latency for run in group.runs)
    rows = []
    for run in [None, *sorted(group.runs, key=lambda run: run.bytes)]:
        if run is None:
            cells = ["dense", bytes_text(group.bytes), _count(group.parameters), *("0", "0") * len(group.texts), ""]
        else:
            name = run.name + (FRONT if id(run) in best else "")
            losses = [
                cell
                for text in group.texts
                for cell in (_cell(run.perplexity.get(text)), _cell(run.kl.get(text), signed=False))
            ]
            cells = [name, bytes_text(run.bytes), _count(run.parameters), *losses, f"{run.seconds:,.0f} s"]
        rows.append((*cells, *([_latency(run)] if timed else [])))
    notes = [
        f"{letter}{text}; dense perplexity {group.dense[text]:.2f}"
        for letter, text in zip(letters, group.texts, strict=True)
    ]
    notes.append("log ratio: rise of the mean loss, paired, and KL: nats per token ± one standard error")
    notes += [f"{FRONT} no other run is as small and as close to the dense model"] if best else []
    return Rows("", (*headers, "time", *(["s/token"] if timed else [])), tuple(rows), tuple(notes))


def _latency(run: Run | None) -> str:
    return "" if run is None or run.latency is None else f"{run.latency:.4f}"


def _cell(value: Value | None, *, signed: bool = True) -> str:
    return "" if value is None else plus_minus(value.value, value.stderr, signed=signed)


def _count(number: int) -> str:
    """`4.00 M`."""
    scale, letter = next((pair for pair in ((1e9, "B"), (1e6, "M")) if number >= pair[0]), (1e3, "k"))
    return f"{number / scale:.2f} {letter}"


def _tasks(group: Group) -> Rows:
    names = dict.fromkeys(name for run in group.runs for name in run.tasks)
    rows = ((run.name, *(_cell(run.tasks.get(name)) for name in names)) for run in group.runs)
    return Rows("Tasks, change against the dense model, paired", ("run", *names), tuple(rows))


def _options(group: Group) -> Rows:
    """Each run's recipe, and its options where runs differ."""
    names = group.differing()
    rows = (
        (run.name, run.method, ", ".join(f"{name} {run.options[name]}" for name in names if name in run.options))
        for run in group.runs
    )
    return Rows("Where the recipes differ", ("run", "recipe", "options"), tuple(rows))
