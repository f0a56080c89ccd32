"""A process that fails, is killed or is stopped ends all of them, and is named."""

import json
import time

import pytest
from launching import ROOT, launch

from trainer.processes import startup, watch
from trainer.storage import checkpoint

TIMEOUT = 8  # seconds, which the processes wait for each other
SMALL = ["--model", "resnet18", "--weights", "none", "--image-size", "32", "--batch-size", "8", "--epochs", "3"]
SMALL += ["--augment", "none", "--workers", "0", "--save-every", "5", "--output", "run"]
STEP = "break_in(trainer.Trainer, '_update', {}, call=8, rank={})"
STOP, KILL = (f"import signal\nhurt = lambda: os.kill(os.getpid(), signal.{name})\n" for name in ("SIGSTOP", "SIGKILL"))
SLEEP = "import time\nbreak_in(trainer.Logs, 'show_predictions', lambda: time.sleep(60), rank=0)\n"
SAVE = "from trainer.storage import checkpoint\n"
BROKE = "LookupError", "something broke"
# Name → what is broken, on which process, and what is to be said of it.
FAULTS = {
    "step": (STEP.format("fail", 1), 1, *BROKE),
    "stopped": (STOP + STEP.format("hurt", 1), 1, "Lost", "no sign of life"),
    "killed": (KILL + STEP.format("hurt", 1), 1, "Lost", "it was killed"),
    "main process killed": (KILL + STEP.format("hurt", 0), 0, "Lost", "it was killed"),
    "main process stopped": (STOP + STEP.format("hurt", 0), 0, "Lost", "no sign of life"),
    "evaluation": ("break_in(trainer.Trainer, 'evaluate', fail, call=2)", 1, *BROKE),
    "images": (
        "from trainer.data import FolderImages\nbreak_in(FolderImages, '__getitem__', fail, call=40)",
        1,
        *BROKE,
    ),
    "save": (SAVE + "break_in(checkpoint, 'prune', fail, call=2, rank=0)", 0, *BROKE),
    "between collectives": (SLEEP + "break_in(trainer.Trainer, 'finish_epoch', fail)", 1, *BROKE),
}
QUICK = {"killed"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in FAULTS])
def test_all_end_together_and_say_who_began(photos, tmp_path, name):
    fault, rank, kind, says = FAULTS[name]
    env = {"FAULT": fault, "STAMP": str(tmp_path / "when")}
    options = ["--data", photos, *SMALL, "--timeout", TIMEOUT / 60]
    done = launch(ROOT / "tests" / "support" / "faulty.py", *options, cwd=tmp_path, config="cpu_x2", env=env)
    assert time.time() - (tmp_path / "when").stat().st_mtime < TIMEOUT + 15
    assert done.returncode != 0
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    error = json.loads((tmp_path / "run" / "error.json").read_text())
    assert (status["status"], status["rank"], status["type"]) == ("failed", rank, kind), done.stderr
    assert (error["rank"], error["type"]) == (rank, kind)
    assert says in status["message"] == error["message"]
    assert says in done.stderr, "the launcher prints it, or a process that is left"
    assert "Traceback" in error["traceback"] or kind == "Lost"
    if name not in ("images", "between collectives"):
        assert checkpoint.newest(tmp_path / "run" / "checkpoints") is not None


def test_alone_there_is_nobody_to_watch():
    startup.start(timeout=1)
    assert watch.Watch.current is None
    error = ValueError("mine")
    assert watch.explained(error) is error
    assert watch.details(error, 0)["message"] == "mine"


def test_what_a_dead_worker_says_is_explained():
    killed = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. \nDetails")
    assert isinstance(watch.explained(killed), OSError)
    assert "killed by signal: Killed. A worker that is killed usually means" in str(watch.explained(killed))


@pytest.mark.parametrize("other", [{"boot": "another"}, {"namespace": "pid:[1]"}, {"began": "7"}])
def test_machines_of_one_name_and_number_are_not_taken_for_this_one(program, tmp_path, other):
    """Process 1 is on a machine that looks like this one, with a number that nobody has here: a healthy run."""
    setup = "import os\nfrom dataclasses import replace\nfrom trainer.processes.identity import Identity\n"
    setup += "old = Identity.of\ndef of(pid=None):\n    if pid is None and os.environ['RANK'] == '1':\n"
    setup += f"        return replace(old(), pid=2**22 - 1, **{other})\n    return old(pid)\nIdentity.of = of\n"
    setup += "from trainer.processes import watch\nwatch._GRACE = 0.1\n"
    setup += "import time, trainer\nold_logs = trainer.Logs.__init__\ndef slow(self, *a, **k):\n"
    setup += "    time.sleep(3)\n    old_logs(self, *a, **k)\ntrainer.Logs.__init__ = slow"
    done = program("--epochs", "1", "--workers", "0", "--output", "run", cwd=tmp_path, processes=2, setup=setup)
    assert done.returncode == 0, done.stderr
