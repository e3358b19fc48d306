"""Modules that hold a packed weight where a model has a `Linear`, a `Conv1D` or a fused parameter of experts.

A packed weight has a kind (how it is stored), a layout (whose place it takes) and sizes: its spec, which stands in
config.json. The tensors in the checkpoint are called `<name>.<tensor of the kind>`; a bias keeps its name. A layer may
carry a bias that the dense model has none of: its spec then says `"bias": true`.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from paredown.compress.errors import PareError, did_you_mean
from paredown.compress.storage.kinds import MASKS, Spec, kind_of

if TYPE_CHECKING:
    from paredown.compress.storage.fuse import Group

Layout = Literal["linear", "conv1d", "experts"]


class _Packed(nn.Module):
    """A packed weight of a given spec, uninitialised until its tensors are loaded."""

    layout: ClassVar[Layout]
    # transformers initialises what a checkpoint lacks; packed weights are loaded or refused, never made up
    _is_hf_initialized = True

    def __init__(self, spec: Spec, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.kind: str = spec["kind"]
        self._shape: tuple[int, ...] = tuple(spec["shape"])
        self._pack = kind_of(self.kind)
        self._asked = {key: spec[key] for key in self._pack.asks}
        self._derived: dict[str, Tensor] = {}  # of the tensors as they are: forgotten when they change
        for name, size in self._pack.sizes(spec).items():
            own = self._pack.tensors[name]
            empty = torch.empty(size, device=device, dtype=own or dtype)
            if own is None:
                self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
            else:
                self.register_buffer(name, empty)

    @property
    def spec(self) -> dict[str, Any]:
        """As in config.json."""
        return {"kind": self.kind, "layout": self.layout, "shape": list(self._shape), **self._asked}

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of its packed tensors."""
        return tuple(self._pack.tensors)

    def fault(self) -> str | None:
        """What is wrong with the loaded tensors, the tensor's name first, or None. Not of offloaded data."""
        for name, size in self._pack.sizes(self.spec).items():
            tensor, dtype = getattr(self, name), self._pack.tensors[name]
            if tuple(tensor.shape) != size:
                return f"{name}: has shape {list(tensor.shape)}, and the spec needs {list(size)}"
            if dtype is not None and tensor.dtype != dtype:
                return f"{name}: has dtype {tensor.dtype}, not {dtype}"
        tensors = self._tensors()
        return None if any(t.is_meta for t in tensors.values()) else self._pack.fault(tensors, self._shape)

    def extra_repr(self) -> str:
        return ", ".join([f"{list(self._shape)}, kind={self.kind}", *(f"{k}={v}" for k, v in self._asked.items())])

    def _tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self._pack.tensors}

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., in) times the weight, plus bias (out,): (..., out)."""
        tensors = self._tensors()
        if not self._derived:
            self._derived = self._pack.derive(tensors)
        return self._pack.matmul(x, {**tensors, **self._derived}, bias)

    def _changed(self) -> None:
        """Forget what was made from other data, or on another device."""
        self._derived = {}

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, Tensor):
            self._changed()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._changed()

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._changed()
        return self

    def _dense(self) -> Tensor:
        dense = self._pack.unpack(self._tensors(), self._shape)
        # some families' _init_weights draws random numbers into `layer.weight` unless it is marked as loaded
        dense._is_hf_initialized = True  # type: ignore[attr-defined]
        return dense


class PackedLinear(_Packed):
    """Stands in for `nn.Linear(in_features, out_features)`: bit-equal outputs."""

    layout = "linear"

    def __init__(self, spec: Spec, bias: bool, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(spec, device, dtype)
        self.out_features, self.in_features = self._shape
        self.bias = nn.Parameter(torch.empty(self.out_features, device=device, dtype=dtype)) if bias else None
        self.added_bias = bool(spec.get("bias", False))  # which the dense layer has not
        self.own_forward: Callable[[nn.Module, Tensor], Tensor] | None = None  # of a Linear that multiplies its own way
        self.group: Group | None = None  # linears that share its input, multiplied together; it is number `place` there
        self.place = 0

    @property
    def spec(self) -> dict[str, Any]:
        return {**super().spec, **({"bias": True} if self.added_bias else {})}

    @property
    def weight(self) -> Tensor:  # (out, in)
        """The dense weight, made anew at each call."""
        return self._dense()

    def forward(self, x: Tensor) -> Tensor:
        if self.own_forward is not None:
            return self.own_forward(self, x)
        if self.group is not None and not torch.is_grad_enabled():
            return self.group.product(self.place, x)
        return self._product(x, self.bias)  # (..., out)

    def _changed(self) -> None:
        super()._changed()
        group = self.__dict__.get("group")
        if group is not None and not group.holds(self):
            group.dissolve()


class PackedConv1D(_Packed):
    """Stands in for transformers' `Conv1D(nf, nx)`, GPT-2's linear whose weight is (in, out): bit-equal outputs."""

    layout = "conv1d"

    def __init__(self, spec: Spec, bias: bool, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(spec, device, dtype)
        self.nf, self.nx = self._shape
        self.bias = nn.Parameter(torch.empty(self.nf, device=device, dtype=dtype))

    @property
    def weight(self) -> Tensor:  # (in, out)
        """The dense weight as `Conv1D` holds it, made anew at each call."""
        weight = self._dense().t().contiguous()
        weight._is_hf_initialized = True  # type: ignore[attr-defined]
        return weight

    def forward(self, x: Tensor) -> Tensor:
        if self._pack.chain or x.is_cuda:
            return self._product(x, self.bias)
        # the same call on the same layout as Conv1D: another order of summation would change the last bit
        return torch.addmm(self.bias, x.reshape(-1, self.nx), self.weight).view(*x.shape[:-1], self.nf)


class PackedExperts(_Packed):
    """Stands in for the 3-D parameter of a fused experts module: `packed[expert]` is one dense weight (out, in)."""

    layout = "experts"

    values: Tensor

    def __init__(self, spec: Spec, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(spec, device, dtype)
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

    def _changed(self) -> None:
        super()._changed()
        self._starts = None


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


def packed_layer(old: nn.Module, spec: Spec, tensors: Mapping[str, Tensor], bias: Tensor | None) -> nn.Module:
    """A packed layer with its tensors and bias, to stand where `old` (a Linear or Conv1D) stands."""
    module = _build(old, spec)
    for name, tensor in tensors.items():
        if name in module._buffers:
            module._buffers[name] = tensor
        else:
            module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(bias, requires_grad=False)
    return module


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
    missing = [key for key in ("kind", "layout", "shape") if key not in spec]
    if not missing:
        missing = [key for key in kind_of(spec["kind"]).asks if key not in spec]
    if missing:
        raise PareError(f"packed weight {name!r}: its spec lacks {', '.join(missing)}.")
    for key in kind_of(spec["kind"]).asks:
        if not isinstance(spec[key], int):
            raise PareError(f"packed weight {name!r}: {key} must be a whole number, not {spec[key]!r}.")
    layouts = {"linear": 2, "conv1d": 2, "experts": 3}
    if spec["layout"] not in layouts:
        raise PareError(
            f"packed weight {name!r} has the unknown layout {spec['layout']!r}, not one of {', '.join(layouts)}."
        )
    shape = tuple(spec["shape"])
    if len(shape) != layouts[spec["layout"]]:
        raise PareError(f"packed weight {name!r}: layout {spec['layout']!r} does not go with shape {list(shape)}.")
    if spec["layout"] == "experts" and spec["kind"] not in MASKS:
        raise PareError(
            f"packed weight {name!r}: fused experts are stored as {' or '.join(MASKS)}, not {spec['kind']}."
        )
    try:
        kind_of(spec["kind"]).sizes(spec)
    except ValueError as fault:
        raise PareError(f"packed weight {name!r}: {fault}") from fault


def _build(old: nn.Module | nn.Parameter, spec: Spec) -> _Packed:
    if isinstance(old, nn.Parameter):
        return PackedExperts(spec, old.device, old.dtype)
    weight, bias = cast(Tensor, old.weight), cast(nn.Parameter | None, old.bias)
    added = bias is None and bool(spec.get("bias", False))
    cls = PackedLinear if spec["layout"] == "linear" else PackedConv1D
    module = cls(spec, added, weight.device, weight.dtype)
    if not added:
        module.bias = bias
    own = isinstance(old, nn.Linear) and type(old).forward is not nn.Linear.forward  # Falcon's: `x @ weight.T + bias`
    if own and not kind_of(spec["kind"]).chain:
        module.own_forward = type(old).forward
    return module.train(old.training)


def _tied(model: nn.Module) -> set[str]:
    keys: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return {*keys.keys(), *keys.values()}


PACKED = (PackedLinear, PackedConv1D, PackedExperts)
