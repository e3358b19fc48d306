"""One process at a time writes an output: a lock that the system frees if the process is killed."""

import os
import sys
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from paredown.compress.errors import PareError

ATTEMPTS = 3  # a file that its holder removes between our opening and our locking it is no lock: take the next


class OutLock:
    """A lock on `file`, which exists while it is held.

    On disks without flock (Lustre without it, NFS without a lock daemon) the file itself is the lock and names its process;
    that of a process which has ended is taken over.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._lock: BaseFileLock | None = None

    def acquire(self) -> None:
        """Take the lock. Raises PareError if another writer holds it, OSError if the folder cannot be written."""
        kind = FileLock if _flock_works(self.file.parent) else SoftFileLock
        self._lock = kind(self.file, thread_local=False)
        for _ in range(ATTEMPTS):
            try:
                self._lock.acquire(blocking=False)
                return
            except Timeout:
                continue
        hint = f" If none is, remove {self.file}." if kind is SoftFileLock else ""
        partial = self.file.with_suffix("")
        raise PareError(f"another process is writing {partial}. Wait for it, or name another output.{hint}")

    @property
    def held(self) -> bool:
        return self._lock is not None and self._lock.is_locked

    def release(self) -> None:
        """Free the lock and leave no file of it. Unix removes the name first, so that no two processes lock one name."""
        if self._lock is None or not self._lock.is_locked:
            return
        if isinstance(self._lock, SoftFileLock):
            self._lock.release(force=True)
        elif os.name == "nt":  # where an open file cannot be removed, neither ours nor that of the next process
            self._lock.release(force=True)
            _remove(self.file)
        else:
            _remove(self.file)
            self._lock.release(force=True)


def _remove(file: Path) -> None:
    with suppress(OSError):
        file.unlink()


def _flock_works(folder: Path) -> bool:
    """Whether the disk of this folder locks files. Raises OSError if no file can be made there."""
    if sys.platform == "win32":
        return True
    import fcntl

    works = True
    try:
        with TemporaryFile(dir=folder) as file:
            try:
                fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                works = False
    except OSError as fault:  # which names a file that is not there
        raise OSError(fault.errno, fault.strerror, str(folder)) from fault
    return works
