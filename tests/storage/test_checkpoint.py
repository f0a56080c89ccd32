import errno
import os
import pickle
import random
import shutil
import zipfile
from dataclasses import replace

import pytest
import torch
from save_points import Watched
from states import made_state

from trainer.config import OptimConfig
from trainer.errors import CheckpointError
from trainer.model.freezing import freeze, trained_tensors
from trainer.optim import build_optimizer
from trainer.storage import checkpoint, files
from trainer.storage.optimizer_state import optimizer_state, positional_state


@pytest.fixture
def state(tiny):
    freeze(tiny, ["fc"])
    optimizer = _stepped(tiny, "adamw")
    return made_state(
        model={name: tensor.detach().clone() for name, tensor in trained_tensors(tiny).items()},
        optimizer=optimizer_state(optimizer, tiny),
        epoch=2,
        step=7,
        samples=100,
        metrics={"val": {"accuracy": 0.5}},
        fingerprint={"conv.weight": "00"},
        freeze_plan={"train": ["fc"], "trainable": ["fc.weight", "fc.bias"]},
        classes=["a", "b", "ç"],
        config={"optim": {"lr": 0.1}},
    )


def _stepped(model, kind):
    optimizer = build_optimizer(model, OptimConfig(optimizer=kind, lr=0.1))
    model.eval()(torch.randn(4, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def _same(left, right) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right) and left.dtype == right.dtype
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    return left == right


def test_round_trip_and_plain_torch_reads_it(tmp_path, state):
    path = checkpoint.path_of(tmp_path, 7)
    checkpoint.write(path, state)
    assert path.name == "step-00000007.pt"
    assert _same(checkpoint.read(path).to_dict(), state.to_dict())
    assert _same(torch.load(path, weights_only=True), state.to_dict())
    assert os.listdir(tmp_path) == [path.name]


def test_every_flipped_bit_zeroed_page_and_truncation_is_detected(tmp_path, state):
    path = tmp_path / "step-00000007.pt"
    checkpoint.write(path, replace(state, model={"wide": torch.rand(2000)}))
    data, draw = path.read_bytes(), random.Random(0)
    detected = 0
    for _ in range(1000):
        place = draw.randrange(len(data) * 8)
        damaged = bytearray(data)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            checkpoint.read(path)
        detected += 1
    assert detected == 1000
    for page in range(0, len(data), 4096):
        path.write_bytes(data[:page] + bytes(len(data[page : page + 4096])) + data[page + 4096 :])
        with pytest.raises(CheckpointError, match=r"damaged|truncated"):
            checkpoint.read(path)
    for length in [0, 1, len(data) - 1, *range(1024, len(data), 1024)]:
        for tail in (b"", bytes(len(data) - length)):  # cut off, or never written
            path.write_bytes(data[:length] + tail)
            with pytest.raises(CheckpointError, match=r"truncated|not a checkpoint|damaged"):
                checkpoint.read(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(CheckpointError):
        checkpoint.read(path)
    path.write_bytes(data)
    checkpoint.read(path)


def _sealed(path, archive: bytes):
    """A file with a valid trailer around any content."""
    path.write_bytes(archive + checkpoint._trailer(archive))


@pytest.mark.parametrize("checked", [True, False])
def test_code_in_a_pickle_is_not_run(tmp_path, monkeypatch, checked):
    """Neither by what looks at the archive first, nor by torch alone."""
    if not checked:
        monkeypatch.setattr(checkpoint, "check", lambda file: None)

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'marker'}",)

    torch.save({"format": 1, "model": Evil()}, tmp_path / "evil.zip")
    archives = [(tmp_path / "evil.zip").read_bytes(), pickle.dumps(Evil())]
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    for archive in archives:
        _sealed(tmp_path / "step-00000001.pt", archive)
        with pytest.raises(CheckpointError, match="cannot be read"):
            checkpoint.read(tmp_path / "step-00000001.pt")
    assert not (tmp_path / "marker").exists()


def test_compressed_members_are_refused(tmp_path):
    torch.save({"format": 1, "zeros": torch.zeros(1000)}, tmp_path / "plain.zip")
    with (
        zipfile.ZipFile(tmp_path / "plain.zip") as source,
        zipfile.ZipFile(tmp_path / "small.zip", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    _sealed(tmp_path / "step-00000001.pt", (tmp_path / "small.zip").read_bytes())
    with pytest.raises(CheckpointError, match="compressed or encrypted members"):
        checkpoint.read(tmp_path / "step-00000001.pt")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": 2}, "has format 2; this version of the template reads up to 1"),
        ({"format": None}, "no format version"),
        ({"optimizer": ...}, "lacks optimizer"),
        ({"scaler": ...}, "lacks scaler"),
    ],
)
def test_entries_that_must_be_there(tmp_path, state, change, says):
    whole = state.to_dict() | change
    torch.save({key: value for key, value in whole.items() if value is not ...}, tmp_path / "a")
    _sealed(tmp_path / "step-00000001.pt", (tmp_path / "a").read_bytes())
    with pytest.raises(CheckpointError, match=says):
        checkpoint.read(tmp_path / "step-00000001.pt")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        checkpoint.read(tmp_path / "nothing.pt")


def _write_steps(folder, state, *steps):
    for step in steps:
        checkpoint.write(checkpoint.path_of(folder, step), replace(state, step=step))


def test_newest_is_by_step_and_passes_over_what_is_damaged(tmp_path, state, caplog):
    assert checkpoint.newest(tmp_path) == (None, None)
    _write_steps(tmp_path, state, 100000000, 9, 20)  # written in this order: time says nothing
    for path in tmp_path.iterdir():
        os.utime(path, (0, 0))
    assert checkpoint.newest(tmp_path)[0].name == "step-100000000.pt"
    checkpoint.path_of(tmp_path, 100000000).write_bytes(b"x" * 100)
    assert checkpoint.newest(tmp_path)[0].name == "step-00000020.pt"
    assert "step-100000000.pt is truncated" in caplog.text
    assert "Using step-00000020.pt instead" in caplog.text
    for step in (9, 20):
        checkpoint.path_of(tmp_path, step).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"(?s)no checkpoint in .* can be used:.*000020.pt.*000009.pt"):
        checkpoint.newest(tmp_path)
    checkpoint.write(tmp_path / "best.pt", state)
    assert checkpoint.newest(tmp_path)[0].name == "best.pt"


def test_newest_ignores_what_only_has_the_name_of_a_checkpoint(tmp_path, state, caplog):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    for folder in (run, elsewhere):
        folder.mkdir()
    _write_steps(run, state, 20)
    _write_steps(elsewhere, state, 30)
    (run / "step-00000030.pt").symlink_to(elsewhere / "step-00000030.pt")
    (run / "step-00000040.pt").mkdir()
    (run / "step-00000050.pt.bak").write_bytes(b"")
    (run / "step-60.pt").write_bytes(b"")
    shutil.copy(run / "step-00000020.pt", run / "step-00000070.pt")
    torch.save({"somebody": "else's"}, run / "step-00000080.pt")
    assert checkpoint.newest(run)[0].name == "step-00000020.pt"
    for name in ("step-00000030.pt", "step-00000040.pt", "step-60.pt"):
        assert f"{name} is ignored: expected a file" in caplog.text
    assert "step-00000070.pt holds step 20: somebody has renamed it. Using step-00000020.pt" in caplog.text
    assert "step-00000080.pt is truncated, or not a checkpoint of this template" in caplog.text


def test_a_newer_format_is_not_passed_over_for_something_older(tmp_path, state, monkeypatch):
    _write_steps(tmp_path, state, 10)
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    _write_steps(tmp_path, state, 20)
    monkeypatch.setattr(checkpoint, "FORMAT", 1)
    with pytest.raises(CheckpointError, match=r"20\.pt has format 2; this version of the template reads up to 1"):
        checkpoint.newest(tmp_path)


def test_a_saver_forgives_two_failures_and_remembers_the_best(tmp_path, state, monkeypatch, caplog):
    saver, ops = checkpoint.Saver(), Watched()
    monkeypatch.setattr(files, "ops", ops)

    def save(step, *, disk, best=False, final=False):
        ops.first = lambda number: None if disk else fail()
        return saver.save(tmp_path, replace(state, step=step), best=best, keep=2, final=final)

    def fail():
        raise OSError(errno.ENOSPC, "No space left on device")

    assert save(10, disk=True).name == "step-00000010.pt"
    before = (tmp_path / "step-00000010.pt").read_bytes()
    assert save(20, disk=False, best=True) is None
    assert save(30, disk=False) is None
    assert "cannot save step 30, failure 2 of 3: [Errno 28] No space left on device. Training goes on" in caplog.text
    assert save(40, disk=True).name == "step-00000040.pt"
    assert checkpoint.read(tmp_path / "best.pt")["step"] == 20
    assert (tmp_path / "step-00000010.pt").read_bytes() == before
    for step in (50, 60):
        assert save(step, disk=False) is None
    with pytest.raises(OSError, match="3 saves in a row failed: No space left on device") as caught:
        save(70, disk=False)
    assert caught.value.errno == errno.ENOSPC
    assert sorted(os.listdir(tmp_path)) == ["best.pt", "step-00000010.pt", "step-00000040.pt"]
    with pytest.raises(OSError, match="a save failed: No space left"):
        checkpoint.Saver().save(tmp_path, state, best=False, keep=2, final=True)


def test_prune_keeps_the_newest_the_best_and_files_of_others(tmp_path, state):
    _write_steps(tmp_path, state, 1, 2, 3, 10)
    shutil.copy(checkpoint.path_of(tmp_path, 1), tmp_path / "best.pt")
    (tmp_path / "notes.txt").write_text("mine")
    checkpoint.prune(tmp_path, keep=1)  # while one is written, another must exist
    assert sorted(os.listdir(tmp_path)) == ["best.pt", "notes.txt", "step-00000003.pt", "step-00000010.pt"]
    assert [path.name for path in checkpoint.later_than(tmp_path, 3)] == ["step-00000010.pt"]


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_optimizer_state_is_by_name(tiny, kind):
    freeze(tiny, ["block", "fc"])
    optimizer = _stepped(tiny, kind)
    saved = optimizer_state(optimizer, tiny)
    assert saved["kind"] == type(optimizer).__name__
    assert saved["state"].keys() == {name for name, p in tiny.named_parameters() if p.requires_grad}

    other = build_optimizer(tiny, OptimConfig(optimizer=kind, lr=0.5))
    other.param_groups.reverse()  # another order of the same parameters: by position it would load wrongly
    other.load_state_dict(positional_state(saved, other, tiny))
    assert _same(optimizer_state(other, tiny), saved)
    assert other.param_groups[0]["lr"] == 0.5


def test_optimizer_state_that_does_not_fit_is_refused_by_name(tiny):
    freeze(tiny, ["fc"])
    optimizer = _stepped(tiny, "adamw")
    saved = optimizer_state(optimizer, tiny)
    with pytest.raises(CheckpointError, match=r"trained with AdamW; this run uses SGD"):
        positional_state(saved, build_optimizer(tiny, OptimConfig(optimizer="sgd")), tiny)
    swapped = {"fc.weight": saved["state"]["fc.bias"], "fc.bias": saved["state"]["fc.weight"]}
    with pytest.raises(CheckpointError, match=r"exp_avg of fc.weight has shape \(3,\); expected \(3, 8\)"):
        positional_state({**saved, "state": swapped}, optimizer, tiny)
    del saved["state"]["fc.bias"]
    with pytest.raises(CheckpointError, match=r"other parameters: missing fc\.bias"):
        positional_state(saved, optimizer, tiny)


def test_optimizer_state_of_any_shape_is_kept(tiny):
    freeze(tiny, ["fc"])

    def build():
        return torch.optim.Adafactor([p for p in tiny.parameters() if p.requires_grad])

    optimizer = build()
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    saved = optimizer_state(optimizer, tiny)
    assert saved["state"]["fc.weight"]["row_var"].shape == (3, 1)
    assert saved["state"]["fc.bias"].keys() != saved["state"]["fc.weight"].keys()
    other = build()
    other.load_state_dict(positional_state(saved, other, tiny))
    assert _same(optimizer_state(other, tiny), saved)


def test_an_optimizer_that_never_stepped_round_trips(tiny):
    freeze(tiny, ["fc"])
    optimizer = build_optimizer(tiny)
    saved = optimizer_state(optimizer, tiny)
    optimizer.load_state_dict(positional_state(saved, optimizer, tiny))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda saved: saved.pop("fc.bias"), "missing fc.bias"),
        (lambda saved: saved.update({"layer4.weight": torch.zeros(1)}), "unexpected layer4.weight"),
        (
            lambda saved: saved.update({"fc.bias": torch.zeros(4)}),
            r"fc.bias is torch.float32 \(4,\); expected .* \(3,\)",
        ),
        (lambda saved: saved.update({"fc.bias": torch.zeros(3).half()}), "fc.bias is torch.float16"),
        (lambda saved: saved.update({"module.fc.bias": saved.pop("fc.bias")}), "missing fc.bias; unexpected module.fc"),
    ],
)
def test_tensors_obey_the_exact_contract(tiny, change, says):
    freeze(tiny, ["fc"])
    saved = {name: tensor.detach().clone() for name, tensor in trained_tensors(tiny).items()}
    checkpoint.check_tensors(saved, trained_tensors(tiny))
    change(saved)
    with pytest.raises(CheckpointError, match=says):
        checkpoint.check_tensors(saved, trained_tensors(tiny))
