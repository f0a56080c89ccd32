"""Files in, classes out; what cannot be read is said at the end."""

import csv
import os

import pytest
import torch
from PIL import Image

import trainer
from trainer.commands.arguments import Predict
from trainer.commands.predict import classify, find_images, predict
from trainer.data.datasets import Digits
from trainer.errors import DataError, UsageError


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "deep" / ".hidden").mkdir(parents=True)
    for name, index in (("0.png", 0), ("1.JPG", 1), ("deep/[2] ü.png", 2), ("deep/.hidden/3.png", 3)):
        Image.fromarray(Digits().images[index]).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def test_files_folders_and_patterns(images):
    names = [os.path.relpath(path, images) for path in find_images((str(images),))]
    assert names == ["0.png", "1.JPG", "deep/[2] ü.png"]
    assert find_images((f"{images}/*.png", f"{images}/0.png")) == [f"{images}/0.png"]
    assert find_images((f"{images}/**/[[]2*",)) == [f"{images}/deep/[2] ü.png"]
    assert find_images((f"{images}/deep/[2] ü.png",)) == [f"{images}/deep/[2] ü.png"]  # as it is named
    assert find_images((f"{images}/notes.txt", "gone.png")) == [f"{images}/notes.txt", "gone.png"]  # asked for by name
    assert find_images((f"{images}/*.webp",)) == []


def test_what_is_printed_and_written(digits_run, images, tmp_path, capsys):
    predict(Predict((str(images),), str(digits_run), csv=str(tmp_path / "out.csv"), top=2))
    loaded = trainer.load(digits_run)
    probabilities = loaded.model(torch.stack([loaded.transform(images / "1.JPG")])).softmax(dim=1)[0]
    first, second = probabilities.argsort(descending=True)[:2].tolist()
    line = capsys.readouterr().out.splitlines()[1]
    assert line.endswith(f"1.JPG  {first} {probabilities[first]:.1%}  {second} {probabilities[second]:.1%}")
    with open(tmp_path / "out.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == find_images((str(images),))
    assert rows[1]["class"] == str(first)
    assert float(rows[1][str(second)]) == pytest.approx(probabilities[second].item(), rel=1e-4)
    assert sum(float(rows[0][name]) for name in loaded.classes) == pytest.approx(1)
    assert sorted(os.listdir(tmp_path)) == ["images", "out.csv"]


@pytest.mark.parametrize("workers", [0, 2])
def test_what_cannot_be_read_is_listed_at_the_end_and_the_rest_done(digits_run, images, workers, capsys, tmp_path):
    (images / "0.png").write_bytes(b"not an image")
    paths = (str(images), "gone.png")
    with pytest.raises(DataError, match=r"(?s)2 of 4 files could not be read:\n  .*0\.png.*\n  .*gone\.png") as caught:
        predict(Predict(paths, str(digits_run), workers=workers, batch_size=1, csv=str(tmp_path / "out.csv")))
    assert caught.value.exit_code == 65
    assert len(capsys.readouterr().out.splitlines()) == 3  # two images, and the table
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 3


def test_results_come_in_order(digits_run, images):
    loaded, files = trainer.load(digits_run), find_images((str(images),))
    together = list(classify(loaded, files, batch_size=32, workers=0))
    alone = [next(iter(classify(loaded, [path], workers=0))) for path in files]
    assert [path for path, _ in together] == files
    for (_, left), (_, right) in zip(together, alone, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"top": 0}, "top is 0: expected at least 1"),
        ({"batch_size": 0}, "batch_size is 0: expected at least 1"),
        ({"workers": -1}, "workers is -1: expected at least 0"),
        ({"device": "foo"}, "device foo cannot be used: Expected one of cpu, cuda"),
        ({"device": "cuda:99"}, "device cuda:99 cannot be used: "),
    ],
)
def test_numbers_and_devices_that_cannot_be(digits_run, images, options, says):
    with pytest.raises(UsageError, match=says):
        predict(Predict((str(images),), str(digits_run), **options))


def test_a_table_that_cannot_be_written_is_known_before_the_work(images, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for target in ("images", "nowhere/out.csv", "images/0.png/out.csv"):
        with pytest.raises(OSError, match=rf": '{tmp_path}/{target}'$"):
            predict(Predict((str(images),), "no run", csv=f"~/{target}"))
    with pytest.raises(UsageError, match="no run does not exist"):
        predict(Predict((str(images),), "no run", csv="~/out.csv"))
    assert os.listdir(tmp_path) == ["images"]


def test_nothing_to_classify(digits_run, tmp_path):
    with pytest.raises(UsageError, match="no image to classify: expected files, folders or patterns"):
        predict(Predict((str(tmp_path),), str(digits_run)))
