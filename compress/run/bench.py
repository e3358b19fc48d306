"""Load one model, or a model and its dense original, and measure how fast they run."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from paredown.compress.checkpoint import transformers_plugin
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.machine import resident_memory
from paredown.compress.progress import logger
from paredown.compress.run.open import max_length, open_source
from paredown.compress.storage.fuse import fuse
from paredown.evaluation.decoding import cache_bytes
from paredown.evaluation.gauges import free_memory
from paredown.evaluation.schema import BenchResult
from paredown.evaluation.speed import Settings, measure
from paredown.evaluation.speed_plot import bench_svg
from paredown.evaluation.speed_report import bench_markdown
from paredown.evaluation.surroundings import surroundings

SCHEMA = 1


def bench(
    model: str | Path,
    against: str | Path | None = None,
    *,
    settings: Settings | None = None,
    out: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    note: Callable[[str], None] = logger.info,
) -> BenchResult:
    """How fast a checkpoint prefills and decodes, and each kind of its layers; with `against`, its dense original too.

    `settings`: batch sizes, numbers of tokens and of repeats. If `out` is given, bench.json, bench.md and bench.svg are
    written there. `progress` is called with (steps done, steps).

    Raises PareError, if possible before weights are read: no checkpoint, different vocabularies, too little memory.
    """
    settings, out = settings or Settings(), None if out is None else Path(out)
    sources = {"model": open_source(str(model), revision, device, dtype)}
    if against is not None:
        # in the same dtype: only the storage of the weights is compared
        stored = str(sources["model"].dtype).removeprefix("torch.")
        sources["against"] = open_source(str(against), None, device, stored)
        _check_vocabularies(sources)
    settings, notes = settings.within(min(map(max_length, sources.values())))
    _check_memory(sources)
    if out is not None:
        _make_folder(out)
    for text in notes:
        note(text)
    models, growth = {}, {}
    for name, source in sources.items():
        note(f"loading {source.id}")
        models[name], growth[name] = _load(source)
    measured = measure(models, settings, progress, note, growth)
    measured["notes"][:0] = notes
    for name, memory in measured["memory"].items():
        memory["growth_bytes"] = growth[name]
    result: BenchResult = {
        "schema": SCHEMA,
        "model": str(model),
        "against": None if against is None else str(against),
        "dtype": str(sources["model"].dtype).removeprefix("torch."),
        **surroundings(sources["model"].device),
        **measured,
    }
    if out is not None:
        _write(result, out)
    return result


def _write(result: BenchResult, out: Path) -> None:
    (out / "bench.json").write_text(json.dumps(result, indent=2) + "\n")
    (out / "bench.md").write_text(bench_markdown(result))
    (out / "bench.svg").write_text(bench_svg(result))


def parse_batches(text: str) -> tuple[int, ...]:
    """The batch sizes in a text such as `1,8,32`. Raises PareError for anything but whole numbers."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as fault:
        raise PareError(f"--batch {text!r}: wanted whole numbers separated by commas, such as 1,8,32.") from fault


def _check_vocabularies(sources: dict[str, ModelSource]) -> None:
    """Raises PareError if the two models cannot be versions of one."""
    ours, theirs = (source.config.get_text_config().vocab_size for source in sources.values())
    if ours != theirs:
        raise PareError(
            f"{sources['model'].id} has a vocabulary of {ours} tokens and {sources['against'].id} one of {theirs}: they "
            "are not versions of one model, and the time of their output layers differs. Name the original of DIR, or "
            "leave --against out."
        )


def _check_memory(sources: dict[str, ModelSource]) -> None:
    """Raises PareError if the models do not fit into memory together: they are timed in turn."""
    first = sources["model"]
    free = free_memory(first.device)
    sizes = {name: sum(entry.bytes for entry in source.files.entries.values()) for name, source in sources.items()}
    if free is None or sum(sizes.values()) <= free:
        return
    available = f"{free / 1e9:.1f} GB of memory are free on {first.device.type}, and "
    if sizes["model"] > free:
        raise PareError(f"{available}{first.id} alone takes {sizes['model'] / 1e9:.1f} GB. Use another --device.")
    raise PareError(
        f"{available}both models take {sum(sizes.values()) / 1e9:.1f} GB: they cannot be timed in turn, as a fair comparison "
        f"needs. Use another --device, or leave --against out: {first.id} alone fits, and its packed layers are then "
        "held against their unpacked weights."
    )


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise PareError(f"{out}: no folder can be made there ({fault.strerror}). Name another with -o.") from fault


def _load(source: ModelSource) -> tuple[Any, int]:
    """The model on its device, and how many bytes of memory loading it and running it once took there."""
    before = _held(source.device)
    with _no_second_bar():
        model = transformers_plugin.load(source.folder, dtype=source.dtype).to(source.device).eval()
    if source.device.type == "cuda":
        fuse(model)
    with torch.no_grad():
        cache_bytes(model, 1 << 3)  # runs the model once: mapped weights and what is derived from them get into memory
    return model, max(0, _held(source.device) - before)


def _held(device: torch.device) -> int:
    """Bytes of memory that this process holds on a device."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_memory()


@contextmanager
def _no_second_bar() -> Iterator[None]:
    """Hide transformers' own progress bar, which would be drawn into ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
