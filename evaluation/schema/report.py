"""What a compression did and what it costs: report.json."""

from typing import Annotated, Any, NotRequired

from pydantic import Field
from typing_extensions import TypedDict  # pydantic wants this one below Python 3.12

from paredown.evaluation.schema.base import SCHEMA, Format, Number, about, strict
from paredown.evaluation.schema.changes import (
    AdapterMerge,
    BytesChange,
    Layer,
    Parameters,
    PartBytes,
    Reconstruction,
    RecoveryStep,
    Structure,
)
from paredown.evaluation.schema.scores import Sample, TaskComparison, Text, TextComparison
from paredown.evaluation.schema.surroundings import Device


@strict
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


@strict
class CalibrationText(Text):
    """A text that the method measured the model on."""

    source: Annotated[str, about("Name of the corpus; of a file or folder its absolute path.")]
    sequences: Annotated[int, about("Number of windows.")]
    tokens: NotRequired[Annotated[int, about("Tokens in all windows.")]]
    seed: Annotated[int | None, about("Seed of the random draw.")]


@strict
class Calibration(CalibrationText):
    """The text that the method measured the model's activations on."""

    domain: NotRequired[CalibrationText]
    """A second text, on which gradients of the loss were taken."""
    sources: NotRequired[list[CalibrationText]]
    """The texts, where several calibrated together; what stands beside them is of all."""


@strict
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


@strict
class PeakMemory(TypedDict):
    """Largest memory in use during the run, in bytes."""

    host: int | None
    """Resident memory of the process; null if not measured."""
    device: int | None
    """Memory allocated on the GPU, 0 without one; null if not measured."""


@strict
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


@strict
class SeedResult(TypedDict):
    """What the recipe came to by one calibration seed."""

    seed: int
    """The seed of the calibration windows."""
    evaluation: list[SeedText]
    """Perplexity by text."""
    tasks: dict[str, dict[str, Number]]
    """Scores of the compressed model, by task and metric."""


@strict
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
    adapters: NotRequired[list[AdapterMerge]]
    """What was merged into it, the first one first."""
    left_dense: NotRequired[list[str]]
    """Names of linear layers that the recipe's targets leave as they are."""
    unsupported: NotRequired[list[str]]
    """Names of matrices in the blocks that no method can compress."""
