"""Finished runs side by side: what each kept, what it lost with paired errors, and which no other beats.

Only runs of one model on the same texts can be compared; others stand in a group of their own.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from paredown.compress.errors import PareError
from paredown.evaluation.schema import Report, check_report
from paredown.evaluation.tables import base_name, short, text_name

Cost = Literal["bytes", "parameters", "latency"]
Loss = Literal["perplexity", "kl"]
SAME = 0.005  # nats: further apart, two dense models of one name are not the same model


@dataclass(frozen=True)
class Value:
    """A figure and its standard error."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class Run:
    """One finished run, as a row of the comparison."""

    name: str
    method: str
    options: dict[str, Any]  # of its recipe, flat: what differs between runs is shown
    bytes: int  # of the weights on disk
    parameters: int  # of the whole model
    perplexity: dict[str, Value]  # by text: rise of log perplexity, nats per token, paired
    kl: dict[str, Value]  # by text: mean KL(dense || compressed), nats
    tasks: dict[str, Value]  # by `task metric`: change, paired
    seconds: float
    latency: float | None  # seconds to decode a token, as bench.json beside the report says

    def cost(self, of: Cost) -> float | None:
        return {"bytes": float(self.bytes), "parameters": float(self.parameters), "latency": self.latency}[of]

    def loss(self, of: Loss, text: str) -> Value | None:
        return (self.perplexity if of == "perplexity" else self.kl).get(text)


@dataclass
class Group:
    """Runs of one model that were scored on the same texts."""

    model: str
    texts: tuple[str, ...]
    bytes: int  # of the dense model
    parameters: int
    dense: dict[str, float]  # its perplexity by text
    runs: list[Run] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `front` says of each run whether no other is both smaller and closer to the dense model."""
        best = {id(run) for run in self.front("bytes", "perplexity")}
        rows = [{**asdict(run), "front": id(run) in best} for run in self.runs]
        return {**asdict(self), "texts": list(self.texts), "runs": rows}

    def front(self, cost: Cost, loss: Loss) -> list[Run]:
        """The runs that no other beats on the first text: none costs as little and loses as little; cheapest first."""
        points = []
        for run in self.runs:
            price, lost = run.cost(cost), run.loss(loss, self.texts[0]) if self.texts else None
            if price is not None and lost is not None:
                points.append((price, lost.value, run))
        best: list[tuple[float, float, Run]] = []
        for point in sorted(points, key=lambda p: p[:2]):
            if not best or point[1] < best[-1][1]:
                best.append(point)
        return [run for *_, run in best]

    def differing(self) -> list[str]:
        """The options that are not the same in all runs."""
        names = dict.fromkeys(name for run in self.runs for name in run.options)
        return [name for name in names if len({repr(run.options.get(name)) for run in self.runs}) > 1]


def compare(folders: Iterable[Path]) -> list[Group]:
    """The runs in these folders, grouped. Raises PareError for a folder without a report, and for fewer than two runs."""
    groups: dict[Any, Group] = {}
    names: set[str] = set()
    known = [(folder, read_report(folder)) for folder in dict.fromkeys(folder.resolve() for folder in folders)]
    if len(known) < 2:
        raise PareError("one run has nothing to be compared with. Name at least two folders that paredown wrote.")
    for folder, report in known:
        name = folder.name if folder.name not in names else f"{folder.parent.name}/{folder.name}"
        names.add(name)
        group = groups.setdefault(_identity(report), _group(report))
        _check_dense(group, report, name)
        group.runs.append(run_of(name, report, latency_in(folder)))
    return list(groups.values())


def read_report(folder: Path) -> Report:
    """The report in a folder. Raises PareError if there is none that this version reads."""
    path = folder / "report.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as fault:
        raise PareError(f"{folder} holds no report.json. Name folders that paredown compress wrote.") from fault
    except (OSError, ValueError) as fault:
        raise PareError(f"{path} cannot be read: {fault}") from fault
    try:
        check_report(report)
    except PareError as fault:
        raise PareError(f"{path}: {fault}") from fault
    return cast(Report, report)


def run_of(name: str, report: Report, latency: float | None = None) -> Run:
    """The row of one run."""
    recipe, counts, texts = report["recipe"], report["parameters"], report["evaluation"]
    rise = {text_key(e): Value(e["paired_delta"]["log_ratio"], e["paired_delta"]["stderr"]) for e in texts}
    apart = {text_key(e): e["divergence"] for e in texts if "divergence" in e}
    return Run(
        name=name,
        method=str(recipe.get("name") or recipe.get("method") or "stages"),
        options=flat(_options(report)),
        bytes=report["bytes"]["after"],
        parameters=counts["total"] - counts["targeted"] + counts["kept"],
        perplexity=rise,
        kl={text: Value(d["kl_mean"], d["kl_stderr"]) for text, d in apart.items()},
        tasks={
            f"{task} {metric}": Value(score["after"] - score["before"], score["paired_stderr"])
            for task, metrics in report["tasks"].items()
            for metric, score in metrics.items()
        },
        seconds=report["seconds"]["total"],
        latency=latency,
    )


def _options(report: Report) -> dict[str, Any]:
    """What of a recipe decides on the result, beside what its name says of it; and what recovered that."""
    recipe, steps = report["recipe"], report.get("recovery", [])
    left_out = ("name", "description", "citation", "evaluate", "recover", *(("method",) if recipe.get("name") else ()))
    chosen = {key: value for key, value in recipe.items() if key not in left_out}
    told = ", ".join(f"{step['step']} by {step['tokens']:,} tokens" for step in steps)
    return {**chosen, "recovered": told} if steps else chosen


def flat(tree: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """`{"options.sparsity": 0.5}` of `{"options": {"sparsity": 0.5}}`; the part `options.` is left out."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= flat(value, "" if key == "options" else f"{place}{key}.")
        else:
            leaves[place + key] = value
    return leaves


def text_key(entry: Mapping[str, Any]) -> str:
    """Which text, and how it was cut: figures on two different ones are not compared."""
    return f"{text_name(entry)}, {entry['tokens']:,} tokens in windows of {entry['length']:,}, {short(entry['sha256'])}"


def latency_in(folder: Path) -> float | None:
    """Seconds to decode one token at the smallest batch, from a bench.json in the folder; None without one."""
    path = folder / "bench.json"
    if not path.is_file():
        return None
    try:
        first = json.loads(path.read_text(encoding="utf-8"))["end_to_end"][0]
        return float(first["model"]["decode"]["seconds"]["median"]) / int(first["decode"])
    except (OSError, ValueError, LookupError, TypeError) as fault:
        raise PareError(f"{path} is no result of paredown bench: {fault!r}. Remove it, or measure again.") from fault


def _identity(report: Report) -> tuple[object, ...]:
    """What two runs must share to be compared."""
    model = report["model"]
    own = (base_name(model), model["revision"], model["family"], model["parameters"], model.get("tokenizer_sha256"))
    return (*own, frozenset(text_key(entry) for entry in report["evaluation"]))


def _group(report: Report) -> Group:
    texts = report["evaluation"]
    return Group(
        model=base_name(report["model"]),
        texts=tuple(map(text_key, texts)),
        bytes=report["bytes"]["before"],
        parameters=report["parameters"]["total"],
        dense={text_key(entry): entry["before"]["token_perplexity"] for entry in texts},
    )


def _check_dense(group: Group, report: Report, name: str) -> None:
    """Remark on a run whose dense model scores otherwise: it may be another model of the same name, dtype or device."""
    for entry in report["evaluation"]:
        here, there = entry["before"]["token_perplexity"], group.dense[text_key(entry)]
        if abs(math.log(here / there)) > SAME:
            group.remarks.append(
                f"{name}: its dense model has perplexity {here:.4f} on {text_name(entry)}, that of the first run "
                f"{there:.4f}: not the same weights, or not computed alike"
            )


def parse_axes(cost: str, loss: str, groups: Sequence[Group]) -> tuple[Cost, Loss]:
    """The axes of the picture. Raises PareError if a run lacks what they show."""
    runs = [run for group in groups for run in group.runs]
    if cost == "latency" and (lacking := [run.name for run in runs if run.latency is None]):
        raise PareError(
            f"no bench.json in {', '.join(lacking)}. Measure each: paredown bench OUT -o OUT, or name another --cost."
        )
    if loss == "kl" and (lacking := [run.name for run in runs if not run.kl]):
        raise PareError(
            f"no KL divergence in the report of {', '.join(lacking)}. Name another --loss, or run it again."
        )
    return cast(Cost, cost), cast(Loss, loss)
