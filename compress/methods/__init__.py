"""One file per paper. A method is a frozen dataclass whose fields are the recipe's options; `@register` makes it known.

To add one, write a file here: nothing else changes.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import MISSING, fields
from functools import cache
from typing import Annotated, Any, Protocol, TypeVar

from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor

from paredown.compress.errors import PareError, did_you_mean
from paredown.compress.numerics.edits import Edit
from paredown.compress.numerics.masks import Sparsity, parse_sparsity
from paredown.compress.numerics.moments import InputStats

Damping = Annotated[float, Field(ge=0, allow_inf_nan=False)]  # of the mean diagonal of H, added to the diagonal


class Method(Protocol):
    """What the pipeline asks of a method."""

    @property
    def needs(self) -> frozenset[str]:
        """Names of the statistics it reads."""
        ...

    def compress(self, weight: Tensor, stats: InputStats) -> Edit | None:
        """A pure function of the weight `(out, in)` and the moments of its input; None leaves the weight as it is."""
        ...


M = TypeVar("M", bound=type)
_REGISTRY: dict[str, type] = {}


def register(name: str) -> Callable[[M], M]:
    """Make a method known under `name`, written with underscores."""

    def add(cls: M) -> M:
        _REGISTRY[name] = cls
        return cls

    return add


@cache
def methods() -> dict[str, type]:
    """Every method by name: all files of this package are imported."""
    for module in pkgutil.walk_packages(__path__, f"{__name__}."):
        importlib.import_module(module.name)
    return dict(sorted(_REGISTRY.items()))


def build(name: str, options: dict[str, Any]) -> Method:
    """The method `name` with its options. Raises PareError listing every fault at once."""
    known = methods()
    if name not in known:
        raise PareError(f"unknown method {name!r}.{did_you_mean(name, known)} Methods: {', '.join(known)}.")
    wanted = {f.name: f for f in fields(known[name]) if f.init}
    faults = [f"{name} has no option {key!r}.{did_you_mean(str(key), wanted)}" for key in options if key not in wanted]
    values: dict[str, Any] = {}
    for key in wanted.keys() & options.keys():
        try:
            values[key] = _parse(wanted[key].type, options[key])
        except PareError as fault:
            faults.append(f"{name}.{key}: {fault}")
        except ValidationError as fault:
            faults.append(f"{name}.{key}: {options[key]!r}: {fault.errors()[0]['msg']}")
    required = [key for key, f in wanted.items() if f.default is MISSING and f.default_factory is MISSING]
    faults += [f"{name} needs the option {key!r}" for key in required if key not in options]
    if faults:
        raise PareError("\n".join(faults))
    method: Method = known[name](**values)
    return method


def _parse(kind: Any, value: Any) -> Any:
    return parse_sparsity(value) if kind == Sparsity else TypeAdapter(kind).validate_python(value)
