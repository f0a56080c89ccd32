"""Images with a tick in a table are left out: in training, in a resumed run, in an evaluation."""

import json
import os

import pytest
from pictures import write_classes

from trainer.data.excluded import keys, place, read_table, ticked
from trainer.data.files import FileImages
from trainer.data.open import load_data
from trainer.errors import UsageError
from trainer.storage import checkpoint

OPTIONS = ["--model", "resnet18", "--weights", "none", "--image-size", "32", "--augment", "none", "--workers", "0"]


def test_the_place_of_an_image(tmp_path, monkeypatch):
    write_classes(tmp_path / "photos" / "train", a=2, b=2)
    write_classes(tmp_path / "photos" / "val", a=1, b=1)
    train, val = load_data(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    for data in ("photos", "./photos/", str(tmp_path / "photos")):
        assert place(train, 0, data) == "train/a/000.png"
        assert place(val, 1, data) == "val/b/000.png"
    assert place(load_data("digits")[0], 0, "digits") == "digits[0]"
    files = FileImages(["photos/train/a/000.png", "/elsewhere/x.png"], [0, 0], ["a"])
    (tmp_path / "photos" / "labels.csv").touch()
    assert place(files, 0, "photos/labels.csv") == "train/a/000.png"
    assert place(files, 1, "photos/labels.csv") == "/elsewhere/x.png"


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_table_may_come_from_a_spreadsheet(tmp_path, delimiter):
    rows = [["path", "given", "exclude"], ["a, b.jpg" if delimiter != "," else "a.jpg", "", " X "], ["c.jpg", "", " "]]
    text = "\r\n".join(delimiter.join(row) for row in rows)
    (tmp_path / "audit.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert ticked(tmp_path / "audit.csv") == [rows[1][0]]
    assert len(read_table(tmp_path / "audit.csv")) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read as a CSV table"),
        (b"\xff\xfe", "cannot be read as a CSV table"),
        (b"path,finding\na,b\n", "has the columns path, finding; expected path and exclude"),
        (b"", "has the columns nothing; expected path and exclude"),
    ],
)
def test_another_table_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "audit.csv").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        ticked(tmp_path / "audit.csv")


def test_a_table_of_other_images_is_refused(tmp_path):
    parts = load_data(write_classes(tmp_path, a=3, b=3))
    found = keys(parts, ["a/000.png", "gone.png"], data=str(tmp_path), table="t.csv")
    assert sorted(found[0] + found[1]) == ["a/000.png"]
    with pytest.raises(UsageError, match=r"none of the images that t\.csv excludes is in .*, such as x\.png"):
        keys(parts, ["x.png"], data=str(tmp_path), table="t.csv")
    assert keys(parts, [], data=str(tmp_path), table="t.csv") == [[], []]
    files = [FileImages([tmp_path / "a" / "000.png", tmp_path / "b" / "000.png"], [0, 1], ["a", "b"])]
    with pytest.raises(UsageError, match="there are several"):
        keys(files, ["a/000.png"], data=str(tmp_path), table="t.csv")


def test_excluded_images_are_left_out_and_stay_out(photos, program, tmp_path):
    table = tmp_path / "audit.csv"
    table.write_text("path,exclude\ntrain/down/003.jpg,x\nval/across/001.jpg,x\nval/across/002.jpg,\n")
    options = ["--data", photos, "--exclude", "audit.csv", *OPTIONS, "--output", "run"]
    done = program(*options, "--epochs", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "59 training, 19 validation images" in done.stdout
    assert "audit.csv or unreadable, left out: 2\n" in done.stdout
    state = checkpoint.read(tmp_path / "run" / "checkpoints" / "best.pt")
    assert state["data"]["skipped"] == [["down/003.jpg"], ["across/001.jpg"]]
    assert state["config"]["data"]["exclude"] == os.path.abspath(table)
    table.unlink()  # the run knows what it left out
    done = program("--resume", "run", "--epochs", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "59 training, 19 validation images" in done.stdout
    again = checkpoint.read(tmp_path / "run" / "checkpoints" / "best.pt")
    assert again["data"] == state["data"]
    done = program("evaluate", "--run", "run", "--json", "-", cwd=tmp_path, target="trainer")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["samples"] == 19
    table.write_text("path,exclude\ntrain/down/003.jpg,x\n")
    other = tmp_path / "other.csv"
    other.write_text("path,exclude\ntrain/down/004.jpg,x\n")
    done = program("--resume", "run", "--exclude", "other.csv", cwd=tmp_path)
    assert done.returncode == 2
    assert "the run has exclude" in done.stderr


def test_two_processes_leave_out_the_same(photos, program, tmp_path):
    (tmp_path / "audit.csv").write_text("path,exclude\ntrain/down/003.jpg,x\n")
    options = ["--data", photos, "--exclude", "audit.csv", *OPTIONS, "--epochs", "1", "--output", "run"]
    done = program(*options, cwd=tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    assert "59 training, 20 validation images" in done.stdout
