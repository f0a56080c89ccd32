"""macOS and Windows, as far as Linux can play them: what they lack is hidden, and one process does a whole run."""

import os
import subprocess
import sys

import pytest
from launching import ROOT, search_path

# Other packages are imported before: they know these systems themselves.
HIDE = """
import importlib, os, pkgutil, runpy, signal, sys
import accelerate, PIL.Image, safetensors.torch, torch, torch.utils.tensorboard, torchvision.transforms.v2, tqdm.auto
import torch._dynamo, torch.distributed.elastic.multiprocessing.errors, torch.testing, typeguard, tyro, yaml
missing = dict(
    macos=["os.posix_fallocate", "os.posix_fadvise", "os.sched_getaffinity", "os.pidfd_open"],
    windows=["fcntl", "resource", "pwd", "grp", "termios", "signal.SIGUSR1", "signal.SIGKILL", "signal.SIGCHLD",
             "signal.SIGHUP", "os.fork", "os.pwrite", "os.pread", "os.O_DIRECTORY", "os.getuid",
             "os.posix_fallocate", "os.posix_fadvise", "os.sched_getaffinity", "os.pidfd_open"],
)[sys.argv[1]]
for name in missing:
    owner, _, attribute = name.rpartition(".")
    if owner:
        delattr({"os": os, "signal": signal}[owner], attribute)
    else:
        sys.modules[name] = None
if sys.argv[1] == "macos":
    torch.backends.mkldnn.is_available, torch.ops.mkldnn = lambda: False, None
    torch.multiprocessing.set_start_method("spawn")  # of data workers
opened, killed = os.open, os.kill
def no_folder(path, *rest, **options):
    if sys.argv[1] == "windows" and os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return opened(path, *rest, **options)
def no_question(pid, number):
    if number == 0 and sys.argv[1] == "windows":
        raise AssertionError("this is Ctrl-C on Windows")
    return killed(pid, number)
os.open, os.kill = no_folder, no_question
import trainer
from trainer.processes import identity
from pathlib import Path
identity._PROC = Path("/nowhere")
for module in pkgutil.walk_packages(trainer.__path__, "trainer."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
program, system = sys.argv.pop(2), sys.argv.pop(1)
sys.argv[0] = program
if program.endswith(".py"):
    runpy.run_path(program, run_name="__main__")
else:
    runpy.run_module(program, run_name="__main__", alter_sys=True)
"""


def _run(system: str, program: str, *arguments: str, cwd):
    env = {**os.environ, "PYTHONPATH": search_path(), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", HIDE, system, program, *arguments]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=200)


@pytest.mark.slow
def test_a_mac_trains_with_one_process(tmp_path):
    options = ["--image-size", "32", "--lr", "0.1", "--epochs", "1", "--output", "run", "--cache-dir", "kept"]
    options += ["--workers", "1"]
    done = _run("macos", str(ROOT / "train.py"), *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "done: best validation epoch 1" in done.stdout
    assert done.stderr == ""
    assert list((tmp_path / "kept").rglob("entry.json"))


@pytest.mark.slow
def test_windows_trains_resumes_and_verifies_with_one_process(tmp_path):
    train = (str(ROOT / "train.py"), "--image-size", "32", "--lr", "0.1", "--output", "run")
    for epochs, more in ((1, []), (2, ["--resume", "auto"])):
        done = _run("windows", *train, "--epochs", str(epochs), *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert f"done: best validation epoch {epochs}" in done.stdout
        assert "Traceback" not in done.stderr
        assert "its file system has no locks" in done.stderr
    done = _run("windows", "trainer", "verify", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ok ") == 3
