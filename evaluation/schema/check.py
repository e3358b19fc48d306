"""A report against its type."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from paredown.compress.errors import PareError
from paredown.evaluation.schema.base import SCHEMA
from paredown.evaluation.schema.report import Report

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
