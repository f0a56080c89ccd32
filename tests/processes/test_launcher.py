import pytest

from trainer.errors import UsageError
from trainer.processes import launcher

GROUP = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.fixture
def env(monkeypatch):
    """Sets the variables given, and no others that count."""
    names = [*GROUP, "LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES", "ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION"]
    for name in [*names, *launcher._COPIES, *launcher._SWITCHES]:
        monkeypatch.delenv(name, raising=False)

    def put(**values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return put


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "mpirun has started 4 copies of this program"),
        ({"PMI_SIZE": "2", "ACCELERATE_USE_CPU": "true"}, "PMI_SIZE"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "srun has started 2 copies"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not set"),
        ({**GROUP, "LOCAL_RANK": ""}, "LOCAL_RANK is ''"),
        ({**GROUP, "RANK": "one"}, "RANK is 'one': expected a whole number"),
        ({"ACCELERATE_USE_FSDP": "true"}, "asks for FSDP"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "asks for DeepSpeed"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "asks for Megatron-LM"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "parallelism_config"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "mixed_precision is fp8: expected one of no, bf16, fp16"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "dynamo_backend INDUCTOR"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "4 gradient_accumulation_steps"),
    ],
)
def test_it_refuses_by_name(env, values, says):
    env(**values)
    launcher.forget_leftovers()
    with pytest.raises(UsageError) as error:
        launcher.check()
    assert says in str(error.value)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
        {"LOCAL_RANK": "3"},
        {"RANK": "3", "LOCAL_RANK": "x", "WORLD_SIZE": "1"},
        {"OMPI_COMM_WORLD_SIZE": "1", "PMI_SIZE": ""},
        {"ACCELERATE_USE_FSDP": "false", "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_MIXED_PRECISION": "bf16"},
    ],
)
def test_alone_it_works(env, values):
    import os

    env(**values)
    launcher.forget_leftovers()
    launcher.check()
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & os.environ.keys()


def test_a_group_stays_as_it_is(env):
    import os

    env(**GROUP, PMI_SIZE="2")
    launcher.forget_leftovers()
    launcher.check()
    assert GROUP.items() <= dict(os.environ).items()


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({}, False),
        ({"ACCELERATE_USE_CPU": "False"}, True),
        ({"ACCELERATE_USE_CPU": "True"}, False),
        (GROUP, True),
        ({**GROUP, "CUDA_VISIBLE_DEVICES": "-1,-1"}, False),
    ],
)
def test_a_launcher_that_means_gpus(env, values, wanted):
    env(**values)
    assert launcher.wants_gpu() is wanted


@pytest.mark.parametrize("values", [{"LOCAL_RANK": "1"}, {"OMPI_COMM_WORLD_SIZE": "3"}])
def test_the_program_works_alone_or_says_one_line(program, tmp_path, values):
    done = program("--epochs", "1", "--workers", "0", cwd=tmp_path, env=values)
    if "LOCAL_RANK" in values:
        assert done.returncode == 0, done.stderr
        assert "done: best" in done.stdout
    else:
        assert done.returncode == 2
        assert done.stderr.startswith("error: mpirun has started 3 copies")
        assert done.stderr.count("\n") == 1
