"""What the JSON of a report must hold, and a check that says everything that is wrong with one."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from paredown.compress.errors import PareError

SCHEMA = 1


@dataclass(frozen=True)
class Each:
    """A mapping with keys of anyone's choice, whose values all look alike."""

    value: Any


@dataclass(frozen=True)
class Maybe:
    """What it says, or null: not measured, or not defined."""

    value: Any


NUMBER = (int, float)
PERPLEXITY = {"token_perplexity": NUMBER, "stderr": Maybe(NUMBER)}

# A dict lists the keys, a list shows its items, a type or a pair of types is a value's. More keys are welcome:
# `command`, `format` ("packed" or "dense"), `warnings`, and a `note` beside an evaluation.
SHAPE: dict[str, Any] = {
    "schema": int,
    "model": {"id": str, "revision": Maybe(str), "family": str, "parameters": int},
    "recipe": dict,
    "calibration": Maybe(
        {"source": str, "split": Maybe(str), "sequences": int, "length": int, "seed": Maybe(int), "sha256": str}
    ),
    "evaluation": [
        {
            "corpus": str,
            "split": Maybe(str),
            "sha256": str,
            "length": int,
            "tokens": int,
            "before": PERPLEXITY,
            "after": PERPLEXITY,
            "paired_delta": {"log_ratio": NUMBER, "stderr": Maybe(NUMBER)},
        }
    ],
    "tasks": Each(
        Each(
            {
                "before": NUMBER,
                "after": NUMBER,
                "stderr_before": Maybe(NUMBER),
                "stderr_after": Maybe(NUMBER),
                "paired_stderr": Maybe(NUMBER),
            }
        )
    ),
    "parameters": {"total": int, "targeted": int, "kept": int},
    "bytes": {"before": int, "after": int},
    # `kept` is the share of a layer's weights that is kept, between 0 and 1.
    "layers": [
        {
            "name": str,
            "method": str,
            "kept": NUMBER,
            "relative_error": Maybe(NUMBER),
            "damping": Maybe(NUMBER),
            "seconds": NUMBER,
        }
    ],
    "seconds": {"calibration": NUMBER, "compress": NUMBER, "evaluation": NUMBER, "write": NUMBER, "total": NUMBER},
    "peak_memory_bytes": {"host": Maybe(int), "device": Maybe(int)},
    "fallbacks": list,
    "versions": dict,
}


def check_report(report: Mapping[str, Any]) -> None:
    """Raise a `PareError` that lists everything missing, mistyped or not finite in a report."""
    faults = list(_faults(report, SHAPE, "report"))
    if not faults and report["schema"] != SCHEMA:
        faults = [f"report.schema is {report['schema']}; this paredown reads schema {SCHEMA}"]
    if faults:
        raise PareError("the report is not one of ours, or incomplete:\n" + "\n".join(faults))


def _faults(value: Any, shape: Any, place: str) -> Iterator[str]:
    if isinstance(shape, Maybe):
        if value is not None:
            yield from _faults(value, shape.value, place)
    elif isinstance(shape, dict | Each):
        if not isinstance(value, Mapping):
            yield f"{place} is {value!r:.60}; wanted a mapping"
            return
        keys = shape if isinstance(shape, dict) else dict.fromkeys(value, shape.value)
        for key, inner in keys.items():
            if key not in value:
                yield f"{place}.{key} is missing"
            else:
                yield from _faults(value[key], inner, f"{place}.{key}")
    elif isinstance(shape, list):
        if not isinstance(value, list):
            yield f"{place} is {value!r:.60}; wanted a list"
            return
        for position, item in enumerate(value):
            yield from _faults(item, shape[0], f"{place}[{position}]")
    elif not isinstance(value, shape) or isinstance(value, bool):
        wanted = " or ".join(kind.__name__ for kind in (shape if isinstance(shape, tuple) else (shape,)))
        yield f"{place} is {value!r:.60}; wanted {wanted}"
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{place} is {value}; wanted a finite number"
