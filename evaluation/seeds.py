"""One recipe by several calibration seeds: how far its figures depend on which windows were drawn."""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, cast

from paredown.evaluation.schema import Report, SeedResult, check_report
from paredown.evaluation.tables import Rows, text_name


def seed_result(seed: int, report: Report) -> SeedResult:
    """What is kept of the report of one seed."""
    texts = []
    for entry in cast(Sequence[Mapping[str, Any]], report["evaluation"]):
        delta = entry.get("paired_delta") or {}
        figures = {"token_perplexity": entry["after"]["token_perplexity"], "log_ratio": delta.get("log_ratio")}
        texts.append({"corpus": entry["corpus"], "split": entry.get("split"), **figures, "stderr": delta.get("stderr")})
    tasks = {task: {name: value["after"] for name, value in scores.items()} for task, scores in report["tasks"].items()}
    return cast(SeedResult, {"seed": seed, "evaluation": texts, "tasks": tasks})


def with_seeds(report: Report, others: Sequence[SeedResult]) -> Report:
    """The report of the first seed with the figures of all; the same report without others."""
    if not others or report["calibration"] is None:
        return report
    own = seed_result(int(report["recipe"]["calibration"]["seed"]), report)
    merged = {**report, "seeds": [own, *others]}
    check_report(merged)
    return cast(Report, merged)


def seed_rows(seeds: Sequence[SeedResult]) -> Rows | None:
    """Each seed's figures with their mean and standard deviation; None for fewer than two seeds."""
    if len(seeds) < 2:
        return None
    rows = []
    for position, text in enumerate(seeds[0]["evaluation"]):
        entries = [seed["evaluation"][position] for seed in seeds]
        ratios = [entry["log_ratio"] for entry in entries if entry["log_ratio"] is not None]
        if len(ratios) == len(seeds):
            rows.append(_row(f"{text_name(text)}, log ratio", ratios, "+.4f"))
        else:
            rows.append(_row(f"{text_name(text)}, perplexity", [entry["token_perplexity"] for entry in entries], ".4g"))
    for task, scores in seeds[0]["tasks"].items():
        rows += [_row(f"{task}, {name}", [seed["tasks"][task][name] for seed in seeds], ".4f") for name in scores]
    headers = ("", *(f"seed {seed['seed']}" for seed in seeds), "mean ± spread")
    note = (
        f"spread: standard deviation over the seeds. The checkpoint, and all else here, is of seed {seeds[0]['seed']}"
    )
    return Rows("By seed of the calibration windows", headers, tuple(rows), (note,))


def _row(label: str, values: Sequence[float], form: str) -> tuple[str, ...]:
    spread = format(stdev(values), form.lstrip("+"))
    return (label, *(format(value, form) for value in values), f"{fmean(values):{form}} ± {spread}")
