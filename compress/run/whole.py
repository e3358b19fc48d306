"""What needs a model whole in memory: lm-eval tasks and samples of its text. One model at a time, if it is needed at all."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from paredown.compress.checkpoint import transformers_plugin
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.progress import ignore
from paredown.compress.run.score_cache import ScoreCache, content_key
from paredown.compress.text.corpus import Bos
from paredown.compress.text.windows import special_prefix
from paredown.evaluation.lm_tasks import document_likelihoods, run_tasks
from paredown.evaluation.schema import Sample
from paredown.evaluation.task_scores import TaskScores, read_scores, write_scores

NEW_TOKENS = 40
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "To make a good cup of tea, you should first",
    "Water boils at a lower temperature on a mountain because",
    "def is_prime(n):\n    ",
)


@dataclass(frozen=True)
class Asked:
    """The tasks that are run, by name with a hash of what each asks, and whether samples of text are made."""

    tasks: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None
    allow_code: bool = False
    bos: Bos = "auto"
    samples: bool = False
    documents: tuple[tuple[str, ...], ...] = ()  # of each text whose word perplexity is asked for

    def __bool__(self) -> bool:
        return bool(self.tasks) or self.samples or bool(self.documents)


@dataclass(frozen=True)
class Answers:
    """What one model answered to what it was asked."""

    tasks: TaskScores
    samples: tuple[str, ...] = ()  # how it goes on after each of PROMPTS
    likelihoods: tuple[tuple[float, ...], ...] = ()  # log likelihood of each document of each text


def ask(
    folder: Path,
    source: ModelSource,
    tokenizer: Any,
    asked: Asked,
    kept: Path | None = None,
    cache: ScoreCache | None = None,
    note: Callable[[str], None] = ignore,
) -> Answers:
    """Run the tasks on the checkpoint in `folder`, in the dtype and on the device of `source`, and make samples.

    The scores of each task are written to the folder `kept` as soon as they are there. Those that are there already, of the
    same model and questions, or in the `cache`, are not measured again.
    """
    found: dict[str, TaskScores] = {}
    keys = {
        name: content_key(folder, source, task=digest, bos=asked.bos, tokenizer=source.tokenizer_sha256())
        for name, digest in asked.tasks.items()
    }
    for name, key in keys.items():
        scores = (read_scores(kept, name, key) if kept else None) or _cached(cache, key, name, note)
        if scores is not None:
            found[name] = scores
            _write(kept, name, key, scores)
    missing = [name for name in keys if name not in found]
    if not missing and not asked.samples and not asked.documents:
        return Answers(TaskScores.merged([found[name] for name in keys]))
    model = transformers_plugin.load(folder, dtype=source.dtype).to(source.device).eval()
    try:
        for name in missing:
            found[name] = run_tasks(
                model, tokenizer, [name], include=asked.folder, allow_code=asked.allow_code, bos=asked.bos
            )
            _write(kept, name, keys[name], found[name])
            if cache:
                with suppress(OSError), cache.adding() as place:
                    write_scores(place, keys[name], keys[name], found[name])
        samples = tuple(continued(model, tokenizer, prompt) for prompt in PROMPTS) if asked.samples else ()
        likelihoods = tuple(document_likelihoods(model, tokenizer, texts, asked.bos) for texts in asked.documents)
    finally:
        del model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return Answers(TaskScores.merged([found[name] for name in keys]), samples, likelihoods)


@torch.no_grad()
def continued(model: Any, tokenizer: Any, prompt: str) -> str:
    """How a model goes on after a prompt, by its likeliest token NEW_TOKENS times at most.

    With a chat template the prompt is a user's message.
    """
    if tokenizer.chat_template:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
    else:
        ids = [*special_prefix(tokenizer), *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    start = torch.tensor([ids], device=model.device)
    told = model.generate(
        start, attention_mask=torch.ones_like(start), max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1,
        temperature=None, top_p=None, top_k=None, pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
    )  # fmt: skip
    text: str = tokenizer.decode(told[0, len(ids) :], skip_special_tokens=True)
    return text


def side_by_side(after: Sequence[str], before: Sequence[str] = ()) -> list[Sample]:
    """The samples of one model, or of the dense one and of another, for the report; none without samples."""
    if not before:
        return [{"prompt": prompt, "after": text} for prompt, text in zip(PROMPTS, after, strict=False)]
    return [
        {"prompt": prompt, "before": dense, "after": text}
        for prompt, dense, text in zip(PROMPTS, before, after, strict=True)
    ]


def _cached(cache: ScoreCache | None, key: str, name: str, note: Callable[[str], None]) -> TaskScores | None:
    scores = read_scores(cache.folder, key, key) if cache else None
    if scores is not None and cache is not None:
        cache.touch(f"{key}.json", f"{key}.jsonl")
        note(f"dense scores of the task {name} taken from {cache.folder} (--no-cache measures anew)")
    return scores


def _write(kept: Path | None, name: str, key: str, scores: TaskScores) -> None:
    if kept is not None:
        write_scores(kept, name, key, scores)
