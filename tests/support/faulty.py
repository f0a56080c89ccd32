"""train.py with something broken in it: runs the Python code in $FAULT first, and notes in $STAMP when it breaks."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import train
import trainer
from trainer.cli import parse

RANK = int(os.environ.get("RANK", "0"))


def break_in(owner, name: str, action, *, call: int = 1, rank: int = 1) -> None:
    """Do `action` in the `call`-th call of a function, on one process."""
    original, calls = getattr(owner, name), []

    def broken(*args, **kwargs):
        calls.append(name)
        if rank == RANK and len(calls) == call:
            Path(os.environ["STAMP"]).touch()
            action()
        return original(*args, **kwargs)

    setattr(owner, name, broken)


def fail():
    raise LookupError("something broke")


exec(os.environ["FAULT"])
trainer.run_and_exit(train.main, parse(train.__doc__))
