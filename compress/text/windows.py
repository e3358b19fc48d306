"""Windows of tokens: drawn at random to calibrate, cut in order to score, each knowing where it came from.

Calibration draws as SparseGPT and Wanda do: a random window of each of many random documents longer than it, or random
windows of the joined text (Frantar & Alistarh 2023, arXiv 2301.00774). Scoring is the token perplexity of the same papers.
The tokenizer adds its special tokens once to each text it is given, as it does by default.
"""

import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from paredown.compress.errors import PareError
from paredown.compress.text.corpora import Corpus

# Characters. A tokenizer holds some hundred bytes per token while it works: a longer text is not given to it in one call.
AT_ONCE = 4_000_000
PIECE = 2_000_000
SEARCHED = 256_000_000
# Text has fewer characters than this to a token, averaged over a window.
PER_TOKEN = 64
# A token of a text too short for windows of its own is drawn about so often at most.
REPEATS = 8


@dataclass(frozen=True, eq=False)
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
    text_tokens: int | None = None  # of the whole text, where it was tokenised whole
    pieces: int | None = None  # a very long text is cut after line breaks into so many to be tokenised

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
            "sequences": len(self.ids), "length": self.length, "tokens": self.tokens, "text_tokens": self.text_tokens,
            "pieces": self.pieces, "sampling": self.sampling, "bos": self.bos, "capped_from": self.capped_from,
        }  # fmt: skip
        return {"corpus": self.corpus, **{k: v for k, v in told.items() if v is not None}}


def calibration_windows(
    corpus: Corpus, tokenizer: Any, sequences: int, length: int, seed: int, max_length: int
) -> Windows:
    """`sequences` windows at random: from documents longer than a window where there are enough, else from the joined text.

    Only as many documents are tokenised as are needed. Raises PareError if the text is too short.
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
        rows, offsets = _from_documents(corpus, tokenizer, sequences, width, draw)
    if len(rows) < sequences:
        sampling = "joined"
        if corpus.characters > max(AT_ONCE, sequences * width * PER_TOKEN):
            rows, offsets = _from_stretches(corpus, tokenizer, sequences, width, draw)
        else:
            ids = torch.cat([part for part, _ in _encode_pieces(corpus, tokenizer, corpus.characters)])  # (tokens,)
            text_tokens = len(ids)
            _check_enough(corpus, text_tokens, sequences, width)
            offsets = [draw.randint(0, len(ids) - width - 1) for _ in range(sequences)]
            rows = [ids[offset : offset + width] for offset in offsets]
    # a window begins with the tokenizer's BOS only where it begins its text
    begun = offsets.count(0) if special_prefix(tokenizer) else 0
    return Windows(
        torch.stack(rows),  # (sequences, width)
        corpus.name,
        corpus.split,
        corpus.sha256,
        corpus.revision,
        seed,
        sampling,
        f"first of {begun} of {sequences} windows" if begun else "none",
        length if width < length else None,
        text_tokens,
    )


def evaluation_windows(
    corpus: Corpus, tokenizer: Any, length: int, max_length: int, limit: int | None = None
) -> Windows:
    """The field's token-perplexity protocol: joined, tokenised once, cut without overlap, the tail dropped.

    `limit` keeps the first windows only. Raises PareError if the text is shorter than one window.
    """
    width = _width(length, max_length, "evaluate.length")
    if limit is not None and limit < 1:
        raise PareError(f"scoring needs at least one window, not {limit}: --set evaluate.windows=1")
    limits = [n for n in (limit, corpus.max_windows) if n is not None]
    wanted = min(limits) * width if limits else None  # tokens
    most = corpus.characters if wanted is None else min(wanted * PER_TOKEN, corpus.characters)
    parts: list[Tensor] = []
    read = 0
    for part, end in _encode_pieces(corpus, tokenizer, most):
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
    """How many special tokens the tokenizer puts before a text by default: 1 where it begins with BOS, 0 for most."""
    plain, full = _encode(tokenizer, "a", special=False).tolist(), _encode(tokenizer, "a").tolist()
    return next((start for start in range(len(full)) if full[start : start + len(plain)] == plain), 0)


def _encode(tokenizer: Any, text: str, special: bool = True) -> Tensor:  # (tokens,)
    """As the tokenizer does by default, special tokens included; long texts are expected, so no warning about them."""
    found = tokenizer(text, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]
    return torch.tensor(list(found), dtype=torch.int64)


def _encode_pieces(corpus: Corpus, tokenizer: Any, most: int) -> Iterator[tuple[Tensor, int]]:
    """Tokens of the first `most` characters of the joined text, piece by piece, and how many characters were read so far."""
    read = 0
    for piece in _pieces(corpus, most):
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
    corpus: Corpus, tokenizer: Any, sequences: int, width: int, draw: random.Random
) -> tuple[list[Tensor], list[int]]:
    """A window of each of up to `sequences` random documents longer than it, and where in its text each begins."""
    rows: list[Tensor] = []
    offsets: list[int] = []
    room, searched = max(PIECE, width * PER_TOKEN), 0
    for position in draw.sample(range(len(corpus.documents)), len(corpus.documents)):
        if len(rows) == sequences or searched > SEARCHED:
            break
        text = corpus.documents[position]
        # a token is at least one byte: shorter documents need no tokenising to be passed over
        if len(text.encode("utf-8", "ignore")) <= width:
            continue
        # of a huge document a random excerpt, whose first token may be the half of a word
        start = draw.randrange(1, len(text) - room + 1) if len(text) > room else 0
        ids = _encode(tokenizer, text[start : start + room], special=not start)[1 if start else 0 :]
        searched += min(len(text), room)
        if len(ids) > width:
            offset = draw.randint(0, len(ids) - width - 1)
            rows.append(ids[offset : offset + width].clone())
            offsets.append(start + offset)
    return rows, offsets


def _from_stretches(
    corpus: Corpus, tokenizer: Any, sequences: int, width: int, draw: random.Random
) -> tuple[list[Tensor], list[int]]:
    """As windows of the joined text, of a text too long to be tokenised: one of each of `sequences` equal stretches."""
    ends = list(accumulate(len(document) + len(corpus.joiner) for document in corpus.documents))
    stretch, reach = corpus.characters // sequences, width * PER_TOKEN
    rows, offsets = [], []
    for place in range(sequences):
        offset = place * stretch + draw.randrange(1, stretch - reach + 1)
        # the first token may be the half of a word
        ids = _encode(tokenizer, _characters(corpus, ends, offset, offset + reach), special=False)[1 : width + 1]
        if len(ids) < width:
            raise PareError(
                f"the calibration text {corpus.name} has {len(ids)} tokens in {reach} characters, too few for a window of "
                f"{width}. Name another text, or shorten the windows: --set calibration.length={max(2, len(ids))}"
            )
        rows.append(ids.clone())
        offsets.append(offset)
    return rows, offsets


def _characters(corpus: Corpus, ends: Sequence[int], start: int, stop: int) -> str:
    """`corpus.text[start:stop]`; `ends` are the places where each document and the joiner after it end."""
    first = bisect_right(ends, start)
    last = bisect_right(ends, stop) + 1  # `stop` may lie in the joiner before it
    begin = ends[first - 1] if first else 0
    return corpus.joiner.join(corpus.documents[first : last + 1])[start - begin : stop - begin]


def _pieces(corpus: Corpus, most: int) -> Iterator[str]:
    """The first `most` characters of the joined text: in one piece, unless they are very many."""
    if most <= AT_ONCE:
        ends = list(accumulate(len(document) + len(corpus.joiner) for document in corpus.documents))
        yield _characters(corpus, ends, 0, most)
        return
    held: list[str] = []
    size, left = 0, most
    for place, document in enumerate(corpus.documents):
        held.append(((corpus.joiner if place else "") + document)[:left])
        size, left = size + len(held[-1]), left - len(held[-1])
        while size > PIECE:
            text = "".join(held)
            cut = _cut(text, PIECE)
            yield text[:cut]
            held, size = [text[cut:]], len(text) - cut
        if not left:
            break
    if size:
        yield "".join(held)


def _cut(text: str, most: int) -> int:
    """The last place before `most` where a line begins with no space, which no tokenizer that splits into words crosses."""
    place = text.rfind("\n", 0, most - 1)
    while place >= 0:
        if not text[place + 1].isspace():
            return place + 1
        place = text.rfind("\n", 0, place)
    return most


def _check_enough(corpus: Corpus, tokens: int, sequences: int, width: int) -> None:
    needed = max(width + 1, sequences * width // REPEATS)
    if tokens >= needed:
        return
    fewer = f"take fewer windows: --set calibration.sequences={tokens // width}" if tokens > width else None
    longest = min(max(2, tokens // 2), tokens - 1, REPEATS * tokens // sequences)
    shorter = f"shorten the windows: --set calibration.length={longest}" if longest >= 2 else None
    ways = "".join(f", or {way}" for way in (fewer, shorter) if way)
    lacking = (
        f"and a window needs {width + 1}"
        if tokens <= width
        else f"and {sequences} windows of {width} need {needed} if no token is to be drawn more than about {REPEATS} times"
    )
    raise PareError(
        f"the calibration text {corpus.name} has {tokens} tokens, {lacking}. Name a longer text{ways or '.'}"
    )
