"""The processes of a run: start them, take turns, agree."""

import atexit
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, broadcast_object_list, gather_object
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

from trainer import errors
from trainer.errors import CheckpointError, NumericalError, UsageError, exit_code
from trainer.preemption import Preempted
from trainer.watch import Elsewhere, Watch, explained

T = TypeVar("T")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # microseconds of CPU in a period of so many


def start(*, exact: bool = False, timeout: float = 30.0) -> Accelerator:
    """The Accelerator of this process, with what `accelerate launch` (or nothing) chose: device, processes, precision.

    Args:
        exact: compute the same bits on any number of processes of one kind of machine: one CPU thread, and on GPUs
            deterministic algorithms, without TF32 (https://docs.pytorch.org/docs/stable/notes/randomness.html).
        timeout: minutes that a process waits for the others, see `Watch`.

    Raises:
        UsageError: the launcher asked for something that would silently not happen.
    """
    # Without a GPU every process believes to be the only one, unless told that the CPU is meant
    # (https://github.com/huggingface/accelerate/pull/3883).
    cpu = True if not torch.accelerator.is_available() else None
    # Accelerate reports fp16 on a CPU and trains in fp32, without a scaler: refuse before it starts.
    wants_cpu = cpu or os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1", "yes")
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
    Watch(accelerator, timeout=60 * timeout)
    return accelerator


def _join_again(*, cpu: bool, timeout: timedelta) -> None:
    """The process group of a run that the launcher has started again (`--max_restarts`).

    The launcher keeps one store through all of its attempts, in which the processes would find the addresses of those
    that have died, and wait for them (https://github.com/pytorch/pytorch/issues/135712): each attempt gets a part of
    the store for itself.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    group = torch.distributed
    store = group.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world_size, is_master=False)
    store = group.PrefixStore(f"attempt_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    backend = "gloo" if cpu else group.get_default_backend_for_device(torch.accelerator.current_accelerator())
    group.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def say(*lines: str) -> None:
    """Print lines on the main process (any process before `start`): the console is one page, not eight."""
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):  # nobody listens any more: no reason to stop
            print(*lines, sep="\n", flush=True)


def cores_per_process(accelerator: Accelerator) -> int:
    """CPU cores that this process may use, shared fairly with the others on this machine; at least 1."""
    return max(1, cores_here() // int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes)))


def cores_here() -> int:
    """CPU cores of this machine that the program may use, of which a container may have but a part; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # a container with all cores and the time of a few; "max 100000" is no limit
        quota, period = _QUOTA.read_text().split()
        cores = min(cores, int(quota) // int(period))
    return max(1, cores)


def in_turn(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """Call `function` on one process, then on one process of each other machine, then on the rest (a collective).

    For what downloads or writes files: the first call does the work, the later ones find it done, on a shared file
    system and on separate ones. An exception in any turn is raised on every process, after that turn.
    """
    machine_first = accelerator.is_local_main_process
    result = None
    for turn in (accelerator.is_main_process, machine_first and not accelerator.is_main_process, not machine_first):
        error = None
        if turn:
            try:
                result = function()
            except Exception as exception:
                error = exception
        raise_together(accelerator, error)
    return result


def gather(accelerator: Accelerator, value: T) -> list[T]:
    """The values of all processes, in their order (a collective)."""
    return gather_object([value]) if accelerator.num_processes > 1 else [value]


def raise_together(accelerator: Accelerator, error: Exception | None) -> None:
    """Raise on every process if any process has an error: its own, or the first of the others' (a collective)."""
    if accelerator.num_processes == 1:
        if error is not None:
            raise error
        return
    # Type and text, not the exception: not every exception can be pickled.
    mine = None if error is None else (type(error).__name__, exit_code(error), str(error))
    found = gather_object([mine])
    if error is not None:
        raise error
    for rank, other in enumerate(found):
        if other is not None:
            raise Elsewhere(rank, *other)


def from_main(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """Call `function` on the main process and give its result to all (a collective); its exception, too."""
    error, result = None, [None]
    if accelerator.is_main_process:
        try:
            result = [function()]
        except Exception as exception:
            error = exception
    raise_together(accelerator, error)
    return broadcast_object_list(result)[0] if accelerator.num_processes > 1 else result[0]


def agree(accelerator: Accelerator, **facts: Callable[[], str]) -> None:
    """Compare the versions of the libraries, and facts that every process must share (a collective).

    Raises:
        UsageError: on every process; names the first fact that differs, with the value of each process.
    """
    if accelerator.num_processes == 1:
        return
    mine = {name: version(name) for name in ("torch", "torchvision", "accelerate")}
    mine |= {name: fact() for name, fact in facts.items()}
    found = gather_object([mine])
    for name in mine:
        values = [others[name] for others in found]
        if len(set(values)) > 1:
            each = ", ".join(f"process {rank}: {value}" for rank, value in enumerate(values))
            raise UsageError(f"the processes differ in {name}: {each}. All machines need the same data and versions.")


def run_and_exit(function: Callable[..., None], *arguments: object) -> NoReturn:
    """Call the program's main function and end the process, with exit code 0 or that of the error (see `fail`).

    An exception that a user cannot mend is a mistake of the program: it is printed with its traceback, exit code 1.
    """
    code = 0
    try:
        try:
            function(*arguments)
        except Exception as error:
            error = explained(error)
            if "TORCHELASTIC_ERROR_FILE" in os.environ and not isinstance(error, Elsewhere):
                ErrorHandler().record_exception(error)  # the launcher prints it
            raise error
    except (*errors.MENDABLE, OSError, Elsewhere, Preempted) as error:
        code = fail(error)
    except KeyboardInterrupt:  # before Preemption took note of signals
        code = 130
    except Exception:
        code = 1
        traceback.print_exc()
    if code:  # a data worker that hangs would be waited for, and one that dies now is no news
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in multiprocessing.active_children():
            worker.kill()
    # Not by way of the interpreter's finalization: threads of torch.distributed that want the GIL then are unwound
    # through C++ code that cannot be, and abort the process, whatever its exit code was going to be.
    atexit._run_exitfuncs()  # ends data workers, and the watch
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def fail(error: BaseException) -> int:
    """Print an error that a user can mend as one message, without a traceback; gives the exit code.

    Every process fails, one speaks: what another has said, and what all of a machine find, is not repeated.
    """
    shared = isinstance(error, Elsewhere | UsageError | CheckpointError | NumericalError | Preempted)
    if not shared or os.environ.get("LOCAL_RANK", "0") == "0" or getattr(error, "orphans", False):
        print(f"error: {error}", file=sys.stderr, flush=True)
    return exit_code(error)
