"""What a recovery takes of memory and disk, counted before anything is computed."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.machine import available_memory
from paredown.compress.model.blocks import blocks
from paredown.compress.model.rest import name_of
from paredown.compress.model.stream import batch_bytes, element_size, hidden_bytes, hidden_size
from paredown.compress.recipe import DistillSpec, LoraSpec, ReconstructSpec
from paredown.compress.recovery.distill import MICRO_TOKENS
from paredown.compress.recovery.hidden import layers_of
from paredown.compress.recovery.lora import places
from paredown.compress.recovery.memory import Sizes, device_bytes, host_bytes, saved_bytes
from paredown.compress.recovery.reconstruct import tuning_bytes
from paredown.compress.recovery.targets import target_bytes
from paredown.compress.text.windows import Windows


def trained_numbers(source: ModelSource, embeddings: bool, last: int | None = None) -> int:
    """How many numbers are trained: all floats in the blocks, or in so many of the `last`, vectors outside them, and
    embeddings and head if asked."""
    inside = tuple(block.prefix for block in blocks(source))
    frozen = inside[:-last] if last else ()
    outer = {f"{name_of(source.model, f'get_{kind}_embeddings')}.weight" for kind in ("input", "output")}
    outer |= {source.tied[name] for name in outer if name in source.tied}
    return sum(
        t.numel()
        for name, t in source.parameters.items()
        if t.is_floating_point()
        and not name.startswith(frozen)
        and (embeddings if name in outer else name.startswith(inside) or t.dim() == 1)
    )


def numbers_of(source: ModelSource, spec: ReconstructSpec | DistillSpec) -> int:
    """How many numbers a step trains."""
    if isinstance(spec, LoraSpec):
        return sum(place.numbers(spec.rank) for place in places(source, spec))
    if isinstance(spec, DistillSpec):
        return trained_numbers(source, spec.embeddings, spec.last)
    return trained_numbers(source, False)


def sizes_of(source: ModelSource, numbers: int) -> Sizes:
    """The counts of a checkpoint, of which so many numbers are trained."""
    inside = tuple(block.prefix for block in blocks(source))
    shapes = [tuple(t.shape) for n, t in source.parameters.items() if n.startswith(inside) and t.dim() > 1]
    shapes += [spec.shape for spec in source.modules.values()]
    return Sizes(
        stored=sum(entry.bytes for entry in source.files.entries.values()),
        packed=sum(spec.size for spec in source.modules.values()),
        trained=numbers,
        blocks=len(inside),
        width=hidden_size(source),
        inner=max((max(shape[-2:]) for shape in shapes), default=hidden_size(source)),
        vocabulary=int(source.config.get_text_config().vocab_size),
        element=element_size(source),
    )


def blockwise_bytes(source: ModelSource, text: Windows) -> int:
    """Bytes of memory that tuning block by block takes: the largest block twice, once unpacked, what is trained of it, and
    three hidden states of each token."""
    inside = [block.prefix for block in blocks(source)]
    numbers = max(sum(t.numel() for n, t in source.parameters.items() if n.startswith(own)) for own in inside)
    unpacked = max(sum(spec.size for n, spec in source.modules.items() if n.startswith(own)) for own in inside)
    batch = batch_bytes(source, 4 * hidden_size(source))
    block = 2 * element_size(source) * (numbers + unpacked)
    return block + tuning_bytes(source, numbers, 0) + batch + 3 * hidden_bytes(source, text.tokens)


def check_room(
    source: ModelSource,
    teacher: ModelSource,
    specs: Sequence[ReconstructSpec | DistillSpec],
    texts: Sequence[tuple[Windows, Windows]],
    out: Path,
    note: Callable[[str], None],
) -> None:
    """Say what the steps take. Raises PareError if the disk of `out`, the host's memory or the device's is too small."""
    numbers, needed = 0, _Needed()
    for spec, (text, heldout) in zip(specs, texts, strict=True):
        own = numbers_of(source, spec)
        numbers, sizes = max(numbers, own), sizes_of(source, own)
        if isinstance(spec, DistillSpec):
            passes = max(MICRO_TOKENS[source.device.type], text.length)
            states = len(layers_of(spec.hidden, len(blocks(teacher))))
            targets = target_bytes(text.tokens + heldout.tokens, spec.top_k, states, hidden_size(teacher))
            device = device_bytes(sizes, spec, passes) + (sizes.stored if isinstance(spec, LoraSpec) else 0)
            needed.add(device, host_bytes(sizes, spec), targets, saved_bytes(sizes, spec))
        else:
            needed.add(blockwise_bytes(source, text), 0, 0, element_size(source) * own)
    on_host = source.device.type == "cpu"
    memory = needed.device + needed.host if on_host else needed.device
    disk = needed.targets + needed.state + sum(entry.bytes for entry in source.files.entries.values())
    beside = "" if on_host else f", and {needed.host / 1e9:.1f} GB of the host's"
    note(
        f"training {numbers:,} numbers takes about {memory / 1e9:.1f} GB of memory{beside}; what the teacher says of the "
        f"text takes {needed.targets / 1e9:.2f} GB of the disk, and {disk / 1e9:.1f} GB with all else"
    )
    folder = next(p for p in [out, *out.absolute().parents] if p.exists())
    free = shutil.disk_usage(folder).free
    if free < disk:
        raise PareError(
            f"the disk of {folder} has {free / 1e9:.1f} GB free, and recovery needs {disk / 1e9:.1f} GB: free some, name "
            "another output with -o, or take fewer tokens, a smaller top_k, or no hidden states."
        )
    left = available_memory() if on_host else torch.cuda.mem_get_info(source.device)[0]
    if left is not None and left < memory:
        raise PareError(
            f"{memory / 1e9:.1f} GB of memory are needed and {left / 1e9:.1f} GB are free. Close other programs, or set "
            "checkpointing: true, optimizer: adamw8bit or a shorter length in its distill or lora step, or take fewer "
            "calibration.sequences for reconstruct."
        )


@dataclass
class _Needed:
    """Bytes: the most of any step, and of the targets, which all stay until the end, the sum."""

    device: int = 0
    host: int = 0
    targets: int = 0
    state: int = 0

    def add(self, device: int, host: int, targets: int, state: int) -> None:
        self.device, self.host = max(self.device, device), max(self.host, host)
        self.targets, self.state = self.targets + targets, max(self.state, state)
