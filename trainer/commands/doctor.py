"""Check the place where runs are to work: `python -m trainer doctor`.

One line for each thing that a run needs: ok and what was found, or bad and what to do.
"""

import locale
import os
import shutil
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch
from packaging.version import Version

from trainer.commands.arguments import Doctor
from trainer.errors import UsageError
from trainer.processes import launcher
from trainer.processes.cores import cores_here, has_bf16

OLDEST = {"python": "3.11", "torch": "2.11", "torchvision": "0.26", "accelerate": "1.15", "pillow": "11.3"}
Finding = tuple[str, str]  # what there is, and what to do about it: nothing, if empty
_GIB = 2**30
_SHARED_MEMORY = Path("/dev/shm")  # where data workers put images
_LEAST_FILES = 1024  # open at once: sockets and shared memory of the data workers
_PATIENCE = 60  # seconds for two processes to start and to add two numbers
_ADD = """
import datetime, sys, torch
port, seconds, rank = map(int, sys.argv[1:])
place = {"init_method": f"tcp://127.0.0.1:{port}", "timeout": datetime.timedelta(seconds=seconds)}
torch.distributed.init_process_group("gloo", rank=rank, world_size=2, **place)
total = torch.tensor([rank + 1.0])
torch.distributed.all_reduce(total)
torch.distributed.destroy_process_group()
sys.exit(f"the sum of 1 and 2 was {total.item()}" if total.item() != 3 else 0)
"""
_APART = (
    "several processes would not find each other: export GLOO_SOCKET_IFNAME=lo (several machines: the name of the "
    "network between them, see `ip addr`), and see whether a firewall blocks 127.0.0.1"
)


def doctor(command: Doctor) -> None:
    """Print what this machine offers to a run, and a remedy for whatever is in its way.

    Raises:
        SystemExit: exit code 1, if there was a remedy.
    """
    sick = 0
    for check in (versions, cores, devices, memory, files, text, environment, disk, processes):
        found, remedy = check()
        sick += bool(remedy)
        print(f"{'bad' if remedy else 'ok ':<4} {check.__name__:<12} {found}", flush=True)
        if remedy:
            print(f"{'':<17} {remedy}", flush=True)
    if sick:
        raise SystemExit(1)


def versions() -> Finding:
    """Python and the packages that compute, against the oldest that are tested."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    found |= {name: metadata.version(name) for name in OLDEST if name != "python"}
    old = [f'"{name}>={least}"' for name, least in OLDEST.items() if Version(found[name]) < Version(least)]
    texts = [f"{name} {version}" for name, version in found.items()]
    return ", ".join(texts), f"too old: pip install --upgrade {' '.join(old)}" if old else ""


def cores() -> Finding:
    """CPU cores that the program may use, and the threads that torch would use."""
    some, threads, given = cores_here(), torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS", "not set")
    bf16 = "" if has_bf16("cpu") else "no "
    found = f"{some} of {os.cpu_count()} may be used, {threads} threads, {bf16}instructions for bf16"
    if threads > some:  # a container with a quota, where torch counts the cores of the machine
        return found, f"threads would wait for each other (OMP_NUM_THREADS: {given}): export OMP_NUM_THREADS={some}"
    if threads == 1 < some or 2 * threads < some:
        return found, f"cores would be idle (OMP_NUM_THREADS: {given}): export OMP_NUM_THREADS={some}"
    return found, ""


def devices() -> Finding:
    """GPUs, with their memory, and what processes on them talk through."""
    if torch.cuda.is_available():
        free, total = zip(*map(torch.cuda.mem_get_info, range(torch.cuda.device_count())), strict=True)
        names = [
            f"{torch.cuda.get_device_name(number)} ({left / _GIB:.1f} of {total[number] / _GIB:.1f} GiB free)"
            for number, left in enumerate(free)
        ]
        if len(names) > 1 and not torch.distributed.is_nccl_available():
            return ", ".join(names), "this torch has no NCCL, which several GPUs need: see pytorch.org"
        full = any(left < size / 10 for left, size in zip(free, total, strict=True))
        return ", ".join(names), "other programs fill the memory of a GPU: see nvidia-smi" if full else ""
    if torch.backends.mps.is_available() or not shutil.which("nvidia-smi"):
        return "the GPU of this Mac" if torch.backends.mps.is_available() else "no GPU: runs use the CPU", ""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    remedy = "update its driver" if hidden is None else f"CUDA_VISIBLE_DEVICES is {hidden!r}: unset it"
    built = "install a torch that is built for GPUs: see pytorch.org"
    return "torch sees no GPU, and nvidia-smi is there", remedy if torch.version.cuda else built


def memory() -> Finding:
    """Shared memory, where data workers put images."""
    if not _SHARED_MEMORY.is_dir():
        return f"no {_SHARED_MEMORY} on this system", ""
    free = shutil.disk_usage(_SHARED_MEMORY).free
    remedy = "data workers may die: docker run --shm-size 8g (or --ipc host), or train with --workers 0"
    return f"{free / _GIB:.2f} GiB free in {_SHARED_MEMORY}", remedy if free < _GIB else ""


def files() -> Finding:
    """How many files and sockets a process may have open."""
    try:
        import resource  # not on Windows
    except ImportError:
        return "no limit known", ""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    few = most != resource.RLIM_INFINITY and most < _LEAST_FILES
    return f"at most {most:,} open", f"too few for data workers: ulimit -n {_LEAST_FILES}" if few else ""


def text() -> Finding:
    """The encodings of file names, files and the console."""
    kinds = {sys.getfilesystemencoding(), locale.getencoding(), getattr(sys.stdout, "encoding", None) or "utf-8"}
    remedy = "names of files and classes may be unreadable: export PYTHONUTF8=1 LANG=C.UTF-8"
    return ", ".join(sorted(kinds)), "" if all(kind.lower() in ("utf-8", "utf8") for kind in kinds) else remedy


def environment() -> Finding:
    """Variables of a launcher, of this one or of an earlier program."""
    names = sorted(name for name in os.environ if name.startswith("ACCELERATE_") or name in launcher.VARIABLES)
    found = ", ".join(f"{name}={os.environ[name]}" for name in names) or "no variables of a launcher"
    try:
        launcher.check()
    except UsageError as error:
        return found, str(error)
    return found, ""


def disk() -> Finding:
    """Room for runs, which are written here, and for pretrained weights."""
    cache = Path(torch.hub.get_dir()).absolute()
    weights = next(path for path in (cache, *cache.parents) if path.is_dir())
    places = {Path.cwd(): "runs, or give --output", weights: "weights, or set TORCH_HOME"}
    free = {path: shutil.disk_usage(path).free for path in places}
    found = ", ".join(f"{size / _GIB:.1f} GiB free in {path}" for path, size in free.items())
    closed = [f"make {path} writable for {use}" for path, use in places.items() if not os.access(path, os.W_OK)]
    full = [f"make room in {path} for {use}" for path, use in places.items() if free[path] < 5 * _GIB]
    return found, "; ".join(closed + full)


def processes() -> Finding:
    """Two processes on this machine really add two numbers through gloo."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    to = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    words, both = [sys.executable, "-c", _ADD, str(port), str(_PATIENCE)], []
    try:
        for rank in "01":
            both.append(subprocess.Popen([*words, rank], **to))
        said = [process.communicate(timeout=_PATIENCE)[0].strip() for process in both]
    except subprocess.TimeoutExpired:
        return f"two did not add two numbers in {_PATIENCE} s", _APART
    finally:
        for process in both:
            process.kill()
            process.communicate()
    wrong = [words for words, process in zip(said, both, strict=True) if process.returncode]
    return (wrong[0].splitlines()[-1], _APART) if wrong else ("two have added two numbers, by gloo", "")
