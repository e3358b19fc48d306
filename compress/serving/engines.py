"""Which engines run a checkpoint that paredown wrote, and in which form: for plan, card and README."""

from collections.abc import Collection, Iterable
from typing import NamedTuple

from paredown.compress.storage.kinds import MASKS, kind_of
from paredown.compress.storage.spec import LAYOUTS, Spec


class Engine(NamedTuple):
    """One engine that runs the checkpoint."""

    name: str
    how: str  # what it takes, and what it does with packed weights


def engines(format: str, specs: Collection[Spec] = (), uneven: bool = False) -> list[Engine]:
    """The engines for a checkpoint of this format (packed, dense, deci, gguf or onnx) with these packed weights.

    uneven: whether the sizes of some blocks are their own. An engine that is not listed does not run it.
    """
    if format == "gguf":
        return [Engine("llama.cpp", "as it is")]
    if format == "onnx":
        return [Engine("onnxruntime", "as it is: float32, without a cache")]
    if format == "deci":
        return [Engine("vLLM", "as it is, with --trust-remote-code for the configuration beside the weights")]
    if format == "dense" and not uneven:
        return [Engine("transformers", "as it is"), Engine("vLLM", "as it is"), *_exported("")]
    packed = [
        Engine("transformers", "after import paredown.compress"),
        Engine("vLLM", f"with paredown installed{_in_vllm(specs)}"),
    ]
    if uneven:
        return [*packed, Engine("llama.cpp", "export --format gguf: a Llama whose MLPs are multiples of 256 wide")]
    return [*packed, *_exported(_if_masked(specs, ": weights are unpacked"))]


def _exported(note: str) -> Iterable[Engine]:
    yield Engine("llama.cpp", "export --format gguf, where its converter knows the family")
    yield Engine("onnxruntime", f"export --format onnx{note}")


def _in_vllm(specs: Collection[Spec]) -> str:
    """What vLLM does with packed weights beyond using them as they are."""
    notes = [_if_masked(specs, "on a CPU pruned weights are unpacked when they are loaded")]
    if any(LAYOUTS[spec.layout] == 3 for spec in specs):
        notes.append("fused experts are unpacked")
    if any(spec.kind == "pifa" for spec in specs):
        notes.append("on several GPUs PIFA is multiplied as two factors")
    return "".join(f"; {note}" for note in notes if note)


def _if_masked(specs: Collection[Spec], note: str) -> str:
    tensors = [kind_of(spec.kind).tensors.keys() for spec in specs]
    return note if any(own >= mask.tensors.keys() for own in tensors for mask in MASKS.values()) else ""
