"""Windows of tokens: drawn at random to calibrate, cut in order to score, each knowing where it came from."""

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paredown.compress.corpora import Corpus
from paredown.compress.errors import PareError


@dataclass(frozen=True)
class Windows:
    """Token ids `(windows, length)` int64 and their provenance."""

    ids: Tensor
    corpus: str
    split: str
    sha256: str  # of the text
    revision: str | None = None
    seed: int | None = None
    sampling: str = "in order"
    bos: str = "none"
    capped_from: int | None = None  # the length that was asked for, where the model allows less

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    @property
    def tokens(self) -> int:
        return self.ids.numel()

    def provenance(self) -> dict[str, Any]:
        """For the report: everything but the ids."""
        told = {
            "split": self.split, "sha256": self.sha256, "revision": self.revision, "seed": self.seed,
            "sequences": len(self.ids), "length": self.length, "tokens": self.tokens, "sampling": self.sampling,
            "bos": self.bos, "capped_from": self.capped_from,
        }  # fmt: skip
        return {"corpus": self.corpus, **{k: v for k, v in told.items() if v is not None}}


def calibration_windows(
    corpus: Corpus, tokenizer: Any, sequences: int, length: int, seed: int, max_length: int
) -> Windows:
    """`sequences` windows at random: from documents longer than a window where there are enough, else from the joined text.

    Only as many documents are tokenised as are needed. Raises PareError if the text is too short.
    """
    width = min(length, max_length)
    capped = length if width < length else None
    draw = random.Random(seed)
    order = draw.sample(range(len(corpus.documents)), len(corpus.documents))
    rows: list[list[int]] = []
    for position in order:
        # a token is at least one byte: shorter documents need no tokenising to be passed over
        if len(rows) == sequences or len(corpus.documents[position].encode("utf-8", "ignore")) <= width:
            continue
        ids = _encode(tokenizer, corpus.documents[position])
        if len(ids) > width:
            offset = draw.randint(0, len(ids) - width - 1)
            rows.append(ids[offset : offset + width])
    sampling = "documents"
    if len(rows) < sequences:
        sampling, ids = "joined", _encode(tokenizer, corpus.text)
        if len(ids) < width + 1:
            raise PareError(
                f"the calibration text {corpus.name} has {len(ids)} tokens, and a window needs {width + 1}. "
                f"Name a longer text, or shorten the windows: --set calibration.length={max(2, len(ids) // 2)}"
            )
        if len(ids) < sequences * width // 8:
            raise PareError(
                f"the calibration text {corpus.name} has {len(ids)} tokens: too few for {sequences} windows of {width}, "
                "which would repeat each token more than 8 times. Name a longer text, or take fewer windows: "
                f"--set calibration.sequences={max(1, len(ids) // width)}"
            )
        offsets = [draw.randint(0, len(ids) - width - 1) for _ in range(sequences)]
        rows = [ids[offset : offset + width] for offset in offsets]
    drawn = torch.tensor(rows)  # (sequences, width)
    return Windows(
        drawn, corpus.name, corpus.split, corpus.sha256, corpus.revision, seed, sampling, _bos(tokenizer), capped
    )


def evaluation_windows(
    corpus: Corpus, tokenizer: Any, length: int, max_length: int, limit: int | None = None
) -> Windows:
    """The field's token-perplexity protocol: joined, tokenised once, cut without overlap, the tail dropped.

    `limit` keeps the first windows only. Raises PareError if the text is shorter than one window.
    """
    width = min(length, max_length)
    limits = [n for n in (limit, corpus.max_windows) if n is not None]
    text = corpus.text
    if limits:  # a token is at least one byte, but never so many: 64 bytes per token is more than any tokenizer packs
        text = text[: min(limits) * width * 64]
    ids = _encode(tokenizer, text)
    if len(ids) < width:
        raise PareError(
            f"the evaluation text {corpus.name} has {len(ids)} tokens, fewer than one window of {width}. "
            f"Name a longer text, or shorten the window: --set evaluate.length={max(2, len(ids) // 2)}"
        )
    count = min([len(ids) // width, *limits])
    windows = torch.tensor(ids[: count * width]).view(count, width)
    capped = length if width < length else None
    return Windows(
        windows, corpus.name, corpus.split, corpus.sha256, corpus.revision, bos=_bos(tokenizer), capped_from=capped
    )


def _encode(tokenizer: Any, text: str) -> list[int]:
    """As the tokenizer does by default, special tokens included; long texts are expected, so no warning about them."""
    return list(tokenizer(text, verbose=False)["input_ids"])


def _bos(tokenizer: Any) -> str:
    """Which windows begin with the beginning-of-sequence token: the tokenizer adds it once to each text, or never."""
    ids = _encode(tokenizer, "a")
    return "first of each text" if ids and ids[0] == tokenizer.bos_token_id else "none"
