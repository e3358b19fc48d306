"""What all results share: numbers, formats, and how their types are read."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, with_config

SCHEMA = 1  # of report.json
Number = Annotated[float, Field(allow_inf_nan=False)]  # finite; an int is welcome, a bool is not
Format = Literal["packed", "dense"]
ExportFormat = Literal["packed", "dense", "deci", "gguf", "onnx"]

# Strict: "1" and True are no numbers. A docstring below a key describes it in the JSON Schema; pydantic does not see the
# docstrings of inherited keys, which are described by `about` instead.
strict = with_config(ConfigDict(extra="allow", strict=True, use_attribute_docstrings=True))


def about(text: str) -> Any:
    """What a key that is inherited means."""
    return Field(description=text)
