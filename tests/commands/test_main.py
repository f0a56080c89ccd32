"""`python -m trainer`: help at once, one message for a mistake."""

import signal
import subprocess
import sys

import pytest
from launching import ROOT


def test_help_does_not_wait_for_torch():
    code = "import sys; sys.argv = ['trainer', 'predict', '--help']\nimport runpy\n"
    code += "try: runpy.run_module('trainer', run_name='__main__')\n"
    code += "except SystemExit as stop: print(stop.code, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "Classify image files." in done.stdout
    assert done.stdout.endswith("0 False\n")
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["frobnicate"], 2, "inspect, verify, evaluate, predict, export"),
        (["verify", "nowhere"], 65, "error: nowhere: there is no checkpoint and no export here."),
        (
            ["export", "--run", "nowhere", "--formats", "pickle"],
            2,
            "error: --formats pickle: a pickle of the whole model",
        ),
    ],
)
def test_a_mistake_is_one_message(arguments, code, says, program, tmp_path):
    done = program(*arguments, target="trainer", cwd=tmp_path)
    assert done.returncode == code
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_interrupted_while_torch_is_imported_it_ends_in_silence():
    code = "import os, signal, sys\nclass Stop:\n"
    code += "    def find_spec(self, name, *_): name == 'torch' and os.kill(os.getpid(), signal.SIGINT)\n"
    code += "sys.meta_path.insert(0, Stop()); sys.argv = ['trainer', 'verify', 'nowhere']\n"
    code += "import runpy; runpy.run_module('trainer', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


@pytest.mark.parametrize(
    ("program", "begins"), [("-m trainer inspect resnet152 --depth 9", "module"), ("train.py --help", "usage")]
)
def test_a_closed_pipe_is_no_error(program, begins):
    program = f"{sys.executable} {program} | head -1"
    done = subprocess.run(program, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith(begins)
    assert done.stderr == ""
