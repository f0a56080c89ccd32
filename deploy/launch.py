"""`accelerate launch` for containers and schedulers, which stop a program by a signal and read its exit code.

    python deploy/launch.py --config_file accelerate_configs/gpu.yaml train.py --output runs/photos --resume auto

Takes what `accelerate launch` takes. That command passes no signal on to a program that it has started alone, does not
end on SIGTERM where it is process 1, and turns all exit codes into 1. Here SIGTERM and SIGUSR1 let the run save, and
the exit code is the program's own: 0, 75 (stopped, to be resumed), 2 (usage), 65 (data), 70 (numbers), 74 (files).
"""

import os
import signal
import subprocess
import sys
from types import FrameType

STOPPED = 75  # EX_TEMPFAIL, as train.py has it


def stop(number: int, frame: FrameType | None) -> None:
    """Pass a signal on; the handler of torch's launcher takes its place where there are several processes."""
    import psutil

    children = psutil.Process().children()
    for child in children:
        child.terminate()
    if not children:  # nothing has begun
        os._exit(STOPPED)


signal.signal(signal.SIGTERM, stop)
if hasattr(signal, "SIGUSR1"):
    signal.signal(signal.SIGUSR1, lambda number, frame: os.kill(os.getpid(), signal.SIGTERM))

from accelerate.commands.launch import launch_command, launch_command_parser  # noqa: E402
from torch.distributed.elastic.multiprocessing import SignalException  # noqa: E402
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # noqa: E402

if __name__ == "__main__":
    try:
        launch_command(launch_command_parser().parse_args())
    except subprocess.CalledProcessError as error:  # one process
        sys.exit(error.returncode)
    except ChildFailedError as error:  # several
        sys.exit(error.get_first_failure()[1].exitcode)
    except SignalException:
        sys.exit(STOPPED)
