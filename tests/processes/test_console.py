import subprocess
import sys

import pytest
from launching import ROOT, search_path

CONSOLES = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


@pytest.mark.parametrize("name", CONSOLES)
def test_any_text_can_be_printed(name):
    code = "import sys\nfrom trainer.processes.console import accept_any_text\naccept_any_text()\n"
    code += "for stream in (sys.stdout, sys.stderr): print('32 \\u2192 64, \\u732b, \\udcff', file=stream)"
    env = {"PYTHONPATH": search_path(), "PATH": "/usr/bin", **CONSOLES[name]}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr
    assert done.stdout.startswith(b"32 \\u2192 64")


@pytest.mark.parametrize(
    "command",
    [
        ["train.py", "--help"],
        ["train.py", "--data", "猫→"],
        ["-m", "trainer", "inspect", "猫→"],
        ["-m", "trainer", "inspect", "resnet18"],
    ],
)
def test_programs_speak_to_any_console(command):
    env = {"PYTHONPATH": search_path(), "PATH": "/usr/bin", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True)
    wrong = "猫→" in command
    assert done.returncode == (2 if wrong else 0), done.stderr
    assert b"UnicodeEncodeError" not in done.stderr
    if wrong:
        assert rb"\u732b\u2192" in done.stderr
