"""The results of the public calls as types: `Report`, `EvalResult`, `BenchResult` and `ExportResult`.

They are plain dicts that hold what JSON can hold. A key that is listed is always there, unless it is `NotRequired`; a dict
may hold further keys. `check_report` checks a report against its type. The JSON Schema of a report is printed by

    python -m paredown.evaluation.schema
"""

from paredown.evaluation.schema.base import SCHEMA, ExportFormat, Format, Number
from paredown.evaluation.schema.changes import (
    BytesChange,
    Layer,
    Parameters,
    PartBytes,
    Reconstruction,
    RecoveryStep,
    Structure,
)
from paredown.evaluation.schema.check import check_report, report_json_schema
from paredown.evaluation.schema.report import (
    Calibration,
    CalibrationText,
    PeakMemory,
    Report,
    ReportModel,
    Seconds,
    SeedResult,
    SeedText,
)
from paredown.evaluation.schema.results import EvalResult, EvalText, ExportResult
from paredown.evaluation.schema.scores import (
    Divergence,
    PairedDelta,
    Perplexity,
    PositionDivergence,
    Sample,
    TaskComparison,
    TaskScore,
    Text,
    TextComparison,
    TextScore,
    WordPerplexity,
    WordPerplexityOf,
)
from paredown.evaluation.schema.speed import (
    BatchSpeed,
    LayerSpeed,
    LayerTiming,
    LogitError,
    Measurement,
    ModelKey,
    ModelMemory,
    ModelSpeed,
    Phase,
    PhaseSpeed,
    SpeedRatio,
    SpeedSettings,
    Spread,
)
from paredown.evaluation.schema.surroundings import BenchResult, Device, Surroundings

__all__ = [
    "SCHEMA",
    "BatchSpeed",
    "BenchResult",
    "BytesChange",
    "Calibration",
    "CalibrationText",
    "Device",
    "Divergence",
    "EvalResult",
    "EvalText",
    "ExportFormat",
    "ExportResult",
    "Format",
    "Layer",
    "LayerSpeed",
    "LayerTiming",
    "LogitError",
    "Measurement",
    "ModelKey",
    "ModelMemory",
    "ModelSpeed",
    "Number",
    "PairedDelta",
    "Parameters",
    "PartBytes",
    "PeakMemory",
    "Perplexity",
    "Phase",
    "PhaseSpeed",
    "PositionDivergence",
    "Reconstruction",
    "RecoveryStep",
    "Report",
    "ReportModel",
    "Sample",
    "Seconds",
    "SeedResult",
    "SeedText",
    "SpeedRatio",
    "SpeedSettings",
    "Spread",
    "Structure",
    "Surroundings",
    "TaskComparison",
    "TaskScore",
    "Text",
    "TextComparison",
    "TextScore",
    "WordPerplexity",
    "WordPerplexityOf",
    "check_report",
    "report_json_schema",
]
