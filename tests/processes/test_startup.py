from types import SimpleNamespace

import pytest
import torch
from launching import ROOT

from trainer.errors import UsageError
from trainer.processes import startup, together


def test_start_alone():
    accelerator = startup.start()
    assert accelerator.num_processes == 1
    assert together.main_first(accelerator, lambda: 5) == together.on_main(accelerator, lambda: 5) == 5


@pytest.mark.skipif(torch.accelerator.is_available(), reason="has a GPU")
def test_fp16_on_a_cpu_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(UsageError, match=r"fp16 needs a GPU.*bf16.*no"):
        startup.start()


def test_processes_that_would_each_run_alone_are_refused(monkeypatch):
    accelerator = startup.start()
    monkeypatch.setattr(startup, "Accelerator", lambda **_: accelerator)
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(UsageError, match="started 2 processes, but each of them runs alone"):
        startup.start()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="has a GPU")
@pytest.mark.parametrize("use_cpu", ["True", "False"])
def test_a_launch_for_a_gpu_says_that_there_is_none(monkeypatch, caplog, use_cpu):
    monkeypatch.setenv("ACCELERATE_USE_CPU", use_cpu)
    startup.start()
    assert ("no GPU was found" in caplog.text) is (use_cpu == "False")


@pytest.mark.parametrize("native", [True, False])
def test_bf16_without_instructions_for_it_is_slow_and_says_so(monkeypatch, caplog, native):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: native)
    for precision in ("bf16", "no"):
        about = SimpleNamespace(device=torch.device("cpu"), mixed_precision=precision)
        startup._warn(about, no_gpu=False)
        assert ("launch with --mixed_precision no" in caplog.text) is (precision == "bf16" and not native)
        caplog.clear()


def test_two_processes_take_turns_and_fail_together(program, tmp_path):
    done = program(target=ROOT / "tests" / "support" / "processes_script.py", cwd=tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    lines = sorted((tmp_path / "out.txt").read_text().splitlines())
    assert lines == [
        "0 main raises ValueError: main did",
        "0 main_first raises OSError: process 0 did",
        "0 main_first saw 0 before",
        "0 on_main [0, 'chosen']",
        "1 main raises Elsewhere: process 0 failed: main did",
        "1 main_first raises Elsewhere: process 0 failed: process 0 did",
        "1 main_first saw 1 before",
        "1 on_main [0, 'chosen']",
    ]
