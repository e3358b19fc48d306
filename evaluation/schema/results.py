"""What `evaluate` and `export` return."""

from typing import NotRequired

from typing_extensions import TypedDict  # pydantic wants this one below Python 3.12

from paredown.evaluation.schema.base import ExportFormat, strict
from paredown.evaluation.schema.changes import BytesChange
from paredown.evaluation.schema.scores import (
    Divergence,
    PairedDelta,
    Perplexity,
    Sample,
    TaskComparison,
    TaskScore,
    TextScore,
)


@strict
class EvalText(TextScore):
    """Perplexity on one text; with `against` of both models."""

    before: NotRequired[Perplexity]
    """Of the dense model."""
    paired_delta: NotRequired[PairedDelta]
    """The difference on the same windows."""
    divergence: NotRequired[Divergence]
    """How far both models' predictions are apart on the same tokens."""


@strict
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


@strict
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
