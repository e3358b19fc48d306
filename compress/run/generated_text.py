"""Calibration text that the dense model writes itself (Williams, Chrysostomou & Aletras 2024, arXiv 2410.17711).

A recovery trains on it too (self-data distillation: Thangarasa et al. 2024, arXiv 2410.09982).

The model is sampled from the tokens that begin a text, or from the first tokens of random places of another text. For this
it must fit into memory whole. What it wrote is kept in the user's cache under a hash of all that it depends on, so that the
same command reads the same text again.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paredown.compress.checkpoint import transformers_plugin
from paredown.compress.checkpoint.hub import load_tokenizer
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.machine import available_memory, return_freed_memory
from paredown.compress.progress import Counted, Progress
from paredown.compress.recipe import DistillSpec, GenerateSpec, Recipe
from paredown.compress.run.once import How
from paredown.compress.run.open import max_length, opened
from paredown.compress.run.score_cache import content_key
from paredown.compress.text.corpora import OWN, load_corpus, own_file
from paredown.compress.text.mix import counts
from paredown.compress.text.windows import calibration_windows, special_prefix

PREFIX = 8  # tokens of another text that the model goes on from
BATCH = 8  # texts that are written at a time
MARGIN = 1.05  # so much more text than the windows hold
ROUNDS = 8  # times as many texts as windows, before a model that ends them at once is given up


def with_own_text(model: Any, recipe: Recipe, how: How, tokenizer: Any = None) -> Recipe:
    """The recipe with the text that the model wrote in the place of `self`; the same recipe where nothing names that.

    Raises PareError if the model does not fit into memory, and if it writes next to nothing.
    """
    spec, number = recipe.calibration, _windows(recipe)
    if not number:
        return recipe
    ways = spec.generate or GenerateSpec()
    with opened(model, tokenizer, how.revision, how.device, how.dtype) as source:
        length = min(spec.length, max_length(source))
        key = content_key(source.folder, source, written=[number, length, spec.seed, recipe.bos, ways.model_dump()])[
            :16
        ]
        if not own_file(key).is_file():
            starts = _starts(source, load_tokenizer(source.folder), number, length, recipe, ways)
            _check_memory(source, length)
            _keep(own_file(key), list(_written(source, starts, number, length, spec.seed, ways, how.progress)))
        how.progress.note(f"the calibration text of the model's own is in {own_file(key)}")
    raw = recipe.to_dict()
    for entry in raw["calibration"].get("sources", [raw["calibration"]]):
        entry["source"] = f"{OWN}:{key}" if entry["source"] == OWN else entry["source"]
    return Recipe.parse(raw)


def _windows(recipe: Recipe) -> int:
    """How many windows of calibration.length hold what calibrates, or what the recovery takes, if that is more."""
    spec = recipe.calibration
    steps = [step.spec for step in recipe.recover if isinstance(step.spec, DistillSpec)]
    tokens = max((step.length * (step.windows + step.heldout) for step in steps), default=0)
    numbers = counts(max(spec.sequences, -(-tokens // spec.length)), [text.weight for text in spec.texts])
    return sum(n for n, text in zip(numbers, spec.texts, strict=True) if text.source == OWN)


def _starts(
    source: ModelSource, tokenizer: Any, number: int, length: int, recipe: Recipe, ways: GenerateSpec
) -> Tensor:  # (texts, tokens)
    """The tokens that the texts begin with."""
    seed = recipe.calibration.seed
    if ways.prefixes is not None:
        corpus, special = load_corpus(ways.prefixes, "calibration"), len(special_prefix(tokenizer))
        width = min(PREFIX, length // 2) + special
        return calibration_windows(corpus, tokenizer, number, width, seed, max_length(source), bos=recipe.bos).ids
    first = (
        special_prefix(tokenizer) or [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None][:1]
    )
    if first:
        return torch.tensor([list(first)]).expand(number, -1)
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(len(tokenizer), (number, 1), generator=draw)


def _check_memory(source: ModelSource, length: int) -> None:
    """Raises PareError where the whole model and what a batch keeps of its tokens do not fit."""
    config = source.config.get_text_config()
    weights = sum(entry.bytes for entry in source.files.entries.values())
    kept = 2 * BATCH * length * int(config.hidden_size) * int(config.num_hidden_layers) * 2  # keys and values
    device = source.device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    if free is not None and free < weights + kept:
        raise PareError(
            f"to write its own calibration text the whole model must fit into memory: {(weights + kept) / 1e9:.1f} GB, and "
            f'{free / 1e9:.1f} GB are free. Let it write on a larger machine, one text a line as {{"text": ...}} in a file '
            "own.jsonl, and use that here: --calibration own.jsonl"
        )


@torch.no_grad()
def _written(
    source: ModelSource, starts: Tensor, number: int, length: int, seed: int, ways: GenerateSpec, progress: Progress
) -> Iterator[str]:
    """Texts of up to `length` tokens beside what starts them, until they have enough tokens for `number` windows."""
    from transformers import GenerationConfig

    tokenizer = load_tokenizer(source.folder)
    model = transformers_plugin.load(source.folder, dtype=source.dtype or "auto").to(source.device).eval()
    ends = model.generation_config.eos_token_id or tokenizer.eos_token_id
    config = GenerationConfig(
        do_sample=True, temperature=ways.temperature, top_p=ways.top_p, top_k=0, max_new_tokens=length, use_cache=True,
        eos_token_id=ends, pad_token_id=tokenizer.pad_token_id or (ends[0] if isinstance(ends, list) else ends or 0),
    )  # fmt: skip
    wanted, tokens, began = int(MARGIN * number * length), 0, 0
    with torch.random.fork_rng(devices=[source.device] if source.device.type == "cuda" else []):
        torch.manual_seed(seed)
        while tokens < wanted:
            if began >= ROUNDS * max(number, BATCH):
                raise PareError(
                    f"the model wrote {tokens} tokens in {began} texts, where {wanted} are wanted: it ends them at once. Let "
                    "it go on from another text (calibration.generate: {prefixes: my-text.txt}), or name a text."
                )
            places = torch.arange(began, began + BATCH) % len(starts)
            first = starts[places].to(source.device)  # (batch, tokens)
            given = model.generate(first, attention_mask=torch.ones_like(first), generation_config=config)
            for row in given.cpu():  # (tokens,)
                tokens += int((row != config.pad_token_id).sum())
                yield tokenizer.decode(row, skip_special_tokens=True)
            began += len(places)
            done = min(tokens, wanted)
            progress.doing(Counted(f"the model wrote {done} of {wanted} tokens", "writing text", done, wanted))
    del model
    return_freed_memory()


def _keep(path: Path, texts: list[str]) -> None:
    """Write the texts as lines of JSON, all of them or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    partial.replace(path)
