"""Faults that are planted in a machine, and the remedy for each."""

import os
import subprocess
import sys
import tomllib
from types import SimpleNamespace

import pytest
import torch
from launching import ROOT, search_path
from packaging.requirements import Requirement

from trainer.commands import doctor


def _doctor(cwd, **environment: str):
    env = {**os.environ, "PYTHONPATH": search_path(), **environment}
    return subprocess.run(
        [sys.executable, "-m", "trainer", "doctor"], env=env, cwd=cwd, capture_output=True, text=True, timeout=200
    )


def _lines(out: str) -> dict[str, str]:
    """ok or bad, by the name of the check."""
    lines = (line.split() for line in out.splitlines() if line[0] != " ")
    return {words[1]: words[0] for words in lines}


def test_a_machine_is_looked_at(tmp_path):
    done = _doctor(tmp_path, PYTHONUTF8="1", GLOO_SOCKET_IFNAME="lo")
    found = _lines(done.stdout)
    assert list(found) == [
        "versions",
        "cores",
        "devices",
        "memory",
        "files",
        "text",
        "environment",
        "disk",
        "processes",
    ]
    assert [found[name] for name in ("versions", "text", "environment", "processes")] == ["ok"] * 4, done.stdout
    assert done.returncode == ("bad" in found.values()), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_faults_of_the_environment_are_found_each_with_its_remedy(tmp_path):
    faults = {"WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "nix", "PYTHONIOENCODING": "latin-1"}
    done = _doctor(tmp_path, **faults)
    found = _lines(done.stdout)
    assert [found[name] for name in ("environment", "processes", "text")] == ["bad"] * 3
    for remedy in ("or, for one process, unset WORLD_SIZE", "GLOO_SOCKET_IFNAME=lo", "PYTHONUTF8=1"):
        assert remedy in done.stdout
    assert done.returncode == 1
    assert done.stderr == ""


def test_the_oldest_versions_are_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    least = {needed.name: str(needed.specifier) for needed in map(Requirement, project["dependencies"])}
    least["python"] = project["requires-python"]
    assert {name: f">={version}" for name, version in doctor.OLDEST.items()} == {n: least[n] for n in doctor.OLDEST}


def test_an_old_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.2" if name == "torch" else "99.0+cpu")
    assert doctor.versions()[1] == 'too old: pip install --upgrade "torch>=2.11"'


@pytest.mark.parametrize(("threads", "remedy"), [(1, "idle"), (3, "idle"), (4, ""), (8, ""), (16, "wait for each")])
def test_threads_fit_the_cores(monkeypatch, threads, remedy):
    monkeypatch.setattr(doctor, "cores_here", lambda: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    said = doctor.cores()[1]
    assert (remedy in said) if remedy else not said
    assert not said or "export OMP_NUM_THREADS=8" in said


def test_the_small_shared_memory_of_a_container(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "_SHARED_MEMORY", tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=64 * 2**20))
    assert doctor.memory() == (
        f"0.06 GiB free in {tmp_path}",
        "data workers may die: docker run --shm-size 8g (or --ipc host), or train with --workers 0",
    )
    monkeypatch.setattr(doctor, "_SHARED_MEMORY", tmp_path / "none")
    assert doctor.memory()[1] == ""


def test_a_low_limit_of_open_files():
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        assert doctor.files() == ("at most 256 open", "too few for data workers: ulimit -n 1024")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert doctor.files()[1] == ""


def test_a_full_disk(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=(1 if path == tmp_path else 9) * 2**30))
    assert doctor.disk()[1] == f"make room in {tmp_path} for runs, or give --output"


def test_a_gpu_that_torch_does_not_see(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert doctor.devices() == ("no GPU: runs use the CPU", "")
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "install a torch that is built for GPUs" in doctor.devices()[1]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert doctor.devices()[1] == "CUDA_VISIBLE_DEVICES is '': unset it"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert doctor.devices()[1] == "update its driver"


def test_gpus_with_their_memory(monkeypatch):
    free = {0: 70 * 2**30, 1: 2 * 2**30}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (free[number], 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"GPU {number}")
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    found = "GPU 0 (70.0 of 80.0 GiB free), GPU 1 (2.0 of 80.0 GiB free)"
    assert doctor.devices() == (found, "other programs fill the memory of a GPU: see nvidia-smi")
    free[1] = free[0]
    assert doctor.devices()[1] == ""
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    assert "no NCCL" in doctor.devices()[1]


def test_processes_that_never_meet_are_given_up(monkeypatch):
    monkeypatch.setattr(doctor, "_PATIENCE", 1)
    monkeypatch.setattr(doctor, "_ADD", "import time; time.sleep(60)")
    assert doctor.processes() == ("two did not add two numbers in 1 s", doctor._APART)
