"""Windows of tokens, all of one length: drawn at random to calibrate, cut in order to score.

Calibration draws as SparseGPT and Wanda do: one random window from each of many random documents that are longer than a
window, or random windows of the joined text (Frantar & Alistarh 2023, arXiv 2301.00774). Scoring follows the token
perplexity of the same papers. The tokenizer adds its special tokens once per text, as it does by default.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paredown.compress.errors import PareError
from paredown.compress.text.corpus import Corpus

# A text is long enough to calibrate on if its windows repeat each token about so many times at most.
MAX_REPEATS_PER_TOKEN = 8


@dataclass(frozen=True)
class ReadSizes:
    """How much text is read at a time, in characters. A tokenizer holds some hundred bytes per token while it works."""

    one_call: int = 4_000_000  # a longer text is tokenised in pieces
    piece: int = 2_000_000
    search: int = 256_000_000  # after so much of the documents, the search for long ones ends
    per_token: int = 64  # a window of text has fewer characters per token than this


READ_SIZES = ReadSizes()


@dataclass(frozen=True, eq=False)
class Windows:
    """Token ids `(windows, length)` int64, and where they come from."""

    ids: Tensor
    corpus: str
    split: str
    sha256: str  # of the joined text
    revision: str | None = None
    seed: int | None = None
    sampling: str = "in order"
    bos: str = "none"
    capped_from: int | None = None  # the requested length, where the model allows less
    text_tokens: int | None = None  # of the whole text, where all of it was tokenised
    pieces: int | None = None  # into how many pieces a very long text was cut, after line breaks, to tokenise it

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    @property
    def tokens(self) -> int:
        return self.ids.numel()

    def provenance(self) -> dict[str, Any]:
        """All fields but the ids, for the report; those that are None are left out."""
        fields = {
            "split": self.split, "sha256": self.sha256, "revision": self.revision, "seed": self.seed,
            "sequences": len(self.ids), "length": self.length, "tokens": self.tokens, "text_tokens": self.text_tokens,
            "pieces": self.pieces, "sampling": self.sampling, "bos": self.bos, "capped_from": self.capped_from,
        }  # fmt: skip
        return {"corpus": self.corpus, **{k: v for k, v in fields.items() if v is not None}}


def calibration_windows(
    corpus: Corpus,
    tokenizer: Any,
    sequences: int,
    length: int,
    seed: int,
    max_length: int,
    sizes: ReadSizes = READ_SIZES,
) -> Windows:
    """`sequences` random windows of `length` tokens, or of `max_length`, the most that the model takes, if that is less.

    They come from documents longer than a window where there are enough of them, else from the joined text. No more
    documents are tokenised than are needed. Raises PareError if the text is too short.
    """
    width = _width(length, max_length, "calibration.length")
    if sequences < 1:
        raise PareError(f"calibration needs at least one window, not {sequences}: --set calibration.sequences=128")
    draw = random.Random(seed)
    rows: list[Tensor] = []
    offsets: list[int] = []
    text_tokens = None
    sampling = "joined" if corpus.pooled else "documents"
    if not corpus.pooled:
        rows, offsets = _from_documents(corpus, tokenizer, sequences, width, draw, sizes)
    if len(rows) < sequences:
        sampling = "joined"
        if corpus.characters > max(sizes.one_call, sequences * width * sizes.per_token):
            rows, offsets = _from_stretches(corpus, tokenizer, sequences, width, draw, sizes)
        else:
            parts = [part for part, _ in _encode_pieces(corpus, tokenizer, corpus.characters, sizes)]
            ids = torch.cat(parts)  # (tokens,)
            text_tokens = len(ids)
            _check_enough(corpus, text_tokens, sequences, width)
            offsets = [draw.randint(0, len(ids) - width - 1) for _ in range(sequences)]
            rows = [ids[offset : offset + width] for offset in offsets]
    # a window begins with the tokenizer's BOS only where it stands at the start of its text
    with_bos = offsets.count(0) if special_prefix(tokenizer) else 0
    return Windows(
        torch.stack(rows),  # (sequences, width)
        corpus.name,
        corpus.split,
        corpus.sha256,
        corpus.revision,
        seed,
        sampling,
        f"first of {with_bos} of {sequences} windows" if with_bos else "none",
        length if width < length else None,
        text_tokens,
    )


def evaluation_windows(
    corpus: Corpus,
    tokenizer: Any,
    length: int,
    max_length: int,
    limit: int | None = None,
    sizes: ReadSizes = READ_SIZES,
) -> Windows:
    """The field's token-perplexity protocol: the joined text is tokenised once and cut without overlap, the tail dropped.

    Windows have `length` tokens, or `max_length`, the most that the model takes, if that is less. `limit` keeps the first
    windows only. Raises PareError if the text is shorter than one window.
    """
    width = _width(length, max_length, "evaluate.length")
    if limit is not None and limit < 1:
        raise PareError(f"scoring needs at least one window, not {limit}: --set evaluate.windows=1")
    limits = [n for n in (limit, corpus.max_windows) if n is not None]
    wanted = min(limits) * width if limits else None  # tokens
    most = corpus.characters if wanted is None else min(wanted * sizes.per_token, corpus.characters)
    parts: list[Tensor] = []
    read = 0  # characters
    for part, end in _encode_pieces(corpus, tokenizer, most, sizes):
        parts.append(part)
        read = end
        if wanted is not None and sum(map(len, parts)) >= wanted:
            break
    ids = torch.cat(parts)  # (tokens,)
    if len(ids) < width:
        shorter = f", or shorten the window: --set evaluate.length={max(2, len(ids) // 2)}" if len(ids) > 1 else "."
        raise PareError(
            f"the evaluation text {corpus.name} has {len(ids)} tokens, fewer than one window of {width}. "
            f"Name a longer text{shorter}"
        )
    count = min([len(ids) // width, *limits])
    return Windows(
        ids[: count * width].view(count, width),
        corpus.name,
        corpus.split,
        corpus.sha256,
        corpus.revision,
        bos="first window only" if special_prefix(tokenizer) else "none",
        capped_from=length if width < length else None,
        text_tokens=len(ids) if read == corpus.characters else None,
        pieces=len(parts) if len(parts) > 1 else None,
    )


def special_prefix(tokenizer: Any) -> int:
    """How many special tokens the tokenizer puts before a text by default: 1 if it adds a BOS, 0 for most."""
    plain, full = _encode(tokenizer, "a", special=False).tolist(), _encode(tokenizer, "a").tolist()
    return next((start for start in range(len(full)) if full[start : start + len(plain)] == plain), 0)


def _encode(tokenizer: Any, text: str, special: bool = True) -> Tensor:  # (tokens,)
    """With the tokenizer's defaults, and without its warning about texts longer than the model's window."""
    ids = tokenizer(text, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]
    return torch.tensor(list(ids), dtype=torch.int64)


def _encode_pieces(corpus: Corpus, tokenizer: Any, most: int, sizes: ReadSizes) -> Iterator[tuple[Tensor, int]]:
    """Tokens of the first `most` characters of the joined text, piece by piece, with the number of characters so far."""
    read = 0
    for piece in [corpus.excerpt(0, most)] if most <= sizes.one_call else corpus.pieces(most, sizes.piece):
        ids = _encode(tokenizer, piece, special=not read)
        read += len(piece)
        yield ids, read


def _width(length: int, max_length: int, option: str) -> int:
    width = min(length, max_length)
    if width < 2:
        raise PareError(
            f"a window needs at least 2 tokens; {option} is {length}, and the model allows {max_length}: "
            f"--set {option}={max(2, min(2048, max_length))}"
        )
    return width


def _from_documents(
    corpus: Corpus, tokenizer: Any, sequences: int, width: int, draw: random.Random, sizes: ReadSizes
) -> tuple[list[Tensor], list[int]]:
    """One window from each of up to `sequences` random documents, all longer than a window.

    Beside each, where it starts: 0 only for the first token of the document.
    """
    rows: list[Tensor] = []
    offsets: list[int] = []
    excerpt, searched = max(sizes.piece, width * sizes.per_token), 0  # characters
    for position in draw.sample(range(len(corpus.documents)), len(corpus.documents)):
        if len(rows) == sequences or searched > sizes.search:
            break
        text = corpus.documents[position]
        # a token is at least one byte: a document of fewer bytes than a window has tokens is too short
        if len(text.encode("utf-8", "ignore")) <= width:
            continue
        # of a huge document a random excerpt is enough; its first token, which may be half a word, is dropped
        start = draw.randrange(1, len(text) - excerpt + 1) if len(text) > excerpt else 0
        ids = _encode(tokenizer, text[start : start + excerpt], special=not start)[1 if start else 0 :]
        searched += min(len(text), excerpt)
        if len(ids) > width:
            offset = draw.randint(0, len(ids) - width - 1)
            rows.append(ids[offset : offset + width].clone())
            offsets.append(start + offset)
    return rows, offsets


def _from_stretches(
    corpus: Corpus, tokenizer: Any, sequences: int, width: int, draw: random.Random, sizes: ReadSizes
) -> tuple[list[Tensor], list[int]]:
    """One window from each of `sequences` equal stretches of a joined text that is too long to tokenise.

    Beside each, the character where it starts.
    """
    stretch, excerpt = corpus.characters // sequences, width * sizes.per_token  # characters
    rows, offsets = [], []
    for i in range(sequences):
        offset = i * stretch + draw.randrange(1, stretch - excerpt + 1)
        # the first token may be half a word
        ids = _encode(tokenizer, corpus.excerpt(offset, offset + excerpt), special=False)[1 : width + 1]
        if len(ids) < width:
            raise PareError(
                f"the calibration text {corpus.name} has {len(ids)} tokens in {excerpt} characters, too few for a window of "
                f"{width}. Name another text, or shorten the windows: --set calibration.length={max(2, len(ids))}"
            )
        rows.append(ids.clone())
        offsets.append(offset)
    return rows, offsets


def _check_enough(corpus: Corpus, tokens: int, sequences: int, width: int) -> None:
    """Raise PareError, with settings that work, if `sequences` windows of `width` need more tokens than there are."""
    needed = max(width + 1, sequences * width // MAX_REPEATS_PER_TOKEN)
    if tokens >= needed:
        return
    fewer = f"take fewer windows: --set calibration.sequences={tokens // width}" if tokens > width else None
    longest = min(max(2, tokens // 2), tokens - 1, MAX_REPEATS_PER_TOKEN * tokens // sequences)
    shorter = f"shorten the windows: --set calibration.length={longest}" if longest >= 2 else None
    ways = "".join(f", or {way}" for way in (fewer, shorter) if way)
    need = (
        f"a window needs {width + 1}"
        if tokens <= width
        else f"{sequences} windows of {width} need {needed} if no token is to be drawn more than about "
        f"{MAX_REPEATS_PER_TOKEN} times"
    )
    raise PareError(
        f"the calibration text {corpus.name} has {tokens} tokens, and {need}. Name a longer text{ways or '.'}"
    )
