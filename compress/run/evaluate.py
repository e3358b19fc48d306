"""Score one model, or a model and its dense original, on the same windows and tasks."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from paredown.compress.checkpoint.hub import load_tokenizer
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.writer import SCORES
from paredown.compress.errors import PareError
from paredown.compress.numerics.perplexity import perplexity
from paredown.compress.progress import logger
from paredown.compress.run.baseline import Baseline
from paredown.compress.run.open import check_ids, max_length, open_source
from paredown.compress.run.remarks import only_stdlib
from paredown.compress.run.score_cache import ScoreCache
from paredown.compress.run.scoring import compare, evaluation_entry, walked
from paredown.compress.run.texts import scored_texts
from paredown.compress.run.whole import Asked, ask, side_by_side
from paredown.compress.run.words import add_words, documents_of
from paredown.compress.text.corpus import Bos
from paredown.compress.text.windows import Windows, evaluation_windows
from paredown.evaluation.lm_tasks import check_tasks
from paredown.evaluation.schema import EvalResult
from paredown.evaluation.task_index import require_lm_eval
from paredown.evaluation.task_scores import compare_tasks


def evaluate(
    model: str | Path,
    against: str | Path | None = None,
    *,
    eval_text: Sequence[str] = ("stdlib",),
    tasks: Sequence[str] = (),
    task_folder: Path | None = None,
    allow_task_code: bool = False,
    samples: bool = False,
    words: bool = False,
    out: Path | None = None,
    cache: bool = True,
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
    `words`: word perplexity too, of texts that have documents; `samples`: how the model goes on after five prompts.
    With `out`, `out/evaluation` gets the result, and each task's as soon as it is there: the same call goes on from them.
    `cache`: dense scores are taken from the user's cache and kept there. `progress` is called with (blocks done, blocks).
    Weights are read block by block, except for tasks, words and samples.
    Raises PareError if a model, a text or a task cannot be read, or if the two models have different tokenizers.
    """
    if words:
        require_lm_eval()
    digests = check_tasks(tasks, task_folder, allow_code=allow_task_code, data=True)
    source = open_source(str(model), revision, device, dtype)
    dense = None if against is None else open_source(str(against), None, device, dtype)
    if dense and dense.tokenizer_sha256() != source.tokenizer_sha256():
        raise PareError(f"{model} and {against} have different tokenizers: their perplexities cannot be compared.")
    kept, dense_cache = out / SCORES if out else None, ScoreCache.of_user() if cache and dense else None
    tokenizer = load_tokenizer(source.folder)
    corpora = scored_texts(eval_text, source.folder, tokenizer, note)
    texts = [evaluation_windows(text, tokenizer, length, max_length(source), windows, bos=bos) for text in corpora]
    for cut in texts:
        check_ids(cut, source)
    documents = [
        documents_of(corpus, cut, tokenizer) if words else () for corpus, cut in zip(corpora, texts, strict=True)
    ]
    asked = Asked(digests, task_folder, allow_task_code, bos, samples, tuple(documents) if any(documents) else ())
    remarks = list(only_stdlib(source, (), eval_text))
    baseline = Baseline(dense, dense_cache, note) if dense else None
    result: dict[str, Any] = {"model": source.id, "evaluation": _entries(source, baseline, texts, progress)}
    result |= {"tasks": {}} if against is None else {"tasks": {}, "against": str(against)}
    if asked:
        ours = ask(source.folder, source, tokenizer, asked, kept and kept / "after", note=note)
        theirs = (
            ask(dense.folder, dense, tokenizer, asked, kept and kept / "before", dense_cache, note) if dense else None
        )
        result["tasks"] = compare_tasks(theirs.tasks, ours.tasks) if theirs else ours.tasks.summary()
        if samples:
            result["samples"] = side_by_side(ours.samples, theirs.samples if theirs else ())
        remarks += ours.tasks.notes
        add_words(result["evaluation"], asked.documents, ours, theirs)
    result |= {"notes": remarks} if remarks else {}
    if kept:
        kept.mkdir(parents=True, exist_ok=True)
        (kept / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return cast(EvalResult, result)


def _entries(
    source: ModelSource, baseline: Baseline | None, texts: Sequence[Windows], progress: Callable[[int, int], None]
) -> list[dict[str, Any]]:
    """The perplexity of each text; with a dense model, that one's too, and how far both are apart."""
    after = walked(source, texts, progress)
    if baseline is None:
        losses = [cut.of_text(stream.nll(source)) for cut, stream in zip(texts, after, strict=True)]
        return [{**cut.provenance(), "after": perplexity(nll)} for cut, nll in zip(texts, losses, strict=True)]
    baseline.note(f"scoring {baseline.source.id}")
    before = baseline.behind(texts, progress=progress)
    return [
        evaluation_entry(cut, compare(dense, ours, baseline.source, source))
        for cut, dense, ours in zip(texts, before, after, strict=True)
    ]
