"""How fast a model's linear layers run: one of each kind and shape in its blocks, against its dense counterpart."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paredown.compress.storage.modules import PackedConv1D, PackedExperts, PackedLinear
from paredown.evaluation.gauges import relative_error, spread, weight_bytes
from paredown.kernels.timing import interleaved

LAYER_TOKENS = (1, 8, 32, 512)
LAYER_SAMPLES = 4  # of a layer, for each repeat end to end: it is that much cheaper


@dataclass(frozen=True)
class LayerCase:
    """A linear layer, or several that the model multiplies as one; their dense counterparts; for how many tokens."""

    kind: str
    shape: tuple[int, int]  # (out, in), of several the sum of their outputs
    name: str  # of the one that stands for all of its kind and shape
    count: int
    modules: tuple[nn.Module, ...]
    against: tuple[nn.Module, ...]  # the other model's layers; if empty, their own weights unpacked
    tokens: int
    dtype: torch.dtype


Unit = tuple[str, ...]  # names of the linear layers that are one product: mostly one


def linear_kinds(model: nn.Module) -> dict[tuple[str, int, int], list[Unit]]:
    """The linear layers of the blocks by `(kind, out, in)`. What stands in no numbered block is left out."""
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[tuple[str, int, int], list[Unit]] = {}
    for name, module in model.named_modules():
        described = describe(module)
        if described is None or not any(part.isdigit() for part in name.split(".")):
            continue
        group = getattr(module, "group", None)  # packed layers that share an input, see compress/fusing.py
        members = [module] if group is None else list(group.members)
        if members[0] is not module:
            continue  # told of with the first of its group
        kind, out, inner = described
        if len(members) > 1:
            kind, out = f"{kind}, {len(members)} fused", sum(member.out_features for member in members)
        found.setdefault((kind, out, inner), []).append(tuple(names[id(member)] for member in members))
    return found


def fused_experts(model: nn.Module) -> list[str]:
    """Names of the 3-D weights that hold all experts of a block, packed or not."""
    packed = [name for name, module in model.named_modules() if isinstance(module, PackedExperts)]
    plain = [name for name, p in model.named_parameters() if p.dim() == 3 and not name.endswith(".weight")]
    return packed + [name for name in plain if not name.startswith(tuple(f"{owner}." for owner in packed))]


def describe(module: nn.Module) -> tuple[str, int, int] | None:
    """`(kind, out, in)` of a linear layer, `dense` for one of torch's or transformers' own; None for anything else."""
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
    """The one of middle size stands for its kind: ranks differ from layer to layer."""
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
    named = dict(model.named_modules())
    found = [named[name] for name in unit if name in named]
    shapes = [[described[1:] for m in of if (described := describe(m))] for of in (found, modules)]
    return tuple(found) if shapes[0] == shapes[1] else ()


def time_layers(
    cases: Iterable[LayerCase], repeats: int, seed: int, device: torch.device, step: Callable[[], None]
) -> list[dict[str, Any]]:
    """The timings of one kind and shape under one head."""
    rows: dict[tuple[str, tuple[int, int]], dict[str, Any]] = {}
    for case in cases:
        head = {
            "kind": case.kind,
            "out": case.shape[0],
            "in": case.shape[1],
            "count": case.count,
            "layer": case.name,
            "bytes": sum(weight_bytes(module) for module in case.modules),
            "against": _baseline(case),
            "timings": [],
        }
        row = rows.setdefault((case.kind, case.shape), head)
        row["timings"].append(_time_layer(case, repeats, seed, device))
        step()
    return list(rows.values())


def _baseline(case: LayerCase) -> str | None:
    """What the layer is held against."""
    if case.against:
        return "the other model's layer"
    return None if case.kind == "dense" else "torch's product with the unpacked weight"


def _time_layer(case: LayerCase, repeats: int, seed: int, device: torch.device) -> dict[str, Any]:
    """Its time, that of what it is held against, and how far its outputs for random inputs are from float32 ones."""
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
    wanted = torch.cat([dense_product(module, torch.float32)(x.float()) for module in case.modules], dim=-1)
    error = relative_error(torch.cat(outputs(case.modules), dim=-1), wanted)
    return {
        "tokens": case.tokens,
        "seconds": spread(timed["layer"]),
        "against_seconds": spread(timed["against"]) if "against" in timed else None,
        "ratio": timed["against"].median / timed["layer"].median if "against" in timed else None,
        "graph": timed["layer"].graph,
        "relative_error": error,
    }


def dense_product(module: nn.Module, dtype: torch.dtype | None = None) -> Callable[[Tensor], Tensor]:
    """torch's product with the module's weight, which is unpacked once."""
    held, added = module.weight, module.bias
    assert isinstance(held, Tensor)
    if not isinstance(module, PackedLinear | nn.Linear):
        held = held.t().contiguous()  # of a Conv1D
    weight = held.detach().to(dtype)  # (out, in)
    bias = added.detach().to(dtype) if isinstance(added, Tensor) else None  # (out,)
    return lambda x: F.linear(x, weight, bias)
