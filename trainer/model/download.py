"""Download a file: complete and with the right sha256, or not at all."""

import hashlib
import http.client
import queue
import re
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from trainer.errors import DataError
from trainer.model.weights_file import read_state
from trainer.storage import files

_TIMEOUT = 60.0  # seconds without an answer, or without a byte, after which a download is given up
_WINDOW, _LEAST = 60.0, 64 * 1024  # also given up if fewer bytes than this arrive in so many seconds
_HASH = re.compile(r"-([0-9a-f]{8,})\.")  # torch.hub's convention: name-<beginning of the sha256>.pth


def place_of(url: str) -> Path:
    """The path of a URL's copy in torch.hub's folder of checkpoints (moved by TORCH_HOME), whether it exists or not."""
    name = re.split(r"[?#]", url)[0].rpartition("/")[2]
    if not _HASH.search(name):  # one site's model.pth must not be taken for another's
        name = f"{hashlib.sha256(url.encode()).hexdigest()[:8]}_{name}"
    return Path(torch.hub.get_dir(), "checkpoints", name)


def fetch_url(url: str, *, sha256: str | None = None) -> tuple[Path, str]:
    """Download a URL, unless there is a local copy.

    Args:
        url: an http, https or file URL. A hash in its name is checked, see `_HASH`.
        sha256: of the file, if it is known; checked before the file is used.

    Returns:
        The local copy, and its sha256.

    Raises:
        DataError: the URL cannot be downloaded, or the file has another sha256.
    """
    path = place_of(url)
    found = _HASH.search(path.name) if not re.match(r"[0-9a-f]{8}_", path.name) else None
    expected = sha256 or (found[1] if found else None)
    if not path.exists():
        _download(url, path, expected)
    try:
        actual = files.sha256_of(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if expected is not None and not actual.startswith(expected):
        raise DataError(
            f"{path} is not the file that was downloaded: expected a sha256 of {expected}..., got {actual};"
            " delete it to download it again"
        )
    return path, actual


def _download(url: str, path: Path, expected: str | None) -> None:
    """Download a URL to `path`, which appears when the file is complete. Raises DataError."""
    folder = path.parent / f".download-{uuid.uuid4().hex}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.sweep_temporary(path.parent, ".download-*")  # left by killed runs
        files.make_temporary(folder)
        part = folder / path.name
        actual = _copy(url, part)
        if expected is None:  # without a hash, only its content shows whether it is an error page
            read_state(part)
        elif not actual.startswith(expected):
            raise ValueError(f'invalid hash (expected sha256 "{expected}", got "{actual}")')
        part.replace(path)
        files.sync(path.parent)
    except (OSError, ValueError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # closes the connection
        raise DataError(
            f"cannot download {url}: {error}. Give --weights FILE (a copy of it), --weights URL (another address) or"
            " --weights none (random features)"
        ) from error
    finally:
        files.remove_temporary(folder)


def _copy(url: str, path: Path) -> str:
    """Copy the content of a URL into a file and sync it to the disk; returns its sha256."""
    sha256 = hashlib.sha256()
    with _opened(url) as response, open(path, "wb") as file:
        length = response.headers.get("Content-Length")
        total = int(length) if (length or "").isdigit() else None
        bar = tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, disable=not sys.stderr.isatty())
        done, began, before = 0, time.monotonic(), 0
        with bar:
            while data := response.read1(1 << 20):  # returns as soon as there is anything
                file.write(data)
                sha256.update(data)
                bar.update(len(data))
                done += len(data)
                if time.monotonic() - began > _WINDOW:
                    if done - before < _LEAST:
                        raise TimeoutError(f"only {done - before:,} bytes came in {_WINDOW:g} s")
                    began, before = time.monotonic(), done
    if total is not None and done != total:
        raise ValueError(f"the connection broke after {done:,} of {total:,} bytes")
    files.sync(path)
    return sha256.hexdigest()


def _opened(url: str) -> Any:
    """The response of a URL. A thread waits for it, because each line of an endless header restarts the timeout."""
    answer: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def wait() -> None:
        try:
            request = urllib.request.Request(url, headers={"User-Agent": "torch.hub"})
            answer.put(urllib.request.urlopen(request, timeout=_TIMEOUT))
        except Exception as error:
            answer.put(error)

    threading.Thread(target=wait, daemon=True).start()
    try:
        found = answer.get(timeout=_TIMEOUT + 1)
    except queue.Empty:
        raise TimeoutError("timed out: no answer") from None
    if isinstance(found, Exception):
        raise found
    return found
