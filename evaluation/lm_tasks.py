"""Run lm-eval tasks on a model in memory, and compare two models on the same documents.

A task is a YAML file that may name Python code to execute. So tasks come from three places only: the installed lm-eval,
our own folder `evaluation/tasks`, and a folder that the user names. The name of a task is never read as a path.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from paredown.compress.errors import PareError, did_you_mean
from paredown.compress.text.windows import Bos, special_prefix
from paredown.evaluation import schema

if TYPE_CHECKING:
    from torch import nn

OURS = Path(__file__).parent / "tasks"

# lm-eval's default seeds (Python's random, numpy, torch, few-shot draw): published scores use the same few-shot examples.
LM_EVAL_SEEDS = (0, 1234, 1234, 1234)

# Bootstrap samples for metrics whose standard error has no formula; that of an accuracy has one.
BOOTSTRAP = 1000


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
    contexts begin with the tokenizer's BOS.
    """

    scores: Mapping[str, Mapping[str, Score]]
    documents: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...] = ()
    bos: str = "none"

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


def check_tasks(names: Sequence[str], include: Path | None = None, *, data: bool = False) -> None:
    """Raise `PareError` for names that are no lm-eval task, group or tag. No weight is read.

    `include` is a folder of further task YAML. By naming it the user agrees that the Python code it refers to is run.
    No such code is run here unless `data` is set: then the data of every task is loaded too, so that a missing network or
    an unknown dataset is an error now, and not after the compression.
    """
    if not names:
        return
    manager = task_manager(names, include)
    if data:
        with _collected_warnings():
            _load(manager, names)


def run_tasks(
    model: "nn.Module",
    tokenizer: Any,
    names: Sequence[str],
    *,
    batch_size: int = 8,
    limit: int | None = None,
    include: Path | None = None,
    seed: int = 0,
    bos: Bos = "auto",
) -> TaskScores:
    """Score a transformers model on lm-eval tasks, and keep the value of every document.

    With `limit` only the first `limit` documents of each task are used. `seed` is added to lm-eval's four default seeds,
    so that 0 draws the same few-shot examples as published scores. Every context begins with a BOS where the tokenizer
    adds one, unless `bos` is `none`. Raises `PareError` for unknown tasks, for data that cannot be loaded, and for a model
    whose likelihoods are NaN: its accuracy would look like chance.
    """
    if not names:
        return TaskScores({}, {})
    if limit is not None and limit < 1:
        raise PareError(f"the limit of documents per task is {limit}; wanted at least 1, or none at all")
    manager = task_manager(names, include)
    from lm_eval import simple_evaluate

    from paredown.evaluation.lm_model import PrefixedLM

    prefix = special_prefix(tokenizer) if bos == "auto" else ()
    random_seed, numpy_seed, torch_seed, fewshot_seed = (start + seed for start in LM_EVAL_SEEDS)
    with _collected_warnings() as warnings:
        loaded = _load(manager, names)
        results = simple_evaluate(
            # a copy of the tokenizer, because lm-eval gives it a padding token
            model=PrefixedLM(model, deepcopy(tokenizer), batch_size, prefix),
            tasks=_roots(loaded),
            task_manager=manager,
            limit=limit,
            log_samples=True,
            bootstrap_iters=BOOTSTRAP,
            random_seed=random_seed,
            numpy_random_seed=numpy_seed,
            torch_random_seed=torch_seed,
            fewshot_random_seed=fewshot_seed,
        )
    return replace(_scores(results, warnings), bos="every context" if prefix else "none")


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


def task_manager(names: Sequence[str], include: Path | None = None) -> Any:
    """An lm-eval `TaskManager` that knows all of `names`.

    It knows only our tasks and those of `include` if they suffice: to index the thousands of lm-eval takes seconds.
    Raises `PareError` for unknown names, for a missing folder and without lm-eval.
    """
    _require_lm_eval()
    if include is not None and not include.is_dir():
        raise PareError(f"the folder of tasks {include} does not exist; wanted a folder of lm-eval task YAML")
    local = _manager(include, False)
    if all(_complete(name, local) for name in names):
        return local
    manager = _manager(include, True)
    unknown = [name for name in names if name not in manager.task_index]
    if unknown:
        raise PareError("\n".join(_unknown(name, manager.all_tasks) for name in unknown))
    return manager


def _complete(name: str, manager: Any) -> bool:
    """Whether the manager knows this task, or this group with all its members. A tag may have members anywhere."""
    if name in manager.all_subtasks:
        return True
    members = (manager.task_index[name].cfg or {}).get("task") if name in manager.all_groups else None
    return isinstance(members, list) and all(isinstance(one, str) and _complete(one, manager) for one in members)


def _unknown(name: str, known: Sequence[str]) -> str:
    hint = "Give its folder as the folder of tasks and its name as the task" if "/" in name else ""
    suggestion = did_you_mean(name, known)
    return f"lm-eval knows no task {name!r}.{suggestion} {hint or '`lm-eval ls tasks` lists them all'}"


@lru_cache(maxsize=4)
def _manager(include: Path | None, defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    folders = [OURS] if include is None else [OURS, include]
    return TaskManager(include_path=folders, include_defaults=defaults)


def _require_lm_eval() -> None:
    try:
        import lm_eval.tasks  # noqa: F401
    except ImportError as error:
        raise PareError(
            f"tasks are run by lm-eval, which cannot be imported here ({error}). "
            "Install it with: pip install 'lm-eval>=0.4.13'"
        ) from error


def _load(manager: Any, names: Sequence[str]) -> Any:
    """The tasks and groups with their data: lm-eval reads it when it builds a task."""
    try:
        return manager.load(list(dict.fromkeys(names)))
    except Exception as error:
        # the Hub, a dataset script, a parser and task code each raise errors of their own
        raise PareError(
            f"the data of the tasks {', '.join(names)} cannot be loaded: {type(error).__name__}: {error}. "
            "A task from the Hub needs the network once (unset HF_HUB_OFFLINE and HF_DATASETS_OFFLINE); "
            "the task stdlib_lines needs none"
        ) from error


def _roots(loaded: Any) -> list[Any]:
    """The groups that are in no other group, and the tasks that are in no group: so each task is run once."""
    groups = loaded["groups"].values()
    inner = {group.name for outer in groups for group in outer.get_all_groups()}
    inside = {task.task_name for group in groups for task in group.get_all_tasks()}
    tasks = [task for name, task in loaded["tasks"].items() if name not in inside]
    return [*(group for group in groups if group.name not in inner), *tasks]


def _scores(results: Any, warnings: "_Warnings") -> TaskScores:
    """lm-eval's results by task and metric, without the tasks of a group that has a score of its own."""
    subtasks, notes = results["group_subtasks"], _notes(warnings)
    scored = {name: values for name, metrics in results["results"].items() if (values := _values(metrics))}
    hidden = {child for name in scored for child in _below(name, subtasks)}
    scores: dict[str, dict[str, Score]] = {}
    documents: dict[str, tuple[str, ...]] = {}
    for name, values in scored.items():
        samples = {leaf: results["samples"][leaf] for leaf in _leaves(name, subtasks)}
        _refuse_nan(name, samples)
        if name in hidden:
            continue
        finite = {key: value for key, value in values.items() if math.isfinite(value)}
        notes.extend(f"{name}: {key} is not a finite number and left out" for key in values.keys() - finite.keys())
        scores[name] = {
            key.removesuffix(",none"): _score(key, value, results["results"][name], samples)
            for key, value in finite.items()
        }
        digests = (f"{leaf}:{one['doc_id']}:{one['doc_hash']}" for leaf, ones in samples.items() for one in ones)
        documents[name] = tuple(dict.fromkeys(digests))
    return TaskScores(scores, documents, tuple(notes))


def _values(metrics: Mapping[str, Any]) -> dict[str, float]:
    """lm-eval's `metric,filter` entries without their standard errors."""
    return {
        key: float(value)
        for key, value in metrics.items()
        if "," in key and "_stderr," not in key and isinstance(value, (int, float))
    }


def _score(key: str, value: float, metrics: Mapping[str, Any], samples: Mapping[str, list[Any]]) -> Score:
    metric, _, filter_name = key.rpartition(",")
    stderr = metrics.get(f"{metric}_stderr,{filter_name}")
    each = [one.get(metric) for ones in samples.values() for one in ones if one["filter"] == filter_name]
    numbers = tuple(float(number) for number in each if isinstance(number, (int, float)))
    # a metric that is not the mean over documents (perplexity, F1) has no paired error by document
    paired = bool(numbers) and len(numbers) == len(each) and math.isclose(fmean(numbers), value, abs_tol=1e-9)
    error = float(stderr) if isinstance(stderr, (int, float)) and math.isfinite(stderr) else None
    return Score(value, error, numbers if paired else None)


def _below(name: str, subtasks: Mapping[str, list[str]]) -> Iterator[str]:
    """All groups and tasks under a group."""
    for child in subtasks.get(name, []):
        yield child
        yield from _below(child, subtasks)


def _leaves(name: str, subtasks: Mapping[str, list[str]]) -> list[str]:
    """The tasks under a group, or the task itself."""
    return [one for one in (name, *_below(name, subtasks)) if one not in subtasks]


def _refuse_nan(task: str, samples: Mapping[str, list[Any]]) -> None:
    """Raise `PareError` for a likelihood of NaN: the model is broken, and argmax would silently pick the first choice."""
    for ones in samples.values():
        for one in ones:
            answers = (part for answer in one["filtered_resps"] for part in _parts(answer))
            if any(isinstance(part, float) and math.isnan(part) for part in answers):
                raise PareError(
                    f"the model answers document {one['doc_id']} of the task {task} with a likelihood of NaN: "
                    "its weights or activations are not finite, and a score would pass for chance"
                )


def _parts(answer: Any) -> tuple[Any, ...]:
    return tuple(answer) if isinstance(answer, (tuple, list)) else (answer,)


class _Warnings(logging.Handler):
    """Counts lm-eval's warnings by the line of code that logs them, with the first message of each."""

    # functions that warn about every model in memory and about every task whose documents come from a function
    EXPECTED = frozenset({"__init__", "download"})

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.seen: dict[tuple[str, int], tuple[str, int]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        if record.funcName not in self.EXPECTED:
            line = (record.pathname, record.lineno)
            first, times = self.seen.get(line, (record.getMessage(), 0))
            self.seen[line] = (first, times + 1)


@contextmanager
def _collected_warnings() -> Iterator[_Warnings]:
    """Collect lm-eval's warnings, which become notes beside the scores, instead of printing pages of them."""
    logger, handler = logging.getLogger("lm_eval"), _Warnings()
    before = logger.propagate, logger.level
    logger.propagate = False
    logger.setLevel(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield handler
    finally:
        logger.removeHandler(handler)
        logger.propagate, level = before
        logger.setLevel(level)


def _notes(warnings: _Warnings) -> list[str]:
    return [f"lm-eval: {first}" + (f" ({times} alike)" if times > 1 else "") for first, times in warnings.seen.values()]
