"""What a checkpoint may hold, and what becomes of the rest when it is written."""

import dataclasses
import io
from pathlib import Path

import hostile
import numpy as np
import pytest
import torch
from states import made_state

from trainer.errors import CheckpointError
from trainer.storage import checkpoint
from trainer.storage.state import State, plain


def test_numbers_of_numpy_and_paths_are_written_as_plain_ones_so_that_they_can_be_read(tmp_path):
    odd = {
        "loss": np.float64(0.5),
        "n": np.int32(3),
        "ok": np.bool_(True),
        "where": Path("a/b"),
        "t": (1, np.str_("x")),
    }
    odd |= {"weight": torch.nn.Parameter(torch.ones(2)), "array": np.arange(3)}
    checkpoint.write(tmp_path / "a.pt", made_state(metrics={"val": odd}))
    found = checkpoint.read(tmp_path / "a.pt").metrics["val"]
    assert torch.equal(found.pop("weight"), torch.ones(2))
    assert torch.equal(found.pop("array"), torch.arange(3))
    assert found == {"loss": 0.5, "n": 3, "ok": True, "where": "a/b", "t": (1, "x")}
    assert [type(value) for value in found.values()] == [float, int, bool, str, tuple]


@pytest.mark.parametrize("value", [object(), {1, 2}, 1j, np.datetime64("2024-01-01"), np.array(["a"])])
def test_what_cannot_be_read_again_is_not_written(tmp_path, value):
    with pytest.raises(CheckpointError, match=r"state\.metrics\.val\.x is a .*Convert it first"):
        checkpoint.write(tmp_path / "a.pt", made_state(metrics={"val": {"x": value}}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"step": "1"}, "it has str as step; expected int"),
        ({"step": True}, "it has bool as step"),
        ({"model": {"w": [0.0]}}, "it has dict as model; expected dict"),
        ({"model": {1: torch.zeros(1)}}, "it has dict as model"),
        ({"scaler": []}, "it has list as scaler"),
        ({"classes": ("a",)}, "it has tuple as classes"),
        ({"fingerprint": {"w": 1}}, "it has dict as fingerprint"),
        ({"recipe": {"model": "x"}}, "it has dict as recipe"),
    ],
)
def test_types_are_those_of_the_annotations(tmp_path, entries, says):
    values = made_state().to_dict() | entries
    with pytest.raises(CheckpointError, match=says):
        State.from_dict(values)
    archive = hostile.saved(values)
    (tmp_path / "a.pt").write_bytes(archive + checkpoint._trailer(archive))
    with pytest.raises(CheckpointError, match=rf"a\.pt cannot be used: {says}"):
        checkpoint.read(tmp_path / "a.pt")


def test_every_field_is_documented_required_or_has_a_default_and_unknown_names_are_ignored():
    source = Path(checkpoint.__file__).with_name("state.py").read_text()
    for field in dataclasses.fields(State):
        line = next(place for place, text in enumerate(source.splitlines()) if text.startswith(f"    {field.name}: "))
        assert source.splitlines()[line + 1].startswith('    """'), field.name
    values = made_state().to_dict()
    for name in ("recipe", "decided", "format"):
        del values[name]
    assert State.from_dict(values | {"of a later version": 1}) == made_state()
    del values["base"]
    with pytest.raises(CheckpointError, match="it lacks base"):
        State.from_dict(values)
    with pytest.raises(KeyError):
        made_state()["to_dict"]


def test_plain_copies_containers_and_not_tensors():
    tensor, inner = torch.zeros(2), [1]
    found = plain({"t": tensor, "l": inner})
    assert found["t"] is tensor
    assert found["l"] == inner
    assert found["l"] is not inner
    torch.save(found, io.BytesIO())
