"""A run that is killed, stopped, moved or started again ends in the bits of one that was not. See docs/exactness.md."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import kill_points
import pytest
import torch
from launching import ROOT, TINY_RUN, tiny_run

from trainer.storage import checkpoint

TRAIN = ROOT / "train.py"


def _kill_and_resume(program, folder: Path, events: list[str], *options: str):
    done = program(folder, *events, *options, target=kill_points.__file__, cwd=folder, timeout=1200)
    assert done.stdout.splitlines() == [f"ok {event}" for event in events], done.stdout + done.stderr


def test_killed_at_any_point_it_ends_in_the_same_bits(program, tmp_path):
    _kill_and_resume(program, tmp_path, kill_points.FAST)


@pytest.mark.parametrize(
    "options",
    [["--workers=2"], ["--exact", "--cache"], pytest.param(["--train=all"], marks=pytest.mark.slow), ["--by=TERM"]],
    ids=" ".join,
)
def test_killed_with_other_settings(program, tmp_path, options):
    _kill_and_resume(program, tmp_path, ["step:1", "micro:5:1", "evaluating:1"], *options)


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--workers=2"], ["--exact"], ["--train=all"], ["--cache"]], ids=" ".join)
def test_killed_at_every_point(program, tmp_path, options):
    _kill_and_resume(program, tmp_path, kill_points.ALL, *options)


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--processes=2"], ["--processes=4"], ["--processes=4", "--exact"]], ids=" ".join)
def test_one_of_several_processes_killed(program, tmp_path, options):
    events = [event for event in kill_points.FAST if not event.startswith("micro") or event.endswith(":0")]
    _kill_and_resume(program, tmp_path, events, *options)


@pytest.mark.slow
def test_a_compiled_tail_goes_on_in_the_same_bits_and_is_evaluated_to_the_same_numbers(photos, program, tmp_path):
    options = ["--weights=none", "--image-size=32", "--workers=0", "--epochs=1", "--train", "layer4", "fc"]
    options += ["--compile-tail", "--augment=flip", "--batch-size=10", "--save-every=1", "--keep=99"]
    done = program("--data", photos, *options, "--output=whole", cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr
    *_, before, last = checkpoint.steps(tmp_path / "whole" / "checkpoints")
    done = program("--resume", before, "--output=rest", cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "images/s" in done.stdout
    one, other = (checkpoint.read(tmp_path / run / "checkpoints" / last.name) for run in ("whole", "rest"))
    assert one["metrics"] == other["metrics"]
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
    done = program("evaluate", "--run=whole", "--json", "-", target="trainer", cwd=tmp_path, timeout=600)
    assert json.loads(done.stdout)["all"] == one["metrics"]["val"], done.stderr


@pytest.mark.slow
def test_killed_twenty_times_at_random_moments(tmp_path):
    draw, folder, golden = random.Random(0), tmp_path / "run", tmp_path / "golden"
    for path in (folder, golden):
        path.mkdir()
    command, env = [sys.executable, str(TINY_RUN)], {**os.environ, "OMP_NUM_THREADS": "1"}
    options = ["--workers", "2", "--epochs", "40", "--save-every", "1"]
    subprocess.run([*command, str(golden), *options], env=env, check=True, capture_output=True)
    for _ in range(20):
        process = subprocess.Popen([*command, str(folder), *options], env=env, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=draw.uniform(3, 6))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    subprocess.run([*command, str(folder), *options], env=env, check=True, capture_output=True)
    assert kill_points.difference(golden, folder) == ""


def _alone(program, folder: Path, *options: object, check: bool = True):
    """tiny_run.py --exact on one process, with two threads: neither number may make a difference."""
    setup = "import torch; torch.set_num_threads(2)"
    done = program(folder, "--exact", *options, target=TINY_RUN, cwd=folder.parent, setup=setup)
    assert not check or done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def exact(program, tmp_path_factory):
    """The run that every number of processes must repeat to the bit."""
    folder = tmp_path_factory.mktemp("exact") / "golden"
    _alone(program, folder)
    return folder


@pytest.mark.slow  # the run that moves from 1 to 4 to 2 processes is the short form
@pytest.mark.parametrize("processes", [2, 4])
def test_exact_gives_the_same_bits_on_any_number_of_processes(exact, tmp_path, processes):
    tiny_run(tmp_path / "run", "--exact", "--workers", "1", processes=processes)
    assert kill_points.difference(exact, tmp_path / "run") == ""
    ends = {(tmp_path / "run" / f"end.{rank}.txt").read_text() for rank in range(processes)}
    assert len(ends) == 1


def test_a_run_moved_from_one_to_four_to_two_processes_is_exact(exact, program, tmp_path):
    _alone(program, tmp_path / "run", "--stop", "1")
    killed = ["--exact", "--kill", "step:9", "--kill-rank", "3"]
    assert program(tmp_path / "run", *killed, target=TINY_RUN, cwd=tmp_path, processes=4).returncode != 0
    done = program(tmp_path / "run", "--exact", target=TINY_RUN, cwd=tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    assert kill_points.difference(exact, tmp_path / "run") == ""


@pytest.mark.slow
def test_a_run_moved_from_four_to_one_to_two_processes_is_exact(exact, program, tmp_path):
    tiny_run(tmp_path / "run", "--exact", "--stop", "1", processes=4)
    _alone(program, tmp_path / "run", "--kill", "micro:8:2", check=False)
    tiny_run(tmp_path / "run", "--exact", processes=2)
    assert kill_points.difference(exact, tmp_path / "run") == ""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two processes, reduced by DDP: exact for this number of processes."""
    folder = tmp_path_factory.mktemp("two") / "golden"
    tiny_run(folder, processes=2)
    return folder


@pytest.mark.slow
def test_a_killed_process_of_two_leads_to_the_same_end(two, tmp_path):
    done = tiny_run(tmp_path / "run", "--kill", "step:7", "--kill-rank", "1", processes=2, check=False)
    assert done.returncode != 0
    assert checkpoint.newest(tmp_path / "run" / "checkpoints")[0].name == "step-00000006.pt"
    tiny_run(tmp_path / "run", processes=2)
    assert kill_points.difference(two, tmp_path / "run") == ""


def test_sigterm_to_one_of_two_processes_stops_both_at_the_same_step(exact, program, tmp_path):
    options = ["--exact", "--kill", "step:7", "--kill-rank", "1", "--by", "TERM"]
    done = program(tmp_path / "run", *options, target=TINY_RUN, cwd=tmp_path, processes=2)
    assert done.returncode == 75
    assert checkpoint.newest(tmp_path / "run" / "checkpoints")[0].name == "step-00000007.pt"
    _alone(program, tmp_path / "run")
    assert kill_points.difference(exact, tmp_path / "run") == ""


@pytest.mark.slow
def test_the_launcher_starts_a_killed_run_again_and_it_ends_in_the_same_bits(two, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--max_restarts", "1"]
    command += ["--config_file", str(ROOT / "accelerate_configs" / "cpu_x2.yaml"), str(TINY_RUN), str(tmp_path / "run")]
    (tmp_path / "run").mkdir()
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--kill", "step:7"], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert kill_points.difference(two, tmp_path / "run") == ""


def test_a_nan_on_one_process_stops_all_and_changes_nothing(program, tmp_path):
    sample = 11
    options = ["--nan", sample, "--save-every", "1"]
    done = program(tmp_path / "run", *options, target=TINY_RUN, cwd=tmp_path, processes=2)
    assert done.returncode == 70
    assert "the gradient is not finite in step" in done.stderr
    ledgers = [(tmp_path / "run" / f"ledger.{rank}.jsonl").read_text().splitlines() for rank in (0, 1)]
    assert [json.loads(line)["weights"] for line in ledgers[0]] == [json.loads(line)["weights"] for line in ledgers[1]]
    assert checkpoint.newest(tmp_path / "run" / "checkpoints")[0].name == f"step-{len(ledgers[0]):08d}.pt"


def test_replicas_that_differ_in_one_bit_are_found(program, tmp_path):
    done = program(tmp_path / "run", "--flip", target=TINY_RUN, cwd=tmp_path, processes=2)
    assert done.returncode == 70
    assert "after step 2 the replicas of fc.bias differ: processes [1] from process 0" in done.stderr


# ------------------------------------------------------------------------------------ the program, told to stop


def _wait_for(path: Path, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.05)


SMALL = ["--model", "resnet18", "--weights", "none", "--image-size", "32", "--batch-size", "16", "--workers", "0"]
SMALL += ["--lr", "1e-3"]
LONG = [*SMALL, "--epochs", "100000", "--output", "run"]  # nobody waits for the end of it


def _start(folder: Path, photos: Path, *options: str, launcher: int = 0, start_new_session: bool = False):
    """train.py, alone or as so many processes of a launcher, after its first epoch."""
    command = [sys.executable]
    if launcher:
        name = "cpu" if launcher == 1 else "cpu_x2"
        command += ["-m", "accelerate.commands.launch"]
        command += ["--config_file", str(ROOT / "accelerate_configs" / f"{name}.yaml")]
    process = subprocess.Popen(
        [*command, str(TRAIN), "--data", str(photos), *LONG, *options],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=start_new_session,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    _wait_for(folder / "run" / "metrics.jsonl", process)
    return process


def _check_preempted(folder: Path, reason: str):
    status = json.loads((folder / "run" / "status.json").read_text())
    assert (status["status"], status["reason"]) == ("preempted", reason)
    newest, state = checkpoint.newest(folder / "run" / "checkpoints")
    assert state["step"] == status["step"]
    assert newest.name == status["checkpoint"] == f"step-{status['step']:08d}.pt"


def test_sigterm_to_the_program_saves_and_exits_with_75(photos, tmp_path):
    process = _start(tmp_path, photos)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # again, while it saves: once is enough
    _, stderr = process.communicate(timeout=10)
    assert process.returncode == 75, stderr
    assert "Traceback" not in stderr
    _check_preempted(tmp_path, "SIGTERM")


@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG")
@pytest.mark.parametrize(
    ("processes", "kill"),
    [
        (2, "TERM"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((1, "TERM"), (1, "USR1"), (1, "KILL"), (2, "KILL"), (2, "USR1"))
        ),
    ],
)
def test_a_launcher_that_dies_takes_the_program_with_it_in_good_order(photos, tmp_path, processes, kill):
    process = _start(tmp_path, photos, launcher=processes)
    process.send_signal(signal.Signals[f"SIG{kill}"])
    process.communicate(timeout=10)  # the pipes close when the program, which has them from the launcher, is gone
    _check_preempted(tmp_path, "SIGTERM")


def test_data_workers_outlast_a_signal_to_the_whole_group(photos, tmp_path):
    """As a batch system sends it, or the launcher of several processes."""
    process = _start(tmp_path, photos, "--workers", "2", "--augment", "flip", start_new_session=True)
    os.killpg(process.pid, signal.SIGTERM)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 75, stderr
    _check_preempted(tmp_path, "SIGTERM")


@pytest.mark.slow
def test_a_second_interrupt_ends_at_once_and_leaves_valid_checkpoints(photos, tmp_path):
    process = _start(tmp_path, photos)
    os.kill(process.pid, signal.SIGSTOP)  # both are waiting for it when it goes on
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGINT, signal.SIGCONT):
        os.kill(process.pid, number)
    process.communicate(timeout=10)
    assert process.returncode in (130, 75)
    assert checkpoint.newest(tmp_path / "run" / "checkpoints")[0] is not None


def test_a_time_limit_stops_before_it(photos, program, tmp_path):
    began = time.monotonic()
    done = program("--data", photos, *LONG, "--time-limit", "0.08", cwd=tmp_path)
    assert done.returncode == 75, done.stderr
    assert time.monotonic() - began < 6
    _check_preempted(tmp_path, "time limit")
