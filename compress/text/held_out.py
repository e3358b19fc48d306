"""What calibrates is not scored: one text for both is divided, and the windows that were drawn are compared."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from paredown.compress.text.corpus import Corpus, Rows

PARTS = ("all but the last tenth", "last tenth")  # what calibrates, and what is scored
SCORED = 0.1  # share of a text that is scored where all else of it calibrates
FEW = 100  # documents: a text of fewer is divided within one of them
CHUNK = 32  # tokens: two texts that have so many in a row in common share a passage
# Shorter documents, such as headings and blank rows, occur in both of two splits that share nothing.
LEAST = 64  # characters
FLATTERED = "the figure after compression is flattered."
MOST_SHARED = 0.01  # of what is scored may be in the calibration text too, as licences are


def divided(corpus: Corpus) -> tuple[Corpus, Corpus]:
    """The part of a text that calibrates and, at its end, the part that is scored.

    It is divided between two documents, and where there are few within one, at the start of a line.
    """
    place = int(corpus.characters * (1 - SCORED))
    documents = corpus.documents
    middle = min(bisect_right(corpus.ends, place), len(documents) - 1)
    if middle and len(documents) >= FEW:
        parts = _stretch(documents, 0, middle), _stretch(documents, middle, len(documents))
    else:
        text, most = documents[middle], place - (corpus.ends[middle - 1] if middle else 0)
        cut = text.rfind("\n", 0, most) + 1 or text.rfind(" ", 0, most) + 1 or most
        parts = [*documents[:middle], text[:cut]], [text[cut:], *documents[middle + 1 :]]
    splits = [name if corpus.split == "all" else f"{corpus.split}, {name}" for name in PARTS]
    calibrating, scored = (
        replace(corpus, split=split, documents=part, whole=corpus.sha256)
        for split, part in zip(splits, parts, strict=True)
    )
    return calibrating, scored


def _stretch(documents: Sequence[str], start: int, stop: int) -> Sequence[str]:
    return documents.part(start, stop) if isinstance(documents, Rows) else documents[start:stop]


def shared_windows(calibration: Tensor, scored: Tensor) -> float:
    """Share of the scored text that is in the calibration windows too, in passages of `CHUNK` tokens.

    Both are ids (windows, length) of one tokenizer. Windows shorter than `CHUNK` tell nothing: the share is 0 then.
    """
    if min(calibration.shape[1], scored.shape[1]) < CHUNK:
        return 0.0
    count = scored.shape[1] // CHUNK
    passages = scored[:, -count * CHUNK :].reshape(-1, CHUNK)  # (passages, CHUNK)
    return float(torch.isin(_hashes(passages), _hashes(calibration)).double().mean())


def _hashes(ids: Tensor) -> Tensor:
    """A polynomial in int64, which wraps around, for each run of `CHUNK` tokens: (windows, length - CHUNK + 1)."""
    runs = ids.shape[1] - CHUNK + 1
    total = torch.zeros(len(ids), runs, dtype=torch.int64)
    for step in range(CHUNK):
        total = total * 6364136223846793005 + ids[:, step : step + runs] + 1
    return total


@dataclass(frozen=True)
class Overlap:
    """What a report says of scored text that also calibrates, and whether it is too much to be scored."""

    told: str
    much: bool


def overlap(calibrating: Corpus, scored: Corpus, shared: float = 0.0) -> Overlap | None:
    """What is in both, `shared` of their windows as `shared_windows` found it; None for nothing, or for common phrases."""
    if calibrating.sha256 == scored.sha256:
        return Overlap(f"{scored.title} both calibrates and scores: {FLATTERED}", True)
    known = {document for document in scored.documents if len(document.strip()) >= LEAST}
    both = len(known.intersection(calibrating.documents))
    if both:
        told = f"{both} of the {len(known)} documents of {scored.name} ({scored.split}) also calibrate: {FLATTERED}"
        return Overlap(told, both > MOST_SHARED * len(known))
    if shared > MOST_SHARED:
        told = f"{shared:.1%} of what is scored of {scored.title} is in the calibration windows too: {FLATTERED}"
        return Overlap(told, True)
    return None
