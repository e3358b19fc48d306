"""vLLM's linear layers with packed weights. Layers that vLLM joins (qkv, gate_up) hold several, each with its own spec."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearMethodBase,
    MergedColumnParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.utils import set_weight_attrs

from paredown.compress.errors import PareError
from paredown.compress.serving.cutting import Part, as_factors, cut
from paredown.compress.serving.probes import UNFILLED, is_filled, places
from paredown.compress.storage.kinds import kind_of
from paredown.compress.storage.spec import DENSE, Spec

PLAIN = "Serve the dense export instead: paredown export OLD -o NEW --format dense"


@dataclass
class Matrix:
    """One weight of the checkpoint in a layer of vLLM's, and its tensors once they were read."""

    name: str  # in our config; empty for one that no table there names
    spec: Spec | None  # None: it is stored dense
    sized: tuple[int, ...] | None  # its shape (out, in), if that is another than the engine's config says
    tensors: dict[str, Tensor] = field(default_factory=dict)
    added_bias: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in), once it was read."""
        return self.spec.shape if self.spec else tuple(self.tensors["weight"].shape)


@dataclass
class Product:
    """Weights of one kind that are multiplied at once, their rows one after another."""

    kind: str
    outs: list[int]
    ranks: list[int]
    names: dict[str, str]  # of the kind's tensors -> their names on the layer


class SizedLinearMethod(UnquantizedLinearMethod):  # type: ignore[misc]
    """An ordinary layer whose weights have other sizes than the model's config says."""

    def __init__(self, sized: Sequence[tuple[int, ...] | None]) -> None:
        super().__init__()
        self.sized = list(sized)

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        *sizes: Any,
        **options: Any,
    ) -> None:
        """As of an ordinary layer."""
        inner, outs = resize(layer, input_size_per_partition, output_partition_sizes, self.sized)
        super().create_weights(layer, inner, outs, *sizes, **options)


class PackedLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """A layer that holds these `matrices`. Its parameter `weight` takes their probes: what it holds then is cut from them."""

    def __init__(self, matrices: Sequence[Matrix], on_cpu: bool) -> None:
        self.matrices, self.on_cpu = list(matrices), on_cpu
        self.parts: list[Part] = []  # of this process, from the top down
        self.added: Tensor | None = None  # bias (out,) of this process

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **options: Any,
    ) -> None:
        """A parameter that is empty until the first probe comes, and empty again after the last."""
        sized = [matrix.sized for matrix in self.matrices]
        self.inner, self.outs = resize(layer, input_size_per_partition, output_partition_sizes, sized)
        self.dtype, self.device = params_dtype, torch.empty(0).device
        self._of_layer = options["weight_loader"]
        weight = nn.Parameter(torch.empty(0, dtype=torch.float64, device="cpu"), requires_grad=False)
        set_weight_attrs(weight, {"input_dim": 1, "output_dim": 0, "weight_loader": self._load})
        layer.register_parameter("weight", weight)

    def _load(self, weight: nn.Parameter, probe: Tensor, *shard: Any, **options: Any) -> None:
        if not weight.numel():
            weight.data = torch.full((sum(self.outs), self.inner), UNFILLED, dtype=torch.float64, device="cpu")
        self._of_layer(weight, probe, *shard, **options)
        if is_filled(weight.data):
            self._cut(weight.data)
            weight.data = weight.new_empty(0)

    def _cut(self, loaded: Tensor) -> None:
        """Keep what this process multiplies with of each weight."""
        shapes = [matrix.shape for matrix in self.matrices]
        biases = []
        try:
            found = places(loaded, shapes)
        except PareError as fault:
            raise PareError(f"{self._name}: vLLM cannot hold it packed: {fault}. {PLAIN}") from fault
        for place in found:
            matrix, shape = self.matrices[place.matrix], shapes[place.matrix]
            kind, tensors = cut(*self._form(matrix), shape, place.rows, place.columns)
            own = kind_of(kind).tensors if kind != DENSE else {"weight": None}
            self.parts.append((kind, {n: self._moved(t, own[n] or self.dtype) for n, t in tensors.items()}))
            bias = matrix.added_bias
            bias = torch.zeros(shape[0], dtype=self.dtype) if bias is None else bias
            biases.append(bias if place.rows is None else bias[place.rows])
        if any(matrix.added_bias is not None for matrix in self.matrices):
            self.added = self._moved(torch.cat(biases), self.dtype)
        for matrix in self.matrices:
            matrix.tensors, matrix.added_bias = {}, None

    @property
    def _name(self) -> str:
        return next(matrix.name for matrix in self.matrices if matrix.name)

    def _form(self, matrix: Matrix) -> tuple[str, dict[str, Tensor]]:
        """The kind in which a weight is used here, and its tensors: on a CPU masks are dense and PIFA is two factors."""
        kind, tensors = matrix.spec.kind if matrix.spec else DENSE, matrix.tensors
        if self.on_cpu and kind == "pifa":
            return as_factors(tensors)
        if self.on_cpu and ("sparse24" in kind or "bitmap" in kind):
            return DENSE, {"weight": kind_of(kind).unpack(tensors, matrix.shape)}
        return kind, tensors

    def _moved(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        # a copy: what was read is a view into a file, or into the part of other processes
        return tensor.to(device=self.device, dtype=dtype, copy=True).contiguous()

    def process_weights_after_loading(self, layer: Any) -> None:
        """Register what was kept. Raises PareError if a weight never came: vLLM would go on with what is in memory."""
        if not self.parts:
            raise PareError(
                f"the weights of {self._name} were not loaded: use --load-format auto, and check the checkpoint with: "
                "paredown verify FOLDER"
            )
        self.products = [self._register(layer, i, parts) for i, parts in enumerate(_groups(self.parts))]
        # of the row-parallel, summed over processes, the first adds the bias
        once = not (isinstance(layer, RowParallelLinear) and layer.tp_rank)
        layer.added_bias = None if self.added is None or not once else nn.Parameter(self.added, requires_grad=False)
        layer.weight = nn.Parameter(torch.empty(0, dtype=self.dtype, device=self.device), requires_grad=False)
        self.parts, self.added = [], None

    def _register(self, layer: Any, index: int, parts: Sequence[Part]) -> Product:
        """Put the tensors of parts that are multiplied at once on the layer."""
        kind = parts[0][0]
        tensors = {name: _joined([own[name] for _, own in parts]) for name in parts[0][1]}
        tensors |= {} if kind == DENSE else kind_of(kind).derive(tensors)
        names = {name: f"packed{index}_{name}" for name in tensors}
        for name, tensor in tensors.items():
            layer.register_parameter(names[name], nn.Parameter(tensor, requires_grad=False))
        factor = next((name for name in ("right", "pivots") if name in names), None)  # its rows are the rank
        ranks = [len(own[factor]) for _, own in parts] if factor else []
        return Product(kind, [_rows(own) for _, own in parts], ranks, names)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., in) times the weights, plus the biases: (..., out), of this process."""
        outputs = [self._product(layer, x, product) for product in self.products]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        for added in (bias, layer.added_bias):
            y = y if added is None else y + added
        return y

    @staticmethod
    def _product(layer: Any, x: Tensor, product: Product) -> Tensor:
        tensors = {name: getattr(layer, own) for name, own in product.names.items()}
        if product.kind == DENSE:
            return F.linear(x, tensors["weight"])
        several = len(product.outs) > 1 and bool(product.ranks)
        sizes = (product.ranks, product.outs) if several else (None, None)
        return kind_of(product.kind).matmul(x, tensors, None, *sizes)


def resize(layer: Any, inner: int, outs: list[int], sized: Sequence[tuple[int, ...] | None]) -> tuple[int, list[int]]:
    """Tell a layer that is being built the sizes (out, in) of its weights; None: as its config says, `inner` and `outs`.

    Returns its own number of inputs, and of outputs of each weight, in this process. Raises PareError for sizes that it
    cannot have.
    """
    if not any(sized):
        return inner, outs
    ranks = layer.tp_size
    if (
        isinstance(layer, RowParallelLinear)
        and sized[0]
        and sized[0][0] == layer.output_size
        and not sized[0][1] % ranks
    ):
        layer.input_size = sized[0][1]
        layer.input_size_per_partition = layer.input_size // ranks
        return layer.input_size_per_partition, outs
    if type(layer) in (ColumnParallelLinear, MergedColumnParallelLinear) and len(sized) in (1, len(outs)):
        even = [(s[0] * len(sized) // len(outs), s[1]) if s else None for s in sized] * (len(outs) // len(sized))
        wholes = [s[0] if s else own * ranks for s, own in zip(even, outs, strict=True)]
        if all(s is None or s[1] == inner for s in even) and not any(whole % ranks for whole in wholes):
            layer.output_partition_sizes = [whole // ranks for whole in wholes]
            layer.output_size, layer.output_size_per_partition = sum(wholes), sum(layer.output_partition_sizes)
            if isinstance(layer, MergedColumnParallelLinear):
                layer.output_sizes = wholes
            return inner, layer.output_partition_sizes
    raise PareError(
        f"{layer.prefix}: vLLM's {type(layer).__name__} cannot have weights {[list(s or ()) for s in sized]} in {ranks} "
        "processes. Of a Llama, try: paredown export OLD -o NEW --format deci"
    )


def _groups(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """Parts of one kind that follow each other, where the kind can multiply them at once."""
    for kind, own in groupby(parts, key=lambda part: part[0]):
        if kind == DENSE or kind_of(kind).joins:
            yield list(own)
        else:
            yield from ([part] for part in own)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """All rows, or all numbers where rows differ in length."""
    return torch.cat(list(tensors) if len({t.shape[1:] for t in tensors}) == 1 else [t.flatten() for t in tensors])


def _rows(tensors: Mapping[str, Tensor]) -> int:
    """How many outputs a part has."""
    return len(
        next(tensors[name] for name in ("weight", "order", "left", "columns", "indices", "bitmap") if name in tensors)
    )
