"""Modules that hold a packed weight where a model has a `Linear`, a `Conv1D` or a fused parameter of experts.

A packed weight has a kind (how it is stored), a layout (whose place it takes), a shape and a number of stored values:
its spec, which stands in config.json. The tensors in the checkpoint are called `<name>.values` and, by kind,
`<name>.indices` or `<name>.bitmap`; a bias keeps its name.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from paredown.compress.errors import PareError, did_you_mean
from paredown.kernels import bitmap as bitmaps
from paredown.kernels import sparse24 as sparse24s

Layout = Literal["linear", "conv1d", "experts"]
Spec = Mapping[
    str, Any
]  # {"kind", "layout", "shape": [out, in] or [experts, out, in], "kept": number of stored values}
Tensors = Mapping[str, Tensor]


class Kind(ABC):
    """One way to store a weight `(..., out, in)`: which tensors, and how to multiply with them."""

    tensors: ClassVar[tuple[str, ...]]  # "values" first: the one in the model's dtype; the others are uint8

    @staticmethod
    @abstractmethod
    def pack(weight: Tensor, keep: Tensor) -> dict[str, Tensor]:
        """The tensors of a weight (..., out, in) of which only what `keep` marks is stored."""

    @staticmethod
    @abstractmethod
    def sizes(shape: tuple[int, ...], kept: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors of a weight of this shape. Raises ValueError if no such weight can exist."""

    @staticmethod
    @abstractmethod
    def unpack(tensors: Tensors, shape: tuple[int, ...]) -> Tensor:
        """The dense weight (..., out, in)."""

    @staticmethod
    @abstractmethod
    def matmul(x: Tensor, tensors: Tensors, bias: Tensor | None) -> Tensor:
        """x (..., in) times the transposed weight (out, in), plus bias."""

    @staticmethod
    @abstractmethod
    def starts(tensors: Tensors) -> list[int]:
        """Where the values of each expert begin, and where the last one's end; empty if `values[expert]` says it."""

    @staticmethod
    @abstractmethod
    def fault(tensors: Tensors, shape: tuple[int, ...]) -> str | None:
        """What is damaged in the index data, or None."""


class Sparse24(Kind):
    """2 of every 4 weights along the input, with 2-bit columns."""

    tensors = ("values", "indices")

    @staticmethod
    def pack(weight: Tensor, keep: Tensor) -> dict[str, Tensor]:
        values, indices = sparse24s.pack24(weight, keep)
        return {"values": values, "indices": indices}

    @staticmethod
    def sizes(shape: tuple[int, ...], kept: int) -> dict[str, tuple[int, ...]]:
        *rows, inner = shape
        if inner % 4 or 2 * kept != math.prod(shape):
            raise ValueError(f"2:4 of {list(shape)} stores half of its weights and needs an input divisible by 4")
        return {"values": (*rows, inner // 2), "indices": (*rows, -(-inner // 8))}

    @staticmethod
    def unpack(tensors: Tensors, shape: tuple[int, ...]) -> Tensor:
        return sparse24s.unpack24(tensors["values"], tensors["indices"])

    @staticmethod
    def matmul(x: Tensor, tensors: Tensors, bias: Tensor | None) -> Tensor:
        return sparse24s.sparse24_matmul(x, tensors["values"], tensors["indices"], bias)

    @staticmethod
    def starts(tensors: Tensors) -> list[int]:
        return []

    @staticmethod
    def fault(tensors: Tensors, shape: tuple[int, ...]) -> str | None:
        bad = sparse24s.count_invalid24(tensors["indices"], shape[-1])
        return f"indices: {bad} groups name no pair of columns" if bad else None


class Bitmap(Kind):
    """Any mask: one bit per weight and the kept values in a row."""

    tensors = ("values", "bitmap")

    @staticmethod
    def pack(weight: Tensor, keep: Tensor) -> dict[str, Tensor]:
        values, bitmap = bitmaps.pack_bitmap(weight, keep)
        return {"values": values, "bitmap": bitmap}

    @staticmethod
    def sizes(shape: tuple[int, ...], kept: int) -> dict[str, tuple[int, ...]]:
        if not 0 <= kept <= math.prod(shape):
            raise ValueError(f"a weight of {list(shape)} cannot keep {kept} values")
        return {"values": (kept,), "bitmap": (*shape[:-1], -(-shape[-1] // 8))}

    @staticmethod
    def unpack(tensors: Tensors, shape: tuple[int, ...]) -> Tensor:
        return bitmaps.unpack_bitmap(tensors["values"], tensors["bitmap"], shape[-1])

    @staticmethod
    def matmul(x: Tensor, tensors: Tensors, bias: Tensor | None) -> Tensor:
        return bitmaps.bitmap_matmul(x, tensors["values"], tensors["bitmap"], bias)

    @staticmethod
    def starts(tensors: Tensors) -> list[int]:
        return [0, *bitmaps.count_bits(tensors["bitmap"]).sum(-1).cumsum(0).tolist()]

    @staticmethod
    def fault(tensors: Tensors, shape: tuple[int, ...]) -> str | None:
        bitmap, kept = tensors["bitmap"], tensors["values"].numel()
        marked = int(bitmaps.count_bits(bitmap).sum())
        if marked != kept:
            return f"bitmap: marks {marked} weights, and {kept} values are stored"
        if shape[-1] % 8 and bool((bitmap[..., -1] >> (shape[-1] % 8)).any()):
            return f"bitmap: marks columns past the last of {shape[-1]}"
        return None


KINDS: dict[str, type[Kind]] = {"sparse24": Sparse24, "bitmap": Bitmap}


def pack(kind: str, weight: Tensor, keep: Tensor) -> dict[str, Tensor]:
    """The tensors to write for `weight` ([experts,] out, in) of which `keep` (same shape, bool) is stored.

    Raises PareError for an unknown kind, ValueError if `keep` does not fit the kind (2:4 keeps exactly 2 of 4).
    """
    return _kind(kind).pack(weight, keep)


class _Packed(nn.Module):
    """A packed weight of a given spec, uninitialised until its tensors are loaded."""

    values: Tensor
    layout: ClassVar[Layout]
    # transformers initialises what a checkpoint lacks; packed weights are loaded or refused, never made up
    _is_hf_initialized = True

    def __init__(self, kind: str, shape: tuple[int, ...], kept: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.kind, self.kept, self._shape = kind, kept, tuple(shape)
        self._pack = _kind(kind)
        sizes = self._pack.sizes(self._shape, kept)
        self.values = nn.Parameter(torch.empty(sizes.pop("values"), device=device, dtype=dtype), requires_grad=False)
        for name, size in sizes.items():
            self.register_buffer(name, torch.empty(size, device=device, dtype=torch.uint8))

    @property
    def spec(self) -> dict[str, Any]:
        """As in config.json."""
        return {"kind": self.kind, "layout": self.layout, "shape": list(self._shape), "kept": self.kept}

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of its packed tensors."""
        return self._pack.tensors

    def fault(self) -> str | None:
        """What is wrong with the loaded tensors, the tensor's name first, or None. Not of offloaded data."""
        for name, size in self._pack.sizes(self._shape, self.kept).items():
            tensor = getattr(self, name)
            if tuple(tensor.shape) != size:
                return f"{name}: has shape {list(tensor.shape)}, and the spec needs {list(size)}"
            if name != "values" and tensor.dtype != torch.uint8:
                return f"{name}: has dtype {tensor.dtype}, not torch.uint8"
        tensors = self._tensors()
        return None if any(t.is_meta for t in tensors.values()) else self._pack.fault(tensors, self._shape)

    def extra_repr(self) -> str:
        return f"{list(self._shape)}, kind={self.kind}, kept={self.kept}"

    def _tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self._pack.tensors}

    def _dense(self) -> Tensor:
        dense = self._pack.unpack(self._tensors(), self._shape)
        # some families' _init_weights draws random numbers into `layer.weight` unless it is marked as loaded
        dense._is_hf_initialized = True  # type: ignore[attr-defined]
        return dense


class PackedLinear(_Packed):
    """Stands in for `nn.Linear(in_features, out_features)`: bit-equal outputs."""

    layout = "linear"

    def __init__(
        self, kind: str, shape: tuple[int, ...], kept: int, bias: bool, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(kind, shape, kept, device, dtype)
        self.out_features, self.in_features = self._shape
        self.bias = nn.Parameter(torch.empty(self.out_features, device=device, dtype=dtype)) if bias else None
        self.own_forward: Callable[[nn.Module, Tensor], Tensor] | None = None  # of a Linear that multiplies its own way

    @property
    def weight(self) -> Tensor:  # (out, in)
        """The dense weight, made anew at each call."""
        return self._dense()

    def forward(self, x: Tensor) -> Tensor:
        if self.own_forward is not None:
            return self.own_forward(self, x)
        return self._pack.matmul(x, self._tensors(), self.bias)  # (..., out)


class PackedConv1D(_Packed):
    """Stands in for transformers' `Conv1D(nf, nx)`, GPT-2's linear whose weight is (in, out): bit-equal outputs."""

    layout = "conv1d"

    def __init__(
        self, kind: str, shape: tuple[int, ...], kept: int, bias: bool, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(kind, shape, kept, device, dtype)
        self.nf, self.nx = self._shape
        self.bias = nn.Parameter(torch.empty(self.nf, device=device, dtype=dtype))

    @property
    def weight(self) -> Tensor:  # (in, out)
        """The dense weight as `Conv1D` holds it, made anew at each call."""
        weight = self._dense().t().contiguous()
        weight._is_hf_initialized = True  # type: ignore[attr-defined]
        return weight

    def forward(self, x: Tensor) -> Tensor:
        # the same call on the same layout as Conv1D: another order of summation would change the last bit
        return torch.addmm(self.bias, x.reshape(-1, self.nx), self.weight).view(*x.shape[:-1], self.nf)


class PackedExperts(_Packed):
    """Stands in for the 3-D parameter of a fused experts module: `packed[expert]` is one dense weight (out, in)."""

    layout = "experts"

    def __init__(self, kind: str, shape: tuple[int, ...], kept: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(kind, shape, kept, device, dtype)
        self._starts: list[int] | None = None

    def __getitem__(self, expert: int | Tensor) -> Tensor:
        # through __call__, so that the hooks of an offloading device map bring the weights in
        return cast(Tensor, self(expert))

    def __len__(self) -> int:
        return self._shape[0]

    @property
    def shape(self) -> torch.Size:  # (experts, out, in)
        return torch.Size(self._shape)

    @property
    def ndim(self) -> int:
        return len(self._shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    def forward(self, expert: int | Tensor) -> Tensor:  # (out, in)
        if isinstance(expert, Tensor) and expert.dim():
            raise PareError(
                "packed experts are unpacked one at a time; load the model with experts_implementation='eager'"
            )
        index = int(expert)
        if not -len(self) <= index < len(self):
            raise IndexError(f"expert {index} of {len(self)}")  # also ends a `for weight in packed` loop
        index %= len(self)
        tensors = {name: t[index] for name, t in self._tensors().items() if name != "values"}
        starts = self._expert_starts()
        tensors["values"] = self.values[starts[index] : starts[index + 1]] if starts else self.values[index]
        return self._pack.unpack(tensors, self._shape[1:])

    def _expert_starts(self) -> list[int]:
        """Counted once after loading. Plain integers: they survive copies and moves between devices."""
        if self._starts is None:
            if self.values.is_meta:
                even = self.values.numel() // len(self)
                return [] if self.values.dim() > 1 else [even * e for e in range(len(self) + 1)]
            self._starts = self._pack.starts(self._tensors())
        return self._starts

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor):  # other data
            self.__dict__["_starts"] = None
        super().__setattr__(name, value)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._starts = None
        super()._load_from_state_dict(*args, **kwargs)


def install(model: nn.Module, modules: Mapping[str, Spec]) -> None:
    """Swap the layers and fused parameters named in `modules` (name -> spec) for packed ones, on the same device.

    Names are those of `model`: of the layer (linear, conv1d) or of the parameter (experts). The new weights are
    uninitialised: load them afterwards. Biases keep their values. Raises PareError, naming the layer, where a spec
    does not fit the model; the model is then unchanged.
    """
    tied = _tied(model)
    planned = [(name, spec, *_place(model, name, spec, tied)) for name, spec in modules.items()]
    for _name, spec, parent, leaf in planned:
        new = _build(getattr(parent, leaf), spec)
        parent._parameters.pop(leaf, None)  # a parameter's name cannot be given to a module
        setattr(parent, leaf, new)


def _place(model: nn.Module, name: str, spec: Spec, tied: set[str]) -> tuple[nn.Module, str]:
    """The module that holds what `name` means, and under which attribute. All checks of `install`."""
    _check_spec(name, spec)
    path, _, leaf = name.rpartition(".")
    try:
        parent = model.get_submodule(path)
        target = getattr(parent, leaf)
    except AttributeError as fault:
        known = [n for n, _ in model.named_modules()] + [n for n, _ in model.named_parameters()]
        raise PareError(
            f"packed weight {name!r}: {type(model).__name__} has no layer or parameter of this name."
            f"{did_you_mean(name, known)} config.json and the model class are not of the same model."
        ) from fault
    layout, shape = spec["layout"], tuple(spec["shape"])
    if layout == "experts":
        found = tuple(target.shape) if isinstance(target, nn.Parameter) else None
    elif layout == "linear":
        found = tuple(target.weight.shape) if isinstance(target, nn.Linear) else None
    else:
        found = tuple(target.weight.shape[::-1]) if type(target).__name__ == "Conv1D" else None
    if found is None:
        raise PareError(
            f"packed weight {name!r}: layout {layout!r} cannot take the place of a {type(target).__name__}. "
            "The layout and the model class do not belong together."
        )
    if found != shape:
        raise PareError(f"packed weight {name!r}: the spec's shape is {list(shape)}, the model's {list(found)}.")
    if (name if layout == "experts" else f"{name}.weight") in tied:
        raise PareError(
            f"packed weight {name!r} is shared with another layer (tied), which would lose it. "
            "Leave it out, or untie the model with tie_word_embeddings=False."
        )
    return parent, leaf


def _check_spec(name: str, spec: Spec) -> None:
    """Kind, layout and sizes make sense by themselves. Raises PareError naming the weight."""
    missing = [key for key in ("kind", "layout", "shape", "kept") if key not in spec]
    if missing:
        raise PareError(f"packed weight {name!r}: its spec lacks {', '.join(missing)}.")
    layouts = {"linear": 2, "conv1d": 2, "experts": 3}
    if spec["layout"] not in layouts:
        raise PareError(
            f"packed weight {name!r} has the unknown layout {spec['layout']!r}, not one of {', '.join(layouts)}."
        )
    shape = tuple(spec["shape"])
    if len(shape) != layouts[spec["layout"]]:
        raise PareError(f"packed weight {name!r}: layout {spec['layout']!r} does not go with shape {list(shape)}.")
    try:
        _kind(spec["kind"]).sizes(shape, spec["kept"])
    except ValueError as fault:
        raise PareError(f"packed weight {name!r}: {fault}") from fault


def _build(old: nn.Module | nn.Parameter, spec: Spec) -> _Packed:
    kind, shape, kept = spec["kind"], tuple(spec["shape"]), spec["kept"]
    if isinstance(old, nn.Parameter):
        return PackedExperts(kind, shape, kept, old.device, old.dtype)
    weight = cast(Tensor, old.weight)
    module = (PackedLinear if spec["layout"] == "linear" else PackedConv1D)(
        kind, shape, kept, old.bias is not None, weight.device, weight.dtype
    )
    module.bias = old.bias  # type: ignore[assignment]
    if isinstance(old, nn.Linear) and type(old).forward is not nn.Linear.forward:  # Falcon's: `x @ weight.T + bias`
        module.own_forward = type(old).forward  # type: ignore[assignment]
    return module.train(old.training)


def _kind(kind: str) -> type[Kind]:
    if kind not in KINDS:
        raise PareError(
            f"unknown kind of packed weight {kind!r}.{did_you_mean(str(kind), KINDS)} This version knows "
            f"{', '.join(KINDS)}; a newer paredown may have written this checkpoint: pip install -U paredown."
        )
    return KINDS[kind]


def _tied(model: nn.Module) -> set[str]:
    keys: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return {*keys.keys(), *keys.values()}


PACKED = (PackedLinear, PackedConv1D, PackedExperts)
