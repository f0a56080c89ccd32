"""Runs Python programs again and again without importing torch again: each process is a fork of this one, which has
imported everything and used nothing yet. Reads jobs from stdin, one JSON object a line, and answers each with one; see
`launching.Program`.
"""

import importlib
import json
import os
import pkgutil
import runpy
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from launching import free_port, join  # noqa: E402

import trainer  # noqa: E402

for module in pkgutil.walk_packages(trainer.__path__, "trainer."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)


def child(job: dict, rank: int, port: int, out: int, err: int) -> None:
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.chdir(job["cwd"])
    trainer.processes.preemption.BEGAN = time.monotonic()
    os.environ.update(job["env"])
    join(rank, job["processes"], port)
    target = job["target"]
    sys.argv = [target, *job["arguments"]]
    code = 0
    try:
        exec(job["setup"], {})
        if target.endswith(".py"):
            runpy.run_path(target, run_name="__main__")
        else:
            runpy.run_module(target, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(job: dict) -> dict:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        port, ranks = free_port(), []
        for rank in range(job["processes"]):
            ranks.append(os.fork())
            if ranks[-1] == 0:
                child(job, rank, port, out.fileno(), err.fileno())
        codes = wait(ranks, job["timeout"])
        for file in (out, err):
            file.seek(0)
        code = next((codes[pid] for pid in ranks if codes[pid] != 0), 0)
        return {"returncode": code, "stdout": out.read(), "stderr": err.read(), "pid": ranks[0]}


def wait(ranks: list[int], timeout: float) -> dict[int, int]:
    """Exit codes; as a launcher does, end all when one fails, after the time they need to notice it by themselves."""
    end, codes = time.monotonic() + timeout, {}
    while waiting := [pid for pid in ranks if pid not in codes]:
        for pid in waiting:
            if (found := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(found[1])
                if codes[pid] != 0:
                    end = min(end, time.monotonic() + 15)
            elif time.monotonic() > end:
                os.killpg(pid, signal.SIGKILL)
        time.sleep(0.01)
    return codes


print("ready", flush=True)
for line in sys.stdin:
    print(json.dumps(run(json.loads(line))), flush=True)
