"""Windows of tokens, all of one length: drawn at random to calibrate, cut in order to score.

Calibration draws as SparseGPT and Wanda do: one random window from each of many random documents that are longer than a
window, or random windows of the joined text (Frantar & Alistarh 2023, arXiv 2301.00774). Scoring follows the token
perplexity of the same papers, but for one thing: where the tokenizer puts a BOS before a text, every window begins with it,
as every text does that the model was trained on. `bos="none"` is the papers' protocol, with one BOS before the whole text.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paredown.compress.errors import PareError
from paredown.compress.text.corpus import Bos, Corpus

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
    bos: str = "none"  # which windows begin with the tokenizer's BOS
    special: int = 0  # tokens before the text of every window
    capped_from: int | None = None  # the requested length, where the model allows less
    text_tokens: int | None = None  # of the whole text, where all of it was tokenised
    pieces: int | None = None  # into how many pieces a very long text was cut, after line breaks, to tokenise it
    domain: "Windows | None" = None  # beside a calibration text: the one on which gradients are taken
    parts: "tuple[Windows, ...]" = ()  # the windows of each text, where several calibrate
    whole: str | None = None  # where only a part of a text is taken: the digest of all of it
    chat: bool = False  # conversations, as the model's chat template writes them

    @property
    def surveyed(self) -> Tensor:  # (windows, length)
        """The tokens on which the dense model is surveyed before the walk."""
        return self.ids if self.domain is None else self.domain.ids

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    @property
    def tokens(self) -> int:
        return self.ids.numel()

    def of_text(self, losses: Tensor) -> Tensor:  # (windows, targets)
        """Those losses (windows, length - 1) whose target is text: of two special tokens, the second is none."""
        return losses[:, max(self.special - 1, 0) :]

    def provenance(self) -> dict[str, Any]:
        """All fields but the ids, for the report; those that are None are left out."""
        fields = {
            "split": self.split, "sha256": self.sha256, "revision": self.revision, "seed": self.seed,
            "sequences": len(self.ids), "length": self.length, "tokens": self.tokens, "text_tokens": self.text_tokens,
            "pieces": self.pieces, "sampling": self.sampling, "bos": self.bos, "capped_from": self.capped_from,
            "whole_sha256": self.whole, "chat": self.chat or None,
            "sources": [part.provenance() for part in self.parts] or None,
            "domain": None if self.domain is None else self.domain.provenance(),
        }  # fmt: skip
        return {"corpus": self.corpus, **{k: v for k, v in fields.items() if v is not None}}


@dataclass(frozen=True)
class _Opening:
    """The special tokens that stand before each window, and those that stand once before a text."""

    window: tuple[int, ...]
    text: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any, bos: Bos) -> "_Opening":
        prefix = special_prefix(tokenizer)
        return cls(prefix, ()) if bos == "auto" else cls((), prefix)

    def encode(self, tokenizer: Any, text: str, begins: bool = True) -> Tensor:  # (tokens,)
        """Tokens of a part of a text; `begins` says that it is the first. What a tokenizer adds at the end is left out."""
        return torch.tensor([*(self.text if begins else ()), *plain_ids(tokenizer, text)], dtype=torch.int64)

    def before(self, rows: Tensor) -> Tensor:  # (windows, length)
        """Put the special tokens before each window of text; rows (windows, length - special tokens)."""
        special = torch.tensor(self.window, dtype=rows.dtype).expand(len(rows), -1)
        return torch.cat([special, rows], 1)

    def at(self, ids: Tensor) -> int:
        """How many tokens a window is moved that would begin with the special one which stands before it anyway."""
        return int(len(self.window) == 1 and ids[0] == self.window[0])

    def told(self, of_text: str) -> str:
        """Which windows begin with a BOS, for the report; `of_text` names those that begin with the text's."""
        return "every window" if self.window else of_text if self.text else "none"


def calibration_windows(
    corpus: Corpus,
    tokenizer: Any,
    sequences: int,
    length: int,
    seed: int,
    max_length: int,
    sizes: ReadSizes = READ_SIZES,
    bos: Bos = "auto",
    alone: bool = True,
) -> Windows:
    """`sequences` random windows of `length` tokens, or of `max_length`, the most that the model takes, if that is less.

    They come from documents longer than a window where there are enough of them, else from the joined text. No more
    documents are tokenised than are needed. Raises PareError if the text is too short; `alone` says that no other text
    calibrates beside it, so that fewer windows can be asked for.
    """
    opening = _Opening.of(tokenizer, bos)
    window = _width(length, max_length, "calibration.length", len(opening.window))
    width = window - len(opening.window)  # of text
    if sequences < 1:
        raise PareError(f"calibration needs at least one window, not {sequences}: --set calibration.sequences=128")
    draw = random.Random(seed)
    rows: list[Tensor] = []
    offsets: list[int] = []
    text_tokens = None
    sampling = "joined" if corpus.pooled else "documents"
    if not corpus.pooled:
        rows, offsets = _from_documents(corpus, tokenizer, opening, sequences, width, draw, sizes)
    if len(rows) < sequences:
        sampling = "joined"
        if corpus.characters > max(sizes.one_call, sequences * width * sizes.per_token):
            rows, offsets = _from_stretches(corpus, tokenizer, opening, sequences, width, draw, sizes)
        else:
            parts = [part for part, _ in _encode_pieces(corpus, tokenizer, opening, corpus.characters, sizes)]
            ids = torch.cat(parts)  # (tokens,)
            text_tokens = len(ids)
            _check_enough(corpus, text_tokens, sequences, width, len(opening.window), alone)
            offsets = [draw.randint(0, len(ids) - width - 1) for _ in range(sequences)]
            offsets = [offset + opening.at(ids[offset : offset + 2]) for offset in offsets]
            rows = [ids[offset : offset + width] for offset in offsets]
    begun = offsets.count(0)  # windows that begin a text
    return Windows(
        opening.before(torch.stack(rows)),  # (sequences, window)
        corpus.name,
        corpus.split,
        corpus.sha256,
        corpus.revision,
        seed,
        sampling,
        opening.told(f"first of {begun} of {sequences} windows" if begun else "none"),
        len(opening.window),
        length if window < length else None,
        text_tokens,
        whole=corpus.whole,
        chat=corpus.chat,
    )


def evaluation_windows(
    corpus: Corpus,
    tokenizer: Any,
    length: int,
    max_length: int,
    limit: int | None = None,
    sizes: ReadSizes = READ_SIZES,
    bos: Bos = "auto",
) -> Windows:
    """The field's token-perplexity protocol: the joined text is tokenised once and cut without overlap, the tail dropped.

    A BOS before each window counts within its length, so that the first token of text is predicted too.
    Windows have `length` tokens, or `max_length`, the most that the model takes, if that is less. `limit` keeps the first
    windows only. Raises PareError if the text is shorter than one window.
    """
    opening = _Opening.of(tokenizer, bos)
    special = len(opening.window)
    window = _width(length, max_length, "evaluate.length", special)
    width = window - special  # of text
    if limit is not None and limit < 1:
        raise PareError(f"scoring needs at least one window, not {limit}: --set evaluate.windows=1")
    limits = [n for n in (limit, corpus.max_windows) if n is not None]
    wanted = min(limits) * width if limits else None  # tokens
    most = corpus.characters if wanted is None else min(wanted * sizes.per_token, corpus.characters)
    parts: list[Tensor] = []
    read = 0  # characters
    for part, end in _encode_pieces(corpus, tokenizer, opening, most, sizes):
        parts.append(part)
        read = end
        if wanted is not None and sum(map(len, parts)) >= wanted:
            break
    ids = torch.cat(parts)  # (tokens,)
    if len(ids) < width:
        least = max(1 if special else 2, len(ids) // 2)
        shorter = f", or shorten the window: --set evaluate.length={least + special}" if len(ids) >= least else "."
        raise PareError(
            f"the evaluation text {corpus.title} has {len(ids)} tokens, fewer than one window of {width}. "
            f"Name a longer text{shorter}"
        )
    count = min([len(ids) // width, *limits])
    return Windows(
        opening.before(ids[: count * width].view(count, width)),  # (count, window)
        corpus.name,
        corpus.split,
        corpus.sha256,
        corpus.revision,
        bos=opening.told("first window only"),
        special=special,
        capped_from=length if window < length else None,
        text_tokens=len(ids) if read == corpus.characters else None,
        pieces=len(parts) if len(parts) > 1 else None,
        whole=corpus.whole,
        chat=corpus.chat,
    )


def special_prefix(tokenizer: Any) -> tuple[int, ...]:
    """The special tokens that the tokenizer puts before a text by default: a BOS for some, for most none."""
    plain, full = plain_ids(tokenizer, "a"), _ids(tokenizer, "a", special=True)
    starts = (start for start in range(len(full)) if full[start : start + len(plain)] == plain)
    return tuple(full[: next(starts, 0)])


def opening_text(tokenizer: Any) -> str:
    """The special tokens before a text as a chat template writes them."""
    return "".join(tokenizer.convert_ids_to_tokens(list(special_prefix(tokenizer))))


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text without any that the tokenizer would add."""
    return _ids(tokenizer, text, special=False)


def _ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    """Without the tokenizer's warning about texts longer than the model's window."""
    return list(tokenizer(text, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"])


def _encode_pieces(
    corpus: Corpus, tokenizer: Any, opening: _Opening, most: int, sizes: ReadSizes
) -> Iterator[tuple[Tensor, int]]:
    """Tokens of the first `most` characters of the joined text, piece by piece, with the number of characters so far."""
    read = 0
    for piece in [corpus.excerpt(0, most)] if most <= sizes.one_call else corpus.pieces(most, sizes.piece):
        ids = opening.encode(tokenizer, piece, begins=not read)
        read += len(piece)
        yield ids, read


def _width(length: int, max_length: int, option: str, special: int) -> int:
    """The tokens of a window, `special` of which are no text."""
    width, least = min(length, max_length), max(2, special + 1)
    if width < least:
        raise PareError(
            f"a window needs at least {least} tokens; {option} is {length}, and the model allows {max_length}: "
            f"--set {option}={max(least, min(2048, max_length))}"
        )
    return width


def _from_documents(
    corpus: Corpus,
    tokenizer: Any,
    opening: _Opening,
    sequences: int,
    width: int,
    draw: random.Random,
    sizes: ReadSizes,
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
        ids = opening.encode(tokenizer, text[start : start + excerpt], begins=not start)[1 if start else 0 :]
        searched += min(len(text), excerpt)
        if len(ids) > width:
            offset = draw.randint(0, len(ids) - width - 1)
            rows.append(ids[offset : offset + width].clone())
            offsets.append(start + offset)
    return rows, offsets


def _from_stretches(
    corpus: Corpus,
    tokenizer: Any,
    opening: _Opening,
    sequences: int,
    width: int,
    draw: random.Random,
    sizes: ReadSizes,
) -> tuple[list[Tensor], list[int]]:
    """One window from each of `sequences` equal stretches of a joined text that is too long to tokenise.

    Beside each, the character where it starts.
    """
    stretch, excerpt = corpus.characters // sequences, width * sizes.per_token  # characters
    rows, offsets = [], []
    for i in range(sequences):
        offset = i * stretch + draw.randrange(1, stretch - excerpt + 1)
        # the first token may be half a word
        ids = opening.encode(tokenizer, corpus.excerpt(offset, offset + excerpt), begins=False)[1 : width + 1]
        if len(ids) < width:
            shorter = max(2, len(ids) + len(opening.window))
            raise PareError(
                f"the calibration text {corpus.title} has {len(ids)} tokens in {excerpt} characters, too few for a window of "
                f"{width}. Name another text, or shorten the windows: --set calibration.length={shorter}"
            )
        rows.append(ids.clone())
        offsets.append(offset)
    return rows, offsets


def _check_enough(corpus: Corpus, tokens: int, sequences: int, width: int, special: int, alone: bool) -> None:
    """Raise PareError, with settings that work, if `sequences` windows of `width` need more tokens than there are.

    `special`: how many tokens a window holds beside its text; `alone`: no other text calibrates beside it.
    """
    needed = max(width + 1, sequences * width // MAX_REPEATS_PER_TOKEN)
    if tokens >= needed:
        return
    most = tokens // width
    fewer = (
        f"take fewer windows: --set calibration.sequences={most}" if alone else f"lower its weight: {most} are enough"
    )
    longest = min(max(2, tokens // 2), tokens - 1, MAX_REPEATS_PER_TOKEN * tokens // sequences)
    enough = longest >= (1 if special else 2)
    shorter = f"shorten the windows: --set calibration.length={longest + special}" if enough else None
    ways = "".join(f", or {way}" for way in (fewer if tokens > width else None, shorter) if way)
    need = (
        f"a window needs {width + 1}"
        if tokens <= width
        else f"{sequences} windows of {width} need {needed} if no token is to be drawn more than about "
        f"{MAX_REPEATS_PER_TOKEN} times"
    )
    raise PareError(
        f"the calibration text {corpus.title} has {tokens} tokens, and {need}. Name a longer text{ways or '.'}"
    )
