"""How fast one or two models run.

End to end, on random tokens. Prefill is one forward over `batch` x `context` tokens into an empty static cache; decoding
continues with one forward for each further token, also random. Both are measured as wall time; in each repeat the models
take turns. On CUDA a decoding step is captured into a CUDA graph, if this works for all models, else for none; prefill is
always launched from Python. Before anything is timed it is run once, and the first and the last decoded logits are compared
with those of a forward without a cache.

Layer by layer: one of each kind and shape among the linear layers of the blocks, against its dense counterpart.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from paredown.compress.errors import PareError
from paredown.evaluation.decoding import TOLERANCE, Decoding, cache_bytes, compare, graphs_or_eager, largest
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
from paredown.evaluation.schema import BatchSpeed, LogitError, Measurement, PhaseSpeed, SpeedSettings
from paredown.kernels.timing import WARM_UP, Timing, in_turn

LEAST = WARM_UP + 1  # tokens to decode, because the warm-up of a CUDA graph decodes WARM_UP

Progress = Callable[[int, int], None]
Note = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """Sizes of a measurement. Raises PareError for sizes below 1, and for fewer than `LEAST` tokens to decode."""

    batches: tuple[int, ...] = (1, 8, 32)  # sequences at once
    context: int = 512  # tokens of each sequence
    decode: int = 64  # tokens of each sequence
    repeats: int = 5
    seed: int = 0  # of the random tokens

    def __post_init__(self) -> None:
        wrong = [f"batch {n}" for n in self.batches if n < 1]
        wrong += [f"{name} {n}" for name, n in (("context", self.context), ("repeats", self.repeats)) if n < 1]
        if wrong or not self.batches:
            raise PareError(f"sizes must be at least 1: {', '.join(wrong) or 'no batch is named'}.")
        if self.decode < LEAST:
            raise PareError(f"decode {self.decode}: at least {LEAST} tokens are needed.")

    def within(self, longest: int) -> "tuple[Settings, list[str]]":
        """The settings capped to models that allow `longest` tokens, and a note about each change.

        Raises PareError if `longest` is too short for any measurement.
        """
        if longest <= LEAST:
            raise PareError(
                f"the model allows {longest} tokens; more than {LEAST} are needed to time prefill and decode."
            )
        decode = min(self.decode, max(LEAST, longest // 2))
        context = min(self.context, longest - decode)
        notes = [
            f"{name} is {used} tokens, not {asked}: the model allows {longest}"
            for name, asked, used in (("decode", self.decode, decode), ("context", self.context, context))
            if used != asked
        ]
        return replace(self, context=context, decode=decode), notes


@dataclass
class Log:
    """Reports progress and notes while something is measured, and collects the notes."""

    progress: Progress
    note: Note
    total: int
    done: int = 0
    notes: list[str] = field(default_factory=list)

    def step(self) -> None:
        self.done += 1
        self.progress(self.done, self.total)

    def add_note(self, text: str) -> None:
        self.notes.append(text)
        self.note(text)


def measure(
    models: Mapping[str, Any],
    settings: Settings,
    progress: Progress = lambda done, total: None,
    note: Note = lambda text: None,
    held: Mapping[str, int] | None = None,
    free: int | None = None,
) -> Measurement:
    """Measure one or two models on one device: `model`, and `against`, the model it is compared with.

    `progress(done, total)` counts steps, `note` takes remarks. `held` are the bytes that each model takes on a GPU, if
    known to be more than its weights. `free` are the bytes that may be allocated beside the models; None: all that are free.

    Raises PareError if a model's logits are not finite, or if no batch size fits into memory.
    """
    device = device_of(next(iter(models.values())))
    weights = {name: weight_bytes(model) for name, model in models.items()}
    cases = list(layer_cases(models))
    batches = sorted(set(settings.batches))
    log = Log(progress, note, len(batches) * len(models) * (1 + settings.repeats) + len(cases))
    if experts := fused_experts(next(iter(models.values()))):
        log.add_note(
            f"{len(experts)} fused parameters such as {experts[0]} are no linear layers: timed end to end only"
        )
    with torch.no_grad():
        progress(0, log.total)
        caches = {name: cache_bytes(model, settings.context + settings.decode) for name, model in models.items()}
        sequence = sum(caches.values()) + max(activation_bytes(model, settings.context) for model in models.values())
        rows = [row for batch in batches if (row := _race_if_it_fits(models, settings, batch, sequence, free, log))]
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
        "settings": cast(SpeedSettings, {**asdict(settings), "batches": batches}),
        "memory": {n: {"weights_bytes": weights[n], "cache_bytes_per_sequence": caches[n]} for n in models},
        "end_to_end": cast(list[BatchSpeed], rows),
        "layers": layers,
        "notes": log.notes,
    }


def _race_if_it_fits(
    models: Mapping[str, Any], settings: Settings, batch: int, sequence: int, free: int | None, log: Log
) -> dict[str, Any] | None:
    """`_race` on one batch size, or None and a note if memory is too small; `sequence` are the bytes that one takes."""
    needed = batch * sequence
    free = free_memory(device_of(next(iter(models.values())))) if free is None else free
    left_out = f"batch {batch} with {settings.context} tokens of context is left out: "
    if free is not None and needed > free:
        log.add_note(left_out + f"it needs about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")
        return None
    try:
        return _race(models, settings, random_ids(models, batch, settings), log)
    except torch.OutOfMemoryError:
        log.add_note(left_out + "it does not fit into the GPU's memory")
    torch.cuda.empty_cache()
    return None


def random_ids(models: Mapping[str, Any], batch: int, settings: Settings) -> Tensor:
    """(batch, context + decode) tokens that are in every model's vocabulary."""
    vocabulary = min(int(model.config.get_text_config().vocab_size) for model in models.values())
    generator = torch.Generator().manual_seed(settings.seed)
    ids = torch.randint(vocabulary, (batch, settings.context + settings.decode), generator=generator)
    return ids.to(device_of(next(iter(models.values()))))


def _race(models: Mapping[str, Any], settings: Settings, ids: Tensor, log: Log) -> dict[str, Any]:
    """Every model over ids (batch, context + decode), checked first and then timed: a `BatchSpeed`."""
    batch = len(ids)
    peaks: dict[str, int | None] = {}
    errors: dict[str, LogitError] = {}
    runs: dict[str, Decoding] = {}
    for name, model in models.items():
        with Peak(ids.device) as peak:
            runs[name] = Decoding(model, ids, settings.context)
            decoded = runs[name].run_once()
        peaks[name] = peak.bytes
        errors[name] = compare(decoded, runs[name].plain(), name)
        log.step()
    graph = ids.is_cuda
    if graph and (reason := graphs_or_eager(runs, errors)):
        graph = False
        log.add_note(f"batch {batch}: decoding is timed without CUDA graphs, for every model alike: {reason}")
    for name, error in errors.items():
        if largest(error) > TOLERANCE:
            log.add_note(
                f"batch {batch}, {name}: decoded logits are {largest(error):.1%} away from those of a plain forward. "
                "This can be right where rounding decides which experts are chosen; otherwise it is a fault"
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
    """Seconds of each prefill and of each decoding; the runs take turns."""
    seconds: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in runs}
    for repeat in range(repeats):
        for name in in_turn(runs, repeat):
            run = runs[name]
            run.start()
            seconds[name]["prefill"].append(wall_seconds(run.prefill, run.ids.device))
            seconds[name]["decode"].append(wall_seconds(run.decode, run.ids.device))
            log.step()
    return seconds


def _rates(seconds: Sequence[float], tokens: int) -> PhaseSpeed:
    per_second = [tokens / spent for spent in seconds]
    return {"seconds": spread(Timing.of(seconds)), "tokens_per_second": spread(Timing.of(per_second))}


def _ratios(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, float] | None:
    """Median time of the second model over that of the first."""
    if len(names) < 2:
        return None
    ours, theirs = row[names[0]], row[names[1]]
    return {
        phase: theirs[phase]["seconds"]["median"] / ours[phase]["seconds"]["median"] for phase in ("prefill", "decode")
    }
