"""Two machines on one: network namespaces joined by a cable, and working directories that the other cannot see."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from launching import ROOT

from trainer.storage import checkpoint

pytestmark = pytest.mark.slow
SMALL = ["--model", "resnet18", "--weights", "none", "--image-size", "32", "--batch-size", "16", "--micro-batch", "4"]
SMALL += ["--augment", "none", "--workers", "0"]
SMALL += ["--optimizer", "sgd", "--lr", "0.1"]  # AdamW would hide a gradient of the wrong scale
# The cable never exists outside the namespaces, and is gone when they are.
SETUP = """netns add {0}
netns add {1}
link add eth0 netns {0} type veth peer name eth0 netns {1}
-n {0} address add 10.77.0.1/24 dev eth0
-n {1} address add 10.77.0.2/24 dev eth0
-n {0} link set lo up
-n {1} link set lo up
-n {0} link set eth0 up
-n {1} link set eth0 up"""


def _ip(*arguments: str, check: bool = True) -> str:
    return subprocess.run(["ip", *arguments], check=check, capture_output=True, text=True).stdout


def _remove(namespace: str) -> None:
    """Kill all that runs in a namespace (the launcher's workers have process groups of their own), and delete it."""
    for _ in range(100):  # what is killed can have forked meanwhile, and takes a moment to be gone
        pids = _ip("netns", "pids", namespace, check=False).split()
        if not pids:
            break
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
    _ip("netns", "delete", namespace, check=False)


@pytest.fixture
def machines(tmp_path):
    """Working directories of two machines, and what runs train.py on both: it gives their exit codes and outputs."""
    if shutil.which("ip") is None:
        pytest.skip("needs ip, of iproute2")
    names = [f"machine{rank}-{os.getpid()}" for rank in (0, 1)]
    folders, logs = [tmp_path / "first", tmp_path / "second"], [tmp_path / "first.log", tmp_path / "second.log"]
    processes = []

    def start(rank: int, *arguments: object) -> None:
        hide = ["sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(folders[1 - rank])]  # in this namespace alone
        command = ["ip", "netns", "exec", names[rank], *hide, sys.executable, "-m", "accelerate.commands.launch"]
        command += ["--config_file", str(ROOT / "accelerate_configs" / "multi_node.yaml"), "--num_processes", "2"]
        command += ["--machine_rank", str(rank), "--main_process_ip", "10.77.0.1", "--mixed_precision", "no"]
        command += [str(ROOT / "train.py"), *map(str, arguments)]
        # Two processes cannot share one GPU over NCCL; and gloo would look for the address of the host's name.
        env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1", "GLOO_SOCKET_IFNAME": "eth0"}
        with open(logs[rank], "w") as log:  # a pipe can fill up while the other machine is waited for
            output = {"stdout": log, "stderr": subprocess.STDOUT}
            processes.append(subprocess.Popen(command, cwd=folders[rank], env=env, **output))

    def run(*arguments: object) -> tuple[list[int], list[str]]:
        for rank in (0, 1):
            start(rank, *arguments)
        end = time.monotonic() + 60
        codes = [process.wait(timeout=max(end - time.monotonic(), 0)) for process in processes[-2:]]
        return codes, [log.read_text() for log in logs]

    try:
        for folder in folders:
            folder.mkdir()
        try:
            for line in SETUP.format(*names).splitlines():
                _ip(*line.split())
        except subprocess.CalledProcessError as error:
            pytest.skip(f"{' '.join(error.cmd)}: {error.stderr.strip()}")
        yield folders, run
    finally:
        for name in names:
            _remove(name)
        for process in processes:
            process.wait(timeout=10)
        for log in filter(os.path.exists, logs):  # shown if the test failed
            print(f"---- {log.name}\n{log.read_text()}")


def test_two_machines_train_and_resume_as_one_process_does(machines, photos, program, tmp_path):
    (first, second), run = machines
    alone = tmp_path / "alone"
    alone.mkdir()
    start = ["--data", photos, *SMALL, "--epochs", "2"]
    resume = ["--data", photos, "--resume", "auto", "--epochs", "3"]  # the rest is known to the first machine alone
    for arguments, step, says in ((start, 8, "epoch 1/2"), (resume, 12, "epoch 2 of 3 done, step 8")):
        codes, outputs = run(*arguments)
        assert codes == [0, 0]
        assert "batch 16 = micro-batch 4 × 2 processes × accumulation 2" in outputs[0]
        assert says in outputs[0]
        assert "epoch" not in outputs[1], "one process speaks"
        assert (os.listdir(first), os.listdir(second)) == (["runs"], [])

        done = program(*arguments, cwd=alone, env={"CUDA_VISIBLE_DEVICES": "-1"})
        assert done.returncode == 0, done.stderr
        name = f"runs/{photos.name}-resnet18/checkpoints/step-{step:08d}.pt"
        one, two = (checkpoint.read(folder / name) for folder in (alone, first))
        momentum = [state["optimizer"]["state"] for state in (one, two)]
        assert one["model"].keys() == two["model"].keys() == momentum[1].keys() == {"fc.weight", "fc.bias"}
        for key, value in one["model"].items():
            pairs = (value, two["model"][key]), [state[key]["momentum_buffer"] for state in momentum]
            assert all(((a - b).norm() / a.norm()).item() < 1e-5 for a, b in pairs), key
        assert two["metrics"]["val"]["accuracy"] == one["metrics"]["val"]["accuracy"]
        assert two["metrics"]["val"]["loss"] == pytest.approx(one["metrics"]["val"]["loss"], rel=1e-5)


def test_data_that_one_machine_lacks_ends_both(machines, photos):
    (first, second), run = machines
    (first / "photos").symlink_to(photos)
    codes, outputs = run("--data", first / "photos", *SMALL, "--epochs", "1")
    assert 0 not in codes
    assert all(f"no folder '{first / 'photos'}'" in output for output in outputs)
    assert (os.listdir(first), os.listdir(second)) == (["photos"], [])
