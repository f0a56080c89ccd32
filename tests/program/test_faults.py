"""The whole program, with something broken: what it says, how it ends, and what is left. See docs/reliability.md."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import hostile
import pytest
import torch
from launching import ROOT
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.storage import checkpoint

SMALL = ["--model", "resnet18", "--weights", "none", "--image-size", "32", "--batch-size", "16", "--augment", "none"]
SMALL += ["--lr", "1e-3"]
SMALL += ["--workers", "0", "--output", "run"]


@pytest.fixture(scope="module")
def trained(photos, program, tmp_path_factory):
    """A run of two epochs of four steps."""
    folder = tmp_path_factory.mktemp("trained")
    done = program("--data", photos, *SMALL, "--epochs", "2", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it, in the current folder of the next program."""
    shutil.copytree(trained / "run", tmp_path / "run")
    return tmp_path / "run"


MORE = ["--resume", "auto", "--output", "run", "--epochs", "4"]


def _status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


def _hashes(run: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in run.glob("checkpoints/*.pt")}


# ------------------------------------------------------------------------------------------------ damaged checkpoints


def test_resume_auto_falls_back_and_says_why(run, program):
    newest = run / "checkpoints" / "step-00000008.pt"
    newest.write_bytes(newest.read_bytes()[:-5])
    done = program(*MORE, cwd=run.parent)
    assert done.returncode == 0, done.stderr
    assert "step-00000008.pt is truncated" in done.stderr
    assert "Using step-00000004.pt instead" in done.stderr
    assert "epoch 1 of 4 done, step 4" in done.stdout
    assert sorted(os.listdir(run / "checkpoints")) == [
        *("best.pt", "step-00000008.pt.damaged", "step-00000012.pt", "step-00000016.pt")
    ]


def test_without_any_good_checkpoint_it_refuses_and_a_named_one_is_never_replaced(run, program):
    for path in run.glob("checkpoints/*.pt"):
        path.write_bytes(path.read_bytes()[:100])
    before = _hashes(run)
    done = program(*MORE, cwd=run.parent)
    assert done.returncode == 65
    assert "can be used" in done.stderr
    assert all(f"{name} is truncated" in done.stderr for name in before)
    shutil.copy(run / "checkpoints" / "best.pt", run / "checkpoints" / "step-00000004.pt")
    done = program("--resume", "run/checkpoints/step-00000008.pt", cwd=run.parent)
    assert done.returncode == 65
    assert "step-00000008.pt is truncated" in done.stderr


def test_code_in_a_checkpoint_is_not_run_whatever_the_environment_says(run, program):
    marker = run.parent / "marker"
    archive = hostile.corpus(marker)["runs os.system"]
    path = run / "checkpoints" / "step-00000012.pt"
    path.write_bytes(archive + checkpoint._trailer(archive))
    env = {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    done = program("--resume", path, cwd=run.parent, env=env)
    assert done.returncode == 65, done.stderr
    assert "it holds posix.system, not only plain types and tensors" in done.stderr
    done = program(*MORE, cwd=run.parent, env=env)
    assert "epoch 2 of 4 done, step 8" in done.stdout
    assert not marker.exists()


@pytest.mark.parametrize("name", ["os.system", "__class__", "../resnet18"])
def test_names_are_looked_up_in_torchvision_and_nowhere_else(program, tmp_path, name):
    done = program("--model", name, cwd=tmp_path)
    assert done.returncode == 2
    assert name in done.stderr
    assert os.listdir(tmp_path) == []


# --------------------------------------------------------------------------------------------------------- the disk

LIMIT = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))"


def test_three_saves_that_fail_end_the_run_with_74_and_the_old_checkpoints_stay(run, program):
    before = _hashes(run)
    done = program(*MORE, "--save-every", "2", cwd=run.parent, setup=LIMIT.format(9000))
    assert done.returncode == 74, done.stderr
    assert "cannot save step 10, failure 1 of 3: [Errno 27] File too large" in done.stderr
    assert "cannot save step 12, failure 2 of 3" in done.stderr
    assert "error: [Errno 27] 3 saves in a row failed: File too large: 'run/checkpoints/" in done.stderr
    assert _hashes(run) == before
    status = _status(run)
    assert (status["status"], status["step"], status["type"]) == ("failed", 12, "OSError")
    assert [name for name in os.listdir(run / "checkpoints") if name.startswith(".tmp")] == []
    done = program(*MORE, cwd=run.parent)
    assert done.returncode == 0, done.stderr


FULL = """
from trainer.storage import files
class Full(files.Ops):
    def write(self, file, data):
        if "step-" in file.name and not broken.pop(0):
            raise OSError(28, "No space left on device")
        super().write(file, data)
files.ops = Full()
"""


def test_a_disk_that_recovers_costs_no_step(trained, run, program):
    whole = program(*MORE, "--save-every", "2", cwd=run.parent)
    assert whole.returncode == 0, whole.stderr
    golden = _hashes(run)
    shutil.rmtree(run)
    shutil.copytree(trained / "run", run)
    # Saves after steps 10, 12, 12 (the epoch), 14, 16, 16, and the last once more.
    broken = "broken = [False, False, True, True, True, False, True]\n"
    done = program(*MORE, "--save-every", "2", cwd=run.parent, setup=broken + FULL)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("cannot save step") == 3
    assert _hashes(run).keys() == golden.keys()
    assert _hashes(run)["step-00000016.pt"] == golden["step-00000016.pt"]
    assert _status(run)["status"] == "completed"


def test_a_run_that_cannot_write_its_last_checkpoint_is_not_completed(run, program):
    broken = "broken = [True, False, False]\n"
    done = program(*MORE, cwd=run.parent, setup=broken + FULL)
    assert done.returncode == 74
    assert "error: [Errno 28] 2 saves in a row failed: No space left on device" in done.stderr
    assert _status(run)["status"] == "failed"


def test_a_folder_that_vanishes_is_made_again(run, program):
    setup = "import shutil, trainer\nold = trainer.Trainer.evaluate\ndef evaluate(self, *a, **k):\n"
    setup += "    shutil.rmtree('run', ignore_errors=True)\n    return old(self, *a, **k)\n"
    setup += "trainer.Trainer.evaluate = evaluate"
    done = program(*MORE, cwd=run.parent, setup=setup)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("training goes on") == 1, "of the logs, once"
    assert checkpoint.newest(run / "checkpoints")[0].name == "step-00000016.pt"


def test_a_folder_that_is_another_runs_now_ends_the_run_and_is_left_alone(run, program):
    setup = "import os, shutil, trainer\nold = trainer.Trainer.evaluate\ndef evaluate(self, *a, **k):\n"
    setup += (
        "    shutil.rmtree('run')\n    os.makedirs('run/features')\n    open('run/lock', 'w').write('host other')\n"
    )
    setup += "    return old(self, *a, **k)\ntrainer.Trainer.evaluate = evaluate"
    done = program(*MORE, cwd=run.parent, setup=setup)
    assert done.returncode == 2
    assert "error: run was deleted, and made again by another run: this run ends at step 12" in done.stderr
    assert sorted(os.listdir(run)) == ["features", "lock"]


@pytest.mark.skipif(os.geteuid() == 0 and shutil.which("setpriv") is None, reason="needs setpriv")
def test_a_folder_that_cannot_be_written_ends_the_run_before_it_begins(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o555)
    # Root may write everywhere, as long as it has the capability to.
    capable = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    command = [*capable, sys.executable, str(ROOT / "train.py"), "--output", "run"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 74, done.stderr
    assert "cannot be written, so neither can the run's folder: 'run'" in done.stderr
    assert done.stdout == "", "found before anything else"


# ------------------------------------------------------------------------------------------------------------- logs


def test_logs_that_fail_change_nothing(run, trained, program):
    done = program(*MORE, cwd=run.parent)
    assert done.returncode == 0, done.stderr
    golden = _hashes(run)
    shutil.rmtree(run)
    shutil.copytree(trained / "run", run)
    shutil.rmtree(run / "tensorboard")
    (run / "tensorboard").write_text("no folder")
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    done = program(
        *MORE, cwd=run.parent, setup="import os, sys; r, w = os.pipe(); os.dup2(w, 1); os.close(r); os.close(w)"
    )
    assert done.returncode == 0, done.stderr
    kinds = re.findall(r"training goes on: (\w+): ", done.stderr)
    assert "IsADirectoryError" in kinds
    assert len(kinds) == len(set(kinds)) == done.stderr.count("training goes on"), "each kind once"
    assert _hashes(run) == golden
    assert _status(run)["status"] == "completed"


def test_curves_that_end_in_half_a_record_have_each_step_once_after_a_resume(run, program):
    for path in (run / "tensorboard").iterdir():
        path.write_bytes(path.read_bytes()[:-7])
    done = program(*MORE, cwd=run.parent)
    assert done.returncode == 0, done.stderr
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    for tag in ("train/loss", "val/accuracy"):
        steps = [event.step for event in events.Scalars(tag)]
        assert steps == sorted(set(steps))
        assert {12, 16} <= set(steps)


# -------------------------------------------------------------------------------------------------------- bad images


@pytest.fixture
def bad(photos, tmp_path):
    """The photos with five that cannot be read, of which one is for validation."""
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    down = folder / "train" / "down"
    (down / "000.jpg").write_bytes(b"")
    (down / "001.jpg").write_text("not an image")
    (down / "002.jpg").write_bytes((down / "002.jpg").read_bytes()[:400])
    Image.new("1", (20000, 20000)).save(down / "bomb.png")  # 400 million pixels in 50 kB
    (folder / "val" / "across" / "003.jpg").write_bytes(b"\xff\xd8 and no more")
    return folder


NAMES = ["down/000.jpg", "down/001.jpg", "down/002.jpg", "down/bomb.png", "across/003.jpg"]


def test_all_bad_images_are_listed_before_the_first_step(bad, program, tmp_path):
    done = program("--data", bad, *SMALL, "--check-data", cwd=tmp_path)
    assert done.returncode == 65
    assert "5 images cannot be read:" in done.stderr
    assert all(name in done.stderr for name in NAMES)
    assert not (tmp_path / "run").exists()


def test_bad_images_are_left_out_equally_on_any_number_of_processes_and_after_a_resume(bad, program, tmp_path):
    skip = ["--data", bad, *SMALL, "--bad-images", "skip", "--batch-size", "8", "--epochs", "1"]
    one = program(*skip, cwd=tmp_path)
    assert one.returncode == 0, one.stderr
    assert "57 training, 19 validation images" in one.stdout
    assert "unreadable, left out: 5\n" in one.stdout
    assert [name for name in NAMES if f"{name}: " not in one.stderr] == []
    (tmp_path / "run").rename(tmp_path / "alone")
    two = program(*skip, "--workers", "1", cwd=tmp_path, processes=2)
    assert two.returncode == 0, two.stderr
    assert "57 training, 19 validation images" in two.stdout
    states = [checkpoint.read(tmp_path / run / "checkpoints" / "step-00000008.pt") for run in ("alone", "run")]
    assert states[0]["data"] == states[1]["data"]
    assert sum(map(len, states[0]["data"]["skipped"])) == 5
    shutil.copy(bad / "train" / "down" / "005.jpg", bad / "train" / "down" / "000.jpg")  # repaired meanwhile: too late
    on = program("--resume", "auto", "--output", "run", "--epochs", "2", cwd=tmp_path)
    assert on.returncode == 0, on.stderr
    assert "57 training, 19 validation images" in on.stdout
    (bad / "train" / "down" / "000.jpg").unlink()
    gone = program("--resume", "auto", "--output", "run", "--epochs", "3", cwd=tmp_path)
    assert gone.returncode == 0, gone.stderr
    assert "57 training, 19 validation images" in gone.stdout


def test_an_image_that_the_split_counts_cannot_go_though_it_was_left_out(photos, program, tmp_path):
    shutil.copytree(photos / "train", tmp_path / "photos")
    last = tmp_path / "photos" / "down" / "029.jpg"
    last.write_text("not an image")
    done = program("--data", "photos", *SMALL, "--bad-images", "skip", "--epochs", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    last.unlink()
    done = program("--resume", "run", "--epochs", "2", cwd=tmp_path)
    assert done.returncode == 65
    assert "that are not here: down/029.jpg. The split for validation counts them: put files of these" in done.stderr
    last.touch()
    assert program("--resume", "run", "--epochs", "2", cwd=tmp_path).returncode == 0


def test_an_image_that_went_bad_since_is_found_by_a_check_and_not_left_out(run, program, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos" / "train" / "down" / "007.jpg").write_bytes(b"")
    again = ["--resume", "run", "--data", "photos", "--epochs", "3"]
    done = program(*again, "--check-data", cwd=tmp_path)
    assert done.returncode == 65
    assert "1 image cannot be read:\n" in done.stderr
    assert "down/007.jpg: " in done.stderr
    assert "put them back as they were, or start a new run with its checkpoint as --weights" in done.stderr
    done = program(*again, "--bad-images", "skip", cwd=tmp_path)
    assert done.returncode == 2
    assert "the run has bad_images 'stop', and --bad-images is 'skip'" in done.stderr
    done = program("--resume", "run", "--epochs", "3", "--check-data", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_other_images_than_the_run_had_are_refused(run, program, photos, tmp_path):
    other = tmp_path / "photos"
    shutil.copytree(photos, other)
    (other / "train" / "down" / "000.jpg").rename(other / "train" / "down" / "new.jpg")
    done = program(*MORE, "--data", other, cwd=tmp_path)
    assert done.returncode == 65
    assert "the training images have other names or labels than the run had; it may be " in done.stderr
    assert f"{other / 'train' / 'down' / 'new.jpg'}. Put the images back" in done.stderr


# ------------------------------------------------------------------------------------------------------ data workers

HURT = """
import os, signal, time, torch
from trainer.data import FolderImages
old = FolderImages.__getitem__
def read(self, index):
    if index == 7 and torch.utils.data.get_worker_info():
        {action}
    return old(self, index)
FolderImages.__getitem__ = read
"""


@pytest.mark.parametrize(
    ("action", "code", "says"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", 74, ". A worker that is killed usually"),
        pytest.param("time.sleep(1000)", 74, "timed out after", marks=pytest.mark.slow),
        pytest.param("os.kill(os.getpid(), signal.SIGSTOP)", 74, "timed out after", marks=pytest.mark.slow),
        ("raise OSError(24, 'Too many open files')", 74, "raise the limit of"),
        ("os.unlink(self.path(index))", 65, "across/007.jpg: "),
    ],
    ids=["killed", "sleeping", "stopped", "no more files", "vanished"],
)
def test_a_data_worker_that_fails_ends_the_run_with_its_cause(photos, program, tmp_path, action, code, says):
    data = photos
    if "unlink" in action:
        data = tmp_path / "photos"
        shutil.copytree(photos, data)
    arguments = ["--data", data, *SMALL, "--workers", "1", "--timeout", "0.05"]
    setup = HURT.format(action=action)
    done = program(*arguments, cwd=tmp_path, setup=setup, timeout=60)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert _status(tmp_path / "run")["status"] == "failed"


@pytest.mark.slow
def test_too_few_file_descriptors_are_named(photos, program, tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))"
    done = program("--data", photos, *SMALL, "--workers", "8", cwd=tmp_path, setup=limit)
    assert done.returncode == 74, done.stderr
    assert "ulimit -n" in done.stderr


# ------------------------------------------------------------------------------------- with means not everybody has


def _unshared(script: str, folder: Path):
    """Run a shell script as root of a mount namespace of its own."""
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare")
    probe = ["unshare", "-rm", "sh", "-ec", 'mount -t tmpfs none /mnt; "$0" -c ""', sys.executable]
    if subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("needs user and mount namespaces")
    command = ["unshare", "-rm", "sh", "-ec", script, sys.executable, str(ROOT / "train.py")]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


@pytest.mark.slow
def test_a_real_full_disk(trained, photos, tmp_path):
    """128 kB: room for the first checkpoint, not for the second."""
    options = " ".join(["--data", str(photos), *SMALL, "--epochs", "9", "--train", "fc"])
    script = "mkdir run; mount -t tmpfs -o size=128k none run; head -c 90000 /dev/zero > run/ballast; "
    done = _unshared(script + f'"$0" "$1" {options} || echo "code $?"; find run -name ".tmp*"', tmp_path)
    assert "code 74" in done.stdout, done.stderr
    assert "[Errno 28] No space left on device" in done.stderr
    assert ".tmp" not in done.stdout


@pytest.mark.slow
def test_a_read_only_disk(tmp_path):
    script = 'mkdir run; mount -t tmpfs -o ro none run; "$0" "$1" --output run/here || echo "code $?"'
    done = _unshared(script, tmp_path)
    assert done.stdout == "code 74\n", done.stderr
    assert "cannot be written" in done.stderr


def _strace(inject: str, script: str, folder: Path):
    """Run Python code with an error or a signal in one of its system calls."""
    if shutil.which("strace") is None:
        pytest.skip("needs strace")
    command = ["strace", "-f", "-qq", "-o", str(folder / "strace.txt"), "-e", "trace=rename,fsync", "-e", inject]
    return subprocess.run([*command, sys.executable, "-c", script], cwd=folder, capture_output=True, text=True)


SAVE = "import sys; sys.path.insert(0, {tests!r}); from pathlib import Path\nfrom save_points import state\n"
SAVE += "from trainer.storage import checkpoint\nfor step in (10, 20): checkpoint.save(Path('.'), state(step))\n"


@pytest.mark.slow
def test_killed_by_the_kernel_in_a_rename_or_refused_an_fsync(tmp_path):
    script = SAVE.format(tests=str(ROOT / "tests" / "support"))
    kill, refuse = "inject=rename:signal=KILL:when=2", "inject=fsync:error=EIO:when=3"
    for inject, says in ((kill, ""), (refuse, "Input/output error")):
        folder = tmp_path / str(bool(says))
        folder.mkdir()
        done = _strace(inject, script, folder)
        if "ptrace" in done.stderr.lower():
            pytest.skip("strace may not trace here")
        assert done.returncode != 0
        assert says in done.stderr
        assert checkpoint.steps(folder)[-1].name in ("step-00000010.pt", "step-00000020.pt")
        for path in folder.glob("*.pt"):
            checkpoint.verify(path)
        if says:
            assert (folder / "strace.txt").read_text().count("rename(") == 1, "not renamed, so not reported as saved"


@pytest.mark.slow
def test_out_of_memory_leaves_a_run_that_can_be_resumed(run, program):
    setup = "import trainer\nold = trainer.Trainer.evaluate\ndef evaluate(self, *a, **k):\n"
    setup += "    import resource, torch\n    resource.setrlimit(resource.RLIMIT_AS, (1 << 34, 1 << 34))\n"
    setup += "    torch.empty(1 << 34)\ntrainer.Trainer.evaluate = evaluate"
    done = program(*MORE, cwd=run.parent, setup=setup)
    assert done.returncode == 1
    assert _status(run)["status"] == "failed"
    assert checkpoint.newest(run / "checkpoints")[0].name == "step-00000008.pt"
    assert program(*MORE, cwd=run.parent).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["steps", "evaluate", "finish_epoch"])
def test_told_to_stop_anywhere_it_saves_and_exits_with_75(run, program, moment):
    setup = f"import os, signal, trainer\nold = trainer.Trainer.{moment}\ndef told(self, *a, **k):\n"
    setup += f"    os.kill(os.getpid(), signal.SIGTERM)\n    return old(self, *a, **k)\ntrainer.Trainer.{moment} = told"
    done = program(*MORE, cwd=run.parent, setup=setup, timeout=20)
    assert done.returncode == 75, done.stderr
    assert _status(run)["checkpoint"] == checkpoint.newest(run / "checkpoints")[0].name


# --------------------------------------------------------------------------------------------------- told to stop

SLOW = """
import os, signal, time
from trainer.data import FolderImages
from trainer.processes import preemption
old, parent, preemption.PATIENCE = FolderImages.__getitem__, os.getpid(), 2.0
def read(self, index):
    if os.path.exists("run/checkpoints/step-00000004.pt") and not os.path.exists("quick"):
        os.kill(parent, signal.SIGTERM)
        time.sleep(60)
    return old(self, index)
FolderImages.__getitem__ = read
"""


@pytest.mark.parametrize("options", [["--workers", "3"], ["--workers", "0"], ["--micro-batch", "8"]], ids=" ".join)
def test_a_stop_does_not_wait_for_slow_images(photos, program, tmp_path, options):
    """A signal while each image takes a minute; then images are quick again, and the run goes on to the same bits."""
    options = ["--data", photos, *SMALL, "--augment", "flip", "--epochs", "2", "--save-every", "1", *options]
    began = time.monotonic()
    done = program(*options, cwd=tmp_path, setup=SLOW)
    assert time.monotonic() - began < 20
    assert done.returncode == 75, done.stderr
    assert "Traceback" not in done.stderr
    status = _status(tmp_path / "run")
    assert (status["status"], status["reason"].split()[0]) == ("preempted", "SIGTERM")
    (tmp_path / "quick").touch()
    on = program("--resume", "run", cwd=tmp_path, setup=SLOW)
    assert on.returncode == 0, on.stderr
    (tmp_path / "run").rename(tmp_path / "stopped")
    assert program(*options, cwd=tmp_path, setup=SLOW).returncode == 0
    one, other = (checkpoint.read(tmp_path / run / "checkpoints" / "step-00000008.pt") for run in ("stopped", "run"))
    assert one.metrics == other.metrics
    assert all(torch.equal(tensor, other.model[name]) for name, tensor in one.model.items())


def test_a_stop_within_a_step_whose_images_are_slow_saves_nothing(photos, program, tmp_path):
    """The first of two micro-batches has been counted when the second does not come."""
    options = ["--data", photos, *SMALL, "--augment", "flip", "--micro-batch", "8", "--save-every", "1"]
    quick = "seen.append(index)\n        if len(seen) <= 21 + 8:\n            return old(self, index)\n"
    setup = SLOW.replace("os.kill", f"{quick}        os.kill")  # 21 are for the picture of predictions
    done = program(*options, "--epochs", "2", cwd=tmp_path, setup="seen = []\n" + setup)
    assert done.returncode == 75, done.stderr
    assert "stopped by SIGTERM while it waited for images: the last checkpoint stands" in done.stderr
    assert "Continue with --resume run" in done.stderr
    assert _status(tmp_path / "run")["status"] == "preempted"


def test_a_stop_of_one_of_two_processes_that_waits_for_images_stops_both(photos, program, tmp_path):
    options = ["--data", photos, *SMALL, "--augment", "flip", "--epochs", "2", "--save-every", "1"]
    setup = SLOW.replace("if os.path", "if os.environ['RANK'] == '1' and os.path")
    began = time.monotonic()
    done = program(*options, cwd=tmp_path, setup=setup, processes=2)
    assert time.monotonic() - began < 40
    assert done.returncode == 75, done.stderr
    assert "Traceback" not in done.stderr
    assert "the last checkpoint stands" in done.stderr
    assert _status(tmp_path / "run")["status"] == "preempted"
    assert program("--resume", "run", cwd=tmp_path).returncode == 0
