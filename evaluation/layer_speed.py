"""Speed of a model's linear layers: one of each kind and shape in its blocks, against its dense counterpart."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paredown.compress.storage.modules import PackedConv1D, PackedExperts, PackedLinear
from paredown.evaluation.gauges import relative_error, spread, weight_bytes
from paredown.evaluation.schema import LayerSpeed, LayerTiming
from paredown.kernels.timing import interleaved

LAYER_TOKENS = (1, 8, 32, 512)
LAYER_SAMPLES = 4  # timings of a layer for each end-to-end repeat: they are cheap


@dataclass(frozen=True)
class LayerCase:
    """A linear layer, or several that run as one product, to be timed for one number of tokens."""

    kind: str
    shape: tuple[int, int]  # (out, in); out is the sum over layers that run as one
    name: str
    count: int  # of products of this kind and shape in the model
    modules: tuple[nn.Module, ...]
    against: tuple[nn.Module, ...]  # the other model's layers; if empty, the same weights unpacked
    tokens: int
    dtype: torch.dtype


Unit = tuple[str, ...]  # names of the linear layers that run as one product: mostly a single one


def linear_kinds(model: nn.Module) -> dict[tuple[str, int, int], list[Unit]]:
    """The linear layers of the blocks by `(kind, out, in)`: those with a number in their name, so not the output layer."""
    names = {id(module): name for name, module in model.named_modules()}
    units: dict[tuple[str, int, int], list[Unit]] = {}
    for name, module in model.named_modules():
        described = describe(module)
        if described is None or not any(part.isdigit() for part in name.split(".")):
            continue
        group = getattr(module, "group", None)  # packed layers that share an input
        members = [module] if group is None else list(group.members)
        if members[0] is not module:
            continue  # listed with the first of its group
        kind, out, inner = described
        if len(members) > 1:
            kind, out = f"{kind}, {len(members)} fused", sum(member.out_features for member in members)
        units.setdefault((kind, out, inner), []).append(tuple(names[id(member)] for member in members))
    return units


def fused_experts(model: nn.Module) -> list[str]:
    """Names of the 3-D weights that hold all experts of a block, packed or not."""
    packed = [name for name, module in model.named_modules() if isinstance(module, PackedExperts)]
    plain = [name for name, p in model.named_parameters() if p.dim() == 3 and not name.endswith(".weight")]
    return packed + [name for name in plain if not name.startswith(tuple(f"{owner}." for owner in packed))]


def describe(module: nn.Module) -> tuple[str, int, int] | None:
    """`(kind, out, in)` of a linear layer, where torch's and transformers' own are `dense`; None for other modules."""
    if isinstance(module, PackedLinear):
        return module.kind, module.out_features, module.in_features
    if isinstance(module, PackedConv1D):
        return module.kind, module.nf, module.nx
    if isinstance(module, nn.Linear):
        return "dense", module.out_features, module.in_features
    if type(module).__name__ == "Conv1D" and isinstance(nf := getattr(module, "nf", None), int):
        return "dense", nf, int(getattr(module, "nx", 0))
    return None


def layer_cases(models: Mapping[str, Any]) -> Iterator[LayerCase]:
    """The layers to time: of each kind and shape the one of median bytes, because ranks differ from layer to layer.

    `models` are one model, or two of which the second is the dense counterpart.
    """
    model, *others = models.values()
    for (kind, out, inner), units in linear_kinds(model).items():
        by_size = sorted(units, key=lambda unit: sum(weight_bytes(model.get_submodule(name)) for name in unit))
        unit = by_size[len(by_size) // 2]
        modules = tuple(model.get_submodule(name) for name in unit)
        against = _same_layers(others[0], unit, modules) if others else ()
        name = " + ".join([unit[0], *(name.rpartition(".")[2] for name in unit[1:])])
        for tokens in LAYER_TOKENS:
            yield LayerCase(kind, (out, inner), name, len(units), modules, against, tokens, model.dtype)


def _same_layers(model: nn.Module, unit: Unit, modules: Sequence[nn.Module]) -> tuple[nn.Module, ...]:
    """The layers of these names in another model, or none if one is missing or of another shape."""
    by_name = dict(model.named_modules())
    same = [by_name[name] for name in unit if name in by_name]
    shapes = [[described[1:] for m in layers if (described := describe(m))] for layers in (same, modules)]
    return tuple(same) if shapes[0] == shapes[1] else ()


def time_layers(
    cases: Iterable[LayerCase], repeats: int, seed: int, device: torch.device, step: Callable[[], None]
) -> list[LayerSpeed]:
    """One entry for each kind and shape, with a timing for each number of tokens; `step` is called after each timing."""
    rows: dict[tuple[str, tuple[int, int]], LayerSpeed] = {}
    for case in cases:
        empty: LayerSpeed = {
            "kind": case.kind,
            "out": case.shape[0],
            "in": case.shape[1],
            "count": case.count,
            "layer": case.name,
            "bytes": sum(weight_bytes(module) for module in case.modules),
            "against": _baseline(case),
            "timings": [],
        }
        row = rows.setdefault((case.kind, case.shape), empty)
        row["timings"].append(_time_layer(case, repeats, seed, device))
        step()
    return list(rows.values())


def _baseline(case: LayerCase) -> str | None:
    """What the layer is compared with, in words."""
    if case.against:
        return "the other model's layer"
    return None if case.kind == "dense" else "torch's product with the unpacked weight"


def _time_layer(case: LayerCase, repeats: int, seed: int, device: torch.device) -> LayerTiming:
    """The times of the layer and of its counterpart, and the error of its output, for random inputs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(case.tokens, case.shape[1], generator=generator).to(device, case.dtype)  # (tokens, in)

    def outputs(layers: Sequence[Callable[[Tensor], Tensor]]) -> list[Tensor]:
        return [layer(x) for layer in layers]

    calls: dict[str, Callable[[], object]] = {"layer": lambda: outputs(case.modules)}
    if case.against:
        calls["against"] = lambda: outputs(case.against)
    elif case.kind != "dense":
        products = [dense_product(module) for module in case.modules]
        calls["against"] = lambda: outputs(products)
    timed = interleaved(calls, device, LAYER_SAMPLES * repeats)
    exact = torch.cat([dense_product(module, torch.float32)(x.float()) for module in case.modules], dim=-1)
    error = relative_error(torch.cat(outputs(case.modules), dim=-1), exact)  # of (tokens, out)
    return {
        "tokens": case.tokens,
        "seconds": spread(timed["layer"]),
        "against_seconds": spread(timed["against"]) if "against" in timed else None,
        "ratio": timed["against"].median / timed["layer"].median if "against" in timed else None,
        "graph": timed["layer"].graph,
        "relative_error": error,
    }


def dense_product(module: nn.Module, dtype: torch.dtype | None = None) -> Callable[[Tensor], Tensor]:
    """torch's product with the module's weight and bias, in `dtype` or their own. A packed weight is unpacked once, here."""
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    if not isinstance(module, PackedLinear | nn.Linear):
        weight = weight.t().contiguous()  # of a Conv1D, which stores (in, out)
    unpacked = weight.detach().to(dtype)  # (out, in)
    added = bias.detach().to(dtype) if isinstance(bias, Tensor) else None  # (out,)
    return lambda x: F.linear(x, unpacked, added)
