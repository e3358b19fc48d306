"""Score one model, or one beside its dense original, on the same windows and tasks."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from paredown.compress.checkpoint.hub import load_tokenizer
from paredown.compress.errors import PareError
from paredown.compress.numerics.perplexity import paired_delta, perplexity
from paredown.compress.run.compress import Note, max_length, open_source, score_tasks
from paredown.compress.run.pipeline import score
from paredown.compress.text.corpora import load_corpus
from paredown.compress.text.windows import evaluation_windows
from paredown.evaluation.lm_tasks import check_tasks, compare_tasks


def evaluate(
    model: str,
    against: str | None,
    texts: Sequence[str],
    tasks: Sequence[str],
    task_folder: Path | None,
    length: int,
    windows: int | None,
    device: str,
    dtype: str,
    revision: str | None,
    progress: Callable[[int, int], None],
    note: Note,
) -> dict[str, Any]:
    """`{model, evaluation, tasks}` as `render_eval` shows it, and with `against` the dense model's figures as `before`.

    Raises PareError if the two models do not cut the texts into the same tokens.
    """
    check_tasks(tasks, task_folder, data=True)
    source = open_source(model, revision, device, dtype)
    tokenizer = load_tokenizer(source.folder)
    found = [
        evaluation_windows(load_corpus(text, "evaluation"), tokenizer, length, max_length(source), windows)
        for text in texts
    ]
    losses = score(source, found, progress)
    result: dict[str, Any] = {"model": source.id, "evaluation": [], "tasks": {}}
    for cut, nll in zip(found, losses, strict=True):
        result["evaluation"].append({**cut.provenance(), "after": perplexity(nll)})
    scored = score_tasks(source.folder, source, tokenizer, tasks, task_folder) if tasks else None
    if scored is not None:
        result.update(tasks=scored.summary(), notes=list(scored.notes))
    if against is None:
        return result
    dense = open_source(against, None, device, dtype)
    if dense.tokenizer_sha256() != source.tokenizer_sha256():
        raise PareError(f"{model} and {against} have different tokenizers: their perplexities cannot be compared.")
    note(f"scoring {against}")
    for entry, nll, before in zip(result["evaluation"], losses, score(dense, found, progress), strict=True):
        entry.update(before=perplexity(before), paired_delta=paired_delta(before, nll))
    if scored is not None:
        result["tasks"] = compare_tasks(score_tasks(dense.folder, dense, tokenizer, tasks, task_folder), scored)
    return {**result, "against": against}
