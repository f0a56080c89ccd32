"""Files that are there whole or not at all.

`replace` does what survives a kill or a power cut at any point: write a temporary file in the same folder, fsync it,
rename it over the target, fsync the folder, read it back. Every operation goes through `ops`, which a test replaces to
record the operations, to fail one, or to die after it.
"""

import errno
import fcntl
import os
import socket
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import BinaryIO


class Ops:
    """The file operations of a save. They raise OSError, with an errno."""

    def make_folder(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)

    def create(self, path: Path) -> BinaryIO:
        return open(path, "wb")

    def write(self, file: BinaryIO, data: bytes) -> None:
        file.write(data)
        file.flush()

    def sync(self, file: BinaryIO) -> None:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # so that reading it back asks the disk, not this machine's memory
            with suppress(OSError):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def rename(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def sync_folder(self, folder: Path) -> None:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems have no such thing
                raise
        finally:
            os.close(descriptor)

    def read(self, path: Path) -> bytes:
        return path.read_bytes()

    def remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)


ops = Ops()


def replace(path: Path, data: bytes) -> None:
    """Write a file so that `path` holds the old content or the new, whatever happens meanwhile.

    Raises:
        OSError: with its errno (a full disk, a folder that cannot be written); `path` is then unchanged. EIO, and no
            file, if it reads back other than it was written.
    """
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}-{_began(os.getpid())}")
    try:
        with ops.create(temporary) as file:
            ops.write(file, data)
            ops.sync(file)
        ops.rename(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            ops.remove(temporary)
        if isinstance(error, OSError) and str(error.filename) == str(temporary):
            error.filename = str(path)  # the temporary name says nothing to people
        raise
    ops.sync_folder(path.parent)  # the rename itself is durable only now
    if ops.read(path) != data:
        ops.remove(path)
        raise OSError(errno.EIO, "it reads back other than it was written", str(path))


def lock(path: Path, *, create: bool = True) -> str:
    """Hold a lock file until this process ends, however it ends; gives who holds it, if somebody else does.

    The lock is the kernel's (POSIX record lock: not inherited by data workers, and honoured over NFS), so a dead
    process holds none; the text in the file is for people: host, pid and start of the one that does.

    Args:
        create: without it, a file that does not exist counts as free, and nothing is written.

    Raises:
        OSError: the file cannot be created, or the file system has no locks.
    """
    if not create and not path.exists():
        return ""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # never closed: that would release it
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return os.read(descriptor, 1000).decode(errors="replace").strip() or "another process"
    if create:
        text = f"host {socket.gethostname()}, pid {os.getpid()}, since {datetime.now():%Y-%m-%d %H:%M:%S}\n"
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)
    return ""


def sweep(folder: Path) -> None:
    """Remove what writers left behind: those that are gone, and this process, between two writes."""
    for path in folder.glob(".tmp-*"):
        pid, began = path.name.split("-")[-2:]
        if pid == str(os.getpid()) or not _is_running(pid, began):
            ops.remove(path)


def _is_running(pid: str, began: str) -> bool:
    """Whether the process of that number is the one that began then: containers give the same few numbers again."""
    try:
        os.kill(int(pid), 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except PermissionError:  # somebody else's
        pass
    return _began(int(pid)) == began


def _began(pid: int) -> str:
    """When a process began, in clock ticks since boot; "0" where the system does not say."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return "0"
