"""Whole files, whatever happens: durable writes, hashes, locks, temporary files and folders.

`replace` survives a kill or a power cut at any point: it writes a temporary file in the same folder, syncs it, renames
it over the target, syncs the folder, and reads the file back. Each operation goes through `ops`, which a test replaces
to record the operations, to fail one, or to die after it.
"""

import errno
import hashlib
import json
import os
import shutil
import signal
import socket
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

fcntl: Any = None
with suppress(ImportError):  # Windows has no POSIX locks
    import fcntl

_YOUNG = 60.0  # seconds in which a new temporary folder may not have its lock yet
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # errors of file systems that have none
_held: dict[Path, int] = {}  # lock file → descriptor, never closed while the lock is needed: closing releases it


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
        if not hasattr(os, "O_DIRECTORY"):  # Windows opens no folders
            return
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync folders
                raise
        finally:
            os.close(descriptor)

    def read(self, path: Path) -> bytes:
        return path.read_bytes()

    def remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)


ops = Ops()


def replace(path: Path, data: bytes) -> None:
    """Write a file so that `path` holds the old content or the new one, whatever happens meanwhile.

    Raises:
        OSError: with its errno and the name `path`: a full disk, a folder that cannot be written; the file is then
            unchanged. EIO, and no file, if it reads back differently.
    """
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}-{_began(os.getpid())}")
    try:
        with ops.create(temporary) as file:
            ops.write(file, data)
            ops.sync(file)
        ops.rename(temporary, path)
        ops.sync_folder(path.parent)  # only now is the rename itself durable
        if ops.read(path) != data:
            ops.remove(path)
            raise OSError(errno.EIO, "it reads back differently from how it was written")
    except BaseException as error:
        with suppress(OSError):
            ops.remove(temporary)
        if isinstance(error, OSError) and error.errno is not None:
            # A failed sync names no file, a failed rename two; and the temporary name says nothing to people.
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_json(path: Path, value: Any) -> None:
    """Write plain values as indented JSON; see `replace`."""
    replace(path, json.dumps(value, indent=1).encode() + b"\n")


def read_text(path: Path, *, most: int) -> str:
    """The text of a small file in UTF-8.

    Args:
        most: bytes that it may have: parsers of YAML take minutes for some MB.

    Raises:
        OSError: it cannot be read, or is larger (EFBIG).
        UnicodeDecodeError: it is not UTF-8.
    """
    with open(path, "rb") as file:  # not its size: a pipe or a device has none
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it has more than {most:,} bytes", str(path))
    return content.decode("utf-8")


def sha256_of(path: Path) -> str:
    """The sha256 of a file, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Make the content of a file, or the names in a folder, durable.

    Raises:
        OSError: names `path`.
    """
    try:
        if path.is_dir():
            ops.sync_folder(path)
        else:
            with open(path, "rb") as file:
                ops.sync(file)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def lock(path: Path, *, create: bool = True) -> str:
    """Hold a lock file until this process ends, however it ends.

    The lock is the kernel's (POSIX record lock: not inherited by data workers, and honoured over NFS), so a dead
    process holds none; the text in the file is for people: host, pid and start of its holder.

    Args:
        create: without it, a file that does not exist counts as free, and nothing is written.

    Returns:
        The text of the process that holds the lock; empty if this process now does.

    Raises:
        OSError: the file cannot be created, or the file system has no locks.
    """
    descriptor = _held.pop(path.absolute(), None)
    if descriptor is not None and not _is_at(path, descriptor):  # it was deleted since
        os.close(descriptor)
        descriptor = None
    while descriptor is None:
        if not create and not path.exists():
            return ""
        opened = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _take(opened)
        except (BlockingIOError, PermissionError):
            text = os.read(opened, 1000).decode(errors="replace").strip()
            os.close(opened)
            return text or "another process"
        except OSError as error:
            os.close(opened)
            raise OSError(error.errno, error.strerror, str(path)) from error
        if _is_at(path, opened):
            descriptor = opened
        else:
            os.close(opened)  # somebody deleted the file between the two calls, and perhaps made another
    _held[path.absolute()] = descriptor
    if create:
        text = f"host {socket.gethostname()}, pid {os.getpid()}, since {datetime.now():%Y-%m-%d %H:%M:%S}\n"
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)
    return ""


def lost_lock(path: Path) -> bool:
    """Whether this process locked a file that is no longer the one at `path`.

    Its folder was then deleted, and perhaps made again by another process, which holds the new lock. False where this
    process holds no lock, for example because the file system has none.
    """
    descriptor = _held.get(path.absolute())
    return descriptor is not None and not _is_at(path, descriptor)


def keep_lock(path: Path) -> bool:
    """Locks a file again if it was deleted with its folder, which is made again.

    Returns:
        Whether this process may go on there: False if another one has made the file again. True where this process
        holds no lock.
    """
    if not lost_lock(path):
        return True
    ops.make_folder(path.parent)
    return not path.exists() and not lock(path)


def unlock_all() -> None:
    """Releases all locks of this process, for one that goes on after its work."""
    while _held:
        os.close(_held.popitem()[1])


def _take(file: int | BinaryIO) -> None:
    """Lock an open file for this process; OSError if another holds it, or there are no locks."""
    if fcntl is None:
        raise OSError(errno.ENOLCK, "this system has no POSIX locks")
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except (FileNotFoundError, NotADirectoryError):
        return False


def make_temporary(folder: Path) -> None:
    """Make an empty folder that belongs to this process, as a lock in it says.

    Raises:
        OSError: it cannot be made, or exists.
    """
    folder.mkdir(parents=True)
    try:
        lock(folder / "lock")
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def publish(folder: Path, target: Path) -> None:
    """Rename a folder of `make_temporary`, whose files are synced, to `target`; it then belongs to nobody.

    Raises:
        OSError: ENOTEMPTY or EEXIST: `target` holds files.
    """
    _release(folder)
    ops.sync_folder(folder)
    ops.rename(folder, target)
    ops.sync_folder(target.parent)


def remove_temporary(folder: Path) -> None:
    """Remove a folder of `make_temporary`, if it is still there."""
    _release(folder)
    shutil.rmtree(folder, ignore_errors=True)


def _release(folder: Path) -> None:
    with suppress(OSError):
        ops.remove(folder / "lock")
    descriptor = _held.pop((folder / "lock").absolute(), None)
    if descriptor is not None:
        os.close(descriptor)


def sweep_temporary(parent: Path, pattern: str) -> None:
    """Remove the folders of `make_temporary` whose process has ended, on any machine, killed or not.

    Args:
        pattern: of their names, as in `Path.glob`.
    """
    for folder in parent.glob(pattern):
        with suppress(OSError):
            young = abs(time.time() - folder.stat().st_mtime) < _YOUNG
            if folder.is_dir() and not folder.is_symlink() and not young and not _is_locked(folder / "lock"):
                shutil.rmtree(folder, ignore_errors=True)


def _is_locked(path: Path) -> bool:
    if path.absolute() in _held:  # closing another descriptor of the file would release it
        return True
    try:
        with open(path, "r+b") as file:
            _take(file)
    except FileNotFoundError:
        return False
    except OSError:  # held, or the file system cannot say
        return True
    return False


def sweep(folder: Path) -> None:
    """Remove the temporary files of `replace` whose process has ended, and those of this one, between two writes."""
    for path in folder.glob(".tmp-*"):
        pid, began = path.name.split("-")[-2:]
        if pid == str(os.getpid()) or not _is_running(pid, began):
            ops.remove(path)


def _is_running(pid: str, began: str) -> bool:
    """Whether the process of that number is the one that began then: containers reuse the same few numbers."""
    if not hasattr(signal, "SIGKILL"):  # Windows cannot ask: there, signal 0 is Ctrl-C
        return True
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
