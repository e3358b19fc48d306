"""Run lm-eval tasks on a model in memory."""

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from paredown.compress.errors import PareError
from paredown.compress.text.corpus import Bos
from paredown.compress.text.windows import special_prefix
from paredown.evaluation.task_code import templates_in_a_sandbox
from paredown.evaluation.task_index import expanded, load_tasks, task_digest, task_manager
from paredown.evaluation.task_scores import Score, TaskScores

if TYPE_CHECKING:
    from torch import nn

# lm-eval's default seeds (Python's random, numpy, torch, few-shot draw): published scores use the same few-shot examples.
LM_EVAL_SEEDS = (0, 1234, 1234, 1234)

# Bootstrap samples for metrics whose standard error has no formula; that of an accuracy has one.
BOOTSTRAP = 1000


def check_tasks(
    names: Sequence[str], include: Path | None = None, *, allow_code: bool = False, data: bool = False
) -> dict[str, str]:
    """Raise `PareError` for names that are no lm-eval task, group or tag. No weight is read.

    `include` is a folder of further task YAML, whose Python code is refused unless `allow_code`. Nothing is run here unless
    `data` is set: then the data of every task is loaded too, so that a missing network or an unknown dataset is an error
    now, and not after the compression; returned is a hash of what each task asks, by its name.
    """
    names = expanded(names)
    manager = task_manager(names, include, allow_code) if names else None
    if not names or not data:
        return {}
    with _collected_warnings(), templates_in_a_sandbox(include is not None and not allow_code):
        return {name: task_digest(load_tasks(manager, [name])) for name in names}


def run_tasks(
    model: "nn.Module",
    tokenizer: Any,
    names: Sequence[str],
    *,
    batch_size: int = 8,
    limit: int | None = None,
    include: Path | None = None,
    allow_code: bool = False,
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
    manager = task_manager(names := expanded(names), include, allow_code)
    from lm_eval import simple_evaluate

    from paredown.evaluation.lm_model import PrefixedLM

    prefix = special_prefix(tokenizer) if bos == "auto" else ()
    random_seed, numpy_seed, torch_seed, fewshot_seed = (start + seed for start in LM_EVAL_SEEDS)
    with _collected_warnings() as warnings, templates_in_a_sandbox(include is not None and not allow_code):
        loaded = load_tasks(manager, names)
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


def document_likelihoods(
    model: "nn.Module", tokenizer: Any, texts: Sequence[str], bos: Bos = "auto"
) -> tuple[float, ...]:
    """The log likelihood of each text in nats, every token predicted once, as lm-eval's rolling tasks have it."""
    from paredown.evaluation.lm_model import rolling_likelihoods

    with _collected_warnings():
        return tuple(rolling_likelihoods(model, tokenizer, texts, special_prefix(tokenizer) if bos == "auto" else ()))


def _roots(loaded: Any) -> list[Any]:
    """The groups that are in no other group, and the tasks that are in no group: so each task is run once."""
    groups = loaded["groups"].values()
    inner = {group.name for outer in groups for group in outer.get_all_groups()}
    inside = {task.task_name for group in groups for task in group.get_all_tasks()}
    tasks = [task for name, task in loaded["tasks"].items() if name not in inside]
    return [*(group for group in groups if group.name not in inner), *tasks]


def _scores(results: Any, warnings: "_Warnings") -> TaskScores:
    """lm-eval's results by task and metric, without the tasks of a group that has a score of its own."""
    from lm_eval.utils import handle_non_serializable

    subtasks, notes = results["group_subtasks"], _notes(warnings)
    scored = {name: values for name, metrics in results["results"].items() if (values := _values(metrics))}
    hidden = {child for name in scored for child in _below(name, subtasks)}
    scores: dict[str, dict[str, Score]] = {}
    documents: dict[str, tuple[str, ...]] = {}
    kept: dict[str, tuple[str, ...]] = {}
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
        kept |= {
            leaf: tuple(json.dumps({"task": leaf, **one}, default=handle_non_serializable) for one in ones)
            for leaf, ones in samples.items()
        }
    return TaskScores(scores, documents, tuple(notes), samples=kept)


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
