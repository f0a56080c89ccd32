"""What the processes of a run do together: take turns, agree, fail at the same place.

The functions marked as collectives must be called by every process, in the same order. They take a function with its
arguments, as `asyncio.to_thread` does.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from typing import Any, ParamSpec, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from trainer.errors import Elsewhere, UsageError, exit_code

P = ParamSpec("P")
T = TypeVar("T")


def print_main(*lines: object) -> None:
    """Print lines on the main process (before `start`, on any process that is not told another rank)."""
    if lines and os.environ.get("RANK", "0") == "0":
        with suppress(OSError):  # nobody reads any more: no reason to stop
            print(*lines, sep="\n", flush=True)


def on_main(accelerator: Accelerator, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `function(*args, **kwargs)` on the main process (a collective).

    Returns:
        Its result, on every process.

    Raises:
        Exception: what it raises; on the other processes as `Elsewhere`.
    """
    result = _call_if(accelerator.is_main_process, accelerator, function, *args, **kwargs)
    return broadcast_object_list([result])[0] if accelerator.num_processes > 1 else result


def on_each_machine(accelerator: Accelerator, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
    """Call `function(*args, **kwargs)` on one process of each machine (a collective).

    Returns:
        Its result on that process, None on the others.

    Raises:
        Exception: what it raises there; on the other processes as `Elsewhere`.
    """
    return _call_if(accelerator.is_local_main_process, accelerator, function, *args, **kwargs)


def on_all(accelerator: Accelerator, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `function(*args, **kwargs)` on every process (a collective); if it raises on one, all raise.

    Returns:
        Its result on this process.

    Raises:
        Exception: what it raises here; `Elsewhere` where only other processes failed.
    """
    return _call_if(True, accelerator, function, *args, **kwargs)


def main_first(accelerator: Accelerator, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `function(*args, **kwargs)` on the main process, then on one of each other machine, then on the rest.

    For functions that download or write files: the first call does the work and the later ones find it done, on a
    file system that machines share and on separate ones. A collective.

    Returns:
        Its result on this process.

    Raises:
        Exception: what it raises in any turn, after that turn; on the other processes as `Elsewhere`.
    """
    main, first_here = accelerator.is_main_process, accelerator.is_local_main_process
    result: Any = None
    for turn in (main, first_here and not main, not first_here and not main):
        mine = _call_if(turn, accelerator, function, *args, **kwargs)
        result = mine if turn else result
    return result


def gather(accelerator: Accelerator, value: T) -> list[T]:
    """Returns the values of all processes, in their order (a collective)."""
    return gather_object([value]) if accelerator.num_processes > 1 else [value]


def raise_together(accelerator: Accelerator, error: Exception | None) -> None:
    """Raises on every process if any process has an error: its own, or the first of the others' (a collective)."""
    # Type and text, not the exception: not every exception can be pickled.
    found = gather(accelerator, None if error is None else (type(error).__name__, exit_code(error), str(error)))
    if error is not None:
        raise error
    for rank, other in enumerate(found):
        if other is not None:
            raise Elsewhere(rank, *other)


def versions() -> dict[str, str]:
    """Returns the versions of the libraries that compute, by name."""
    return {name: version(name) for name in ("torch", "torchvision", "accelerate")}


def assert_same(accelerator: Accelerator, **facts: Callable[[], str]) -> None:
    """Compares the versions of the libraries, and facts that every process must share (a collective).

    Raises:
        UsageError: on every process; names the first fact that differs, with the value of each process.
    """
    if accelerator.num_processes == 1:
        return
    found = gather(accelerator, versions() | {name: fact() for name, fact in facts.items()})
    for name in found[0]:
        values = [others[name] for others in found]
        if len(set(values)) > 1:
            each = ", ".join(f"process {rank}: {value}" for rank, value in enumerate(values))
            raise UsageError(f"the processes differ in {name}: {each}. All machines need the same data and versions.")


def _call_if(turn: bool, accelerator: Accelerator, function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Calls a function on the processes whose turn it is; what it raises on one, all raise."""
    error = result = None
    if turn:
        try:
            result = function(*args, **kwargs)
        except Exception as exception:
            error = exception
    raise_together(accelerator, error)
    return result
