"""Scores of a text, of a task, and text that models write."""

from typing import Annotated, NotRequired

from typing_extensions import TypedDict  # pydantic wants this one below Python 3.12

from paredown.evaluation.schema.base import Number, about, strict


@strict
class Text(TypedDict):
    """Windows of tokens that were cut from a text. Keys that say nothing of this text are missing."""

    split: Annotated[str | None, about("Split of the dataset; null where the text has none.")]
    sha256: Annotated[str, about("Digest of the text.")]
    length: Annotated[int, about("Tokens in a window.")]
    revision: NotRequired[Annotated[str, about("Version of the dataset.")]]
    text_tokens: NotRequired[Annotated[int, about("Tokens in the whole text, where all of it was tokenized.")]]
    pieces: NotRequired[Annotated[int, about("Number of pieces that a very long text was tokenized in.")]]
    sampling: NotRequired[Annotated[str, about("`in order`, or drawn from `documents` or from the `joined` text.")]]
    bos: NotRequired[
        Annotated[str, about("Windows that begin with the tokenizer's BOS: `every window`, `none`, or words.")]
    ]
    capped_from: NotRequired[Annotated[int, about("Tokens asked for in a window, where the model allows fewer.")]]
    whole_sha256: NotRequired[
        Annotated[str, about("Digest of the whole text, where a part calibrated and the other was scored.")]
    ]
    chat: NotRequired[Annotated[bool, about("Whether it is of conversations, by the model's chat template.")]]


@strict
class Perplexity(TypedDict):
    """Token perplexity of one model on one text."""

    token_perplexity: Number
    """`exp` of the mean loss per token."""
    stderr: Number | None
    """Its standard error by bootstrap over windows; null for a single window."""


@strict
class PairedDelta(TypedDict):
    """How far the loss rose on the same windows."""

    log_ratio: Number
    """Increase of the mean loss, which is the log of the ratio of both perplexities; nats per token."""
    stderr: Number | None
    """Its standard error by paired bootstrap over windows; null for a single window."""
    low: NotRequired[Number]
    """Lower end of its 95 % interval; nats per token."""
    high: NotRequired[Number]
    """Upper end of its 95 % interval; nats per token."""
    ratio: NotRequired[Number]
    """Perplexity after compression over perplexity before."""
    windows: NotRequired[int]
    """Number of windows."""
    resamples: NotRequired[int]
    """Bootstrap samples."""
    seed: NotRequired[int]
    """Seed of the bootstrap."""


@strict
class PositionDivergence(TypedDict):
    """How far the models are apart on the tokens at some positions of all windows."""

    first: int
    """Fewest tokens that stand before such a token in its window."""
    last: int
    """Most tokens that stand before such a token."""
    kl_mean: Number
    """Mean KL(dense || compressed); nats."""
    kl_stderr: Number | None
    """Its standard error by bootstrap over windows; null for a single window."""


@strict
class Divergence(TypedDict):
    """How far the compressed model's next-token distributions are from the dense one's, on the same tokens."""

    kl_mean: Number
    """Mean over tokens of KL(dense || compressed); nats."""
    kl_stderr: Number | None
    """Its standard error by bootstrap over windows; null for a single window."""
    kl_median: Number
    """Median over tokens."""
    kl_p99: Number
    """99th percentile."""
    kl_p999: Number
    """99.9th percentile."""
    kl_max: Number
    """Largest."""
    js_mean: Number
    """Mean Jensen-Shannon divergence; nats, at most ln 2."""
    js_stderr: Number | None
    """Its standard error."""
    top1_agreement: Number
    """Share of tokens where both models like the same token best."""
    top1_stderr: Number | None
    """Its standard error."""
    tokens: int
    """Number of predicted tokens."""
    by_position: list[PositionDivergence]
    """Mean KL by position in the window."""


@strict
class WordPerplexityOf(TypedDict):
    """Word perplexity of one model."""

    word_perplexity: Number
    """`exp` of the loss of all documents by their number of words."""
    stderr: Number | None
    """Its standard error by bootstrap over documents; null for a single one."""


@strict
class WordPerplexity(TypedDict):
    """Word perplexity on the documents of one text, in rolling windows as lm-eval's `wikitext`."""

    before: NotRequired[WordPerplexityOf]
    """Of the dense model; missing where there is none."""
    after: WordPerplexityOf
    """Of the model in question."""
    log_ratio: NotRequired[Number]
    """How far the loss of a word rose; nats."""
    stderr: NotRequired[Number | None]
    """Its standard error by paired bootstrap over documents."""
    documents: int
    """Number of documents."""
    words: int
    """Words in them: parts between white space."""


@strict
class TextScore(Text):
    """Perplexity on one text."""

    corpus: Annotated[str, about("Name of the corpus, or path of a text file.")]
    tokens: Annotated[int, about("Tokens in all windows.")]
    sequences: NotRequired[Annotated[int, about("Number of windows.")]]
    after: Annotated[Perplexity, about("Of the model in question: after its compression, if it was compressed.")]
    words: NotRequired[Annotated[WordPerplexity, about("Word perplexity; missing unless it was asked for.")]]
    note: NotRequired[Annotated[str, about("A remark for the reader.")]]


@strict
class TextComparison(TextScore):
    """Perplexity on one text before and after compression."""

    before: Perplexity
    """Of the dense model."""
    paired_delta: PairedDelta
    """The difference on the same windows."""
    divergence: NotRequired[Divergence]
    """How far both models' predictions are apart on the same tokens."""
    compressed: NotRequired[Perplexity]
    """Of the compressed model before its recovery; `after` is that of the recovered one."""
    recovered_delta: NotRequired[PairedDelta]
    """The difference between `compressed` and `after`, on the same windows."""


@strict
class TaskScore(TypedDict):
    """One metric of one lm-eval task, of one model."""

    value: Number
    """In the metric's own unit; an accuracy is a share between 0 and 1."""
    stderr: Number | None
    """Its standard error; null where lm-eval gives none."""
    documents: int
    """Number of documents that were scored."""
    bos: NotRequired[str]
    """Which contexts begin with the tokenizer's BOS token: `every context` or `none`."""


@strict
class TaskComparison(TypedDict):
    """One metric of one lm-eval task before and after compression, in the metric's own unit."""

    before: Number
    """Of the dense model."""
    after: Number
    """Of the compressed model."""
    stderr_before: Number | None
    """Standard error of `before`; null where lm-eval gives none."""
    stderr_after: Number | None
    """Standard error of `after`; null where lm-eval gives none."""
    paired_stderr: Number | None
    """Standard error of `after - before` over the same documents; null where there is no value for each document."""
    correct_to_wrong: NotRequired[int | None]
    """Documents answered correctly before and wrongly after; null where a document's value is not 0 or 1."""
    wrong_to_correct: NotRequired[int | None]
    """Documents answered wrongly before and correctly after; null where a document's value is not 0 or 1."""
    bos: NotRequired[str]
    """Which contexts begin with the tokenizer's BOS token: `every context` or `none`."""


@strict
class Sample(TypedDict):
    """How the models go on after one prompt, by the likeliest token each time."""

    prompt: str
    """Of the tokenizer's chat template, where it has one, the user's message."""
    before: NotRequired[str]
    """By the dense model; missing where there is none."""
    after: str
    """By the model in question."""
