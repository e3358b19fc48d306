"""The text that a recovery trains on, the windows beside it that tell when to stop, and the texts that are scored."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.recipe import DistillSpec, Recipe, ReconstructSpec
from paredown.compress.run.open import check_ids, max_length
from paredown.compress.run.texts import open_texts
from paredown.compress.text.corpus import Corpus
from paredown.compress.text.held_out import divided, overlap, shared_windows
from paredown.compress.text.mix import counts, mixed
from paredown.compress.text.windows import Windows, calibration_windows, evaluation_windows

SPREAD = 4  # a text of at least so many times the windows taken is drawn from all over, a shorter one is cut in order
HELDOUT = 5  # of a short text, one window in so many is held out


@dataclass(frozen=True)
class RecoveryTexts:
    """Of each step windows to train on and windows held out, which share no token; windows of each scored text."""

    steps: list[tuple[Windows, Windows]]
    evaluations: list[Windows]
    warnings: list[str]


def recovery_texts(recipe: Recipe, source: ModelSource, tokenizer: Any, note: Callable[[str], None]) -> RecoveryTexts:
    """The texts of a recipe's recovery: it trains on those that calibrate, in the proportion of their weights.

    Raises PareError if a text is too short, if what is trained on is scored too, and if the tokenizer is not the model's.
    """
    scored, longest = recipe.evaluate, max_length(source)
    corpora, scoring = open_texts(recipe, tokenizer, note=note)
    corpora = corpora[: len(recipe.calibration.texts)]  # without the domain's
    steps = [_windows(recipe, step.spec, corpora, source, tokenizer) for step in recipe.recover]
    evaluations = [
        evaluation_windows(corpus, tokenizer, scored.length, longest, scored.windows, bos=recipe.bos)
        for corpus in scoring
    ]
    for windows in (*(w for pair in steps for w in pair), *evaluations):
        check_ids(windows, source)
    warnings = []
    for corpus, cut in zip(scoring, evaluations, strict=True):
        seen = max((shared_windows(text.ids, cut.ids) for text, _ in steps), default=0.0)
        for trained in corpora:
            found = overlap(trained, corpus, seen)
            if found and found.much and not recipe.calibration.allow_scored:
                raise PareError(f"{found.told} Train on another text, or set calibration.allow_scored to true.")
            warnings += [found.told] if found else []
    return RecoveryTexts(steps, evaluations, list(dict.fromkeys(warnings)))


def _windows(
    recipe: Recipe, spec: ReconstructSpec | DistillSpec, corpora: Sequence[Corpus], source: ModelSource, tokenizer: Any
) -> tuple[Windows, Windows]:
    """What one step trains on, and what it holds out. Fewer windows than asked for where the text is short."""
    seed, weights = recipe.calibration.seed, [text.weight for text in recipe.calibration.texts]
    if isinstance(spec, DistillSpec):
        windows, length, key = spec.windows, spec.length, f"recover.0.{spec.step}.length"
    else:
        windows, length, key = recipe.calibration.sequences, recipe.calibration.length, "calibration.length"
    wanted = counts(max(windows, len(weights)), weights)
    held = counts(max(spec.heldout, len(weights)), weights)
    longest, bos, pairs = max_length(source), recipe.bos, []
    for corpus, number, last in zip(corpora, wanted, held, strict=True):
        limit = SPREAD * (number + last)
        cut = evaluation_windows(corpus, tokenizer, length, longest, limit, bos=bos)
        if len(cut.ids) < 2:
            raise PareError(
                f"the text {corpus.name} has one window of {cut.length} tokens, and one is trained on and one held out. "
                f"Name a longer text, or take shorter windows: --set {key}=..."
            )
        if len(cut.ids) == limit:
            parts = zip(divided(corpus), (number, last), strict=True)
            drawn, later = (
                calibration_windows(part, tokenizer, n, length, seed, longest, bos=bos) for part, n in parts
            )
        else:
            last = min(last, max(1, len(cut.ids) // HELDOUT))
            others = cut.ids[:-last]
            order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))
            drawn = replace(cut, ids=others[order[:number]], seed=seed, sampling="drawn from the windows in order")
            later = replace(cut, ids=cut.ids[-last:], sampling="the last of the windows in order")
        pairs.append((drawn, later))
    return mixed([drawn for drawn, _ in pairs], seed), mixed([later for _, later in pairs], seed)
