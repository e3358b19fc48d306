"""On what a measurement was made, and what `bench` returns."""

from typing import NotRequired

from typing_extensions import TypedDict  # pydantic wants this one below Python 3.12

from paredown.evaluation.schema.base import strict
from paredown.evaluation.schema.speed import Measurement


@strict
class Device(TypedDict):
    """Where something was measured."""

    type: str
    """`cuda` or `cpu`."""
    name: str
    """Product name of the GPU or CPU."""
    threads: NotRequired[int]
    """Threads of torch; of a CPU."""


@strict
class Surroundings(TypedDict):
    """Where, when and with what something was measured."""

    device: Device
    """The GPU or CPU."""
    date: str
    """UTC, ISO 8601."""
    versions: dict[str, str]
    """Versions of Python and of packages."""


@strict
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
