"""Kill or fail a save at every one of its file operations, and look at what is left; used by test_files.py.

    python tests/support/save_points.py FOLDER

Every save is a fork of this process. Prints one line per case: "ok CASE" or "BAD CASE: what is wrong".
"""

import os
import signal
import sys
from pathlib import Path

import torch
from states import made_state

from trainer.storage import checkpoint, files
from trainer.storage.state import State

OPERATIONS = [name for name in vars(files.Ops) if not name.startswith("_")]


class Watched(files.Ops):
    """Writes down every operation; calls `first` before and `then` after each, with its number, counted from 1."""

    def __init__(self, *, first=lambda number: None, then=lambda number: None):
        self.log: list[tuple[str, str]] = []
        self.first, self.then = first, then


def _watch(name: str):
    original = getattr(files.Ops, name)

    def watched(self, target, *rest):
        self.first(len(self.log) + 1)
        result = original(self, target, *rest)
        self.log.append((name, Path(getattr(target, "name", target)).name))
        self.then(len(self.log))
        return result

    return watched


for operation in OPERATIONS:
    setattr(Watched, operation, _watch(operation))


class Torn(files.Ops):
    """Dies in the middle of the first write."""

    def write(self, file, data):
        file.write(data[: len(data) // 2])
        file.flush()
        die()


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def state(step: int) -> State:
    return made_state(step=step, model={"fc.weight": torch.full((30, 30), float(step))})


def in_fork(ops: files.Ops, folder: Path, step: int) -> int:
    pid = os.fork()
    if pid == 0:
        files.ops = ops
        checkpoint.save(folder, state(step), best=state(step))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def problems(folder: Path) -> list[str]:
    """What is wrong after a save of step 30 died, in a folder that held 10 and 20; then after the next save."""
    found = []
    for path in [*checkpoint.steps(folder), folder / "best.pt"]:
        try:
            checkpoint.verify(path)
        except (ValueError, OSError) as error:
            found.append(str(error))
    newest = checkpoint.steps(folder)[-1].name
    if newest not in ("step-00000020.pt", "step-00000030.pt"):
        found.append(f"newest is {newest}")
    checkpoint.save(folder, state(40))
    expected = {"best.pt", "step-00000040.pt", newest}
    if set(os.listdir(folder)) != expected:
        found.append(f"the next save leaves {sorted(os.listdir(folder))}")
    return found


def main(root: Path) -> None:
    whole = Watched()
    files.ops = whole
    for step in (10, 20, 30):
        whole.log.clear()
        checkpoint.save(root / "whole", state(step), best=state(step))
    files.ops = files.Ops()
    cases = {f"{number} {' '.join(done)}": number for number, done in enumerate(whole.log, 1)} | {"torn write": 0}
    for case, number in cases.items():
        folder = root / case.replace(" ", "-")
        for step in (10, 20):
            checkpoint.save(folder, state(step), best=state(step))
        ops = Watched(then=lambda count, number=number: die() if count == number else None) if number else Torn()
        died = in_fork(ops, folder, 30)
        found = problems(folder) if died == -signal.SIGKILL else [f"it ended with {died}"]
        print(f"BAD {case}: {found}" if found else f"ok {case}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
