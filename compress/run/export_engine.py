"""Write the file of another engine, GGUF or ONNX, of the ordinary checkpoint that a model is or can be exported to."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from paredown.compress.checkpoint.companions import file_sha256
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.tensor_files import TensorFiles
from paredown.compress.checkpoint.writer import CheckpointWriter
from paredown.compress.run import export_gguf, export_onnx
from paredown.compress.storage.kinds import MASKS, kind_of

Engine = Literal["gguf", "onnx"]
Plain = Literal["dense", "deci"]


def write_for_engine(
    source: ModelSource,
    writer: CheckpointWriter,
    format: Engine,
    record: Mapping[str, Any],
    export: Callable[[Path, Plain], object],
) -> int:
    """Write the whole export but for the commit, and return the bytes of its file; `record` goes into paredown.json.

    `export` writes the source in an ordinary format into a folder, which is only there for a while.
    """
    with writer.scratch() as scratch:
        plain = source.folder
        if not _is_read(source, format):
            plain = scratch / "plain"
            export(plain, "deci" if source.shapes and format == "gguf" else "dense")
        if format == "gguf":
            export_gguf.write_gguf(plain, writer.folder / export_gguf.FILE, source.dtype or torch.float32)
        else:
            export_onnx.write_onnx(plain, writer.folder / export_onnx.FILE)
    files = sorted(path for path in writer.folder.iterdir() if path.name.startswith("model."))
    writer.finish({**record, "files": {path.name: file_sha256(path) for path in files}})
    return sum(path.stat().st_size for path in files)


def _is_read(source: ModelSource, format: Engine) -> bool:
    """Whether the source is what the engine's exporter reads: an ordinary checkpoint, or for ONNX one with factors alone."""
    masked = any(
        kind_of(s.kind).tensors.keys() >= mask.tensors.keys()
        for s in source.modules.values()
        for mask in MASKS.values()
    )
    return (format == "onnx" and not masked if source.packed else True) and type(source.files) is TensorFiles
