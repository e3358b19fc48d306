"""How fast a model runs, beside another or alone: models in, numbers out.

End to end, on random tokens: prefill is one forward over `batch` x `context` tokens into an empty static cache, and
decode one forward a token from there, fed with further random tokens. Both are wall time, of every model in turn within
each repeat. On CUDA one step of decoding is a CUDA graph, if that can be had for every model, and else none is; prefill
is launched from Python. Before anything is timed, what is timed is run once, and the first and the last logits it
decodes are compared with those of one plain forward.

Layer by layer: one of each kind and shape among the linear layers of the blocks, against its dense counterpart.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from paredown.compress.errors import PareError
from paredown.evaluation.decoding import TOLERANCE, Decoding, cache_bytes, compare, graphs_or_eager
from paredown.evaluation.energy import EnergyMeter, joules_per_token
from paredown.evaluation.gauges import (
    Peak,
    activation_bytes,
    device_of,
    free_memory,
    spread,
    wall_seconds,
    weight_bytes,
)
from paredown.evaluation.layer_speed import fused_experts, layer_cases, time_layers
from paredown.kernels.timing import WARM_UP, Timing, in_turn

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


@dataclass
class Log:
    """What is told while something is measured: how many steps of all are done, and notes."""

    progress: Progress
    note: Note
    total: int
    done: int = 0
    notes: list[str] = field(default_factory=list)

    def step(self) -> None:
        self.done += 1
        self.progress(self.done, self.total)

    def tell(self, text: str) -> None:
        self.notes.append(text)
        self.note(text)


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
    weights = {name: weight_bytes(model) for name, model in models.items()}
    cases = list(layer_cases(models))
    batches = sorted(set(settings.batches))
    log = Log(progress, note, len(batches) * len(models) * (1 + settings.repeats) + len(cases))
    if experts := fused_experts(next(iter(models.values()))):
        log.tell(f"{len(experts)} fused parameters such as {experts[0]} are no linear layers: timed end to end only")
    with torch.no_grad():
        progress(0, log.total)
        caches = {name: cache_bytes(model, settings.context + settings.decode) for name, model in models.items()}
        sequence = sum(caches.values()) + max(activation_bytes(model, settings.context) for model in models.values())
        rows = [row for batch in batches if (row := _race_if_it_fits(models, settings, batch, sequence, log))]
        if not rows:
            raise PareError(
                f"not even batch {batches[0]} with {settings.context} tokens of context fits into memory. "
                "Ask for less with --batch 1 --context 128, or use another --device."
            )
        layers = time_layers(cases, settings.repeats, settings.seed, device, log.step)
    for row in rows:
        for name in models:
            if row[name]["peak_bytes"] is not None:
                row[name]["peak_bytes"] += (held or {}).get(name) or weights[name]
    return {
        "settings": {**asdict(settings), "batches": batches},
        "memory": {n: {"weights_bytes": weights[n], "cache_bytes_per_sequence": caches[n]} for n in models},
        "end_to_end": rows,
        "layers": layers,
        "notes": log.notes,
    }


def _race_if_it_fits(
    models: Mapping[str, Any], settings: Settings, batch: int, sequence: int, log: Log
) -> dict[str, Any] | None:
    """One row of the result, or None and a note where memory does not suffice; `sequence`: bytes that each one takes."""
    needed, free = batch * sequence, free_memory(device_of(next(iter(models.values()))))
    told = f"batch {batch} with {settings.context} tokens of context is left out: "
    if free is not None and needed > free:
        log.tell(told + f"it needs about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")
        return None
    try:
        return _race(models, settings, random_ids(models, batch, settings), log)
    except torch.OutOfMemoryError:
        log.tell(told + "it does not fit into the GPU's memory")
    torch.cuda.empty_cache()
    return None


def random_ids(models: Mapping[str, Any], batch: int, settings: Settings) -> Tensor:
    """(batch, context + decode) tokens that every model knows."""
    known = min(int(model.config.get_text_config().vocab_size) for model in models.values())
    generator = torch.Generator().manual_seed(settings.seed)
    ids = torch.randint(known, (batch, settings.context + settings.decode), generator=generator)
    return ids.to(device_of(next(iter(models.values()))))


def _race(models: Mapping[str, Any], settings: Settings, ids: Tensor, log: Log) -> dict[str, Any]:
    """One row: every model over ids (batch, context + decode), checked first and then timed."""
    batch = len(ids)
    peaks: dict[str, int | None] = {}
    errors: dict[str, dict[str, float]] = {}
    runs: dict[str, Decoding] = {}
    for name, model in models.items():
        with Peak(ids.device) as peak:
            runs[name] = Decoding(model, ids, settings.context)
            decoded = runs[name].run_once()
        peaks[name] = peak.bytes
        errors[name] = compare(decoded, runs[name].plain(), name)
        log.step()
    graph = ids.is_cuda
    if graph and (why := graphs_or_eager(runs, errors)):
        graph = False
        log.tell(f"batch {batch}: decoding is timed without CUDA graphs, for every model alike: {why}")
    for name, error in errors.items():
        if max(error.values()) > TOLERANCE:
            log.tell(
                f"batch {batch}, {name}: decoded logits are {max(error.values()):.1%} away from those of a plain "
                "forward. Where rounding decides (experts that are chosen by a hair) this can be right; else it is not"
            )
    seconds = _timed(runs, settings.repeats, log)
    meter = EnergyMeter.of(ids.device)
    row: dict[str, Any] = {"batch": batch, "context": settings.context, "decode": settings.decode}
    row["decode_mode"] = "cuda graph" if graph else "eager"
    for name, run in runs.items():
        row[name] = {
            "prefill": _rates(seconds[name]["prefill"], batch * settings.context),
            "decode": _rates(seconds[name]["decode"], batch * settings.decode),
            "joules_per_token": joules_per_token(run, meter),
            "peak_bytes": peaks[name],
            "relative_error": errors[name],
        }
    row["ratio"] = _ratios(row, list(runs))
    return row


def _timed(runs: Mapping[str, Decoding], repeats: int, log: Log) -> dict[str, dict[str, list[float]]]:
    """Seconds of each prefill and each decoding, the runs in turn."""
    seconds: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in runs}
    for repeat in range(repeats):
        for name in in_turn(runs, repeat):
            run = runs[name]
            run.start()
            seconds[name]["prefill"].append(wall_seconds(run.prefill, run.ids.device))
            seconds[name]["decode"].append(wall_seconds(run.decode, run.ids.device))
            log.step()
    return seconds


def _rates(seconds: Sequence[float], tokens: int) -> dict[str, Any]:
    per_second = [tokens / taken for taken in seconds]
    return {"seconds": spread(Timing.of(seconds)), "tokens_per_second": spread(Timing.of(per_second))}


def _ratios(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, float] | None:
    if len(names) < 2:
        return None
    ours, theirs = row[names[0]], row[names[1]]
    return {
        phase: theirs[phase]["seconds"]["median"] / ours[phase]["seconds"]["median"] for phase in ("prefill", "decode")
    }
