"""Modules with a packed weight, to replace a `Linear`, a `Conv1D` or a fused parameter of experts.

In a checkpoint their tensors are called `<name>.<tensor of the kind>`; a bias keeps its name.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn

from paredown.compress.errors import PareError
from paredown.compress.storage.kinds import kind_of
from paredown.compress.storage.spec import Layout, Spec


class LinearGroup(Protocol):
    """Linears that share an input and are multiplied as one: see `fuse.FusedGroup`."""

    def product(self, index: int, x: Tensor) -> Tensor: ...
    def holds(self, member: "PackedLinear") -> bool: ...
    def dissolve(self) -> None: ...


class _Packed(nn.Module):
    """A packed weight of a spec; its tensors are uninitialised until they are loaded."""

    layout: ClassVar[Layout]
    # so that transformers does not initialise packed weights that a checkpoint lacks: loading must fail instead
    _is_hf_initialized = True

    def __init__(self, spec: Spec, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.spec = replace(spec, layout=self.layout, bias=False)  # as in config.json
        self.kind, self._shape, self._pack = spec.kind, spec.shape, kind_of(spec.kind)
        self._derived: dict[str, Tensor] = {}  # from the current tensors: emptied when one changes
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

    def _changed(self) -> None:
        """A tensor has other data now, or is on another device."""
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
        """The dense weight, unpacked at each call."""
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
        """The dense weight as in `Conv1D`, unpacked at each call."""
        weight = self._dense().t().contiguous()
        weight._is_hf_initialized = True  # type: ignore[attr-defined]
        return weight

    def forward(self, x: Tensor) -> Tensor:
        if self._pack.chain or x.is_cuda:
            return self._product(x, self.bias)
        # the same call as in Conv1D, with the same memory layout: another order of summation would change the last bit
        return torch.addmm(self.bias, x.reshape(-1, self.nx), self.weight).view(*x.shape[:-1], self.nf)


class PackedExperts(_Packed):
    """Replaces the 3-D parameter of a fused experts module: `packed[expert]` is one dense weight (out, in)."""

    layout = "experts"

    values: Tensor

    def __init__(self, spec: Spec, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(spec, device, dtype)
        self._starts: list[int] | None = None

    def __getitem__(self, expert: int | Tensor) -> Tensor:
        # through __call__, so that the hooks of an offloading device map load the weights
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
        tensors = {name: t[index] for name, t in self.tensors().items() if name != "values"}
        starts = self._expert_starts()
        tensors["values"] = self.values[starts[index] : starts[index + 1]] if starts else self.values[index]
        return self._pack.unpack(tensors, self._shape[1:])

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
