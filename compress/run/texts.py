"""The texts of a run: windows that calibrate, windows that are scored, and what is in both."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.writer import RECORD
from paredown.compress.errors import PareError
from paredown.compress.progress import ignore
from paredown.compress.recipe import EvaluateSpec, Recipe
from paredown.compress.run.open import check_ids, max_length
from paredown.compress.run.recorded import read_record
from paredown.compress.text.chat import Chat
from paredown.compress.text.corpora import load_corpus
from paredown.compress.text.corpus import Corpus
from paredown.compress.text.held_out import divided, overlap, shared_windows
from paredown.compress.text.mix import counts, mixed
from paredown.compress.text.windows import Windows, calibration_windows, evaluation_windows, opening_text


def read_texts(
    recipe: Recipe,
    source: ModelSource,
    tokenizer: Any,
    later: EvaluateSpec | None = None,
    note: Callable[[str], None] = ignore,
) -> tuple[Windows, list[Windows], list[str]]:
    """Windows of the calibration text, windows of each evaluation text, and a warning for each text that is in both.

    One text for both purposes is divided. `later`: what a further stage scores, which does not calibrate either.
    Raises PareError if a text cannot be read or is too short, if what calibrates is scored too, and if the tokenizer is not
    the model's.
    """
    spec, scored, longest = recipe.calibration, later or recipe.evaluate, max_length(source)
    corpora, scoring = open_texts(recipe, tokenizer, later, note)
    texts = _drawn(recipe, corpora, tokenizer, longest)
    evaluations = [
        evaluation_windows(corpus, tokenizer, scored.length, longest, scored.windows, bos=recipe.bos)
        for corpus in scoring
    ]
    for text in (*texts, *evaluations):
        check_ids(text, source)
    warnings = _in_both(
        list(zip(corpora, texts, strict=True)), list(zip(scoring, evaluations, strict=True)), spec.allow_scored
    )
    if found := [text.corpus for text in texts if text.chat]:
        note(f"conversations, written by the model's chat template: {', '.join(found)}")
    windows = mixed(texts[: len(spec.texts)], spec.seed)
    windows = windows if spec.domain is None else replace(windows, domain=texts[-1])
    return windows, [] if later else evaluations, warnings


def open_texts(
    recipe: Recipe, tokenizer: Any, later: EvaluateSpec | None = None, note: Callable[[str], None] = ignore
) -> tuple[list[Corpus], list[Corpus]]:
    """The texts that calibrate, the domain's last, and those that are scored; arguments and errors as of `read_texts`."""
    spec, scored = recipe.calibration, later or recipe.evaluate
    chat = Chat(tokenizer, opening_text(tokenizer))
    corpora = [load_corpus(text.source, "calibration", chat, text.chat) for text in spec.texts]
    corpora += [load_corpus(spec.domain, "calibration", chat)] if spec.domain is not None else []
    scoring = [load_corpus(name, "evaluation", chat) for name in scored.perplexity]
    return (corpora, scoring) if spec.allow_scored else _apart(corpora, scoring, note)


def scored_texts(names: Sequence[str], folder: Path, tokenizer: Any, note: Callable[[str], None]) -> list[Corpus]:
    """The texts on which the model in `folder` is scored: of one that was divided to calibrate it, the part that did not.

    Raises PareError if a text cannot be read.
    """
    chat = Chat(tokenizer, opening_text(tokenizer))
    record: Mapping[str, Any] = read_record(folder) if (folder / RECORD).is_file() else {}
    used = record.get("calibration") or {}
    texts = [text for text in (*used.get("sources", [used]), used.get("domain")) if text]
    wholes, parts = {text.get("whole_sha256") for text in texts}, {text["sha256"] for text in texts}
    corpora = [load_corpus(name, "evaluation", chat) for name in names]
    for place, corpus in enumerate(corpora):
        if corpus.sha256 in wholes:
            corpora[place] = divided(corpus)[1]
            note(f"{corpus.name} calibrated this model, all but its last tenth, which is scored")
        elif corpus.sha256 in parts:
            note(f"{corpus.name} calibrated this model: its figure is flattered")
    return corpora


def _apart(
    calibrating: Sequence[Corpus], scoring: Sequence[Corpus], note: Callable[[str], None]
) -> tuple[list[Corpus], list[Corpus]]:
    """The same corpora, but for those that are in both: each of them is divided."""
    scored = {corpus.sha256 for corpus in scoring}
    parts = {corpus.sha256: divided(corpus) for corpus in calibrating if corpus.sha256 in scored}
    for kept, held in parts.values():
        if not all(any(document.strip() for document in part.documents) for part in (kept, held)):
            raise PareError(f"{kept.name} is too short to calibrate and to score, a part of it each: name two texts.")
        note(f"{kept.name} both calibrates and scores: its last tenth is scored, and all else of it calibrates")

    def held_out(corpus: Corpus) -> Corpus:
        if corpus.sha256 not in parts:
            return corpus
        return replace(parts[corpus.sha256][1], name=corpus.name, max_windows=corpus.max_windows)

    rest = [parts[corpus.sha256][0] if corpus.sha256 in parts else corpus for corpus in calibrating]
    return rest, [held_out(corpus) for corpus in scoring]


def _drawn(recipe: Recipe, corpora: Sequence[Corpus], tokenizer: Any, longest: int) -> list[Windows]:
    """Windows of each text, in proportion to the weights, then as many again of the domain's."""
    spec = recipe.calibration
    numbers = counts(spec.sequences, [text.weight for text in spec.texts])
    for text, number in zip(spec.texts, numbers, strict=True):
        if not number:
            raise PareError(
                f"of {spec.sequences} calibration windows none is of {text.source}, which has a weight of {text.weight:g}: "
                "raise its weight, or --set calibration.sequences=..."
            )
    return [
        calibration_windows(
            corpus, tokenizer, number, spec.length, spec.seed, longest, bos=recipe.bos, alone=number == spec.sequences
        )
        for corpus, number in zip(corpora, [*numbers, spec.sequences], strict=False)
    ]


def _in_both(
    calibrating: Sequence[tuple[Corpus, Windows]], scoring: Sequence[tuple[Corpus, Windows]], allowed: bool
) -> list[str]:
    """A sentence for each scored text that calibrates too. Raises PareError if it is more than a little and not allowed."""
    warnings = []
    for scored, cut in scoring:
        for corpus, drawn in calibrating:
            found = overlap(corpus, scored, shared_windows(drawn.ids, cut.ids))
            if found and found.much and not allowed:
                raise PareError(
                    f"{found.told} Calibrate on another text; or let it be, and the report says so: "
                    "--allow-scored-calibration (calibration.allow_scored: true in a recipe)."
                )
            warnings += [found.told] if found else []
    return warnings
