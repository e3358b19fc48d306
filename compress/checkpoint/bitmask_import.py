"""Checkpoints in the sparse formats that compressed-tensors removed in 2026, read as if they were dense.

They are called stranded here: no tool reads them any more. `sparse-24-bitmask` and `sparse-bitmask` replace a weight by
up to four tensors: `compressed`, the stored values row by row (a matrix of half the width for 2:4, a vector otherwise);
`bitmask`, one bit per weight, the lowest bit of a byte first and each row in whole bytes; `shape`; and, without 2:4,
`row_offsets`, where the values of each row begin. Since compressed-tensors 0.9 their names begin with that of the layer.
Until 0.8 they began with that of the parameter, and all tensors of the model were stored so, norms too.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

import torch
from torch import Tensor

from paredown.compress.checkpoint.tensor_files import Entry, TensorFiles
from paredown.compress.errors import PareError
from paredown.kernels.bitmap import count_bits, unpack_bitmap

COMPRESSED_TENSORS = "compressed-tensors"
SETTINGS_KEYS = ("quantization_config", "compression_config")  # of config.json; the second until version 0.8
SPARSE24, BITMASK, DENSE = "sparse-24-bitmask", "sparse-bitmask", "dense"
PARTS = {SPARSE24: ("compressed", "bitmask", "shape"), BITMASK: ("compressed", "bitmask", "shape", "row_offsets")}
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# of each byte of a bitmask, whether two bits are set in its lower and two in its upper half
TWO_OF_FOUR = torch.tensor([(byte & 15).bit_count() == 2 == (byte >> 4).bit_count() for byte in range(256)])


def stranded_format(config: Any) -> str | None:
    """How compressed-tensors stored the weights: a key of PARTS, or DENSE where the config only describes their zeros.

    None for other models. Raises PareError for weights that are quantised, sparse or not, and for an unknown format.
    """
    settings: Any = next((value for key in SETTINGS_KEYS if (value := getattr(config, key, None))), {})
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    if settings.get("quant_method", COMPRESSED_TENSORS) != COMPRESSED_TENSORS:
        return None
    # transformers saves the settings of a model that it loaded one level deeper
    settings = settings | (settings.get("quantization_config") or {})
    sparsity = settings.get("sparsity_config") or {}
    stored = sparsity.get("format", DENSE)
    if reason := _quantised(settings):
        sparse = f", and stored as {stored}" if stored in PARTS else ""
        raise PareError(
            f"the checkpoint is quantised ({COMPRESSED_TENSORS}, {reason}){sparse}: there are no plain weights to edit. "
            "Name the original checkpoint in bfloat16, float16 or float32."
        )
    if stored not in (*PARTS, DENSE):
        raise PareError(f"the checkpoint's sparsity format {stored!r} is unknown. We read {' and '.join(PARTS)}.")
    return stored if sparsity else None


def as_dense(config: Any, files: TensorFiles) -> tuple[Any, TensorFiles]:
    """Config and tensors of a stranded checkpoint as they were when it was dense; those of other models unchanged."""
    stored = stranded_format(config)
    if stored is None:
        return config, files
    for key in SETTINGS_KEYS:
        if hasattr(config, key):
            delattr(config, key)
    return config, BitmaskFiles(files.folder, stored) if stored in PARTS else files


@dataclass(frozen=True)
class BitmaskFiles(TensorFiles):
    """All tensors of a stranded checkpoint by their dense names; a weight is unpacked when it is read.

    Raises PareError naming the tensor if a part of it is missing, does not fit the others, or holds quantised values.
    """

    format: str

    @cached_property
    def stored(self) -> TensorFiles:
        """The tensors as the files hold them."""
        return TensorFiles(self.folder)

    @cached_property
    def prefixes(self) -> dict[str, str]:
        """Dense name of each weight that is stored in parts -> the prefix of their names."""
        split = (name.rpartition(".") for name in self.stored.entries)
        prefixes = sorted({prefix for prefix, _, part in split if part in PARTS[self.format]})
        by_parameter = any(prefix.endswith(".weight") for prefix in prefixes)
        return {prefix if by_parameter else f"{prefix}.weight": prefix for prefix in prefixes}

    @cached_property
    def entries(self) -> dict[str, Entry]:
        for name, prefix in self.prefixes.items():
            for part in PARTS[self.format]:
                if f"{prefix}.{part}" not in self.stored.entries:
                    self._refuse(f"{prefix}.{part}", "is missing")
            if name in self.stored.entries:
                self._refuse(name, f"is stored twice, dense and as {prefix}.compressed")
        parts = {f"{prefix}.{part}" for prefix in self.prefixes.values() for part in PARTS[self.format]}
        shapes = self.stored.read(f"{prefix}.shape" for prefix in self.prefixes.values())
        dense = {name: entry for name, entry in self.stored.entries.items() if name not in parts}
        return dense | {
            name: self._entry(prefix, shapes[f"{prefix}.shape"].flatten().tolist())
            for name, prefix in self.prefixes.items()
        }

    def read(self, names: Iterable[str], finite: bool = True) -> dict[str, Tensor]:
        names = list(names)
        tensors = self.stored.read((name for name in names if name not in self.prefixes), finite)
        return tensors | {name: self._unpacked(name) for name in names if name in self.prefixes}

    def _entry(self, prefix: str, shape: list[Any]) -> Entry:
        """The header of the dense tensor, from those of its parts, which are checked."""
        if not shape or not all(isinstance(size, int) and size > 0 for size in shape):
            self._refuse(f"{prefix}.shape", f"tells the shape {shape}")
        *rows, width = shape
        values = self.stored.entries[f"{prefix}.compressed"]
        if values.dtype not in FLOATS:
            raise PareError(
                f"{self.folder}: tensor '{prefix}.compressed' holds {values.dtype} values: it is quantised, and there "
                "are no plain weights to edit. Name the original checkpoint in bfloat16, float16 or float32."
            )
        sizes: dict[str, tuple[int, ...]] = {"bitmask": (*rows, -(-width // 8))}
        if self.format == SPARSE24:
            if len(shape) != 2 or width % 4:
                self._refuse(f"{prefix}.shape", f"tells the shape {shape}, and 2:4 needs rows of whole groups of four")
            sizes["compressed"] = (*rows, width // 2)
        else:
            sizes["row_offsets"] = tuple(rows)
            sizes["compressed"] = (*values.shape[:1],)  # one per bit; they are counted when it is read
        for part, size in sizes.items():
            actual = self.stored.entries[f"{prefix}.{part}"].shape
            if actual != size:
                self._refuse(f"{prefix}.{part}", f"has shape {[*actual]}, and a weight of {shape} needs {[*size]}")
        if (dtype := self.stored.entries[f"{prefix}.bitmask"].dtype) != torch.uint8:
            self._refuse(f"{prefix}.bitmask", f"has dtype {dtype}, not torch.uint8")
        return Entry(values.file, tuple(shape), values.dtype)

    def _unpacked(self, name: str) -> Tensor:  # (..., out, in)
        prefix, width = self.prefixes[name], self.entries[name].shape[-1]
        parts = self.stored.read(f"{prefix}.{part}" for part in PARTS[self.format])
        values, bitmask = parts[f"{prefix}.compressed"].flatten(), parts[f"{prefix}.bitmask"]
        counts = count_bits(bitmask)  # (..., out)
        if width % 8 and bool((bitmask[..., -1] >> (width % 8)).any()):
            self._refuse(f"{prefix}.bitmask", f"marks columns past the last of {width}")
        if int(counts.sum()) != len(values):
            self._refuse(f"{prefix}.bitmask", f"marks {int(counts.sum())} weights, and {len(values)} values are stored")
        if self.format == SPARSE24 and (bad := _rows_not_two_of_four(bitmask, width)):
            self._refuse(f"{prefix}.bitmask", f"does not mark two of every four columns in {bad} rows")
        if self.format == BITMASK and not torch.equal(parts[f"{prefix}.row_offsets"].long(), counts.cumsum(0) - counts):
            self._refuse(f"{prefix}.row_offsets", "tells other beginnings of the rows than the bitmask")
        return unpack_bitmap(values, bitmask, width)

    def _refuse(self, name: str, fault: str) -> NoReturn:
        raise PareError(f"{self.folder}: tensor {name!r} {fault}. The checkpoint is damaged: fetch it again.")


def _quantised(settings: dict[str, Any]) -> str | None:
    """The setting of compressed-tensors that means quantised numbers or rotated weights, or None."""
    if settings.get("config_groups"):
        return str(settings.get("format") or "config_groups")
    stored = settings.get("format") or DENSE
    if stored not in (*PARTS, DENSE):
        return str(stored)
    return next((key for key in ("kv_cache_scheme", "transform_config") if settings.get(key)), None)


def _rows_not_two_of_four(bitmask: Tensor, width: int) -> int:
    """How many rows have a group of four columns without exactly two bits. bitmask (out, bytes)."""
    codes = bitmask.int()  # (out, bytes)
    if width % 8:
        codes[:, -1] |= 0b11 << 4  # the last byte holds one group only
    return int((~TWO_OF_FOUR[codes]).any(-1).sum())
