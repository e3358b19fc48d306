"""How fast a model runs, beside another or alone: models in, numbers out.

End to end, on random tokens: prefill is one forward over `batch` x `context` tokens into an empty static cache, and
decode one forward a token from there, fed with further random tokens. Both are wall time, of every model in turn within
each repeat. On CUDA one step of decoding is a CUDA graph, if that can be had for every model, and else none is; prefill
is launched from Python. Before anything is timed, what is timed is run once, and the first and the last logits it
decodes are compared with those of one plain forward.

Layer by layer: one of each kind and shape among the linear layers of the blocks, against its dense counterpart.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paredown.compress.errors import PareError
from paredown.compress.machine import available_memory
from paredown.compress.packed import PackedConv1D, PackedExperts, PackedLinear
from paredown.kernels.timing import WARM_UP, Timing, captured, in_turn, interleaved

LAYER_TOKENS = (1, 8, 32, 512)
LAYER_SAMPLES = 4  # of a layer, for each repeat end to end: it is that much cheaper
TOLERANCE = 0.05  # relative error of decoded logits that rounding explains; 16-bit models are near 0.01
ENERGY_SECONDS = 2.0  # the driver's counter moves some ten times a second
LEAST = WARM_UP + 1  # tokens to decode: a graph's warm-up decodes some, too

Progress = Callable[[int, int], None]
Note = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """Sizes of a measurement, in sequences and in tokens of each."""

    batches: tuple[int, ...] = (1, 8, 32)
    context: int = 512
    decode: int = 64
    repeats: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = [f"batch {n}" for n in self.batches if n < 1]
        wrong += [f"{name} {n}" for name, n in (("context", self.context), ("repeats", self.repeats)) if n < 1]
        if wrong or not self.batches:
            raise PareError(f"sizes must be at least 1: {', '.join(wrong) or 'no batch is named'}.")
        if self.decode < LEAST:
            raise PareError(f"decode {self.decode}: at least {LEAST} tokens are needed.")

    def within(self, longest: int) -> "tuple[Settings, list[str]]":
        """The same for models that allow `longest` tokens, and what had to be changed."""
        if longest <= LEAST:
            raise PareError(
                f"the model allows {longest} tokens; more than {LEAST} are needed to time prefill and decode."
            )
        decode = min(self.decode, max(LEAST, longest // 2))
        context = min(self.context, longest - decode)
        told = [
            f"{name} is {used} tokens, not {asked}: the model allows {longest}"
            for name, asked, used in (("decode", self.decode, decode), ("context", self.context, context))
            if used != asked
        ]
        return replace(self, context=context, decode=decode), told


def measure(
    models: Mapping[str, Any],
    settings: Settings,
    progress: Progress = lambda done, total: None,
    note: Note = lambda text: None,
    held: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """`{settings, memory, end_to_end, layers, notes}` of one or two models on one device, by the names they are given.

    `held` are the bytes that each takes on a GPU, where that is known to be more than its weights.

    The first model is the one in question and the second the one it is held against. Seconds carry `median`, `low` and
    `high`; `ratio` is the second model's median time over the first's, so that above 1 the first is faster.
    Raises PareError if a model's logits are not finite or not one batch fits into memory.
    """
    device = device_of(next(iter(models.values())))
    notes: list[str] = []

    def tell(text: str) -> None:
        notes.append(text)
        note(text)

    cases = list(_layer_cases(models))
    if experts := fused_experts(next(iter(models.values()))):
        tell(f"{len(experts)} fused parameters such as {experts[0]} are no linear layers: timed end to end only")
    batches = sorted(set(settings.batches))
    total = len(batches) * len(models) * (1 + settings.repeats) + len(cases)
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    with torch.no_grad():
        progress(0, total)
        caches = {name: cache_bytes(model, settings.context + settings.decode) for name, model in models.items()}
        rows = []
        for batch in batches:
            row = _race_if_it_fits(models, settings, batch, caches, device, tick, tell)
            if row is not None:
                for name, model in models.items():
                    if row[name]["peak_bytes"] is not None:
                        row[name]["peak_bytes"] += (held or {}).get(name) or weight_bytes(model)
                rows.append(row)
        if not rows:
            raise PareError(
                f"not even batch {batches[0]} with {settings.context} tokens of context fits into memory. "
                "Ask for less with --batch 1 --context 128, or use another --device."
            )
        layers = [_time_layer(case, settings, device, tick) for case in cases]
    return {
        "settings": {**asdict(settings), "batches": batches},
        "memory": {
            name: {"weights_bytes": weight_bytes(model), "cache_bytes_per_sequence": caches[name]}
            for name, model in models.items()
        },
        "end_to_end": rows,
        "layers": _grouped(layers),
        "notes": notes,
    }


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, what is shared counted once."""
    tensors = {(t.device, t.data_ptr(), t.numel()): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


class Decoding:
    """One model over one text: a prefill, then one token at a time out of the rest of the text.

    ids (batch, context + steps). `step` keeps its logits (batch, 1, vocabulary) in `logits`.
    """

    def __init__(self, model: Any, ids: Tensor, context: int) -> None:
        self.model, self.ids, self.context = model, ids, context
        self.steps = ids.shape[1] - context
        self.cache = static_cache(model, ids.shape[1])
        self.position = torch.zeros(1, dtype=torch.long, device=ids.device)  # of the token that is fed next
        self.logits = torch.empty(0)
        self._takes = inspect.signature(model.forward).parameters
        self._launch: Callable[[], object] = self.step

    def start(self) -> None:
        self.cache.reset()
        self.position.fill_(self.context)

    def prefill(self) -> None:
        self.logits = self._forward(self.ids[:, : self.context], **self._given(logits_to_keep=1))

    def step(self) -> None:
        token = self.ids.index_select(1, self.position)  # (batch, 1)
        # named, because a sliding window counts in Python, where a graph would freeze it
        self.logits = self._forward(token, **self._given(position_ids=self.position[None]))  # (batch, 1, vocabulary)
        self.position.add_(1)

    def decode(self) -> None:
        for _ in range(self.steps):
            self._launch()

    def use_graph(self, graph: torch.cuda.CUDAGraph) -> None:
        self._launch = graph.replay

    def run_once(self) -> Tensor:
        """Everything as it is timed; the logits of the first and of the last step (batch, 2, vocabulary)."""
        self.start()
        self.prefill()
        self._launch()
        first = self.logits[:, -1].clone()
        for _ in range(self.steps - 1):
            self._launch()
        return torch.stack((first, self.logits[:, -1]), dim=1)

    def plain(self) -> Tensor:
        """What `run_once` should return, by one forward over the whole text without a cache."""
        places = torch.tensor([self.context, self.ids.shape[1] - 1], device=self.ids.device)
        given = self._given(logits_to_keep=places)
        logits: Tensor = self.model(self.ids, use_cache=False, **given).logits
        return logits if given else logits[:, places]

    @property
    def rewindable(self) -> bool:
        """Whether the cache can go back to the end of the prefill by forgetting: no window, no recurrent state."""
        from transformers.cache_utils import StaticLayer

        return all(type(layer) is StaticLayer for layer in self.cache.layers)

    def rewind(self) -> None:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.context)
        self.position.fill_(self.context)

    def _forward(self, ids: Tensor, **given: Any) -> Tensor:
        cache = "past_key_values" if "past_key_values" in self._takes else "cache_params"  # Mamba's name for it
        logits: Tensor = self.model(ids, use_cache=True, **{cache: self.cache}, **given).logits
        return logits

    def _given(self, **options: Any) -> dict[str, Any]:
        """Of these options the ones that the model's forward knows."""
        return {name: value for name, value in options.items() if name in self._takes}


def static_cache(model: Any, length: int) -> Any:
    """transformers' StaticCache for `length` tokens. A window as long as that is plain attention, and made so."""
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

    cache = StaticCache(config=model.config, max_cache_len=length)
    for index, layer in enumerate(cache.layers):
        if type(layer) is StaticSlidingWindowLayer and layer.max_cache_len == length:
            cache.layers[index] = StaticLayer(length)  # which counts on the device: a graph can hold it
    return cache


def cache_bytes(model: Any, length: int) -> int:
    """Bytes of the cache of one sequence of `length` tokens, counted on a real one."""
    run = Decoding(model, torch.zeros(1, length, dtype=torch.long, device=device_of(model)), 2)
    run.start()
    try:
        run.prefill()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as fault:
        model(run.ids[:, :2], use_cache=False)  # if this fails as well, it is not the cache's fault
        raise PareError(
            f"{type(model).__name__} cannot run with a static cache in this version of transformers "
            f"({type(fault).__name__}: {str(fault).splitlines()[0] if str(fault) else ''}). Upgrade transformers."
        ) from fault
    return sum(t.numel() * t.element_size() for layer in run.cache.layers for t in _tensors(vars(layer)))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


# ---- end to end


def _race_if_it_fits(
    models: Mapping[str, Any],
    settings: Settings,
    batch: int,
    caches: Mapping[str, int],
    device: torch.device,
    tick: Callable[[], None],
    tell: Note,
) -> dict[str, Any] | None:
    """One row of the result, or None and a note where memory does not suffice."""
    needed = batch * (sum(caches.values()) + max(_activation_bytes(m, settings.context) for m in models.values()))
    free = free_memory(device)
    told = f"batch {batch} with {settings.context} tokens of context is left out: "
    if free is not None and needed > free:
        tell(told + f"it needs about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")
    else:
        try:
            return _race(models, settings, batch, device, tick, tell)
        except torch.OutOfMemoryError:
            tell(told + "it does not fit into the GPU's memory")
        torch.cuda.empty_cache()
    return None


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated, or None where the system does not tell."""
    if device.type != "cuda":
        return available_memory()
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + reserved


def _activation_bytes(model: Any, context: int) -> int:
    """About what a forward of one sequence allocates: some copies of the hidden states, and the MLP's inner ones."""
    config = model.config.get_text_config()
    hidden = getattr(config, "hidden_size", 0)
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    return int(context * (6 * hidden + 3 * inner) * model.dtype.itemsize)


def _race(
    models: Mapping[str, Any],
    settings: Settings,
    batch: int,
    device: torch.device,
    tick: Callable[[], None],
    tell: Note,
) -> dict[str, Any]:
    ids = random_ids(models, batch, settings, device)
    peaks: dict[str, int | None] = {}
    errors: dict[str, dict[str, float]] = {}
    runs: dict[str, Decoding] = {}
    for name, model in models.items():
        with _Peak(device) as peak:
            runs[name] = Decoding(model, ids, settings.context)
            decoded = runs[name].run_once()
        peaks[name] = peak.bytes
        errors[name] = _compare(decoded, runs[name].plain(), name)
        tick()
    graph, why = False, None
    if device.type == "cuda":
        with torch.cuda.device(device):
            graph, why = _use_graphs(runs, errors)
        if not graph:
            tell(f"batch {batch}: decoding is timed without CUDA graphs, for every model alike: {why}")
            runs.clear()  # and their caches, before others are made
            for name, model in models.items():
                runs[name] = Decoding(model, ids, settings.context)
                runs[name].run_once()
    for name, error in errors.items():
        if max(error.values()) > TOLERANCE:
            tell(
                f"batch {batch}, {name}: decoded logits are {max(error.values()):.1%} away from those of a plain "
                "forward. Where rounding decides (experts that are chosen by a hair) this can be right; else it is not"
            )
    seconds: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in runs}
    for repeat in range(settings.repeats):
        for name in in_turn(runs, repeat):
            runs[name].start()
            seconds[name]["prefill"].append(_seconds(runs[name].prefill, device))
            seconds[name]["decode"].append(_seconds(runs[name].decode, device))
            tick()
    meter = EnergyMeter.of(device)
    row: dict[str, Any] = {"batch": batch, "context": settings.context, "decode": settings.decode}
    row["decode_mode"] = "cuda graph" if graph else "eager"
    for name, run in runs.items():
        row[name] = {
            "prefill": _rates(seconds[name]["prefill"], batch * settings.context),
            "decode": _rates(seconds[name]["decode"], batch * settings.decode),
            "joules_per_token": _joules_per_token(run, meter, device),
            "peak_bytes": peaks[name],
            "relative_error": errors[name],
        }
    row["ratio"] = _ratios(row, list(runs))
    return row


def random_ids(models: Mapping[str, Any], batch: int, settings: Settings, device: torch.device) -> Tensor:
    """(batch, context + decode) tokens that every model knows."""
    known = min(int(model.config.get_text_config().vocab_size) for model in models.values())
    generator = torch.Generator().manual_seed(settings.seed)
    return torch.randint(known, (batch, settings.context + settings.decode), generator=generator).to(device)


def _use_graphs(runs: Mapping[str, Decoding], errors: dict[str, dict[str, float]]) -> tuple[bool, str | None]:
    """Make every run decode by a graph that is found right; or say why not. `errors` become those of the graphs."""
    for run in runs.values():
        run.start()
        run.prefill()
    graphs = captured({name: run.step for name, run in runs.items()})
    if graphs is None:
        return False, "a step cannot be captured into one"
    for name, run in runs.items():
        run.use_graph(graphs[name])
        error = _compare(run.run_once(), run.plain(), name)
        if max(error.values()) > max(TOLERANCE, 2 * max(errors[name].values())):
            return False, f"the captured step of {name} does not compute what the model computes"
        errors[name] = error
    return True, None


def _compare(decoded: Tensor, wanted: Tensor, name: str) -> dict[str, float]:
    """Relative Frobenius error of the first and the last step's logits (batch, 2, vocabulary)."""
    if not bool(decoded.isfinite().all()) or not bool(wanted.isfinite().all()):
        raise PareError(
            f"{name} computes logits that are NaN or infinite: its speed means nothing. "
            "Check the checkpoint with `paredown verify`, or try --dtype bfloat16 or float32."
        )
    first, last = (_relative_error(decoded[:, i], wanted[:, i]) for i in (0, 1))
    return {"first": first, "last": last}


def _relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm().clamp_min(1e-30))


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Wall time until the device is done."""
    _wait(device)
    began = perf_counter()
    call()
    _wait(device)
    return perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _rates(seconds: Sequence[float], tokens: int) -> dict[str, Any]:
    per_second = [tokens / taken for taken in seconds]
    return {"seconds": _spread(Timing.of(seconds)), "tokens_per_second": _spread(Timing.of(per_second))}


def _spread(timing: Timing) -> dict[str, float]:
    return {"median": timing.median, "low": timing.low, "high": timing.high}


def _ratios(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, float] | None:
    if len(names) < 2:
        return None
    ours, theirs = row[names[0]], row[names[1]]
    return {
        phase: theirs[phase]["seconds"]["median"] / ours[phase]["seconds"]["median"] for phase in ("prefill", "decode")
    }


class _Peak:
    """Bytes allocated above what was allocated before, at their highest; None on a CPU, where nobody counts them."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, None if device.type != "cuda" else 0

    def __enter__(self) -> "_Peak":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self.before


class EnergyMeter:
    """The driver's counter of what the whole board has consumed, idle power included."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self.nvml, self.handle = nvml, handle

    @classmethod
    def of(cls, device: torch.device) -> "EnergyMeter | None":
        """None without pynvml, and where the driver does not tell."""
        if device.type != "cuda":
            return None
        try:
            nvml = import_module("pynvml")
            nvml.nvmlInit()
            # by its name: CUDA_VISIBLE_DEVICES renumbers devices for torch and not for the driver
            name = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            meter = cls(nvml, nvml.nvmlDeviceGetHandleByUUID(name))
            meter.joules()
        except Exception:  # not installed, no driver library, a virtual GPU without a counter
            return None
        return meter

    def joules(self) -> float:
        return float(self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle)) / 1000


def _joules_per_token(run: Decoding, meter: EnergyMeter | None, device: torch.device) -> float | None:
    """Decoded again and again for some seconds: one pass is too short for the counter."""
    if meter is None or not run.rewindable:
        return None
    run.run_once()
    _wait(device)
    passes, spent, began = 0, meter.joules(), perf_counter()
    while not passes or perf_counter() - began < ENERGY_SECONDS:
        run.rewind()
        run.decode()
        _wait(device)
        passes += 1
    return (meter.joules() - spent) / (passes * run.steps * len(run.ids))


# ---- layer by layer


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


def _layer_cases(models: Mapping[str, Any]) -> Iterator[LayerCase]:
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


def _time_layer(
    case: LayerCase, settings: Settings, device: torch.device, tick: Callable[[], None]
) -> tuple[LayerCase, dict[str, Any]]:
    generator = torch.Generator().manual_seed(settings.seed)
    x = torch.randn(case.tokens, case.shape[1], generator=generator).to(device, case.dtype)  # (tokens, in)

    def outputs(layers: Sequence[Callable[[Tensor], Tensor]]) -> list[Tensor]:
        return [layer(x) for layer in layers]

    calls: dict[str, Callable[[], object]] = {"layer": lambda: outputs(case.modules)}
    if case.against:
        calls["against"] = lambda: outputs(case.against)
    elif case.kind != "dense":
        products = [_dense_product(module) for module in case.modules]
        calls["against"] = lambda: outputs(products)
    timed = interleaved(calls, device, LAYER_SAMPLES * settings.repeats)
    wanted = torch.cat([_dense_product(module, torch.float32)(x.float()) for module in case.modules], dim=-1)
    error = _relative_error(torch.cat(outputs(case.modules), dim=-1), wanted)
    tick()
    return case, {
        "tokens": case.tokens,
        "seconds": _spread(timed["layer"]),
        "against_seconds": _spread(timed["against"]) if "against" in timed else None,
        "ratio": timed["against"].median / timed["layer"].median if "against" in timed else None,
        "graph": timed["layer"].graph,
        "relative_error": error,
    }


def _dense_product(module: nn.Module, dtype: torch.dtype | None = None) -> Callable[[Tensor], Tensor]:
    """torch's product with the module's weight, which is unpacked once."""
    held, added = module.weight, module.bias
    assert isinstance(held, Tensor)
    if not isinstance(module, PackedLinear | nn.Linear):
        held = held.t().contiguous()  # of a Conv1D
    weight = held.detach().to(dtype)  # (out, in)
    bias = added.detach().to(dtype) if isinstance(added, Tensor) else None  # (out,)
    return lambda x: F.linear(x, weight, bias)


def _grouped(timed: Sequence[tuple[LayerCase, dict[str, Any]]]) -> list[dict[str, Any]]:
    """The timings of one kind and shape under one head."""
    rows: dict[tuple[str, tuple[int, int]], dict[str, Any]] = {}
    for case, timing in timed:
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
        rows.setdefault((case.kind, case.shape), head)["timings"].append(timing)
    return list(rows.values())


def _baseline(case: LayerCase) -> str | None:
    """What the layer is held against."""
    if case.against:
        return "the other model's layer"
    return None if case.kind == "dense" else "torch's product with the unpacked weight"
