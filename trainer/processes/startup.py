"""The start of a run's processes: what the launcher chose, checked, as an Accelerator."""

import logging
import os
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import distributed
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]  # they are public

from trainer.errors import UsageError
from trainer.processes import launcher
from trainer.processes.cores import has_bf16
from trainer.processes.watch import Watch

log = logging.getLogger(__name__)


def start(*, exact: bool = False, timeout: float = 30.0) -> Accelerator:
    """Starts what `accelerate launch` (or nothing) chose for this process: device, processes, precision.

    Args:
        exact: compute the same bits on any number of processes of one kind of machine: one CPU thread, and on GPUs
            deterministic algorithms, without TF32 (https://docs.pytorch.org/docs/stable/notes/randomness.html).
        timeout: minutes that a process waits for the others, see `Watch`.

    Returns:
        The Accelerator of this process. Call `finish` where the process goes on after the run.

    Raises:
        UsageError: the launcher, or a variable of the environment, asks for something that would not happen as asked.
    """
    launcher.forget_leftovers()
    launcher.check()
    # Without a GPU every process believes to be the only one, unless told that the CPU is meant
    # (https://github.com/huggingface/accelerate/pull/3883).
    cpu = not torch.accelerator.is_available()
    # Accelerate reports fp16 on a CPU and trains in fp32, without a scaler: refuse before it starts.
    wants_cpu = cpu or launcher.is_on("ACCELERATE_USE_CPU")
    if wants_cpu and os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16":
        raise UsageError(
            "mixed_precision fp16 needs a GPU: on a CPU nothing would be computed in fp16. "
            "Launch with --mixed_precision bf16 (the same range as fp32, no scaler), or with --mixed_precision no."
        )
    if exact:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.set_num_threads(1)  # a sum over two threads has other bits than one over one
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    no_gpu = cpu and launcher.wants_gpu()  # before Accelerate writes to the environment
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if again and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        _join_again(cpu=wants_cpu, timeout=timedelta(minutes=timeout))
    patience = InitProcessGroupKwargs(timeout=timedelta(minutes=timeout))
    # A gradient is a part of its bucket: one copy less, in time and in memory.
    buckets = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    accelerator = Accelerator(cpu=cpu, kwargs_handlers=[patience, buckets])
    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    if wanted != accelerator.num_processes:
        raise UsageError(
            f"the launcher started {wanted} processes, but each of them runs alone; "
            "use accelerate_configs/cpu_x2.yaml for processes on CPU, multi_gpu.yaml for GPUs."
        )
    if accelerator.is_main_process:
        _warn(accelerator, no_gpu=no_gpu)
    Watch(accelerator, timeout=60 * timeout)
    return accelerator


def finish() -> None:
    """Ends the watch over the other processes that `start` began; for a process that goes on after its run."""
    if Watch.current is not None:
        Watch.current.close()


def _warn(accelerator: Accelerator, *, no_gpu: bool) -> None:
    """Says what makes a run slow, and could be changed at its launch."""
    if no_gpu:
        built = "" if torch.version.cuda or torch.version.hip else " (this torch is built without GPU support)"
        log.warning(
            "no GPU was found%s: this run uses the CPU. If that is meant, launch with accelerate_configs/cpu.yaml; "
            "if not, see whether nvidia-smi lists the GPU, and CUDA_VISIBLE_DEVICES.",
            built,
        )
    on_cpu, bf16 = accelerator.device.type == "cpu", accelerator.mixed_precision == "bf16"
    if on_cpu and bf16 and not has_bf16("cpu"):
        log.warning(
            "bf16 is slower than fp32 on this CPU, which has no instructions for it: launch with --mixed_precision no."
        )


def _join_again(*, cpu: bool, timeout: timedelta) -> None:
    """Joins the process group of a run that the launcher has started again (`--max_restarts`).

    The launcher keeps one store for all of its attempts. The processes would find there the addresses of those that
    have died, and wait for them (https://github.com/pytorch/pytorch/issues/135712), so each attempt gets a part of the
    store for itself.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world_size, is_master=False)
    store = PrefixStore(f"attempt_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    device = None if cpu else torch.accelerator.current_accelerator()
    backend = "gloo" if device is None else distributed.get_default_backend_for_device(device)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def precision(accelerator: Accelerator) -> str:
    """The precision of the run, for people: fp32, bf16 or fp16."""
    return "fp32" if accelerator.mixed_precision == "no" else str(accelerator.mixed_precision)
