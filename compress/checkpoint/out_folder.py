"""Where a checkpoint is written until it is whole, and the step that makes it OUT.

It is written to OUT.partial, and one rename makes that OUT. Where a rename cannot replace OUT (a mount point, the current
folder, a folder in one that we may not write) it is written to OUT/.paredown-partial, and its files are moved up, those that
make them a model last. A link at OUT is followed first.

The folder holds a file that marks it as ours: a folder without it is not touched. In ours no link is followed. While a
process writes it, it holds a lock beside it.
"""

import errno
import json
import os
import shlex
import shutil
import stat
from collections.abc import Collection
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from paredown.compress.checkpoint.disk import INDEX, SINGLE, in_words, sync
from paredown.compress.checkpoint.out_lock import OutLock
from paredown.compress.errors import PareError

INSIDE = ".paredown-partial"
MARK = ".paredown"  # in the folder: it is ours; says whether the checkpoint in it is finished, and what is moved up
COPY = INSIDE + ".copy"  # in OUT: a file that is being moved there from another disk
SCRATCH = "scratch"  # a folder in it for a run's temporary files
STATE = "resume.safetensors"  # in it: the state from which a stopped run continues: run/journal.py
LAST = (SINGLE, INDEX, "config.json")  # without them nothing takes a folder for a model


class OutFolder:
    """The unfinished OUT: `open` locks and makes `folder`, `commit` makes it OUT, `close` frees the lock.

    `finished`: the key of the run whose whole checkpoint `folder` holds, "" for one without a key, None while it is
    unfinished. Such a folder is never removed.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.target = self.folder = out
        self.finished: str | None = None
        self._moving: list[str] = []  # names of the files that are moved up, from the first move to the last
        self._moved = False
        self._lock: OutLock | None = None
        self._ours = False

    def look(self) -> None:
        """Find the place without touching it. Raises PareError if OUT is not free, or its path cannot be looked at."""
        try:
            self.target = _followed(self.out)
            self.folder = _place(self.target)
            if not _left(self.folder).moving:
                self._check_free()
        except OSError as fault:
            raise in_words(fault, self.out, self.folder.parent) from fault

    def open(self) -> None:
        """Lock the folder and make it if it is not there.

        Raises PareError if OUT is not free, if another process writes it, if the folder is there and not ours, or if the
        place cannot be written.
        """
        self.look()
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._lock = OutLock(self.folder.with_name(self.folder.name + ".lock"))
            self._lock.acquire()
            self._undo_move()
            self._check_free()  # again: another process may have made OUT before we had the lock
            self._make()
        except OSError as fault:
            raise in_words(fault, self.out, self.folder.parent) from fault

    @property
    def has_state(self) -> bool:
        """Whether a stopped run left its state here."""
        return self._ours and _is_file(self.folder / STATE)

    @property
    def placed(self) -> bool:
        """Whether the finished checkpoint stands at OUT."""
        return self._moved or (self.finished is not None and not os.path.lexists(self.folder))

    @property
    def by_hand(self) -> str:
        """What to type to put a finished checkpoint in its place."""
        folder, target = shlex.quote(str(self.folder)), shlex.quote(str(self.target))
        state = f"rm {folder}/{STATE} && " if self.has_state else ""
        return f"mkdir -p {target} && {state}mv {folder}/* {target} && rm -r {folder}"

    def begin(self, keep: Collection[str] = ()) -> None:
        """Take the folder for a new run, or for one that goes on with the files in `keep`; all others are removed."""
        self.reopen()
        for path in list(self.folder.iterdir()):
            if path.is_symlink() or path.name not in (MARK, *keep):
                _remove(path)

    def reopen(self) -> None:
        """Take a finished checkpoint for an unfinished one, before its files are changed."""
        self.finished, self._moving = None, []
        self._mark()

    def discard(self) -> None:
        """Remove the folder if it is ours and locked. The mark goes last: what remains after a signal is still ours."""
        if not self._ours or self._lock is None or not self._lock.held:
            return
        with suppress(OSError):
            for path in list(self.folder.iterdir()):
                if path.name != MARK:
                    _remove(path)
            _remove(self.folder / MARK)
            self.folder.rmdir()

    def close(self) -> None:
        """Free the lock."""
        if self._moved and os.path.lexists(self.folder):  # a signal came while what its files left was removed
            self.discard()
        if self._lock is not None:
            self._lock.release()

    def commit(self, key: str) -> None:
        """Flush all files to the disk and make the folder OUT. The state of the run is removed after that.

        Raises PareError, which says where the checkpoint lies, if it cannot be put at OUT; OSError if it cannot be flushed.
        """
        self.finished = key  # from here on nothing removes it
        self._flush()
        self._mark()
        try:
            self._put()
        except OSError as fault:
            raise PareError(
                f"{self.out} could not be made: {self._reason(fault)}. The finished checkpoint is kept in {self.folder}. "
                f"Make room for it, then type: {self.by_hand}"
            ) from fault
        self._tidy()

    def _make(self) -> None:
        folder = self.folder
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            kind = "a link" if folder.is_symlink() else "a file"
            raise PareError(
                f"{folder} is {kind}, and this run needs the name. Remove it, or name another output with -o."
            )
        marked = _is_file(folder / MARK)
        if not marked and folder.exists() and any(not path.name.startswith(MARK) for path in folder.iterdir()):
            raise PareError(
                f"{folder} is in the way and holds files that are not paredown's. "
                "Move or remove it, or name another output with -o."
            )
        self.finished = _left(folder).finished
        self._ours = True
        folder.mkdir(exist_ok=True)
        if not marked:
            self._mark()

    def _mark(self) -> None:
        """Write the mark anew, in one step; its mode is that of a new file."""
        new = self.folder / (MARK + ".new")
        new.unlink(missing_ok=True)
        new.write_text(json.dumps({"finished": self.finished, "moving": self._moving}) + "\n", encoding="utf-8")
        new.replace(self.folder / MARK)
        with nullcontext() if self.finished is not None else suppress(OSError):
            sync(self.folder / MARK)
            sync(self.folder)

    def _check_free(self) -> None:
        """Raises PareError if OUT is there and is not an empty folder."""
        if self._taken():
            what = "" if self.target.is_dir() else ": it is a file"
            raise PareError(
                f"{self.out} exists and is not empty{what}. Name another output with -o, or remove it first."
            )

    def _taken(self) -> bool:
        if not os.path.lexists(self.target):
            return False
        if self.target.is_symlink() or not self.target.is_dir():
            return True
        of_the_disk = {"lost+found"} if os.path.ismount(self.target) else set()
        return any(not p.name.startswith(INSIDE) and p.name not in of_the_disk for p in self.target.iterdir())

    def _flush(self) -> None:
        """Give all files the mode that the user's new files get, and flush them."""
        mode = stat.S_IMODE((self.folder / MARK).stat().st_mode)
        for path in self.folder.rglob("*"):
            if _is_file(path):
                with suppress(OSError):  # some mounts have no modes
                    path.chmod(mode)
                sync(path)
            elif not path.is_symlink():
                sync(path)
        sync(self.folder)

    def _put(self) -> None:
        if self.folder.parent == self.target or _stays(self.target):
            self._move_up()
            return
        try:
            if os.name == "nt" and self.target.exists():  # elsewhere a rename replaces an empty folder, and only that
                self.target.rmdir()
            self.folder.rename(self.target)
        except OSError as fault:
            if fault.errno not in (errno.EBUSY, errno.EXDEV):  # it has become a mount point, or lies on an overlay
                raise
            self._move_up()

    def _move_up(self) -> None:
        """Move the files to OUT one by one. The mark names them until all are there."""
        if self._taken():
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
        self.target.mkdir(exist_ok=True)
        names = [path.name for path in self.folder.iterdir() if path.name not in (MARK, STATE, SCRATCH)]
        self._moving = sorted(names, key=lambda name: (LAST.index(name) + 1 if name in LAST else 0, name))
        self._mark()
        for name in self._moving:
            _move(self.folder / name, self.target)
        self._moved = True

    def _undo_move(self) -> None:
        """Take back what an interrupted `_move_up` had moved, or end it if nothing but its tidying was left."""
        left = _left(self.folder)
        if not left.moving:
            return
        if not any(os.path.lexists(self.folder / name) for name in left.moving):
            self._ours = True
            self.discard()
            return
        for name in left.moving:
            if os.path.lexists(self.target / name) and not os.path.lexists(self.folder / name):
                _move(self.target / name, self.folder)
        _remove(self.target / COPY)
        self.finished = left.finished
        self._mark()

    def _tidy(self) -> None:
        """Remove the state and the mark from what is OUT now, and flush."""
        try:
            sync(self.target)
            if self._moved:
                self.discard()
            for name in (STATE, SCRATCH, MARK):
                with suppress(OSError):
                    _remove(self.target / name)
            sync(self.target)
            sync(self.target.parent)
        except OSError as fault:
            raise PareError(
                f"{self.out} is written, but its disk reports: {fault.strerror}. Check it: paredown verify {self.out}"
            ) from fault

    def _reason(self, fault: OSError) -> str:
        if not os.path.lexists(self.target) or not self._taken():
            return fault.strerror or str(fault)
        return "it has been filled meanwhile" if self.target.is_dir() else "a file or link has taken its name"


def _followed(out: Path) -> Path:
    """The folder that a link leads to, `out` itself if it is none. Raises PareError for the root and for dead links."""
    if out.is_symlink() and not out.exists():
        raise PareError(
            f"{out} is a link to {os.readlink(out)}, which does not exist. Make that folder, or remove the link."
        )
    target = out.resolve() if out.is_symlink() or out.name in ("", "..") else out
    if not target.name:
        raise PareError(f"{target} is the root of the file system. Name a folder with -o.")
    return target


def _place(target: Path) -> Path:
    """The folder to write in: where an earlier run began, else inside OUT if no rename can replace it, else beside it."""
    inside, beside = target / INSIDE, target.with_name(target.name + ".partial")
    if os.path.lexists(inside):
        return inside
    if not target.is_dir() or _is_file(beside / MARK):
        return beside
    closed = os.access(target, os.W_OK) and not os.access(target.absolute().parent, os.W_OK | os.X_OK)
    return inside if _stays(target) or closed else beside


def _stays(target: Path) -> bool:
    """Whether this is a folder that must not be replaced by another: a mount point, or the one the user stands in."""
    with suppress(OSError):
        return target.is_dir() and (os.path.ismount(target) or target.samefile(Path.cwd()))
    return False


def _is_file(path: Path) -> bool:
    """Whether this is an ordinary file and no link to one."""
    return path.is_file() and not path.is_symlink()


def _remove(path: Path) -> None:
    """Remove a file, a link but not what it leads to, or a folder with all that is in it. A missing one is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _move(path: Path, folder: Path) -> None:
    """Move a file or folder into another folder, onto another disk if need be: it appears there whole or not at all."""
    to = folder / path.name
    if os.path.lexists(to):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(to))
    try:
        path.rename(to)
    except OSError as fault:
        if fault.errno != errno.EXDEV:
            raise
        copy = folder / COPY
        _remove(copy)
        if path.is_dir():
            shutil.copytree(path, copy)
        else:
            shutil.copy(path, copy)
        for part in (copy, *copy.rglob("*")):
            sync(part)
        copy.rename(to)
        sync(folder)
        _remove(path)


@dataclass(frozen=True)
class _Left:
    """What the mark says of the run that left a folder."""

    finished: str | None = None
    moving: tuple[str, ...] = ()


def _left(folder: Path) -> _Left:
    """What the mark of a folder says; nothing if it has none, or if the machine went down while it was written."""
    if folder.is_symlink() or not _is_file(folder / MARK):
        return _Left()
    try:
        said = json.loads((folder / MARK).read_text(encoding="utf-8"))
        finished, moving = said["finished"], tuple(Path(name).name for name in said["moving"])
    except (ValueError, KeyError, TypeError):
        return _Left()
    return _Left(finished, moving) if isinstance(finished, str) else _Left()
