"""What models scored on lm-eval tasks, document by document: compared, written to files and read again."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import stdev

from pydantic import TypeAdapter
from typing_extensions import TypedDict  # pydantic wants this one below Python 3.12

from paredown.compress.errors import PareError
from paredown.evaluation import schema


@dataclass(frozen=True)
class Score:
    """One metric of one task.

    `samples` holds the value of each document if the metric is the mean of these values, else `None`.
    """

    value: float
    stderr: float | None
    samples: tuple[float, ...] | None


@dataclass(frozen=True)
class TaskScores:
    """What one model scored: `scores[task][metric]`.

    A metric has lm-eval's name, followed by a comma and its filter if there is one (`exact_match,strict-match`).
    `documents[task]` identifies the documents in order, by digest; `notes` are lm-eval's warnings; `bos` says which
    contexts begin with the tokenizer's BOS. `samples` are lm-eval's records of each task's documents, as lines of JSON.
    """

    scores: Mapping[str, Mapping[str, Score]]
    documents: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...] = ()
    bos: str = "none"
    samples: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def merged(cls, parts: "Sequence[TaskScores]") -> "TaskScores":
        """The scores of several tasks of one model together."""
        return cls(
            {name: metrics for part in parts for name, metrics in part.scores.items()},
            {name: documents for part in parts for name, documents in part.documents.items()},
            tuple(dict.fromkeys(note for part in parts for note in part.notes)),
            parts[0].bos if parts else "none",
            {name: lines for part in parts for name, lines in part.samples.items()},
        )

    def summary(self) -> dict[str, dict[str, schema.TaskScore]]:
        """By task and metric, as in an `EvalResult` of one model."""
        return {
            task: {
                metric: {
                    "value": score.value,
                    "stderr": score.stderr,
                    "documents": len(self.documents[task]),
                    "bos": self.bos,
                }
                for metric, score in metrics.items()
            }
            for task, metrics in self.scores.items()
        }


def compare_tasks(before: TaskScores, after: TaskScores) -> dict[str, dict[str, schema.TaskComparison]]:
    """The scores of two models by task and metric.

    `paired_stderr` is the standard error of `after - before` over the same documents, far smaller than the two errors
    combined. `correct_to_wrong` and `wrong_to_correct` count the documents whose answer flipped (Dutta et al. 2024,
    "Accuracy is not all you need", arXiv 2407.09141). All three are `None` where lm-eval gives no value for each document,
    the counts also where a document's value is not 0 or 1. Raises `PareError` if the documents of a task differ.
    """
    differing = [task for task in before.scores if before.documents[task] != after.documents.get(task)]
    if differing or before.scores.keys() != after.scores.keys():
        raise PareError(
            f"the two models were not asked the same questions: {', '.join(differing) or 'other tasks'} differ. "
            "Run both with the same tasks, limit and seed"
        )
    return {
        task: {metric: _compare(score, after.scores[task][metric], after.bos) for metric, score in metrics.items()}
        for task, metrics in before.scores.items()
    }


def _compare(before: Score, after: Score, bos: str) -> schema.TaskComparison:
    paired: float | None = None
    lost: int | None = None
    won: int | None = None
    if before.samples is not None and after.samples is not None:
        pairs = list(zip(before.samples, after.samples, strict=True))
        if len(pairs) > 1:
            paired = stdev(b - a for a, b in pairs) / math.sqrt(len(pairs))
        if all(value in (0.0, 1.0) for pair in pairs for value in pair):
            lost, won = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    return {
        "before": before.value,
        "after": after.value,
        "stderr_before": before.stderr,
        "stderr_after": after.stderr,
        "paired_stderr": paired,
        "correct_to_wrong": lost,
        "wrong_to_correct": won,
        "bos": bos,
    }


class _Kept(TypedDict):
    key: str
    scores: dict[str, dict[str, Score]]
    documents: dict[str, tuple[str, ...]]
    notes: tuple[str, ...]
    bos: str
    samples: dict[str, int]  # lines of each task in the other file
    sha256: str  # of the lines


_kept = TypeAdapter(_Kept)


def write_scores(folder: Path, name: str, key: str, scores: TaskScores) -> None:
    """Write `name.json` and, with lm-eval's records of each document, `name.jsonl`. `key` says what they depend on."""
    lines = [line for task in scores.samples.values() for line in task]
    told: _Kept = {
        "key": key,
        "scores": {task: dict(metrics) for task, metrics in scores.scores.items()},
        "documents": dict(scores.documents),
        "notes": scores.notes,
        "bos": scores.bos,
        "samples": {task: len(of_task) for task, of_task in scores.samples.items()},
        "sha256": _digest(lines),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
    (folder / f"{name}.json").write_bytes(_kept.dump_json(told, indent=1) + b"\n")


def read_scores(folder: Path, name: str, key: str) -> TaskScores | None:
    """What `write_scores` wrote under this key; None if there is nothing of the kind, or if it is damaged."""
    try:
        told = _kept.validate_json((folder / f"{name}.json").read_bytes())
        lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    except (OSError, ValueError):
        return None
    if told["key"] != key or told["sha256"] != _digest(lines):
        return None
    parts = iter(lines)
    samples = {task: tuple(islice(parts, count)) for task, count in told["samples"].items()}
    return TaskScores(told["scores"], told["documents"], told["notes"], told["bos"], samples)


def _digest(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
