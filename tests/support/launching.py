"""Start programs as people do: through the launcher, or several processes that find each other."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[2]
TINY_RUN = Path(__file__).with_name("tiny_run.py")


def search_path() -> str:
    """PYTHONPATH of a process of this checkout."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def launch(
    script: Path,
    *arguments: object,
    cwd: Path,
    config: str = "cpu",
    processes: int | None = None,
    env: dict | None = None,
):
    """Run a script through `accelerate launch` with one of the configurations; gives the finished process."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / "accelerate_configs" / f"{config}.yaml")]
    command += ["--num_processes", str(processes)] if processes else []
    return subprocess.run(
        [*command, str(script), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search_path(), **(env or {})},
        capture_output=True,
        text=True,
        timeout=300,
    )


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def join(rank: int, processes: int, port: int) -> None:
    """Make this process one of several on this machine, by the environment that a launcher gives it."""
    if processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}
        os.environ |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def tiny_run(folder: Path, *options: object, processes: int, check: bool = True):
    """Run tiny_run.py on several processes through the launcher; gives the finished process."""
    folder.mkdir(exist_ok=True)
    done = launch(TINY_RUN, folder, *options, cwd=folder.parent, config="cpu_x2", processes=processes)
    assert not check or done.returncode == 0, done.stderr
    return done


class Program:
    """Runs train.py, or another program of this project, in a third of a second: see program_server.py."""

    def __init__(self):
        command = [sys.executable, str(Path(__file__).with_name("program_server.py"))]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search_path()}
        self.server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        assert self.server.stdout.readline() == "ready\n"

    def __call__(
        self,
        *arguments: object,
        cwd: Path,
        target: Path | str = ROOT / "train.py",
        processes: int = 1,
        setup: str = "",
        env: dict | None = None,
        timeout: float = 100,
    ):
        """Run it; gives returncode, stdout, stderr and pid.

        Args:
            arguments: its command line.
            target: a script, or the name of a package.
            processes: how many, which find each other as those of a launcher do.
            setup: Python code to run before, in each process: where a test breaks something.
            timeout: seconds, after which it is killed.
        """
        job = {"arguments": [*map(str, arguments)], "cwd": str(cwd), "setup": setup, "env": env or {}}
        job |= {"target": str(target), "processes": processes, "timeout": timeout}
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        return SimpleNamespace(**json.loads(self.server.stdout.readline()))
