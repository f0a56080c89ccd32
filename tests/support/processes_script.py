"""Run on two processes by test_processes.py: each writes what it saw."""

import os
from pathlib import Path

from trainer.processes import startup, together

accelerator = startup.start()
rank = accelerator.process_index
turns = Path("turns")


def note(text: str) -> None:
    with open("out.txt", "a") as file:
        file.write(f"{rank} {text}\n")


def take_a_turn() -> int:
    before = turns.read_text() if turns.exists() else ""
    turns.write_text(before + "x")
    return len(before)


def raise_on_main() -> None:
    if rank == 0:
        raise OSError(f"process {rank} did")


def raise_always() -> None:
    raise ValueError("main did")


note(f"main_first saw {together.main_first(accelerator, take_a_turn)} before")
note(f"on_main {together.on_main(accelerator, lambda: [rank, 'chosen'])}")
for title, function, call in (
    ("main_first", together.main_first, raise_on_main),
    ("main", together.on_main, raise_always),
):
    try:
        function(accelerator, call)
    except Exception as error:
        note(f"{title} raises {type(error).__name__}: {error}")
assert int(os.environ["WORLD_SIZE"]) == 2
accelerator.end_training()
