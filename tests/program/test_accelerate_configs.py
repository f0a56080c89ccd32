"""Every file in accelerate_configs/ means to the launcher what its comments say.

The launcher is asked itself: its loader, its parser, its merge of file and command line, its choice of how to start.
Some of its fields cannot be set from a file and unknown nested keys are dropped, both without a word.
"""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands import launch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.utils import DistributedType, prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from torch.distributed.run import determine_local_world_size

CONFIGS = Path(__file__).parents[2] / "accelerate_configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
# The merge puts these before a nested key: `fsdp_config: {version: 2}` sets `args.fsdp_version`.
NESTED_PREFIX = {"fsdp_config": "fsdp_", "fp8_config": "fp8_", "dynamo_config": "dynamo_"}


def read(name):
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    """What the surrounding job exports must not decide a test."""
    for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)


def merge(path, *command_line):
    """The launcher's arguments for `accelerate launch --config_file PATH COMMAND_LINE train.py`."""
    parser = launch.launch_command_parser()
    args = parser.parse_args(["--config_file", str(path), *command_line, "train.py"])
    return launch._validate_launch_command(args)[0]


def launcher_of(path, monkeypatch):
    """Name of the function that would start the processes."""
    chosen = []
    for name in [name for name in vars(launch) if name.endswith("_launcher")]:
        monkeypatch.setattr(launch, name, lambda *args, name=name: chosen.append(name))
    parser = launch.launch_command_parser()
    launch.launch_command(parser.parse_args(["--config_file", str(path), "train.py"]))
    assert len(chosen) == 1
    return chosen[0]


def unknown_nested_keys(config):
    """Nested keys that no option of the launcher answers to; the launcher would drop them silently."""
    known = {action.dest for action in launch.launch_command_parser()._actions}
    unknown = []
    for section, values in config.items():
        if isinstance(values, dict):
            prefix = NESTED_PREFIX.get(section, "")
            for key in values:
                option = key if key.startswith(prefix) else prefix + key
                if option not in known:
                    unknown.append(f"{section}.{key}")
    return unknown


def uncommented_keys(text):
    lines = text.splitlines()
    return [
        line.split(":")[0].strip()
        for before, line in zip(["", *lines], lines, strict=False)
        if re.match(r"\s*[\w-]+\s*:", line) and not before.lstrip().startswith("#")
    ]


def test_the_six_files_are_there():
    assert NAMES == ["cpu", "cpu_x2", "gpu", "gpu_fp16", "multi_gpu", "multi_node"]


@pytest.mark.parametrize("name", NAMES)
def test_launcher_loads_it(name):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert isinstance(config, ClusterConfig)
    assert isinstance(config.distributed_type, DistributedType)
    assert set(read(name)) <= {field.name for field in fields(ClusterConfig)}


@pytest.mark.parametrize("name", NAMES)
def test_every_value_takes_effect(name):
    """A field with a command line default other than None (rdzv_backend, same_network, ...) ignores the file."""
    config = read(name)
    args = merge(CONFIGS / f"{name}.yaml")
    assert args.multi_gpu is (config.pop("distributed_type") == "MULTI_GPU")
    # Of another type than the launcher's, a value would fail later: it splits gpu_ids, YAML reads a bare `no` as False.
    expected = {key: value for key, value in config.items() if not isinstance(value, dict)}
    assert {key: getattr(args, key) for key in expected} == expected
    assert isinstance(args.gpu_ids, str)
    assert args.mixed_precision in ("no", "bf16", "fp16")


@pytest.mark.parametrize("name", NAMES)
def test_nested_keys_are_launcher_options(name):
    assert unknown_nested_keys(read(name)) == []


def test_nested_key_check_finds_a_typo():
    config = {"fsdp_config": {"fsdp_version": 2, "version": 2, "verson": 2}, "dynamo_config": {"mode": "default"}}
    assert unknown_nested_keys(config) == ["fsdp_config.verson"]


@pytest.mark.parametrize("name", NAMES)
def test_every_key_has_a_comment_above(name):
    assert uncommented_keys((CONFIGS / f"{name}.yaml").read_text()) == []


def test_comment_check_finds_a_bare_key():
    assert uncommented_keys("# why\na: 1\nb: 2\n\nc:\n  # why\n  d: 3\n  e: 4\n") == ["b", "c", "e"]


@pytest.mark.parametrize("name", NAMES)
def test_commands_in_comments_start_train_with_this_file(name):
    commands = re.findall(r"^#\s+(accelerate launch .*)$", (CONFIGS / f"{name}.yaml").read_text(), re.MULTILINE)
    assert commands
    for command in commands:
        args = launch.launch_command_parser().parse_args(shlex.split(command)[2:])
        assert (args.config_file, args.training_script) == (f"accelerate_configs/{name}.yaml", "train.py")


def test_cpu_is_one_process_on_the_cpu(monkeypatch):
    args = merge(CONFIGS / "cpu.yaml")
    command, env = prepare_simple_launcher_cmd_env(args)
    assert args.num_processes == 1
    assert args.mixed_precision == "no"
    assert command[-1] == "train.py"
    assert env["ACCELERATE_USE_CPU"] == "True"
    assert launcher_of(CONFIGS / "cpu.yaml", monkeypatch) == "simple_launcher"


def test_cpu_x2_is_two_processes_that_see_no_gpu(monkeypatch):
    args = merge(CONFIGS / "cpu_x2.yaml")
    env = prepare_multi_gpu_env(args)
    assert args.nproc_per_node == "2"
    assert args.mixed_precision == "no"
    assert env["CUDA_VISIBLE_DEVICES"].startswith("-1")  # in this mode the launcher does not pass use_cpu on
    assert launcher_of(CONFIGS / "cpu_x2.yaml", monkeypatch) == "multi_gpu_launcher"


@pytest.mark.parametrize("name", ["cpu_x2", "multi_gpu"])
def test_two_runs_on_one_machine_get_different_ports(name):
    ports = set()
    for _ in range(8):  # the same free port can be handed out twice, not eight times
        args = merge(CONFIGS / f"{name}.yaml")
        prepare_multi_gpu_env(args)
        ports.add(int(args.master_port))
    assert len(ports) > 1
    assert 0 not in ports


@pytest.mark.parametrize(("name", "precision"), [("gpu", "bf16"), ("gpu_fp16", "fp16")])
def test_one_gpu_leaves_the_choice_of_gpu_to_the_environment(name, precision, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    args = merge(CONFIGS / f"{name}.yaml")
    _, env = prepare_simple_launcher_cmd_env(args)
    assert args.num_processes == 1
    assert env["ACCELERATE_USE_CPU"] == "False"
    assert env["ACCELERATE_MIXED_PRECISION"] == precision
    assert env["CUDA_VISIBLE_DEVICES"] == "3"
    assert launcher_of(CONFIGS / f"{name}.yaml", monkeypatch) == "simple_launcher"


def test_multi_gpu_takes_all_gpus_or_as_many_as_the_command_line_says(monkeypatch):
    args = merge(CONFIGS / "multi_gpu.yaml")
    prepare_multi_gpu_env(args)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert determine_local_world_size(args.nproc_per_node) == 3
    args = merge(CONFIGS / "multi_gpu.yaml", "--num_processes", "4")
    env = prepare_multi_gpu_env(args)
    assert args.nproc_per_node == "4"
    assert env["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert launcher_of(CONFIGS / "multi_gpu.yaml", monkeypatch) == "multi_gpu_launcher"


def test_multi_node_splits_its_processes_evenly(monkeypatch):
    config = read("multi_node")
    assert config["num_machines"] > 1
    assert config["num_processes"] % config["num_machines"] == 0  # the launcher would round down
    args = merge(CONFIGS / "multi_node.yaml", "--machine_rank", "1")
    prepare_multi_gpu_env(args)
    assert (args.nnodes, args.nproc_per_node, args.node_rank) == ("2", "8", 1)
    assert args.rdzv_endpoint == f"{config['main_process_ip']}:{config['main_process_port']}"
    assert config["main_process_port"] != 0  # each machine would choose its own
    assert launcher_of(CONFIGS / "multi_node.yaml", monkeypatch) == "multi_gpu_launcher"


def test_multi_node_has_a_command_for_each_machine():
    text = (CONFIGS / "multi_node.yaml").read_text()
    ranks = [int(rank) for rank in re.findall(r"^#\s+accelerate launch .*--machine_rank (\d+)", text, re.MULTILINE)]
    assert ranks == list(range(read("multi_node")["num_machines"]))
