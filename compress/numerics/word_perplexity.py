"""Word perplexity, as lm-eval's `wikitext`: the likelihood of whole documents by the number of words in them.

A document is read in rolling windows that begin with the special tokens of a text, so that each of its tokens is predicted
once. Uncertainty by bootstrap over documents; two models are resampled together.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from paredown.compress.numerics.perplexity import RESAMPLES, deviation


def words_of(document: str) -> int:
    """Its words as lm-eval counts them: parts between white space."""
    return len(re.split(r"\s+", document))


def word_perplexity(
    after: Sequence[float], documents: Sequence[str], before: Sequence[float] | None = None, seed: int = 0
) -> dict[str, Any]:
    """Word perplexity with its standard error, None for a single document; with `before`, the dense model's, paired.

    after, before: the log likelihood of each document, in nats.
    """
    words = torch.tensor([words_of(document) for document in documents], dtype=torch.float64)
    found: dict[str, Any] = {"after": _one(after, words, seed)}
    if before is not None:
        rise = torch.tensor(before, dtype=torch.float64) - torch.tensor(after, dtype=torch.float64)
        mean, stderr = _per_word(rise, words, seed)
        found |= {"before": _one(before, words, seed), "log_ratio": mean, "stderr": deviation(stderr, len(words))}
    return {**found, "documents": len(words), "words": int(words.sum())}


def _one(likelihoods: Sequence[float], words: Tensor, seed: int) -> dict[str, Any]:
    mean, resampled = _per_word(-torch.tensor(likelihoods, dtype=torch.float64), words, seed)
    value = float(torch.tensor(mean, dtype=torch.float64).exp())
    return {"word_perplexity": value, "stderr": deviation(resampled.exp(), len(words))}


def _per_word(values: Tensor, words: Tensor, seed: int) -> tuple[float, Tensor]:
    """The sum of values (documents,) by that of words (documents,), and the same of resampled documents (resamples,)."""
    generator = torch.Generator().manual_seed(seed)
    picks = (torch.randint(len(words), (len(words),), generator=generator) for _ in range(RESAMPLES))
    resampled = torch.stack([values[some].sum() / words[some].sum() for some in picks])
    return float(values.sum() / words.sum()), resampled
