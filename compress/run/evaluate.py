"""Score one model, or a model and its dense original, on the same windows and tasks."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from paredown.compress.checkpoint import transformers_plugin
from paredown.compress.checkpoint.hub import load_tokenizer
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.numerics.perplexity import paired_delta, perplexity
from paredown.compress.progress import logger
from paredown.compress.run.open import check_ids, max_length, open_source
from paredown.compress.run.scoring import score
from paredown.compress.text.corpora import load_corpus
from paredown.compress.text.windows import Bos, evaluation_windows
from paredown.evaluation.lm_tasks import TaskScores, check_tasks, compare_tasks, run_tasks
from paredown.evaluation.schema import EvalResult


def evaluate(
    model: str | Path,
    against: str | Path | None = None,
    *,
    eval_text: Sequence[str] = ("stdlib",),
    tasks: Sequence[str] = (),
    task_folder: Path | None = None,
    length: int = 2048,
    windows: int | None = None,
    bos: Bos = "auto",
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    note: Callable[[str], None] = logger.info,
) -> EvalResult:
    """Token perplexity and task scores of a model, dense or packed; with `against`, the dense model's too, as `before`.

    `length`: tokens in a window, at most what the model allows; `windows`: the most of each text; `bos`: as in a recipe.
    `progress` is called with (blocks done, blocks). Weights are read block by block, except for tasks.
    Raises PareError if a model, a text or a task cannot be read, or if the two models have different tokenizers.
    """
    check_tasks(tasks, task_folder, data=True)
    source = open_source(str(model), revision, device, dtype)
    tokenizer = load_tokenizer(source.folder)
    texts = [
        evaluation_windows(load_corpus(text, "evaluation"), tokenizer, length, max_length(source), windows, bos=bos)
        for text in eval_text
    ]
    for cut in texts:
        check_ids(cut, source)
    losses = [cut.of_text(nll) for cut, nll in zip(texts, score(source, texts, progress), strict=True)]
    entries = [{**cut.provenance(), "after": perplexity(nll)} for cut, nll in zip(texts, losses, strict=True)]
    result: dict[str, Any] = {"model": source.id, "evaluation": entries, "tasks": {}}
    scored = score_tasks(source.folder, source, tokenizer, tasks, task_folder, bos) if tasks else None
    if scored is not None:
        result.update(tasks=scored.summary(), notes=list(scored.notes))
    if against is None:
        return cast(EvalResult, result)
    dense = open_source(str(against), None, device, dtype)
    if dense.tokenizer_sha256() != source.tokenizer_sha256():
        raise PareError(f"{model} and {against} have different tokenizers: their perplexities cannot be compared.")
    note(f"scoring {against}")
    for entry, nll, cut, all_before in zip(entries, losses, texts, score(dense, texts, progress), strict=True):
        before = cut.of_text(all_before)
        entry.update(before=perplexity(before), paired_delta=paired_delta(before, nll))
    if scored is not None:
        result["tasks"] = compare_tasks(score_tasks(dense.folder, dense, tokenizer, tasks, task_folder, bos), scored)
    return cast(EvalResult, {**result, "against": str(against)})


def score_tasks(
    folder: Path,
    source: ModelSource,
    tokenizer: Any,
    names: Sequence[str],
    task_folder: Path | None,
    bos: Bos = "auto",
) -> TaskScores:
    """The tasks' scores of the checkpoint in `folder`. lm-eval needs the whole model in memory; it is freed afterwards."""
    model = transformers_plugin.load(folder, dtype=source.dtype).to(source.device).eval()
    try:
        return run_tasks(model, tokenizer, names, include=task_folder, bos=bos)
    finally:
        del model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
