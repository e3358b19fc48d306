"""Modules with a packed weight, to replace a `Linear`, a `Conv1D` or a fused parameter of experts.

In a checkpoint their tensors are called `<name>.<tensor of the kind>`; a bias keeps its name.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn

from paredown.compress.errors import PareError
from paredown.compress.storage.kinds import MASKS, kind_of
from paredown.compress.storage.spec import Layout, Spec


class LinearGroup(Protocol):
    """Linears that share an input and are multiplied as one: see `fuse.FusedGroup`."""

    def product(self, index: int, x: Tensor) -> Tensor: ...
    def holds(self, member: "PackedLinear") -> bool: ...
    def dissolve(self) -> None: ...


@dataclass(frozen=True)
class _Kept:
    """What stays in memory, and the stored tensors of which it was made."""

    made: Tensor
    tensors: dict[str, Tensor]
    edits: list[int]  # how often each was changed in place

    @classmethod
    def of(cls, made: Tensor, tensors: dict[str, Tensor]) -> "_Kept":
        return cls(made, tensors, [0 if t.is_inference() else t._version for t in tensors.values()])

    def holds(self) -> bool:
        """Whether none of these has changed."""
        for tensor, edits in zip(self.tensors.values(), self.edits, strict=True):
            if not tensor.is_inference() and tensor._version != edits:
                return False
        return True

    def learns(self) -> bool:
        """Whether gradients are wanted of them."""
        return torch.is_grad_enabled() and any(t.requires_grad for t in self.tensors.values())


class _Packed(nn.Module):
    """A packed weight of a spec; its tensors are uninitialised until they are loaded."""

    layout: ClassVar[Layout]
    # so that transformers does not initialise packed weights that a checkpoint lacks: loading must fail instead
    _is_hf_initialized = True
    keeps = False  # what `Kind.keep` makes stays in memory on a CPU: see `unpacked`

    def __init__(self, spec: Spec, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.spec = replace(spec, layout=self.layout, bias=False)  # as in config.json
        self.kind, self._shape, self._pack = spec.kind, spec.shape, kind_of(spec.kind)
        self._derived: dict[str, Tensor] = {}  # from the current tensors: emptied when one changes
        self._kept: _Kept | None = None
        for name, size in self._pack.sizes(spec).items():
            own = self._pack.tensors[name]
            empty = torch.empty(size, device=device, dtype=own or dtype)
            if own is None:
                self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
            else:
                self.register_buffer(name, empty)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the stored tensors."""
        return tuple(self._pack.tensors)

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors, by name."""
        return {name: getattr(self, name) for name in self._pack.tensors}

    def fault(self) -> str | None:
        """What is wrong with the loaded tensors, the tensor's name first; None if nothing is, or if they are offloaded."""
        tensors = self.tensors()
        for name, size in self._pack.sizes(self.spec).items():
            tensor, dtype = tensors[name], self._pack.tensors[name]
            if tuple(tensor.shape) != size:
                return f"{name}: has shape {list(tensor.shape)}, and the spec needs {list(size)}"
            if dtype is not None and tensor.dtype != dtype:
                return f"{name}: has dtype {tensor.dtype}, not {dtype}"
        return None if any(t.is_meta for t in tensors.values()) else self._pack.fault(tensors, self._shape)

    def extra_repr(self) -> str:
        sizes = (f"{name}={count}" for name, count in self.spec.counts.items())
        return ", ".join([f"{list(self._shape)}, kind={self.kind}", *sizes])

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., in) times the weight, plus bias (out,): (..., out)."""
        tensors = self.tensors()
        if not self._derived:
            self._derived = self._pack.derive(tensors)
        return self._pack.matmul(x, {**tensors, **self._derived}, bias)

    def forget(self) -> None:
        """Free what was computed from the stored tensors."""
        self._derived, self._kept = {}, None

    def _changed(self) -> None:
        """A tensor has other data now, or is on another device."""
        self.forget()

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
        """The dense weight as in the layer that this one replaces."""
        kept = self._in_memory() if self.kind in MASKS else None
        return self._unpacked() if kept is None else kept.made

    def _in_memory(self) -> _Kept | None:
        """What stays in memory, if it may be used as it is: on a CPU, neither trained nor compiled."""
        if not self.keeps or torch.compiler.is_compiling():
            return None
        kept = self._kept
        if kept is None or not kept.holds():
            tensors = self.tensors()
            if any(t.device.type != "cpu" for t in tensors.values()):
                return None
            with torch.inference_mode(False), torch.no_grad():
                self._kept = kept = _Kept.of(self._keep(), tensors)
        return None if kept.learns() else kept

    def _keep(self) -> Tensor:
        return self._unpacked()

    def _unpacked(self) -> Tensor:
        dense = self._pack.unpack(self.tensors(), self._shape)
        # some families' _init_weights writes random numbers into `layer.weight` unless it is marked as loaded
        dense._is_hf_initialized = True  # type: ignore[attr-defined]
        return dense


class PackedLinear(_Packed):
    """Replaces an `nn.Linear(in_features, out_features)`. With a masked weight its outputs are equal to the last bit."""

    layout = "linear"

    def __init__(self, spec: Spec, bias: bool, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(spec, device, dtype)
        self.out_features, self.in_features = self._shape
        self.bias = nn.Parameter(torch.empty(self.out_features, device=device, dtype=dtype)) if bias else None
        self.spec = replace(self.spec, bias=spec.bias)
        self.own_forward: Callable[[nn.Module, Tensor], Tensor] | None = None  # of a subclass of Linear
        self.group: LinearGroup | None = None  # linears that share its input and are multiplied as one
        self.place = 0  # its index in the group

    @property
    def weight(self) -> Tensor:  # (out, in)
        """The dense weight."""
        return self._dense()

    def forward(self, x: Tensor) -> Tensor:
        if self.own_forward is not None:
            return self.own_forward(self, x)
        if self.group is not None and not torch.is_grad_enabled():
            return self.group.product(self.place, x)
        kept = self._in_memory()
        if kept is not None:
            return self._pack.matmul_kept(x, kept.tensors, kept.made, self.bias)
        return self._product(x, self.bias)  # (..., out)

    def _keep(self) -> Tensor:
        return self._pack.keep(self.tensors(), self._shape)

    def _changed(self) -> None:
        super()._changed()
        group = self.__dict__.get("group")
        if group is not None and not group.holds(self):
            group.dissolve()


class PackedConv1D(_Packed):
    """Replaces transformers' `Conv1D(nf, nx)`, GPT-2's linear, whose weight is (in, out).

    With a masked weight its outputs are equal to the last bit.
    """

    layout = "conv1d"

    def __init__(self, spec: Spec, bias: bool, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(spec, device, dtype)
        self.nf, self.nx = self._shape
        self.bias = nn.Parameter(torch.empty(self.nf, device=device, dtype=dtype))

    @property
    def weight(self) -> Tensor:  # (in, out)
        """The dense weight as in `Conv1D`."""
        return self._dense()

    def _unpacked(self) -> Tensor:
        weight = super()._unpacked().t().contiguous()
        weight._is_hf_initialized = True  # type: ignore[attr-defined]
        return weight

    def forward(self, x: Tensor) -> Tensor:
        if self._pack.chain or x.is_cuda:
            return self._product(x, self.bias)
        # the same call as in Conv1D, with the same memory layout: another order of summation would change the last bit
        return torch.addmm(self.bias, x.reshape(-1, self.nx), self.weight).view(*x.shape[:-1], self.nf)


class PackedExperts(_Packed):
    """Replaces the parameter of a fused experts module: `packed[expert]` is one dense weight, as the parameter's was.

    Weights are (out, in), with the layout `experts_in_out` (in, out). Where a class multiplies with all experts at once, or
    takes another view of the parameter, all are unpacked together.
    """

    layout = "experts"

    values: Tensor

    def __init__(self, spec: Spec, device: torch.device, dtype: torch.dtype, stacked: bool = False) -> None:
        """`stacked`: the parameter is a matrix that holds the rows of all experts one after another."""
        super().__init__(spec, device, dtype)
        self.spec, self.stacked = replace(self.spec, layout=spec.layout), stacked
        self._starts: list[int] | None = None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """A torch function of the packed weights is that function of the dense ones."""
        dense = [arg.whole() if isinstance(arg, PackedExperts) else arg for arg in args]
        return func(*dense, **(kwargs or {}))

    def __getitem__(self, expert: int | Tensor) -> Tensor:
        # through __call__, so that the hooks of an offloading device map load the weights
        return cast(Tensor, self(expert))

    def __len__(self) -> int:
        return self._shape[0]

    def whole(self) -> Tensor:
        """All experts, dense, in the shape of the parameter."""
        return cast(Tensor, self(None))

    def transpose(self, one: int, other: int) -> Tensor:
        """That of the parameter."""
        return self.whole().transpose(one, other)

    def view(self, *sizes: Any) -> "PackedExperts | Tensor":
        """That of the parameter; where it parts the rows of the experts, experts are still unpacked one at a time."""
        wanted = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
        own = self._separate
        if self.stacked and len(wanted) == 3 and wanted[0] in (-1, own[0]) and wanted[1:] == own[1:]:
            return self
        return self.whole().view(*sizes)

    @property
    def _separate(self) -> tuple[int, ...]:
        """Shape of the parameter with a dimension for the experts."""
        experts, out, inner = self._shape
        return (experts, inner, out) if self.spec.layout == "experts_in_out" else (experts, out, inner)

    @property
    def shape(self) -> torch.Size:
        """That of the parameter."""
        experts, rows, columns = self._separate
        return torch.Size((experts * rows, columns) if self.stacked else (experts, rows, columns))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self._values.dtype

    @property
    def device(self) -> torch.device:
        return self._values.device

    @property
    def _values(self) -> Tensor:
        """The first of the stored tensors in the model's dtype."""
        return next(t for name, t in self.tensors().items() if self._pack.tensors[name] is None)

    def forward(self, expert: int | Tensor | None) -> Tensor:
        """One expert's dense weight, or those of all (None) in the shape of the parameter."""
        if expert is None:
            return self._dense()
        if isinstance(expert, Tensor) and expert.dim():
            raise PareError(
                "packed experts are unpacked one at a time; load the model with experts_implementation='eager'"
            )
        kept = self._in_memory()
        if kept is not None:
            return kept.made.view(self._separate)[int(expert)]
        return self._expert(int(expert))

    def _unpacked(self) -> Tensor:
        return torch.stack([self._expert(e) for e in range(len(self))]).view(self.shape)

    def _expert(self, index: int) -> Tensor:
        if not -len(self) <= index < len(self):
            raise IndexError(f"expert {index} of {len(self)}")  # also ends a `for weight in packed` loop
        index %= len(self)
        tensors = {name: t[index] for name, t in self.tensors().items() if name != "values"}
        if "values" in self.parts:
            starts = self._expert_starts()
            tensors["values"] = self.values[starts[index] : starts[index + 1]] if starts else self.values[index]
        dense = self._pack.unpack(tensors, self._shape[1:])  # (out, in)
        # with the memory layout of the parameter: another order of summation would change the last bit
        return dense.t().contiguous() if self.spec.layout == "experts_in_out" else dense

    def _expert_starts(self) -> list[int]:
        """See `Kind.starts`. Computed once after loading, as plain integers, which copies and moves to a device keep."""
        if self._starts is None:
            if self.values.is_meta:
                even = self.values.numel() // len(self)
                return [] if self.values.dim() > 1 else [even * e for e in range(len(self) + 1)]
            self._starts = self._pack.starts(self.tensors())
        return self._starts

    def _changed(self) -> None:
        super()._changed()
        self._starts = None


PACKED = (PackedLinear, PackedConv1D, PackedExperts)
