"""What the environment says about how this process was started: read before torch and Accelerate do.

`accelerate launch` sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for several processes, and settings
named ACCELERATE_*. Accelerate also believes variables of other launchers, and some that remain from an earlier program.
"""

import os

from trainer.errors import UsageError

_TOGETHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
# How many copies of the program other launchers have started, in the words of each.
_COPIES = {
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "an MPI launcher",
    "MV2_COMM_WORLD_SIZE": "an MPI launcher",
    "SLURM_STEP_NUM_TASKS": "srun",  # SLURM_NTASKS is also set in the one shell of a batch script
}
_SWITCHES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
VARIABLES = {*_TOGETHER, *_NUMBERS, *_COPIES}  # besides ACCELERATE_*
_PRECISIONS = ("no", "bf16", "fp16")
_WAY_ON = "Start it with one of the files in accelerate_configs/"


def forget_leftovers() -> None:
    """Removes a rank from the environment that belongs to no group of processes: this process is alone.

    A LOCAL_RANK that an earlier program left in the shell would silence this one, or make it wait for others.
    """
    if os.environ.get("WORLD_SIZE", "1").strip() in ("", "1") and not all(os.environ.get(name) for name in _TOGETHER):
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)


def check() -> None:
    """Refuses what a launcher, or the environment, asks for and would not happen as asked.

    Raises:
        UsageError: names the variable, its value, and the way on.
    """
    for name in _NUMBERS:
        value = os.environ.get(name)
        if value is not None and not value.strip().isdecimal():
            raise UsageError(f"the environment variable {name} is {value!r}: expected a whole number. Unset it.")
    missing = [name for name in _TOGETHER if not os.environ.get(name)]
    if "WORLD_SIZE" in os.environ and missing:
        raise UsageError(
            f"the environment variable WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set: this process cannot find the others. {_WAY_ON} "
            "(several machines: multi_node.yaml), or, for one process, unset WORLD_SIZE."
        )
    for name, who in _COPIES.items() if "WORLD_SIZE" not in os.environ else ():
        if os.environ.get(name, "1").strip() not in ("", "0", "1"):
            raise UsageError(
                f"{who} has started {os.environ[name]} copies of this program ({name}), which would not work together. "
                f"{_WAY_ON} (accelerate launch --config_file ...), once on each machine; or, if {name} remains from "
                f"another program, unset it (env -u {name} ...)."
            )
    for name, what in _SWITCHES.items():
        if is_on(name):
            raise UsageError(
                f"the launcher asks for {what} ({name}), which this program does not support: it trains replicas of "
                f"the tail (DDP). {_WAY_ON}, such as multi_gpu.yaml."
            )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in _PRECISIONS:
        raise UsageError(
            f"mixed_precision is {precision}: expected one of {', '.join(_PRECISIONS)}. "
            "Launch with --mixed_precision bf16."
        )
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        raise UsageError(
            f"the launcher asks for dynamo_backend {backend}: expected no, as this program compiles its parts itself "
            "(--compile, --compile-tail)."
        )
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps.strip() != "1":
        raise UsageError(
            f"the launcher asks for {steps} gradient_accumulation_steps: expected 1, as --batch-size and --micro-batch "
            "say how gradients are accumulated. Unset ACCELERATE_GRADIENT_ACCUMULATION_STEPS."
        )


def is_on(name: str) -> bool:
    """Whether a switch in the environment is on, as Accelerate reads it."""
    return os.environ.get(name, "false").strip().lower() in ("true", "1", "yes", "on", "y", "t")


def wants_gpu() -> bool:
    """Whether a launcher has started this process, and not for the CPU; cpu_x2.yaml hides the GPUs to say that."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip()
    launched = "ACCELERATE_USE_CPU" in os.environ or "WORLD_SIZE" in os.environ
    return launched and not is_on("ACCELERATE_USE_CPU") and hidden != "" and not hidden.startswith("-1")
