"""How many CPU cores a process may use, and what they and a GPU can compute."""

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import Accelerator

_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # microseconds of CPU time in a period of so many


def cores_per_process(accelerator: "Accelerator") -> int:
    """Returns the CPU cores that this process may use: its share of those of the machine, at least 1."""
    return max(1, cores_here() // int(os.environ.get("LOCAL_WORLD_SIZE") or accelerator.num_processes))


def cores_here() -> int:
    """Returns the CPU cores of this machine that the program may use, at least 1; a container may have only some."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # "max 100000" is no limit, and no number
        quota, period = _QUOTA.read_text().split()
        cores = min(cores, int(quota) // int(period))
    return max(1, cores)


def has_bf16(device: str) -> bool:
    """Whether devices of a type, such as "cpu", have instructions for bf16: without them it is slower than fp32."""
    import torch  # here, as this module is imported before it

    if device == "cpu":  # a Mac has no mkldnn
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return device == "cuda" and torch.cuda.is_bf16_supported()
