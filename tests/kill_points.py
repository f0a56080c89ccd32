"""Kill a tiny run at every point of its life, resume it, and compare; used by test_exactness.py.

    python tests/kill_points.py FOLDER [EVENT ...]       # all events without any

Every run is a fork of this process, which has imported torch and not yet used it: a run takes a third of a second.
Prints one line per event: "ok EVENT" or "BAD EVENT: what differs first".
"""

import json
import os
import sys
from pathlib import Path

import tiny_run

import trainer

for name in trainer.__all__:
    getattr(trainer, name)  # imported here once, instead of in every fork

FAST = [
    *("start", "micro:1:0", "step:1", "step:2", "saved:2", "micro:5:1", "micro:4:3", "step:5", "trained:0"),
    *("evaluating:0", "evaluated:0", "saved:5", "fsync:1", "replace:1", "fsync:2", "fsync:5", "replace:3", "pruned:3"),
    *("step:14", "step:15", "trained:2", "evaluating:2", "saved:15", "done"),
]
ALL = [
    *("start", "done"),
    *(f"step:{step}" for step in range(1, 16)),
    *(f"micro:{step}:{number}" for step in (1, 4, 5, 6, 10, 15) for number in range(3)),
    *(f"{name}:{epoch}" for name in ("trained", "evaluating", "evaluated") for epoch in range(3)),
    *(
        f"{name}:{count}"
        for name, most in (("fsync", 20), ("replace", 10), ("pruned", 10))
        for count in range(1, most + 1)
    ),
    *(f"saved:{step}" for step in (2, 4, 5, 6, 8, 10, 12, 14, 15)),
]


def child(folder: Path, *options: str) -> int:
    """Run tiny_run in a fork; gives its exit code, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            sys.stderr = open(folder / "stderr.txt", "a")  # noqa: SIM115
            tiny_run.run(tiny_run.parser.parse_args([str(folder), *options]))
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def difference(golden: Path, folder: Path) -> str:
    """The first line and field in which two ledgers differ, or the final state; empty if nothing does."""
    left, right = ((path / "ledger.0.jsonl").read_text().splitlines() for path in (golden, folder))
    for one, other in zip(left, right, strict=False):
        if one != other:
            one, other = json.loads(one), json.loads(other)
            return f"step {one['step']}: " + ", ".join(key for key in one if one[key] != other.get(key))
    if len(left) != len(right):
        return f"{len(left)} steps, {len(right)} steps"
    one, other = ((path / "end.0.txt").read_text() for path in (golden, folder))
    return "" if one == other else "final state"


def main(root: Path, events: list[str], options: list[str]) -> int:
    golden = root / "golden"
    golden.mkdir(parents=True)
    assert child(golden, *options) == 0, (golden / "stderr.txt").read_text()
    bad = 0
    for event in events:
        folder = root / event.replace(":", "-")
        folder.mkdir()
        killed = child(folder, *options, "--kill", event)
        again = child(folder, *options)
        problem = difference(golden, folder) if again == 0 else (folder / "stderr.txt").read_text()[-800:]
        if killed != -9:
            problem = f"was not killed: {killed}"
        if leftover := list((folder / "checkpoints").glob(".tmp-*")):
            problem = f"left {leftover}"
        print(f"BAD {event}: {problem}" if problem else f"ok {event}", flush=True)
        bad += bool(problem)
    return bad


if __name__ == "__main__":
    folder, *rest = sys.argv[1:]
    options = [word for word in rest if word.startswith("--")]
    chosen = [word for word in rest if not word.startswith("--")]
    raise SystemExit(main(Path(folder), chosen or ALL, options))
