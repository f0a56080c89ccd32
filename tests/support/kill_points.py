"""Kill a tiny run at every point of its life, resume it, and compare; used by test_exactness.py.

    python tests/support/kill_points.py FOLDER [EVENT ...] [--processes=N] [--kill-rank=R]  # no event: all

Every process is a fork of this one, which has imported torch and not yet used it: a run takes a third of a second.
When one of several dies, the others are ended, as the launcher would.
Prints one line per event: "ok EVENT" or "BAD EVENT: what differs first".
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import tiny_run
from launching import free_port, join

import trainer

for name in trainer.__all__:
    getattr(trainer, name)  # imported here once, instead of in every fork

FAST = [
    *("start", "micro:1:0", "step:1", "saved:2", "micro:5:1", "micro:4:3", "trained:0", "evaluating:0", "evaluated:0"),
    *("fsync:1", "replace:1", "fsync:5", "pruned:3", "step:15", "saved:15", "done"),
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


def child(folder: Path, *options: str, processes: int = 1) -> list[int]:
    """Run tiny_run in forks; gives their exit codes, negative for a signal."""
    port = free_port()
    ranks = [_fork(folder, options, rank, processes, port) for rank in range(processes)]
    codes: dict[int, int] = {}
    while len(codes) < processes:
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid] != 0:
            time.sleep(0.2)
            for other in set(ranks) - codes.keys():
                os.kill(other, signal.SIGKILL)
    return [codes[pid] for pid in ranks]


def _fork(folder: Path, options: tuple[str, ...], rank: int, processes: int, port: int) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            join(rank, processes, port)
            sys.stderr = open(folder / "stderr.txt", "a")  # noqa: SIM115
            tiny_run.run(tiny_run.parser.parse_args([str(folder), *options]))
            code = 0
        except trainer.Preempted as stop:
            code = stop.exit_code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


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


def main(root: Path, events: list[str], options: list[str], processes: int) -> int:
    golden = root / "golden"
    golden.mkdir(parents=True)
    assert not any(child(golden, *options, processes=processes)), (golden / "stderr.txt").read_text()
    bad = 0
    for event in events:
        folder = root / event.replace(":", "-")
        folder.mkdir()
        killed = child(folder, *options, "--kill", event, processes=processes)
        again = child(folder, *options, processes=processes)
        problem = (folder / "stderr.txt").read_text()[-800:] if any(again) else difference(golden, folder)
        if (75 if "--by=TERM" in options else -signal.SIGKILL) not in killed:
            problem = f"was not killed: {killed}"
        if leftover := list((folder / "checkpoints").glob(".tmp-*")):
            problem = f"left {leftover}"
        print(f"BAD {event}: {problem}" if problem else f"ok {event}", flush=True)
        bad += bool(problem)
    return bad


if __name__ == "__main__":
    folder, *rest = sys.argv[1:]
    processes = [int(word.removeprefix("--processes=")) for word in rest if word.startswith("--processes=")]
    options = [word for word in rest if word.startswith("--") and not word.startswith("--processes=")]
    chosen = [word for word in rest if not word.startswith("--")]
    raise SystemExit(main(Path(folder), chosen or ALL, options, *(processes or [1])))
