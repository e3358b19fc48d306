"""The safetensors files of one folder as one lazy dictionary. Never pickle, never a path outside the folder."""

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from paredown.compress.checkpoint.disk import INDEX as INDEX
from paredown.compress.checkpoint.disk import SINGLE as SINGLE
from paredown.compress.errors import PareError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One tensor as the header of its file describes it."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.numbers * self.dtype.itemsize


@dataclass(frozen=True)
class TensorFiles:
    """All tensors of `folder` by name. The first use of `entries` reads and checks the headers; only `read` reads data.

    As in transformers, a single file goes before an index beside it.

    Raises PareError for a folder that holds pickles only, an index entry that is no plain file name, and a shard that is
    missing or truncated.
    """

    folder: Path

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Name of each tensor -> its entry in the header of its file."""
        index = self._index()
        entries: dict[str, Entry] = {}
        for file in sorted(set(index.values())) if index else [SINGLE]:
            entries.update(self._header(file))
        if missing := sorted(set(index) - set(entries)):
            raise PareError(
                f"{self.folder}: the index names {missing[0]!r}, which {index[missing[0]]!r} does not hold "
                f"({len(missing)} such tensors). The download is incomplete or mixed: fetch the checkpoint again."
            )
        return entries

    @property
    def ignored_index(self) -> bool:
        """Whether there is an index that is not read, because a single file is there too."""
        return (self.folder / SINGLE).is_file() and (self.folder / INDEX).exists()

    def read(self, names: Iterable[str], finite: bool = True) -> dict[str, Tensor]:
        """The tensors `names` on CPU, in their stored dtypes, mapped from the file rather than copied.

        Raises PareError naming the tensor if any value is not finite, unless `finite` is False.
        """
        tensors: dict[str, Tensor] = {}
        for file, group in groupby(sorted(names, key=self._file), key=self._file):
            with self._open(file) as shard:
                tensors.update((name, shard.get_tensor(name)) for name in group)
        for name, tensor in tensors.items():
            if finite and tensor.is_floating_point() and not all_finite(tensor):
                raise PareError(
                    f"{self.folder}: tensor {name!r} holds NaN or infinite values. Fetch the checkpoint again."
                )
        return tensors

    def _file(self, name: str) -> str:
        return self.entries[name].file

    def _index(self) -> dict[str, str]:
        """Tensor name -> file of a sharded checkpoint; empty for a single file."""
        path = self.folder / INDEX
        if (self.folder / SINGLE).is_file():
            return {}
        if not path.exists():
            raise PareError(self._nothing_to_read())
        try:
            weight_map: dict[str, str] = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"].items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as fault:
            raise PareError(f"{path} is not a safetensors index ({fault!r}). Fetch the checkpoint again.") from fault
        for file in weight_map.values():
            if not isinstance(file, str) or Path(file).name != file or "\\" in file or file in ("", ".", ".."):
                raise PareError(
                    f"{path} points to {file!r}. Shards must be plain file names inside the folder; "
                    "this index could read other files of this machine, so it is refused."
                )
            if not (self.folder / file).exists():
                raise PareError(f"{self.folder}: shard {file!r} of the index is missing. Fetch the checkpoint again.")
        return weight_map

    def _nothing_to_read(self) -> str:
        pickles = sorted(p.name for p in self.folder.glob("*.bin")) + sorted(p.name for p in self.folder.glob("*.pt"))
        if pickles:
            return (
                f"{self.folder} holds only pickled weights ({pickles[0]}). Loading pickle can run code "
                "(CVE-2025-32434), so only safetensors are read. Convert it once with transformers: "
                "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)."
            )
        return f"{self.folder} holds neither {SINGLE} nor {INDEX}. Name a folder with a Hugging Face model in it."

    def _header(self, file: str) -> dict[str, Entry]:
        with self._open(file) as shard:
            entries = {}
            for name in shard.keys():  # noqa: SIM118 - a safe_open handle is no dictionary
                tensor = shard.get_slice(name)
                if tensor.get_dtype() not in DTYPES:
                    raise PareError(
                        f"{self.folder}: tensor {name!r} has dtype {tensor.get_dtype()}, which we cannot read."
                    )
                entries[name] = Entry(file, tuple(tensor.get_shape()), DTYPES[tensor.get_dtype()])
            return entries

    def _open(self, file: str) -> safe_open:
        try:
            return safe_open(self.folder / file, framework="pt")
        except (SafetensorError, OSError) as fault:
            raise PareError(
                f"{self.folder / file} cannot be read ({fault}). It is truncated or damaged: fetch it again."
            ) from fault


def sha256(tensor: Tensor) -> str:
    """The digest of the bytes of a tensor on CPU."""
    data = tensor.contiguous().flatten().view(torch.uint8).numpy().data if tensor.numel() else b""
    return hashlib.sha256(data).hexdigest()


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite, in one pass and without temporaries: NaN wins every comparison of aminmax."""
    if not tensor.numel() or tensor.dtype.itemsize == 1:
        return True
    low, high = tensor.aminmax()
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))
