"""A data worker that dies, hangs or is stopped."""

import json
import os
import signal
import threading
import time

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from trainer.processes.workers import batches


class Hurt(Dataset):
    """Numbers; the worker that loads number 6 sends itself a signal, before or after it is on its way."""

    def __init__(self, number: int | None, *, later: bool = False):
        self.number, self.later = number, later

    def __len__(self):
        return 12

    def __getitem__(self, index):
        if index == 6 and self.number is not None:
            if self.later:
                threading.Timer(0.3, os.kill, (os.getpid(), self.number)).start()
            else:
                os.kill(os.getpid(), self.number)
        return torch.full((100_000,), index)  # so large that it is handed over in shared memory


def loader(dataset, **options):
    return DataLoader(dataset, num_workers=2, prefetch_factor=4, **options)


@pytest.fixture(autouse=True)
def handler():
    others = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a test before may have used a DataLoader of torch
    yield
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
    signal.signal(signal.SIGCHLD, others)


@pytest.mark.parametrize("persistent", [False, True])
def test_it_is_the_loop_over_the_loader(persistent):
    for loading in (loader(Hurt(None), persistent_workers=persistent), DataLoader(Hurt(None))):
        for _ in range(2):
            assert [int(batch[0, 0]) for batch in batches(loading, timeout=60)] == list(range(12))


def consume(loading, *, pause: float, timeout: float = 0.0) -> list[int]:
    """The batches that came, with a pause after the first, in which something happens to a worker."""
    seen = []
    for batch in batches(loading, timeout=timeout):
        seen.append(int(batch[0, 0]))
        try:
            time.sleep(pause if len(seen) == 1 else 0)
        except RuntimeError as error:
            raise AssertionError("raised elsewhere than in the loader") from error
    return seen


@pytest.mark.parametrize("later", [False, True], ids=["before its batch", "after its batch is announced"])
def test_a_death_is_raised_where_the_batch_is_waited_for(later):
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid \d+\) is killed by signal: Killed"):
        consume(loader(Hurt(signal.SIGKILL, later=later)), pause=1)


@pytest.mark.parametrize("later", [False, True], ids=["before its batch", "after its batch is announced"])
def test_a_worker_that_is_stopped_is_ended_after_the_timeout(later):
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="DataLoader timed out after 2 s"):
        consume(loader(Hurt(signal.SIGSTOP, later=later)), pause=0.5, timeout=2)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_run_is_told_as_failed(photos, program, tmp_path, number):
    """Whatever the process does when a worker dies: status.json tells it."""
    setup = "import os, threading, trainer\nfrom trainer.data import FolderImages\nold = FolderImages.__getitem__\n"
    setup += "parent = os.getpid()\ndef get(self, index):\n    if os.getpid() != parent and index % 7 == 6:\n"
    setup += f"        os.kill(os.getpid(), {int(number)})\n    return old(self, index)\nFolderImages.__getitem__ = get"
    options = ["--model", "resnet18", "--weights", "none", "--image-size", "32", "--batch-size", "4", "--workers", "2"]
    options += ["--no-check-data", "--output", "run", "--timeout", 3 / 60]
    done = program("--data", photos, *options, cwd=tmp_path, setup=setup, timeout=60)
    assert done.returncode == 74, done.stderr
    assert "loading images failed: DataLoader" in done.stderr
    assert "cannot write logs" not in done.stderr
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["status"], status["type"]) == ("failed", "OSError")
