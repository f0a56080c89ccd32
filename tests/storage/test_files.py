import errno
import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT
from save_points import OPERATIONS, Watched, state

from trainer.storage import checkpoint, files


@pytest.fixture
def watched(monkeypatch):
    ops = Watched()
    monkeypatch.setattr(files, "ops", ops)
    return ops


def test_a_save_is_written_synced_renamed_synced_read_back_and_only_then_are_old_ones_deleted(
    tmp_path, watched, monkeypatch
):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size) or fsync(descriptor)
    )
    for step in (10, 20, 30):
        watched.log.clear()
        checkpoint.save(tmp_path, state(step), best=state(step))
    temporary = [name for operation, name in watched.log if operation == "create"]
    whole = [("make_folder", tmp_path.name)]
    for name, final in zip(temporary, ("best.pt", "step-00000030.pt"), strict=True):
        assert name.startswith(f".tmp-{final}-")
        whole += [("create", name), ("write", name), ("sync", name), ("rename", name)]
        whole += [("sync_folder", tmp_path.name), ("read", final)]
    assert watched.log == [*whole, ("remove", "step-00000010.pt")]
    size = (tmp_path / "best.pt").stat().st_size
    assert [found == size for found in synced] == [True, False] * 6, "the whole file, then its folder"
    assert {operation for operation, _ in watched.log} == set(OPERATIONS), "every operation is one of the save's"


def test_killed_after_any_operation_a_save_leaves_what_verifies_and_no_rubbish(tmp_path):
    script = [sys.executable, str(ROOT / "tests" / "support" / "save_points.py"), str(tmp_path)]
    done = subprocess.run(script, capture_output=True, text=True)
    assert len(done.stdout.splitlines()) == 15, done.stdout + done.stderr
    assert [line for line in done.stdout.splitlines() if not line.startswith("ok ")] == []


@pytest.mark.parametrize("number", range(1, 14))
def test_a_disk_that_fails_at_any_operation_leaves_the_old_checkpoints_whole(tmp_path, watched, number):
    for step in (10, 20):
        checkpoint.save(tmp_path, state(step))
    before = {path.name: path.read_bytes() for path in checkpoint.steps(tmp_path)}
    watched.log.clear()

    failures = []

    def fail(count):
        if count == number and not failures:
            failures.append(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
            raise failures[0]

    watched.first = fail
    with pytest.raises(OSError, match="No space left") as caught:
        checkpoint.save(tmp_path, state(30), best=state(30))
    assert caught.value.errno == errno.ENOSPC
    assert {path.name: path.read_bytes() for path in checkpoint.steps(tmp_path) if path.name in before} == before
    assert [name for name in os.listdir(tmp_path) if name.startswith(".tmp-")] == []
    for path in tmp_path.iterdir():
        checkpoint.verify(path)


def test_what_reads_back_other_than_it_was_written_does_not_count_as_saved(tmp_path, monkeypatch):
    class Forgetful(files.Ops):
        def read(self, path):
            return super().read(path)[:-1] + b"\0"

    for step in (10, 20):
        checkpoint.save(tmp_path, state(step))
    monkeypatch.setattr(files, "ops", Forgetful())
    with pytest.raises(OSError, match="reads back differently from how it was written") as caught:
        checkpoint.save(tmp_path, state(30))
    assert caught.value.errno == errno.EIO
    assert sorted(os.listdir(tmp_path)) == ["step-00000010.pt", "step-00000020.pt"]


def test_an_error_names_the_file_that_was_to_be_written(tmp_path):
    path = tmp_path / "missing" / "plan.json"
    with pytest.raises(FileNotFoundError) as caught:
        files.replace(path, b"new")
    assert str(caught.value) == f"[Errno {errno.ENOENT}] No such file or directory: {str(path)!r}"


def test_a_limit_on_the_size_of_files_is_an_error_with_its_number(tmp_path):
    files.replace(tmp_path / "a", b"old")
    script = "import resource, signal; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); "
    script += "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    script += "from pathlib import Path\nfrom trainer.storage import files\n"
    script += f"try: files.replace(Path({str(tmp_path / 'a')!r}), bytes(2000))\n"
    script += "except OSError as error: print(error.errno)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == f"{errno.EFBIG}\n", done.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"old"}


def test_temporary_files_of_the_dead_are_swept_away_and_those_of_the_living_stay(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    living = os.getppid()
    names = {
        f".tmp-step-00000011.pt-{dead.pid}-17": False,
        f".tmp-step-00000012.pt-{living}-{files._began(living)}": True,
        f".tmp-step-00000013.pt-{living}-17": False,  # its number belongs to another process now
        f".tmp-step-00000014.pt-{os.getpid()}-{files._began(os.getpid())}": False,  # no save of ours is under way
        ".tmp-status.json-no number-17": False,
        "mine.tmp": True,
    }
    for name in names:
        (tmp_path / name).write_bytes(b"half")
    files.sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(name for name, stays in names.items() if stays)


@pytest.mark.parametrize("operation", ["fsync", "replace"])
def test_an_error_of_any_operation_names_the_file_once(tmp_path, monkeypatch, operation):
    def fail(*names: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), *(str(name) for name in names if operation == "replace"))

    monkeypatch.setattr(os, operation, lambda source, *rest: fail(source, None, *rest) if rest else fail(source))
    with pytest.raises(OSError, match="Input/output error") as caught:
        files.replace(tmp_path / "a", b"new")
    assert str(caught.value) == f"[Errno {errno.EIO}] Input/output error: {str(tmp_path / 'a')!r}"


def _lock_in(folder, *, wait="input()"):
    """A process that locks a file in a folder, prints the answer, and waits."""
    script = f"from pathlib import Path; from trainer.storage import files\np = Path({str(folder / 'lock')!r})\n"
    script += (
        f"p.parent.mkdir(exist_ok=True); print(repr(files.lock(p)), flush=True); {wait}; print(files.lost_lock(p))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    return process, process.stdout.readline().strip()


@pytest.mark.parametrize("again", [False, True], ids=["deleted", "deleted and made again"])
def test_a_lock_whose_folder_was_deleted_is_known_to_be_lost(tmp_path, again):
    folder = tmp_path / "run"
    first, answer = _lock_in(folder)
    assert answer == "''"
    assert files.lock(folder / "lock").startswith("host ")
    shutil.rmtree(folder)
    second = None
    if again:
        second, answer = _lock_in(folder)
        assert answer == "''"  # another file: the kernel sees no conflict
        assert second.communicate("\n")[0].strip() == "False"
    assert first.communicate("\n")[0].strip() == "True"
    assert not files.lost_lock(tmp_path / "never locked")


def test_a_lock_is_kept_as_long_as_nobody_else_may_have_the_folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    assert files.keep_lock(folder / "lock"), "it never had one"
    assert list(folder.iterdir()) == []
    files.lock(folder / "lock")
    count = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        assert files.lock(folder / "lock") == ""
        shutil.rmtree(folder)
        assert files.keep_lock(folder / "lock")
        other, answer = _lock_in(folder)
        assert f"pid {os.getpid()}" in answer
        other.communicate("\n")
    assert len(os.listdir("/proc/self/fd")) == count
    shutil.rmtree(folder)
    other, answer = _lock_in(folder)
    assert answer == "''"
    assert not files.keep_lock(folder / "lock")
    other.communicate("\n")
    assert not files.keep_lock(folder / "lock"), "its run has ended, and left its files"
    files.unlock_all()
    assert len(os.listdir("/proc/self/fd")) < count
    assert files.keep_lock(folder / "lock")


def test_a_file_replaced_while_it_is_being_locked_is_locked_as_it_is_now(tmp_path, monkeypatch):
    path, lockf, calls = tmp_path / "lock", fcntl.lockf, []

    def slow(descriptor, how):
        if not calls:
            path.unlink()
            path.write_text("")  # another inode, under the same name
        calls.append(descriptor)
        lockf(descriptor, how)

    monkeypatch.setattr(fcntl, "lockf", slow)
    assert files.lock(path) == ""
    assert len(calls) == 2
    assert not files.lost_lock(path)
    assert f"pid {os.getpid()}" in path.read_text()


def test_temporary_folders_of_killed_processes_are_removed_and_those_in_use_stay(tmp_path):
    running, _ = _lock_in(tmp_path / ".tmp-running")
    killed, _ = _lock_in(tmp_path / ".tmp-killed")
    killed.kill()
    killed.communicate()
    (tmp_path / ".tmp-no-lock").mkdir()
    (tmp_path / "mine").mkdir()
    files.make_temporary(tmp_path / ".tmp-own")
    for path in tmp_path.iterdir():
        os.utime(path, (0, 0))
    (tmp_path / ".tmp-new").mkdir()  # whose lock may be about to come
    files.sweep_temporary(tmp_path, ".tmp-*")
    assert sorted(os.listdir(tmp_path)) == [".tmp-new", ".tmp-own", ".tmp-running", "mine"]
    assert running.communicate("\n")[0].strip() == "False"
    files.publish(tmp_path / ".tmp-own", tmp_path / "done")
    assert list((tmp_path / "done").iterdir()) == []


def test_text_that_is_too_long_is_not_read(tmp_path):
    (tmp_path / "a").write_text("é" * 50)
    assert files.read_text(tmp_path / "a", most=100) == "é" * 50
    with pytest.raises(OSError, match="it has more than 99 bytes"):
        files.read_text(tmp_path / "a", most=99)
    with pytest.raises(OSError, match="more than 99 bytes"):
        files.read_text(Path("/dev/zero"), most=99)
