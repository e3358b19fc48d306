"""What is measured of a model's speed and memory."""

from typing import Annotated, Literal, NotRequired

from typing_extensions import TypedDict  # pydantic wants this one below Python 3.12

from paredown.evaluation.schema.base import Number, about, strict

Phase = Literal["prefill", "decode"]


ModelKey = Literal["model", "against"]  # the model in question, and the one it is compared with


@strict
class Spread(TypedDict):
    """A quantity over the repeats of a measurement."""

    median: Number
    low: Number
    """The smallest."""
    high: Number
    """The largest."""


@strict
class PhaseSpeed(TypedDict):
    """Speed of the prefill, or of decoding."""

    seconds: Spread
    """Wall time for all sequences of the batch."""
    tokens_per_second: Spread
    """Over all sequences of the batch."""


@strict
class LogitError(TypedDict):
    """Relative error (Frobenius norm) of decoded logits against those of one forward over the whole text."""

    first: Number
    """At the first decoded token."""
    last: Number
    """At the last decoded token."""


@strict
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


@strict
class SpeedRatio(TypedDict):
    """Median time of the other model over that of the model in question: above 1 the latter is faster."""

    prefill: Number
    decode: Number


@strict
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


@strict
class ModelMemory(TypedDict):
    """Memory that one model needs, in bytes."""

    weights_bytes: int
    """Parameters and buffers; shared ones count once."""
    cache_bytes_per_sequence: int
    """Cache of one sequence of context and decoded tokens."""
    growth_bytes: NotRequired[int]
    """How far memory grew on the device when the model was loaded and run once."""


@strict
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


_LayerSizes = TypedDict("_LayerSizes", {"in": Annotated[int, about("Inputs.")]})


@strict
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


@strict
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


@strict
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
