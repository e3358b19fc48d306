"""A finished checkpoint is never lost, whatever OUT is or becomes, and nothing that is not ours is touched."""

import errno
import os
import shutil
from contextlib import ExitStack, contextmanager
from pathlib import Path

import filelock
import pytest
import torch
from safetensors.torch import load_file

from paredown.compress.checkpoint import out_folder, out_lock
from paredown.compress.checkpoint.out_folder import INSIDE, MARK, STATE
from paredown.compress.checkpoint.writer import RECORD, CheckpointWriter
from paredown.compress.errors import PareError

T = torch.arange(12.0).view(3, 4)
WHOLE = ["config.json", "model.safetensors", RECORD]


def write(out, key=None, value=T, before_commit=lambda writer: None):
    """Write a checkpoint of one tensor; with a `key` as a run that can go on."""
    with CheckpointWriter(out, resumable=key is not None) as writer:
        writer.key = key or ""
        writer.add("a", value)
        writer.write_json("config.json", {})
        writer.finish({})
        before_commit(writer)
        writer.commit()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def is_whole(out, value=T):
    return names(out) == WHOLE and torch.equal(load_file(out / "model.safetensors")["a"], value)


def save_state(writer):
    (writer.folder / STATE).write_text("state")


@pytest.fixture
def failing(monkeypatch):
    """`failing(number, applies)`: renames of paths that `applies(path, to)` fail with that error of the system."""
    plain = os.rename

    def install(number, applies):
        def rename(path, to, **options):
            if applies(Path(path), Path(to)):
                raise OSError(number, os.strerror(number), str(path), None, str(to))
            plain(path, to, **options)

        monkeypatch.setattr(os, "rename", rename)

    return install


# where OUT may be


def test_a_link_to_an_empty_folder_is_followed(tmp_path):
    (tmp_path / "disk" / "target").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "target")
    write(tmp_path / "out")
    assert (tmp_path / "out").is_symlink() and is_whole(tmp_path / "out")
    assert names(tmp_path) == ["disk", "out"] and names(tmp_path / "disk") == ["target"]


def test_a_mount_point_is_written_inside(tmp_path, monkeypatch):
    out = tmp_path / "out"
    (out / "lost+found").mkdir(parents=True)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == out)
    seen = []
    node = out.stat().st_ino
    write(out, before_commit=lambda writer: seen.append((writer.folder, names(tmp_path))))
    assert seen == [(out / INSIDE, ["out"])]
    (out / "lost+found").rmdir()
    assert is_whole(out) and out.stat().st_ino == node


def test_the_current_folder_is_written_inside_and_stays_the_same_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    node = tmp_path.stat().st_ino
    write(Path("."))
    assert is_whole(tmp_path) and tmp_path.stat().st_ino == node == Path.cwd().stat().st_ino


def test_a_folder_in_one_that_is_closed_to_us_is_written_inside(tmp_path, monkeypatch):
    out = tmp_path / "closed" / "out"
    out.mkdir(parents=True)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) == out)
    seen = []
    write(out, before_commit=lambda writer: seen.append(writer.folder))
    assert seen == [out / INSIDE] and is_whole(out) and names(out.parent) == ["out"]


def test_a_run_goes_on_where_it_began_though_the_user_stands_elsewhere_now(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    with monkeypatch.context() as inside:
        inside.chdir(out)
        with pytest.raises(KeyboardInterrupt):
            write(Path("."), "one", before_commit=stop_with_state)
    with CheckpointWriter(out, resumable=True) as writer:
        assert writer.folder == out / INSIDE and writer.place.has_state


def stop_with_state(writer):
    save_state(writer)
    raise KeyboardInterrupt


@pytest.mark.parametrize("out", ["/", "/.."])
def test_the_root_is_refused(out):
    with pytest.raises(PareError, match=r"is the root of the file system\. Name a folder"), CheckpointWriter(Path(out)):
        pass


def test_dead_links_files_and_long_names_are_refused_in_one_sentence(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "ring").symlink_to(tmp_path / "ring")
    (tmp_path / "file").touch()
    before = names(tmp_path)
    for name, said in {
        "link": "is a link to .*nowhere, which does not exist. Make that folder, or remove the link",
        "ring": "is a link to .*ring, which does not exist",
        "file": "exists and is not empty: it is a file",
        "file/out": r"cannot be written \(.*: (Not a directory|File exists)\). Name another output",
        "n" * 250: "the name of .* is too long",
        "n" * 300: "the name of .* is too long",
    }.items():
        with pytest.raises(PareError, match=said), CheckpointWriter(tmp_path / name):
            pass
        assert names(tmp_path) == before


@pytest.mark.parametrize("call", ["mkdir", "stat", "iterdir"])
def test_what_may_not_be_read_or_made_is_told_in_one_sentence(call, tmp_path, monkeypatch):
    def denied(path, *arguments, **named):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    (tmp_path / "out").mkdir()
    with monkeypatch.context() as patch, pytest.raises(PareError, match=r"out cannot be written \(.*Permission denied"):
        patch.setattr(Path, call, denied)
        CheckpointWriter(tmp_path / "out").__enter__()
    assert names(tmp_path) == ["out"]


# what stands in the way of the last step


def becomes_a_file(out):
    out.write_text("mine")


def becomes_a_link(out):
    (out.parent / "empty").mkdir()
    out.symlink_to(out.parent / "empty")


def is_filled(out):
    out.mkdir()
    (out / "mine").touch()


@pytest.mark.parametrize("change", [becomes_a_file, becomes_a_link, is_filled])
def test_what_took_the_name_meanwhile_is_left_alone_and_the_checkpoint_is_kept(change, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(PareError, match=r"The finished checkpoint is kept in .*out\.partial.* then type: ") as fault:
        write(out, before_commit=lambda writer: change(out))
    assert {*WHOLE} < {*names(tmp_path / "out.partial")}
    assert out.is_symlink() or out.is_file() or names(out) == ["mine"]
    shutil.rmtree(out) if out.is_dir() and not out.is_symlink() else out.unlink()
    assert os.system(str(fault.value).split("then type: ")[1]) == 0
    assert is_whole(out) and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EROFS])
def test_a_rename_that_fails_keeps_the_checkpoint_and_its_state(number, failing, tmp_path):
    out = tmp_path / "out"
    failing(number, lambda path, to: to == out)
    with pytest.raises(PareError, match=f"{os.strerror(number)}. The finished checkpoint is kept"):
        write(out, "one", before_commit=save_state)
    assert {*WHOLE, STATE} < {*names(tmp_path / "out.partial")} and not out.exists()


def test_the_same_command_puts_a_kept_checkpoint_in_its_place_and_another_one_does_not(failing, tmp_path, monkeypatch):
    out = tmp_path / "out"
    failing(errno.EIO, lambda path, to: to == out)
    with pytest.raises(PareError):
        write(out, "one")
    monkeypatch.undo()
    with pytest.raises(PareError, match="holds a finished checkpoint that could not be moved"):
        write(out, value=T + 1)
    with CheckpointWriter(out, resumable=True) as writer:
        assert not writer.commit_finished("another")
    assert {*WHOLE} < {*names(tmp_path / "out.partial")}
    with CheckpointWriter(out, resumable=True) as writer:
        assert writer.commit_finished("one")
    assert is_whole(out) and names(tmp_path) == ["out"]


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EBUSY])
def test_where_the_folder_cannot_be_renamed_its_files_are_moved(number, failing, tmp_path):
    out = tmp_path / "out"
    failing(number, lambda path, to: to == out or (number == errno.EXDEV and path.parent != to.parent))
    write(out, before_commit=lambda writer: (writer.folder / "templates").mkdir())
    (out / "templates").rmdir()
    assert is_whole(out) and names(tmp_path) == ["out"]


@pytest.mark.parametrize("stopped_at", range(len(WHOLE)))
def test_a_move_that_is_interrupted_is_no_model_and_is_taken_back(stopped_at, failing, tmp_path, monkeypatch):
    out, moved = tmp_path / "out", []

    def stops(path, to):
        if path.parent == out / INSIDE and to.parent == out:
            if len(moved) == stopped_at:
                raise KeyboardInterrupt
            moved.append(path.name)
        return False

    out.mkdir()
    monkeypatch.setattr(out_folder, "_stays", lambda target: True)
    failing(0, stops)
    with pytest.raises(KeyboardInterrupt):
        write(out, "one", before_commit=save_state)
    assert moved == [RECORD, "model.safetensors", "config.json"][:stopped_at]
    monkeypatch.undo()
    with CheckpointWriter(out, resumable=True) as writer:
        assert {*WHOLE, STATE} < {*names(writer.folder)} and writer.commit_finished("one")
    assert is_whole(out)


@contextmanager
def signal_at(step):
    """Ctrl-C at the `step`th of the moments before and after each call that changes the disk; yields a list, empty by then."""
    left = [None] * step

    def count():
        if left:
            left.pop()
            if not left:
                raise KeyboardInterrupt

    def counted(plain):
        def call(*arguments, **options):
            count()
            result = plain(*arguments, **options)
            count()
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("rename", "replace", "fsync", "unlink", "mkdir", "rmdir", "chmod"):
            patch.setattr(os, name, counted(getattr(os, name)))
        yield left


def interrupted(out, step):
    """Write `out` with a signal at that step of the commit; returns what it told, None if there is no such step."""
    left = []
    with ExitStack() as stack:

        def arm(writer):
            save_state(writer)
            left.append(stack.enter_context(signal_at(step)))

        try:
            write(out, "one", before_commit=arm)
        except KeyboardInterrupt as fault:
            return "".join(fault.__notes__)
    assert left[0]
    return None


@pytest.mark.parametrize("moves", [False, True])
def test_a_signal_at_any_step_of_the_commit_leaves_the_whole_out_or_the_kept_folder(moves, tmp_path, monkeypatch):
    monkeypatch.setattr(out_folder, "_stays", lambda target: moves)
    for step in range(1, 200):
        out = tmp_path / f"{step}"
        out.mkdir()
        told = interrupted(out, step)
        if told is None:
            break
        if "is whole" in told:
            assert {*WHOLE} <= {*names(out)} <= {*WHOLE, *LEFT}
            assert torch.equal(load_file(out / "model.safetensors")["a"], T)
        else:
            assert "is kept" in told and goes_on(out)
    assert step > 20 and is_whole(out)


@pytest.mark.parametrize("step", range(1, 9))
def test_a_signal_while_the_folder_is_made_leaves_nothing(step, tmp_path):
    with pytest.raises(KeyboardInterrupt), signal_at(step), CheckpointWriter(tmp_path / "out"):
        raise KeyboardInterrupt
    assert not [name for name in names(tmp_path) if not name.endswith(".lock")]


LEFT = (STATE, MARK, f"{INSIDE}.lock")  # what a signal may leave beside a whole checkpoint


def goes_on(out):
    """Whether the next run finds the checkpoint with its state, or in its place already."""
    try:
        with CheckpointWriter(out, resumable=True) as writer:
            return {*WHOLE, STATE} < {*names(writer.folder)}
    except PareError as told:
        return "exists and is not empty" in str(told) and is_whole(out)


def test_a_disk_that_fails_after_the_last_step_is_told_and_nothing_is_removed(tmp_path, monkeypatch):
    plain, out = out_folder.sync, tmp_path / "out"

    def sync(path):
        if path == tmp_path:
            raise OSError(errno.EIO, "Input/output error")
        plain(path)

    monkeypatch.setattr(out_folder, "sync", sync)
    with pytest.raises(PareError, match=r"is written, but its disk reports: Input/output error\. Check it: paredown"):
        write(out)
    assert is_whole(out)


# what is not ours


def foreign_files(partial):
    partial.mkdir()
    (partial / "model.safetensors").write_text("theirs")


def foreign_link(partial):
    partial.with_name("theirs").mkdir()
    (partial.with_name("theirs") / MARK).touch()
    partial.symlink_to(partial.with_name("theirs"))


def foreign_file(partial):
    partial.write_text("theirs")


def foreign_mark(partial):
    partial.mkdir()
    (partial / "thesis.txt").write_text("theirs")
    (partial / MARK).symlink_to(partial / "thesis.txt")


@pytest.mark.parametrize("key", [None, "one"])
@pytest.mark.parametrize("foreign", [foreign_files, foreign_link, foreign_file, foreign_mark])
def test_a_partial_that_is_not_ours_is_refused_and_left_alone(foreign, key, tmp_path):
    foreign(tmp_path / "out.partial")
    before = {path: path.lstat() for path in tmp_path.rglob("*")}
    with pytest.raises(PareError, match=r"out\.partial is (in the way|a link|a file)"):
        write(tmp_path / "out", key)
    after = {path: path.lstat() for path in tmp_path.rglob("*")}
    assert before.keys() == after.keys()
    assert all(before[path].st_mtime_ns == after[path].st_mtime_ns for path in before)


def test_links_in_our_folder_are_unlinked_and_never_followed(tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for name in ("shard-00001.safetensors", "resume.safetensors", "thesis.txt"):
        (theirs / name).write_text("theirs")
    partial = tmp_path / "out.partial"
    (partial / "deep").mkdir(parents=True)
    (partial / MARK).touch()
    (partial / "scratch").symlink_to(theirs)
    (partial / "deep" / "link").symlink_to(theirs)
    for name in ("shard-00001.safetensors", STATE):
        (partial / name).symlink_to(theirs / name)

    def use_scratch(writer):
        with writer.scratch() as scratch:
            (scratch / "thesis.txt").write_text("ours")

    write(tmp_path / "out", before_commit=use_scratch)
    assert is_whole(tmp_path / "out")
    assert all(path.read_text() == "theirs" for path in theirs.iterdir()) and len(names(theirs)) == 3


def test_a_link_or_folder_at_the_name_of_the_lock_is_told(tmp_path):
    lock = tmp_path / "out.partial.lock"
    lock.symlink_to(tmp_path / "theirs")
    for _ in range(2):
        with pytest.raises(PareError, match=r"out cannot be written \(.*"), CheckpointWriter(tmp_path / "out"):
            pass
        assert names(tmp_path) == ["out.partial.lock"]
        if lock.is_symlink():
            lock.unlink()
            lock.mkdir()
    assert not (tmp_path / "theirs").exists()


def test_the_state_of_a_stopped_run_is_not_cleared_by_a_command_that_cannot_go_on(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", "one", before_commit=stop_with_state)
    with pytest.raises(PareError, match=r"out\.partial holds what another command"):
        write(tmp_path / "out")
    assert (tmp_path / "out.partial" / STATE).read_text() == "state"


# two at once


def test_a_process_that_comes_between_does_not_begin(tmp_path, monkeypatch):
    """The second writer looks at OUT before the first one has renamed, and locks after the first one has ended."""
    out, acquire = tmp_path / "out", out_lock.OutLock.acquire

    def first_then_lock(lock):
        monkeypatch.undo()
        write(out)
        acquire(lock)

    monkeypatch.setattr(out_lock.OutLock, "acquire", first_then_lock)
    with pytest.raises(PareError, match="exists and is not empty"):
        write(out, value=T + 1)
    assert is_whole(out) and names(tmp_path) == ["out"]


def test_the_lock_is_held_until_the_last_step_is_done(tmp_path, monkeypatch):
    plain, refused = out_folder.sync, []

    def sync(path):
        plain(path)
        if path == tmp_path:  # the last: OUT stands by then
            monkeypatch.undo()
            (tmp_path / "out").rename(tmp_path / "taken away")
            with pytest.raises(PareError, match="another process is writing"), CheckpointWriter(tmp_path / "out"):
                pass
            (tmp_path / "taken away").rename(tmp_path / "out")
            refused.append(path)

    monkeypatch.setattr(out_folder, "sync", sync)
    write(tmp_path / "out")
    assert refused and is_whole(tmp_path / "out")


@pytest.mark.skipif(os.name == "nt", reason="Windows removes no open file")
def test_a_lock_file_that_its_holder_removed_is_no_lock(tmp_path, monkeypatch):
    """A process opens the lock file, its holder removes it and ends, and only then the process locks what it had opened."""
    import fcntl

    plain, file = fcntl.flock, tmp_path / "out.partial.lock"
    first = out_lock.OutLock(file)
    first.acquire()

    def flock(handle, operation):
        if first.held and operation & fcntl.LOCK_NB and file.exists() and os.path.sameopenfile(handle, opened.fileno()):
            first.release()
        return plain(handle, operation)

    second, third = out_lock.OutLock(file), out_lock.OutLock(file)
    with file.open() as opened:
        monkeypatch.setattr(fcntl, "flock", flock)
        second.acquire()
    assert second.held and file.exists()
    with pytest.raises(PareError, match="another process is writing"):
        third.acquire()
    second.release()
    assert not names(tmp_path)


@pytest.fixture
def no_flock(monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def flock(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.filterwarnings("error")
def test_without_flock_the_lock_file_itself_excludes_others(tmp_path, no_flock):
    def second(writer):
        said = r"another process is writing .*out\.partial\. Wait for it.* If none is, remove .*out\.partial\.lock"
        with pytest.raises(PareError, match=said), CheckpointWriter(tmp_path / "out"):
            pass

    write(tmp_path / "out", before_commit=second)
    assert is_whole(tmp_path / "out") and names(tmp_path) == ["out"]


def test_without_flock_the_lock_of_a_process_that_has_ended_is_taken_over(tmp_path, no_flock):
    lock = filelock.SoftFileLock(tmp_path / "out.partial.lock")
    lock.acquire()
    marker = (tmp_path / "out.partial.lock").read_text()
    lock.release()
    ended = os.spawnlp(os.P_NOWAIT, "true", "true")
    os.waitpid(ended, 0)
    (tmp_path / "out.partial.lock").write_text(marker.replace(str(os.getpid()), str(ended)))
    write(tmp_path / "out")
    assert is_whole(tmp_path / "out") and names(tmp_path) == ["out"]
