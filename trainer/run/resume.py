"""Where a run starts, and with which settings.

1. At the checkpoint that `--resume` names, with the settings stored in it, except for those given again.
2. At the newest checkpoint of the folder, for `--resume auto` or after the launcher has restarted the program.
3. Anew, in a folder of its own.
"""

import json
import os
from contextlib import suppress
from pathlib import Path

from accelerate import Accelerator

from trainer import config as settings
from trainer.config import Config, default_name, flag, flat, from_dict, to_dict
from trainer.errors import UsageError
from trainer.processes.identity import Identity
from trainer.processes.together import on_main, print_main
from trainer.run.folder import ROOT, Run, check_writable, choose, holds_run, numbered
from trainer.storage import checkpoint
from trainer.text import counted

# What a resumed run must share with the run that it continues.
_OVERRIDABLE = ("augment", "views", "image_size", "batch_size", "seed")  # the checkpoint would refuse the others
_FIXED = (*_OVERRIDABLE, "val_fraction", "bad_images", "exclude", "model", "train", "optimizer")


def open_run(accelerator: Accelerator, config: Config) -> tuple[Config, Run]:
    """The settings and the folder of a run, and its checkpoint, read once (a collective). Nothing is changed yet.

    The main process looks, because a folder may exist on one machine alone, and all others are given what it found.

    Args:
        config: as given; a resumed run takes all other settings from its checkpoint.

    Raises:
        UsageError: the folder holds another run, or newer checkpoints than the one to continue from, or is in use; or
            the run cannot be continued with these settings.
        CheckpointError: there are checkpoints and none can be used.
        OSError: the folder cannot be written.
    """
    return on_main(accelerator, find_run, config)


def find_run(config: Config) -> tuple[Config, Run]:
    """`open_run` on one process."""
    if folder := _under_way(config):
        config = settings.replace(config, resume="auto", overwrite=False, output=str(folder))
    run = _find(config)
    if run.state is not None:
        config = _resumed(config, run.state, run.source)
    elif config.run.resume == "auto":
        print_main(f"resume  there is no checkpoint in {run.path} yet: a new run")
    settings.check(config)
    run.lock(create=False)
    check_writable(run.path)
    return config, run


def restarts() -> int:
    """How often the launcher has restarted this program (`--max_restarts`)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _find(config: Config) -> Run:
    resume, output, overwrite = config.run.resume, config.run.output, config.run.overwrite
    name = default_name(config)
    if resume is None:
        return choose(output, name, overwrite=overwrite)
    folder = _named(config)
    named = resume != "auto" and folder.is_file()
    if resume != "auto" and not folder.exists():
        raise UsageError(f"--resume {resume}: there is no such checkpoint or run.")
    if overwrite and not named and (output is None or Path(output).absolute() == folder.absolute()):
        raise UsageError(f"--resume {resume} continues {folder}, and --overwrite deletes it: give one of them.")
    source, state = (folder, checkpoint.read(folder)) if named else checkpoint.newest(folder / "checkpoints")
    if source is None or state is None:
        if resume == "auto":
            return Run(folder) if holds_run(folder) else choose(str(folder), name)
        if not holds_run(folder):
            raise UsageError(f"--resume {resume} is neither a checkpoint nor the folder of a run.")
        raise UsageError(f"{folder} has no checkpoint yet; start it anew with --resume auto --output {folder}.")
    home: Path | None = source.absolute().parent.parent
    if source.parent.name != "checkpoints" or not holds_run(source.absolute().parent.parent):
        home = None
    if home is None or (output is not None and Path(output).absolute() != home):
        stored = from_dict(state["config"], f"the settings in {source}")
        named = {n: settings.get(config, n) for n in ("data", "model") if n in settings.given(config)}
        run = choose(output, default_name(settings.replace(stored, **named)), overwrite=overwrite)
        return Run(run.path, source, state, stale=run.stale)
    later = checkpoint.later_than(home / "checkpoints", state["step"])
    if not named:
        return Run(folder, source, state, damaged=later)  # else one of them would be the source
    # Continuing in place from an older checkpoint: the later ones belong to another future.
    if later and not overwrite:
        raise UsageError(
            f"{home} has newer checkpoints than {source.name}, such as {later[-1].name}. Delete them with --overwrite, "
            "or continue in another folder with --output."
        )
    return Run(home, source, state, stale=later)


def _named(config: Config) -> Path:
    """The run or the checkpoint that `--resume` names: a run also by its folder of checkpoints."""
    if config.run.resume in (None, "auto"):
        name = default_name(config)
        return Path(config.run.output) if config.run.output is not None else (numbered(name) or [ROOT / name])[-1]
    path = Path(config.run.resume)
    inside = path.name == "checkpoints" and path.is_dir() and not holds_run(path)
    return path.parent if inside else path


def _under_way(config: Config) -> Path | None:
    """The run that the launcher had started before it restarted the program, if it had created its folder."""
    if not restarts():
        return None
    path = _named(config)
    folders = [path, path.absolute().parent.parent]  # a run, or a checkpoint in one
    if config.run.output is not None:
        folders = [Path(config.run.output)]
    launcher = Identity.of(os.getppid()).to_dict()
    for folder in folders:
        with suppress(OSError, ValueError, TypeError, KeyError):
            if json.loads((folder / "status.json").read_text())["launcher"] == launcher:
                return folder
    return None


def _resumed(config: Config, state: checkpoint.State, source: Path | None) -> Config:
    """The stored settings with those given again; prints what changes, and refuses to continue as another run."""
    stored = from_dict(state["config"], f"the settings in {source}")
    again = {name for name in settings.given(config) if settings.get(config, name) != "auto"}  # it was found already
    new = settings.replace(stored, **{name: settings.get(config, name) for name in {*again, *settings.START}})
    was, now = flat(to_dict(stored)), flat(to_dict(new))
    for name in (name for name in now if now[name] != was[name]):
        if name in _FIXED and not (name in _OVERRIDABLE and config.run.override):
            other = "give --override as well" if name in _OVERRIDABLE else "start that run with --weights CHECKPOINT"
            raise UsageError(
                f"--resume: the run has {name} {was[name]!r}, and {flag(name)} is {now[name]!r}. Omit {flag(name)} to "
                f"continue the run as it is, omit --resume to start a new run, or {other}."
            )
        print_main(f"resume: {name}: {was[name]} → {now[name]}")
    if "epochs" in again and now["epochs"] != was["epochs"] and now["schedule"] != "constant":
        print_main(f"        the {now['schedule']} schedule is stretched over {counted(now['epochs'], 'epoch')}")
    return new
