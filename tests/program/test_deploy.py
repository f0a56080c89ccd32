"""The container, the Slurm script and the Kubernetes job, as far as this machine can run or read them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from launching import ROOT, search_path

from trainer import errors
from trainer.cli import parse

ALONE = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]
LAUNCH = [sys.executable, str(ROOT / "deploy" / "launch.py")]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search_path(), "CUDA_VISIBLE_DEVICES": ""}
SMALL = ["--lr", "0.1", "--image-size", "32"]


def _lines(text: str, word: str) -> list[str]:
    """The arguments of an instruction of a Dockerfile, one string for each time."""
    joined = text.replace("\\\n", " ")
    return re.findall(rf"^{word} (.*)$", joined, re.MULTILINE)


@contextmanager
def _running(command, *, until: Path, **options):
    """A process that has made a file; killed at the end."""
    process = subprocess.Popen(command, text=True, **options)
    try:
        for _ in range(600):
            if until.exists() or process.poll() is not None:
                break
            time.sleep(0.1)
        assert until.exists(), f"ended with {process.poll()}"
        yield process
    finally:
        for one in [*psutil.Process(process.pid).children(recursive=True), process] if process.poll() is None else ():
            one.kill()
        process.wait()


@pytest.fixture
def checkout(tmp_path):
    """A folder with what a job needs, and a train.py of the test."""
    for name in ("deploy", "accelerate_configs"):
        (tmp_path / name).symlink_to(ROOT / name)

    def write(code: str) -> Path:
        (tmp_path / "train.py").write_text("import os, signal, sys, time\nfrom pathlib import Path\n" + code)
        return tmp_path

    return write


WAITS = """
signal.signal(signal.SIGTERM, lambda *about: (time.sleep(0.3), Path("saved").touch(), os._exit(75)))
Path("ready").touch()
time.sleep(60)
"""


def test_the_container_trains_saves_when_it_is_stopped_and_goes_on(tmp_path):
    """The ENTRYPOINT and the CMD of the Dockerfile as process 1."""
    if subprocess.run([*ALONE, "true"], capture_output=True).returncode:
        pytest.skip("no namespaces here")
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    entry, command = (json.loads(_lines(text, word)[-1]) for word in ("ENTRYPOINT", "CMD"))
    assert entry == ["python", "deploy/launch.py"]
    for name in ("deploy", "accelerate_configs", "train.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    process_1, output = [*ALONE, sys.executable, entry[1], *command, *SMALL], tmp_path / "runs" / "digits"
    checkpoints = output / "checkpoints"
    with _running([*process_1, "--epochs", "9000"], until=checkpoints / "best.pt", cwd=tmp_path, env=ENV) as unshare:
        (container,) = psutil.Process(unshare.pid).children()
        container.terminate()
        assert unshare.wait(timeout=60) == 75
    status = json.loads((output / "status.json").read_text())
    assert status["status"] == "preempted"
    assert status["launcher"]["pid"] == 1
    done = subprocess.run(
        [*process_1, "--epochs", str(status["epoch"] + 1)], cwd=tmp_path, env=ENV, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"resume  runs/digits/checkpoints/{status['checkpoint']}" in done.stdout


@pytest.mark.parametrize(("config", "code"), [("cpu", 0), ("cpu", 2), ("cpu_x2", 65)])
def test_the_exit_code_is_that_of_the_program(checkout, config, code):
    folder = checkout(f"sys.exit({code})")
    done = subprocess.run(
        [*LAUNCH, "--config_file", f"accelerate_configs/{config}.yaml", "train.py"],
        cwd=folder, env=ENV, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("config", "number"), [("cpu", signal.SIGUSR1), ("cpu_x2", signal.SIGTERM)])
def test_a_signal_lets_the_program_save(checkout, config, number):
    folder = checkout(WAITS)
    command = [*LAUNCH, "--config_file", f"accelerate_configs/{config}.yaml", "train.py"]
    with _running(command, until=folder / "ready", cwd=folder, env=ENV) as process:
        process.send_signal(number)
        assert process.wait(timeout=60) == 75
    assert (folder / "saved").exists()


@pytest.fixture
def slurm(tmp_path):
    """The commands of Slurm that the script calls: one node, on which a step is a child of srun."""
    folder = tmp_path / "bin"
    folder.mkdir()
    srun = 'while [ "${1#--}" != "$1" ]; do shift; done\nexport SLURM_NODEID=0\necho "$@" > srun.txt\nexec "$@"\n'
    scontrol = 'echo "$@" >> scontrol.txt\ncase $1 in show) echo "JobState=$STATE node1";; esac\n'
    for name, text in {"srun": srun, "scontrol": scontrol}.items():
        (folder / name).write_text("#!/bin/bash\n" + text)
        (folder / name).chmod(0o755)
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    job = {"SLURM_JOB_ID": "77", "CONFIG": "cpu.yaml", "STATE": "RUNNING"}
    return {**{name: value for name, value in ENV.items() if not name.startswith("SLURM")}, "PATH": path, **job}


def _requeued(folder: Path) -> bool:
    said = (folder / "scontrol.txt").read_text() if (folder / "scontrol.txt").exists() else ""
    return "requeue 77" in said.splitlines()


@pytest.mark.parametrize(("state", "requeued"), [("RUNNING", True), ("CANCELLED", False)])
def test_a_job_whose_time_is_up_saves_and_waits_again(checkout, slurm, state, requeued):
    folder = checkout(WAITS)
    job = ["bash", "deploy/slurm.sbatch", "--output", "run"]
    with _running(job, until=folder / "ready", cwd=folder, env=slurm | {"STATE": state}) as process:
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=60) == 75
    assert (folder / "saved").exists()
    assert _requeued(folder) == requeued


@pytest.mark.parametrize("code", [0, 70])
def test_a_job_that_fails_or_is_done_does_not_wait_again(checkout, slurm, code):
    folder = checkout(f"Path('words').write_text(' '.join(sys.argv[1:]))\nsys.exit({code})")
    job = ["bash", "deploy/slurm.sbatch", "--data", "my photos"]
    assert subprocess.run(job, cwd=folder, env=slurm, capture_output=True).returncode == code
    assert not _requeued(folder)
    assert (folder / "words").read_text() == "--resume auto --data my photos"


def test_a_job_on_two_nodes_has_a_launcher_on_each(checkout, slurm, tmp_path):
    folder = checkout("")
    srun = Path(slurm["PATH"].partition(os.pathsep)[0]) / "srun"
    srun.write_text(srun.read_text().replace('exec "$@"', 'SLURM_NODEID=1 exec "$@"'))
    (folder / "bin" / "python").write_text('#!/bin/bash\nprintf "%s\\n" "$@" > python.txt\n')
    (folder / "bin" / "python").chmod(0o755)
    nodes = {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_NODELIST": "node[1-2]"}
    env = {name: value for name, value in slurm.items() if name != "CONFIG"} | nodes
    done = subprocess.run(["bash", "deploy/slurm.sbatch", "--output", "run"], cwd=folder, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr
    script, *words = (folder / "python.txt").read_text().splitlines()
    assert script == "deploy/launch.py"
    launched = launch_command_parser().parse_args(words)
    assert (launched.num_machines, launched.num_processes, launched.machine_rank) == (2, 8, 1)
    assert launched.config_file == "accelerate_configs/multi_node.yaml"
    assert launched.main_process_port == 20077
    assert launched.training_script_args == ["--resume", "auto", "--output", "run"]


def test_the_kubernetes_job_tries_again_what_can_succeed():
    job = yaml.safe_load((ROOT / "deploy" / "kubernetes.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never", "podFailurePolicy needs it"
    (container,) = pod["containers"]
    fail, again, evicted = spec["podFailurePolicy"]["rules"]
    mistakes = {kind.exit_code for kind in errors.MENDABLE}
    assert (fail["action"], set(fail["onExitCodes"]["values"])) == ("FailJob", mistakes)
    assert (again["action"], again["onExitCodes"]["values"]) == ("Ignore", [errors.Preempted.exit_code])
    assert evicted == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}
    assert {rule["onExitCodes"]["containerName"] for rule in (fail, again)} == {container["name"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert all(isinstance(word, str) for word in container["args"])
    launched = launch_command_parser().parse_args(container["args"])
    assert (ROOT / launched.config_file).exists()
    config = parse(arguments=launched.training_script_args)
    assert config.run.resume == "auto"
    inside = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert any(Path(config.run.output).is_relative_to(path) for path in inside)


def test_the_image_has_what_it_copies():
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {source for line in _lines(text, "COPY") for source in line.split()[:-1]}
    assert copied == kept
    assert all((ROOT / source).exists() for source in copied)
    devices = {line for line in _lines(text, "ARG") if line.startswith("DEVICE=")}
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
    assert f"DEVICE={compose['services']['gpu']['build']['args']['DEVICE'].partition(':-')[2][:-1]}" in devices
    launched = launch_command_parser().parse_args(json.loads(_lines(text, "CMD")[-1]))
    assert parse(arguments=launched.training_script_args).run.output == "runs/digits"


def test_shell_and_dockerfile_have_no_findings():
    assert subprocess.run(["bash", "-n", ROOT / "deploy" / "slurm.sbatch"]).returncode == 0
    tools = {"shellcheck": "deploy/slurm.sbatch", "hadolint": "Dockerfile"}
    bin_folder = Path(sys.executable).parent
    for tool, file in tools.items():
        found = shutil.which(tool, path=os.pathsep.join([str(bin_folder), os.environ["PATH"]]))
        if found:
            done = subprocess.run([found, ROOT / file], capture_output=True, text=True)
            assert done.returncode == 0, done.stdout
