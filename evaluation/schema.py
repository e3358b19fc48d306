"""The results of the public calls as types: `Report`, `EvalResult`, `BenchResult` and `ExportResult`.

They are plain dicts that hold what JSON can hold. A key that is listed is always there, unless it is `NotRequired`; a dict
may hold further keys. `check_report` checks a report against its type. The JSON Schema of a report is printed by

    python -m paredown.evaluation.schema
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NotRequired

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from pydantic_core import ErrorDetails
from typing_extensions import TypedDict  # pydantic wants this one below Python 3.12

from paredown.compress.errors import PareError

SCHEMA = 1  # of report.json

Number = Annotated[float, Field(allow_inf_nan=False)]  # finite; an int is welcome, a bool is not
Format = Literal["packed", "dense"]
ExportFormat = Literal["packed", "dense", "deci", "gguf", "onnx"]

# Strict: "1" and True are no numbers. A docstring below a key describes it in the JSON Schema; pydantic does not see the
# docstrings of inherited keys, which are described by `_about` instead.
_strict = with_config(ConfigDict(extra="allow", strict=True, use_attribute_docstrings=True))


def _about(text: str) -> Any:
    return Field(description=text)


@_strict
class ReportModel(TypedDict):
    """The model that was compressed."""

    id: str
    """Its folder or its name on the Hugging Face Hub, as the user gave it."""
    revision: str | None
    """Commit on the Hub; null for a folder."""
    family: str
    """`model_type` of its config, such as `llama`."""
    parameters: int
    """Number of its parameters; tied weights count once."""
    tokenizer_sha256: NotRequired[str]
    """Digest of its tokenizer files."""


@_strict
class Text(TypedDict):
    """Windows of tokens that were cut from a text. Keys that say nothing of this text are missing."""

    split: Annotated[str | None, _about("Split of the dataset; null where the text has none.")]
    sha256: Annotated[str, _about("Digest of the text.")]
    length: Annotated[int, _about("Tokens in a window.")]
    revision: NotRequired[Annotated[str, _about("Version of the dataset.")]]
    text_tokens: NotRequired[Annotated[int, _about("Tokens in the whole text, where all of it was tokenized.")]]
    pieces: NotRequired[Annotated[int, _about("Number of pieces that a very long text was tokenized in.")]]
    sampling: NotRequired[Annotated[str, _about("`in order`, or drawn from `documents` or from the `joined` text.")]]
    bos: NotRequired[
        Annotated[str, _about("Windows that begin with the tokenizer's BOS: `every window`, `none`, or words.")]
    ]
    capped_from: NotRequired[Annotated[int, _about("Tokens asked for in a window, where the model allows fewer.")]]
    whole_sha256: NotRequired[
        Annotated[str, _about("Digest of the whole text, where a part calibrated and the other was scored.")]
    ]
    chat: NotRequired[Annotated[bool, _about("Whether it is of conversations, by the model's chat template.")]]


@_strict
class CalibrationText(Text):
    """A text that the method measured the model on."""

    source: Annotated[str, _about("Name of the corpus; of a file or folder its absolute path.")]
    sequences: Annotated[int, _about("Number of windows.")]
    tokens: NotRequired[Annotated[int, _about("Tokens in all windows.")]]
    seed: Annotated[int | None, _about("Seed of the random draw.")]


@_strict
class Calibration(CalibrationText):
    """The text that the method measured the model's activations on."""

    domain: NotRequired[CalibrationText]
    """A second text, on which gradients of the loss were taken."""
    sources: NotRequired[list[CalibrationText]]
    """The texts, where several calibrated together; what stands beside them is of all."""


@_strict
class Perplexity(TypedDict):
    """Token perplexity of one model on one text."""

    token_perplexity: Number
    """`exp` of the mean loss per token."""
    stderr: Number | None
    """Its standard error by bootstrap over windows; null for a single window."""


@_strict
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


@_strict
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


@_strict
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


@_strict
class WordPerplexityOf(TypedDict):
    """Word perplexity of one model."""

    word_perplexity: Number
    """`exp` of the loss of all documents by their number of words."""
    stderr: Number | None
    """Its standard error by bootstrap over documents; null for a single one."""


@_strict
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


@_strict
class TextScore(Text):
    """Perplexity on one text."""

    corpus: Annotated[str, _about("Name of the corpus, or path of a text file.")]
    tokens: Annotated[int, _about("Tokens in all windows.")]
    sequences: NotRequired[Annotated[int, _about("Number of windows.")]]
    after: Annotated[Perplexity, _about("Of the model in question: after its compression, if it was compressed.")]
    words: NotRequired[Annotated[WordPerplexity, _about("Word perplexity; missing unless it was asked for.")]]
    note: NotRequired[Annotated[str, _about("A remark for the reader.")]]


@_strict
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


@_strict
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


@_strict
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


@_strict
class Sample(TypedDict):
    """How the models go on after one prompt, by the likeliest token each time."""

    prompt: str
    """Of the tokenizer's chat template, where it has one, the user's message."""
    before: NotRequired[str]
    """By the dense model; missing where there is none."""
    after: str
    """By the model in question."""


@_strict
class Parameters(TypedDict):
    """Numbers of parameters."""

    total: int
    """Of the whole model before compression."""
    targeted: int
    """In the layers that were to be compressed, before compression."""
    kept: int
    """In the same layers after compression: nonzero weights, or numbers in the factors."""


@_strict
class BytesChange(TypedDict):
    """Bytes of the weights on disk."""

    before: Annotated[int, _about("Of the checkpoint that was read.")]
    after: Annotated[int, _about("Of the checkpoint that was written.")]


@_strict
class Layer(TypedDict):
    """One compressed layer."""

    name: str
    """Of its weight in the model, without `.weight`."""
    method: str
    """Name of the method."""
    kept: Number
    """Share of its numbers that is stored, 0 to 1."""
    relative_error: Number | None
    """Share of the energy of its output on the calibration text that is wrong; null if not measured.

    The right output is the dense weight's, or, of a method that makes up for the errors of earlier layers, one that does."""
    damping: Number | None
    """What was added to the diagonal of the Hessian, as a share of its mean; null for methods without a Hessian."""
    seconds: Number
    """Time it took to compress it."""
    flops_per_token: NotRequired[int]
    """Floating point operations of its product for one token; a mask skips what it removed."""
    sparsity: NotRequired[Number | str]
    """Share of zeros, or a pattern such as `2:4`; of masks."""
    kind: NotRequired[str]
    """How its factors are stored, such as `lowrank` or `pifa`; of factors."""
    rank: NotRequired[int]
    """Rank of its factors; of factors."""
    measured_loss: NotRequired[Number | None]
    """Loss of what was stored in the method's own metric, as a share of the loss of dropping the weight; of factors."""
    predicted_loss: NotRequired[Number | None]
    """The same as predicted from the dense model, where that loss decided on the ranks; of factors."""


@_strict
class Structure(TypedDict):
    """What was removed whole."""

    blocks: list[int]
    """The blocks that stay, by their numbers in the model that was read."""
    blocks_before: int
    """How many blocks that model has."""
    units: dict[str, list[int]]
    """Units of a group, such as the channels of an MLP, before and after, by their key of config.json."""
    sizes: NotRequired[dict[str, list[int]]]
    """The same by the name of the module that holds them, where blocks differ."""
    absent: NotRequired[list[str]]
    """Parts of blocks that are absent, such as the attention of one."""


@_strict
class PartBytes(BytesChange):
    """Bytes of the weights on disk of all layers of a kind."""

    part: str
    """The kind, such as `mlp.down_proj`: the end of a layer's name without numbers."""


@_strict
class Reconstruction(TypedDict):
    """How a block was tuned towards the dense block's output."""

    block: str
    """Name of the block."""
    before: Number
    """Mean square error of its output on the calibration text before the tuning, over the variance of the dense one."""
    after: Number
    """The same afterwards."""


@_strict
class RecoveryStep(TypedDict):
    """One step of the training of a compressed model."""

    step: Literal["reconstruct", "distill"]
    """What was done."""
    recipe: dict[str, Any]
    """The recipe of the recovery, with every default."""
    settings: dict[str, Any]
    """Those of this step."""
    teacher: str
    """Folder or Hub name of the model whose probabilities were the targets."""
    trained: int
    """How many numbers were trained."""
    steps: int
    """Steps of the optimizer."""
    tokens: int
    """Training tokens that were seen, those several times that were."""
    passes: Number
    """How often the training text was seen."""
    curve: list[list[Number]]
    """Tokens seen and the held-out divergence from the teacher then, in nats per token."""
    before: Number
    """The held-out divergence before training; of `reconstruct` the mean of the blocks' errors."""
    after: Number
    """The lowest, of the weights that were kept."""
    best_tokens: int
    """Tokens seen by then."""
    stopped: str
    """Why training ended."""
    seconds: Number
    """Time that it took."""
    target_bytes: int
    """Of the teacher's probabilities on the disk, while it ran."""
    remarks: list[str]
    """What went otherwise than planned: a sentence each."""
    blocks: NotRequired[list[Reconstruction]]
    """Of `reconstruct`: each block."""


@_strict
class Seconds(TypedDict):
    """Wall time by step, in seconds."""

    calibration: Number
    """Running the calibration text and collecting statistics."""
    compress: Number
    """Compressing layers."""
    evaluation: Number
    """Running the evaluation texts through both models."""
    write: Number
    """Writing the checkpoint."""
    total: Number
    """From the start to the report. A run that was interrupted and continued counts both parts."""
    survey: NotRequired[Number]
    """Measuring the dense model to distribute ranks or sparsity over layers."""
    read: NotRequired[Number]
    """Reading weights."""
    reconstruct: NotRequired[Number]
    """Tuning compressed blocks towards the dense block's output."""
    tasks: NotRequired[Number]
    """Running lm-eval tasks on both models."""
    recover: NotRequired[Number]
    """Training the compressed model, and all else that its recovery took."""
    forward: NotRequired[Number]
    """Running blocks; contained in `calibration` and `evaluation`."""


@_strict
class PeakMemory(TypedDict):
    """Largest memory in use during the run, in bytes."""

    host: int | None
    """Resident memory of the process; null if not measured."""
    device: int | None
    """Memory allocated on the GPU, 0 without one; null if not measured."""


@_strict
class SeedText(TypedDict):
    """What one calibration seed came to on one text."""

    corpus: str
    """Name of the text."""
    split: str | None
    """Split of the text."""
    token_perplexity: Number
    """Of the compressed model."""
    log_ratio: Number | None
    """As in `paired_delta`; null where the dense model was not scored."""
    stderr: Number | None
    """Its standard error over windows; null for a single window."""


@_strict
class SeedResult(TypedDict):
    """What the recipe came to by one calibration seed."""

    seed: int
    """The seed of the calibration windows."""
    evaluation: list[SeedText]
    """Perplexity by text."""
    tasks: dict[str, dict[str, Number]]
    """Scores of the compressed model, by task and metric."""


@_strict
class Report(TypedDict):
    """What a compression did and what it costs: report.json."""

    schema: Annotated[int, Field(json_schema_extra={"const": SCHEMA})]
    """Version of this schema."""
    model: ReportModel
    """The model that was compressed."""
    recipe: dict[str, Any]
    """The recipe as it was run, with every default."""
    calibration: Calibration | None
    """The calibration text; null for a method that needs no data."""
    evaluation: list[TextComparison]
    """Perplexity before and after, by text."""
    tasks: dict[str, dict[str, TaskComparison]]
    """lm-eval scores before and after, by task and metric."""
    parameters: Parameters
    """Numbers of parameters."""
    bytes: BytesChange
    """Bytes of the weights on disk."""
    layers: list[Layer]
    """The compressed layers, in the order of the model."""
    seconds: Seconds
    """Wall time by step."""
    peak_memory_bytes: PeakMemory
    """Largest memory in use."""
    fallbacks: list[str]
    """Where something else was done than the recipe says, and why: a sentence each."""
    versions: dict[str, str]
    """Versions of Python and of the packages that decide on the numbers."""
    samples: NotRequired[list[Sample]]
    """Text that both models write; missing unless it was asked for."""
    format: NotRequired[Format]
    """How the checkpoint is stored: `packed` needs paredown to load, `dense` is an ordinary checkpoint."""
    engines: NotRequired[dict[str, str]]
    """What runs the checkpoint, by name: how it takes it."""
    command: NotRequired[str | None]
    """The command line; null for a call from Python."""
    warnings: NotRequired[list[str]]
    """What a reader of the figures should know: a sentence each."""
    memory_base_bytes: NotRequired[int]
    """Resident memory before any weight was read: the libraries. The plan's estimate comes on top of it."""
    structure: NotRequired[Structure]
    """What was removed whole; missing where the model has its shape still."""
    seeds: NotRequired[list[SeedResult]]
    """The recipe by several calibration seeds; the checkpoint, and all else of the report, is of the first."""
    date: NotRequired[str]
    """When the run ended: UTC, ISO 8601."""
    device: NotRequired["Device"]
    """The GPU or CPU that it ran on."""
    dtype: NotRequired[str]
    """Of the activations, such as `bfloat16`."""
    parts: NotRequired[list[PartBytes]]
    """Bytes of the weights on disk by kind of layer; they add up to `bytes`."""
    reconstruction: NotRequired[list[Reconstruction]]
    """The blocks that were tuned, in the order of the model."""
    recovery: NotRequired[list[RecoveryStep]]
    """What the compressed model was trained by, step by step."""
    left_dense: NotRequired[list[str]]
    """Names of linear layers that the recipe's targets leave as they are."""
    unsupported: NotRequired[list[str]]
    """Names of matrices in the blocks that no method can compress."""


@_strict
class EvalText(TextScore):
    """Perplexity on one text; with `against` of both models."""

    before: NotRequired[Perplexity]
    """Of the dense model."""
    paired_delta: NotRequired[PairedDelta]
    """The difference on the same windows."""
    divergence: NotRequired[Divergence]
    """How far both models' predictions are apart on the same tokens."""


@_strict
class EvalResult(TypedDict):
    """What `evaluate` returns: the scores of one model, or of one beside its dense original."""

    model: str
    """Folder or Hub name."""
    evaluation: list[EvalText]
    """Perplexity by text."""
    tasks: dict[str, dict[str, TaskScore]] | dict[str, dict[str, TaskComparison]]
    """lm-eval scores by task and metric: `TaskComparison` with `against`, else `TaskScore`."""
    samples: NotRequired[list[Sample]]
    """Text that the models write; missing unless it was asked for."""
    notes: NotRequired[list[str]]
    """lm-eval's warnings; missing without tasks."""
    against: NotRequired[str]
    """Folder or Hub name of the dense model; missing if there is none."""


@_strict
class ExportResult(TypedDict):
    """What `export` returns."""

    model: str
    """The checkpoint that was converted: folder or Hub name."""
    out: str
    """The folder that was written."""
    format: ExportFormat
    """The format that was written."""
    engines: NotRequired[dict[str, str]]
    """What runs it, by name: how it takes it."""
    bytes: BytesChange
    """Bytes of the weights on disk."""


Phase = Literal["prefill", "decode"]
ModelKey = Literal["model", "against"]  # the model in question, and the one it is compared with


@_strict
class Spread(TypedDict):
    """A quantity over the repeats of a measurement."""

    median: Number
    low: Number
    """The smallest."""
    high: Number
    """The largest."""


@_strict
class PhaseSpeed(TypedDict):
    """Speed of the prefill, or of decoding."""

    seconds: Spread
    """Wall time for all sequences of the batch."""
    tokens_per_second: Spread
    """Over all sequences of the batch."""


@_strict
class LogitError(TypedDict):
    """Relative error (Frobenius norm) of decoded logits against those of one forward over the whole text."""

    first: Number
    """At the first decoded token."""
    last: Number
    """At the last decoded token."""


@_strict
class ModelSpeed(TypedDict):
    """One model at one batch size."""

    prefill: PhaseSpeed
    """One forward over the context."""
    decode: PhaseSpeed
    """One forward for each further token."""
    joules_per_token: Number | None
    """Energy of the whole GPU board for one decoded token; null where it cannot be measured."""
    peak_bytes: int | None
    """Largest memory allocated on the GPU, weights included; null on a CPU."""
    relative_error: LogitError
    """How far decoded logits are from those of a plain forward."""


@_strict
class SpeedRatio(TypedDict):
    """Median time of the other model over that of the model in question: above 1 the latter is faster."""

    prefill: Number
    decode: Number


@_strict
class BatchSpeed(TypedDict):
    """Both models, or the only one, at one batch size."""

    batch: int
    """Sequences."""
    context: int
    """Tokens of context in each sequence."""
    decode: int
    """Tokens decoded in each sequence."""
    decode_mode: Literal["cuda graph", "eager"]
    """How a decoding step was launched."""
    model: ModelSpeed
    """The model in question."""
    against: NotRequired[ModelSpeed]
    """The model it is compared with."""
    ratio: SpeedRatio | None
    """Null without a second model."""


@_strict
class ModelMemory(TypedDict):
    """Memory that one model needs, in bytes."""

    weights_bytes: int
    """Parameters and buffers; shared ones count once."""
    cache_bytes_per_sequence: int
    """Cache of one sequence of context and decoded tokens."""
    growth_bytes: NotRequired[int]
    """How far memory grew on the device when the model was loaded and run once."""


@_strict
class LayerTiming(TypedDict):
    """One layer for one number of tokens."""

    tokens: int
    """Rows of its input."""
    seconds: Spread
    """Time of one product."""
    against_seconds: Spread | None
    """Time of the product it is compared with; null without one."""
    ratio: Number | None
    """Median of `against_seconds` over median of `seconds`: above 1 the layer is faster."""
    graph: bool
    """Whether a CUDA graph was timed."""
    relative_error: Number
    """Relative error (Frobenius norm) of its output against a float32 product with the unpacked weight."""


_LayerSizes = TypedDict("_LayerSizes", {"in": Annotated[int, _about("Inputs.")]})


@_strict
class LayerSpeed(_LayerSizes):
    """One layer for all of its kind and shape."""

    kind: str
    """How its weight is stored, such as `sparse24` or `dense`; with the number of layers that run as one."""
    out: int
    """Outputs, of all layers that run as one."""
    count: int
    """How many of its kind and shape the model has."""
    layer: str
    """Name of the layer that was timed: of middle size among them."""
    bytes: int
    """Bytes of its weight and bias."""
    against: str | None
    """What it is compared with; null without a comparison."""
    timings: list[LayerTiming]
    """By number of tokens."""


@_strict
class SpeedSettings(TypedDict):
    """What was asked of a measurement of speed, after it was capped to what the models allow."""

    batches: list[int]
    """Sequences at once, ascending."""
    context: int
    """Tokens of context in each sequence."""
    decode: int
    """Tokens to decode in each sequence."""
    repeats: int
    """Measurements of each model."""
    seed: int
    """Seed of the random tokens."""


@_strict
class Measurement(TypedDict):
    """What `evaluation.speed.measure` returns."""

    settings: SpeedSettings
    """What was asked for."""
    memory: dict[str, ModelMemory]
    """By `model` and `against`."""
    end_to_end: list[BatchSpeed]
    """By batch size, ascending; sizes that do not fit into memory are missing."""
    layers: list[LayerSpeed]
    """By kind and shape of layer."""
    notes: list[str]
    """What a reader of the figures should know: a sentence each."""


@_strict
class Device(TypedDict):
    """Where something was measured."""

    type: str
    """`cuda` or `cpu`."""
    name: str
    """Product name of the GPU or CPU."""
    threads: NotRequired[int]
    """Threads of torch; of a CPU."""


@_strict
class Surroundings(TypedDict):
    """Where, when and with what something was measured."""

    device: Device
    """The GPU or CPU."""
    date: str
    """UTC, ISO 8601."""
    versions: dict[str, str]
    """Versions of Python and of packages."""


@_strict
class BenchResult(Measurement, Surroundings):
    """What `bench` returns and writes to bench.json."""

    schema: int
    """Version of these keys: 1."""
    model: str
    """Folder or Hub name of the model in question."""
    against: str | None
    """Folder or Hub name of the model it is compared with; null without one."""
    dtype: str
    """Of the activations, such as `bfloat16`."""


_report = TypeAdapter(Report)


def check_report(report: object) -> None:
    """Raise a `PareError` that names every value of a report that is missing, of a wrong type or not finite."""
    version = report.get("schema") if isinstance(report, Mapping) else None
    if type(version) is int and version != SCHEMA:
        raise PareError(f"report.schema is {version}; this paredown reads schema {SCHEMA}")
    try:
        _report.validate_python(report)
    except ValidationError as error:
        faults: dict[str, list[ErrorDetails]] = {}
        for fault in error.errors(include_url=False):
            faults.setdefault(_place(fault["loc"], report), []).append(fault)
        lines = "\n".join(f"{place} {_problem(several)}" for place, several in faults.items())
        raise PareError(f"this is no report of paredown, or an incomplete one:\n{lines}") from error


def report_json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of report.json."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_report.json_schema()}


def _place(path: Sequence[int | str], report: Any) -> str:
    """`report.layers[3].kept` for the path `("layers", 3, "kept")`.

    Where several types are allowed, pydantic's path ends in the name of one of them, which is left out.
    """
    place, value = "report", report
    for part in path:
        if isinstance(value, Mapping):
            place += f".{part}"
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int):
            place += f"[{part}]"
            value = value[part]
    return place


def _problem(faults: Sequence[ErrorDetails]) -> str:
    """What is wrong with one value, in words that follow its place; a fault for each type that it could have had."""
    if faults[0]["type"] == "missing":
        return "is missing"
    wanted = " or ".join(fault["msg"].removeprefix("Input should be ") for fault in faults)
    return f"is {faults[0]['input']!r:.60}; wanted {wanted}"


if __name__ == "__main__":
    print(json.dumps(report_json_schema(), indent=2))
