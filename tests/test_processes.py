import os

import pytest
import torch
from conftest import ROOT

from trainer import processes
from trainer.errors import DataError, UsageError


def test_start_alone():
    accelerator = processes.start()
    assert accelerator.num_processes == 1
    assert processes.in_turn(accelerator, lambda: 5) == processes.from_main(accelerator, lambda: 5) == 5


@pytest.mark.skipif(torch.accelerator.is_available(), reason="has a GPU")
def test_fp16_on_a_cpu_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(UsageError, match=r"fp16 needs a GPU.*bf16.*no"):
        processes.start()


def test_processes_that_would_each_run_alone_are_refused(monkeypatch):
    accelerator = processes.start()
    monkeypatch.setattr(processes, "Accelerator", lambda **_: accelerator)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="started 2 processes, but each of them runs alone"):
        processes.start()


def test_fail_prints_one_line_and_gives_the_exit_code(capsys):
    assert processes.fail(UsageError("wrong")) == 2
    assert processes.fail(DataError("bad")) == 65
    assert processes.fail(OSError(28, "No space left on device")) == 74
    assert processes.fail(processes.Elsewhere(1, "DataError", 65, "bad")) == 65
    assert capsys.readouterr().err.splitlines()[:2] == ["error: wrong", "error: bad"]


def test_what_all_processes_of_a_machine_find_is_said_once(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert processes.fail(UsageError("wrong")) == 2
    assert processes.fail(processes.Elsewhere(0, "DataError", 65, "bad")) == 65
    assert processes.fail(DataError("my bad")) == 65
    assert capsys.readouterr().err == "error: my bad\n"


def test_cores_are_shared(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    accelerator = processes.start()
    assert processes.cores_per_process(accelerator) == 12
    monkeypatch.setattr(processes, "_QUOTA", tmp_path / "cpu.max")
    for quota, cores in (("max 100000", 12), ("350000 100000", 3), ("50000 100000", 1)):
        processes._QUOTA.write_text(f"{quota}\n")
        assert processes.cores_per_process(accelerator) == cores
    processes._QUOTA.unlink()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    assert processes.cores_per_process(accelerator) == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "50")
    assert processes.cores_per_process(accelerator) == 1


def test_two_processes_take_turns_and_fail_together(program, tmp_path):
    done = program(target=ROOT / "tests" / "processes_script.py", cwd=tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    lines = sorted((tmp_path / "out.txt").read_text().splitlines())
    assert lines == [
        "0 from_main [0, 'chosen']",
        "0 in_turn raises OSError: process 0 did",
        "0 in_turn saw 0 before",
        "0 main raises ValueError: main did",
        "1 from_main [0, 'chosen']",
        "1 in_turn raises Elsewhere: process 0 failed: process 0 did",
        "1 in_turn saw 1 before",
        "1 main raises Elsewhere: process 0 failed: main did",
    ]
