"""What we ask of the disk: to keep what was written, and to say in one sentence why it could not."""

import errno
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from paredown.compress.errors import PareError

if TYPE_CHECKING:
    from torch import Tensor

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
FULL = {errno.ENOSPC, errno.EDQUOT}
# what network and FUSE mounts answer that cannot flush: CIFS, WSL shares, object stores
CANNOT_FLUSH = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


def sync(path: Path) -> None:
    """Flush a file, or the list of files of a folder, to the disk. Mounts that cannot flush are passed over."""
    on_windows = os.name == "nt"
    if on_windows and path.is_dir():  # Windows opens no folders, and keeps their lists of files by itself
        return
    handle = os.open(path, os.O_RDWR if on_windows else os.O_RDONLY)  # and flushes only what it may write
    try:
        os.fsync(handle)
    except OSError as fault:
        if fault.errno not in CANNOT_FLUSH:
            raise OSError(fault.errno, fault.strerror, str(path)) from fault
    finally:
        os.close(handle)


def save_tensors(tensors: "Mapping[str, Tensor]", path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file. Raises OSError if the system says why it cannot be written."""
    from safetensors.torch import save_file  # imports torch

    try:
        save_file(dict(tensors), path, metadata=metadata)
    except SafetensorError as fault:
        if (system := system_fault(fault)) is not None:
            raise OSError(system.errno, system.strerror, str(path)) from fault
        raise


def system_fault(fault: BaseException | None) -> OSError | None:
    """The system's error in a fault, also where safetensors wraps it in an error class of its own; else None."""
    if isinstance(fault, OSError):
        return fault
    if isinstance(fault, SafetensorError) and (number := re.search(r"\(os error (\d+)\)", str(fault))):
        code = int(number[1])
        return OSError(code, os.strerror(code), None, code)  # the last is Windows' own number, read only there
    return None


def in_words(fault: OSError, out: Path, disk: Path) -> PareError:
    """The sentence for an output that cannot be written. `disk` is the folder on the disk that was written to."""
    if fault.errno in FULL:
        return PareError(f"the disk of {disk} is full. Free space or name another output.")
    if fault.errno == errno.ENAMETOOLONG:
        return PareError(
            f"the name of {out} is too long: .partial.lock is put behind it while it is written. "
            "Name a shorter output with -o."
        )
    where = "" if fault.filename in (None, str(out)) else f"{fault.filename}: "
    return PareError(f"{out} cannot be written ({where}{fault.strerror or fault}). Name another output with -o.")
