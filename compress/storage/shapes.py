"""Models whose layers are not all as their config says: parameters with sizes of their own, and modules that are absent.

In config.json these are two tables beside the packed weights: `sizes`, full name of a parameter -> its shape, of all that
have another shape than the config gives them, and `absent`, full names of modules.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from paredown.compress.errors import PareError, did_you_mean
from paredown.compress.storage.returns import returned
from paredown.compress.storage.spec import FIELDS, told

SIZED: dict[str, tuple[str, str]] = {"Linear": ("out_features", "in_features"), "Conv1D": ("nx", "nf")}  # by dimension
# what becomes of such a model, in words
UNEVEN = "per-layer sizes: packed format, loads with paredown; paredown export --format deci for Llama-shaped models"
AGAIN = "config.json is damaged, or not of this model. Fetch the checkpoint again."


@dataclass(frozen=True)
class Shapes:
    """How a model differs from the one that its config describes."""

    sizes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # shape by full name of a parameter
    absent: tuple[str, ...] = ()  # full names of modules

    def __bool__(self) -> bool:
        return bool(self.sizes or self.absent)

    def apply(self, model: nn.Module) -> None:
        """Give a model these shapes. Raises PareError as `resize` and `remove` do."""
        resize(model, self.sizes)
        remove(model, self.absent)

    def to_json(self) -> dict[str, Any]:
        """The tables of config.json that are not empty."""
        sizes = {name: list(shape) for name, shape in self.sizes.items()}
        return {**({"sizes": sizes} if sizes else {}), **({"absent": list(self.absent)} if self.absent else {})}

    @classmethod
    def from_json(cls, settings: Mapping[str, Any]) -> "Shapes":
        """From the tables beside the packed weights. Raises PareError for what is no table of shapes, or no list of names."""
        sizes, absent = settings.get("sizes") or {}, settings.get("absent") or []
        if not isinstance(sizes, Mapping):
            raise PareError(f"sizes in config.json is {told(sizes)}, wanted is a table of shapes. {AGAIN}")
        is_shape, wanted = FIELDS["shape"]
        for name, shape in sizes.items():
            if not is_shape(shape) or not shape:
                raise PareError(f"sizes in config.json gives {name!r} {told(shape)}, wanted is {wanted}. {AGAIN}")
        if not isinstance(absent, list) or not all(isinstance(name, str) for name in absent):
            raise PareError(f"absent in config.json is {told(absent)}, wanted is a list of names. {AGAIN}")
        return cls({name: tuple(shape) for name, shape in sizes.items()}, tuple(dict.fromkeys(absent)))


class Absent(nn.Module):
    """In the place of a module that was removed: zeros like its input, as many values as it returned, and no parameters."""

    def __init__(self, values: int | None) -> None:
        """values: how many the module returned in a tuple, zeros first and then None; None: a bare tensor."""
        super().__init__()
        self.values = values

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor | None, ...]:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        zeros = torch.zeros_like(hidden)
        return zeros if self.values is None else (zeros, *[None] * (self.values - 1))

    def extra_repr(self) -> str:
        return "" if self.values is None else f"values={self.values}"


def resize(model: nn.Module, sizes: Mapping[str, Sequence[int]]) -> None:
    """Replace parameters by uninitialised ones of these shapes, of the same device and dtype.

    Linear layers are told their new sizes. Raises PareError, naming the parameter, for one that the model does not have, that
    is shared, or that cannot have this shape; the model is then unchanged.
    """
    shared = _shared(model)
    planned = {name: _place(model, name, tuple(shape), shared) for name, shape in sizes.items()}
    _check_biases(planned, sizes)
    for name, (module, leaf) in planned.items():
        old = cast(nn.Parameter, module._parameters[leaf])
        empty = torch.empty(tuple(sizes[name]), dtype=old.dtype, device=old.device)
        module._parameters[leaf] = nn.Parameter(empty, requires_grad=old.requires_grad)
        if leaf == "weight":
            for attribute, size in zip(SIZED.get(_kind(module), ()), sizes[name], strict=False):
                setattr(module, attribute, size)


def remove(model: nn.Module, absent: Sequence[str]) -> None:
    """Put modules without parameters, which return zeros, in the place of those with these full names.

    Raises PareError, naming the module, for one that the model does not have or whose weights others share; the model is then
    unchanged.
    """
    shared, planned = _shared(model), list[tuple[nn.Module, str, Absent]]()
    modules = dict(model.named_modules())
    for name in absent:
        old = modules.get(name)
        if not name or old is None or next(old.children(), None) is None:
            raise PareError(
                f"absent module {name!r}: {type(model).__name__} has no module of this name that holds layers."
                f"{did_you_mean(name, list(modules))} {AGAIN}"
            )
        if tied := sorted(n for n in shared if n.startswith(f"{name}.")):
            raise PareError(f"absent module {name!r}: {tied[0]} is shared with another layer (tied).")
        parent, _, leaf = name.rpartition(".")
        planned.append((modules[parent], leaf, Absent(returned(old))))
    for parent_module, leaf, empty in planned:
        setattr(parent_module, leaf, empty)


def _place(model: nn.Module, name: str, shape: tuple[int, ...], shared: set[str]) -> tuple[nn.Module, str]:
    """The module that holds a parameter, and its name there. Makes the checks of `resize` but that of biases."""
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
        old = module._parameters[leaf]
    except (AttributeError, KeyError):
        old = None
    if old is None:
        known = [n for n, _ in model.named_parameters()]
        raise PareError(
            f"size of {name!r}: {type(model).__name__} has no parameter of this name.{did_you_mean(name, known)} {AGAIN}"
        )
    if len(shape) != old.dim() or any(new > was or new < 1 for new, was in zip(shape, old.shape, strict=True)):
        raise PareError(f"size of {name!r}: {list(shape)} is no smaller form of the model's {list(old.shape)}. {AGAIN}")
    if name in shared:
        raise PareError(f"size of {name!r}: it is shared with another layer (tied), which has the old size.")
    if old.dim() != 1 and _kind(module) not in SIZED:
        raise PareError(
            f"size of {name!r}: a {type(module).__name__} reads its sizes from the config, so that it cannot have others. "
            "Those of Linear and Conv1D layers can be changed, and vectors."
        )
    return module, leaf


def _check_biases(planned: Mapping[str, tuple[nn.Module, str]], sizes: Mapping[str, Sequence[int]]) -> None:
    """Raises PareError for a linear layer that would give more or fewer numbers than its bias holds."""
    for name, (module, leaf) in planned.items():
        bias, weight = module._parameters.get("bias"), module._parameters.get("weight")
        if _kind(module) not in SIZED or bias is None or weight is None:
            continue
        stem = name.removesuffix(leaf)
        shape = sizes.get(f"{stem}weight", weight.shape)
        out = shape[0] if _kind(module) == "Linear" else shape[1]
        if (held := sizes.get(f"{stem}bias", bias.shape)[0]) != out:
            raise PareError(f"size of {name!r}: the layer gives {out} numbers, and its bias has {held}. {AGAIN}")


def _kind(module: nn.Module) -> str:
    """Linear, also of a class derived from it, Conv1D, or another class."""
    return "Linear" if isinstance(module, nn.Linear) else type(module).__name__


def _shared(model: nn.Module) -> set[str]:
    """Names of parameters that several layers share."""
    keys: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return {*keys.keys(), *keys.values()}
