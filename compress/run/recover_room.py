"""What a recovery takes of memory and disk, counted before anything is computed."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.machine import available_memory
from paredown.compress.model.blocks import blocks
from paredown.compress.model.rest import name_of
from paredown.compress.model.stream import BATCH_TOKENS, batch_bytes, element_size, hidden_bytes, hidden_size
from paredown.compress.recipe import DistillSpec, ReconstructSpec
from paredown.compress.recovery.distill import MICRO_TOKENS
from paredown.compress.recovery.divergence import POSITIONS
from paredown.compress.recovery.reconstruct import tuning_bytes
from paredown.compress.recovery.targets import target_bytes
from paredown.compress.recovery.trainable import SAVED_BYTES, STATE_BYTES
from paredown.compress.text.windows import Windows


def trained_numbers(source: ModelSource, embeddings: bool) -> int:
    """How many numbers are trained: all floats in the blocks, vectors outside them, and embeddings and head if asked."""
    inside = tuple(block.prefix for block in blocks(source))
    outer = {f"{name_of(source.model, f'get_{kind}_embeddings')}.weight" for kind in ("input", "output")}
    outer |= {source.tied[name] for name in outer if name in source.tied}
    return sum(
        t.numel()
        for name, t in source.parameters.items()
        if t.is_floating_point() and (embeddings if name in outer else name.startswith(inside) or t.dim() == 1)
    )


def training_bytes(source: ModelSource, numbers: int, length: int) -> int:
    """Bytes of memory: the model, what is trained of it with AdamW's moments, the copies to go back to, and the file in
    which all that is saved; packed weights unpacked, and the activations and logits of one batch."""
    element, vocabulary = element_size(source), int(source.config.get_text_config().vocab_size)
    weights = sum(entry.bytes for entry in source.files.entries.values())
    unpacked = element * sum(spec.size for spec in source.modules.values())
    usual = BATCH_TOKENS[source.device.type]
    tokens = max(MICRO_TOKENS[source.device.type], length)
    activations = len(blocks(source)) * batch_bytes(source, 4 * hidden_size(source)) * tokens // usual
    logits = (2 * element * tokens + 12 * POSITIONS) * vocabulary
    trained = STATE_BYTES + 2 * element + SAVED_BYTES + element
    return weights + unpacked + trained * numbers + activations + logits


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
    specs: Sequence[ReconstructSpec | DistillSpec],
    texts: Sequence[tuple[Windows, Windows]],
    out: Path,
    note: Callable[[str], None],
) -> None:
    """Say what the steps take. Raises PareError if the disk of `out` or the host's memory is too small."""
    numbers = trained_numbers(source, any(isinstance(spec, DistillSpec) and spec.embeddings for spec in specs))
    memory = targets = 0
    for spec, (text, heldout) in zip(specs, texts, strict=True):
        if isinstance(spec, DistillSpec):
            memory = max(memory, training_bytes(source, numbers, text.length))
            targets += target_bytes(text.tokens + heldout.tokens, spec.top_k)
        else:
            memory = max(memory, blockwise_bytes(source, text))
    written = sum(entry.bytes for entry in source.files.entries.values())
    state = (SAVED_BYTES + element_size(source)) * numbers  # from which an interrupted run goes on
    disk = targets + written + state
    note(
        f"training {numbers:,} numbers takes about {memory / 1e9:.1f} GB of memory; the teacher's probabilities take "
        f"{targets / 1e9:.2f} GB of the disk, and {disk / 1e9:.1f} GB with all else"
    )
    folder = next(p for p in [out, *out.absolute().parents] if p.exists())
    free = shutil.disk_usage(folder).free
    if free < disk:
        raise PareError(
            f"the disk of {folder} has {free / 1e9:.1f} GB free, and recovery needs {disk / 1e9:.1f} GB: free some, name "
            "another output with -o, or take fewer tokens or a smaller top_k."
        )
    host = available_memory() if source.device.type == "cpu" else None
    if host is not None and host < memory:
        raise PareError(
            f"{memory / 1e9:.1f} GB of memory are needed and {host / 1e9:.1f} GB are free. Close other programs, or take "
            "shorter windows in recover: distill.length, or fewer in calibration.sequences."
        )
