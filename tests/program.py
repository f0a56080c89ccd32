"""Runs train.py again and again without importing torch again: each run is a fork of this process, which has not used
it yet. Reads jobs from stdin, one JSON object a line, and answers each with one; see `conftest.Program`.
"""

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
import trainer
from trainer.config import parse

for name in trainer.__all__:
    getattr(trainer, name)


def child(job: dict, out: int, err: int) -> None:
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.chdir(job["cwd"])
    os.environ.update(job["env"])
    sys.argv = ["train.py", *job["arguments"]]
    code = 1
    try:
        exec(job["setup"], {})
        trainer.run_and_exit(train.main, parse(train.__doc__))
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(job: dict) -> dict:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        pid = os.fork()
        if pid == 0:
            child(job, out.fileno(), err.fileno())
        end = time.monotonic() + job["timeout"]
        while not (found := os.waitpid(pid, os.WNOHANG))[0]:
            if time.monotonic() > end:
                os.killpg(pid, signal.SIGKILL)
            time.sleep(0.01)
        for file in (out, err):
            file.seek(0)
        code = os.waitstatus_to_exitcode(found[1])
        return {"returncode": code, "stdout": out.read(), "stderr": err.read(), "pid": pid}


for line in sys.stdin:
    print(json.dumps(run(json.loads(line))), flush=True)
