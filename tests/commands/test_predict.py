"""Files in, classes out; what cannot be read is said at the end."""

import csv
import io
import json
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


def test_paths_from_standard_input(images, monkeypatch):
    lines = io.TextIOWrapper(io.BytesIO(os.fsencode(f"{images}/deep/[2] ü.png\r\n\n{images}/gone[1].png\n{images}")))
    monkeypatch.setattr("sys.stdin", lines)
    found = [os.path.relpath(path, images) for path in find_images(("-",))]
    assert found == ["deep/[2] ü.png", "gone[1].png", "0.png", "1.JPG"]


def test_lines_of_json(digits_run, images, tmp_path, capsys):
    (images / "0.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match="1 of 3 files"):
        predict(Predict((str(images),), str(digits_run), jsonl="-"))
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["path"] for row in printed] == find_images((str(images),))
    assert "cannot read" in printed[0]["error"]
    expected = trainer.load(digits_run)(images / "1.JPG")[0]
    assert [*printed[1]] == ["path", *expected]
    assert printed[1]["class"] == expected["class"]
    assert printed[1]["probability"] == pytest.approx(expected["probability"], rel=1e-4)
    with pytest.raises(DataError):
        predict(Predict((str(images),), str(digits_run), jsonl=str(tmp_path / "x"), threshold=1))
    kept = [json.loads(line) for line in (tmp_path / "x").read_text().splitlines()]
    assert kept == [printed[0], *({**row, "sure": False} for row in printed[1:])]
    assert "\n" in (out := capsys.readouterr().out)
    assert out.count("  unsure  ") == 2
    predict(Predict((str(images / "1.JPG"),), str(digits_run), jsonl=str(tmp_path / "x"), csv=str(tmp_path / "new")))
    out = capsys.readouterr().out
    assert "x: 1 line, in place of the file that was there" in out
    assert out.count("in place of") == 1


def test_a_result_is_written_before_the_next_batch(digits_run, images, monkeypatch, tmp_path):
    seen = []

    class Noted(trainer.commands.predict._Files):
        def __getitem__(self, index):
            seen.append((tmp_path / "x").read_text().count("\n"))
            return super().__getitem__(index)

    monkeypatch.setattr("trainer.commands.predict._Files", Noted)
    predict(Predict((str(images),), str(digits_run), jsonl=str(tmp_path / "x"), batch_size=1, workers=0))
    assert seen == [0, 1, 2]


def test_images_are_copied_into_folders(digits_run, images, tmp_path, capsys):
    loaded, target = trainer.load(digits_run), tmp_path / "sorted"
    best = loaded(images / "1.JPG")[0]
    twice = images / "deep" / "1.JPG"
    twice.write_bytes((images / "1.JPG").read_bytes())
    threshold = best["probability"]
    command = Predict(
        (str(images / "1.JPG"), str(twice)), str(digits_run), copy_to=str(target), threshold=threshold - 1e-3
    )
    predict(command)
    folder = target / best["class"]
    assert sorted(os.listdir(folder)) == ["1-2.JPG", "1.JPG"]
    assert f"{target}: 2 images copied, 1 of them under a new name" in capsys.readouterr().out
    (folder / "1.JPG").write_bytes(b"mine")
    command.threshold = threshold + 1e-3
    predict(command)
    assert (folder / "1.JPG").read_bytes() == b"mine"
    assert (folder / "1-2.JPG").read_bytes() == (target / "unsure" / "1.JPG").read_bytes() == twice.read_bytes()
    with pytest.raises(UsageError, match="threshold is 2: expected a probability"):
        predict(Predict((str(images),), str(digits_run), threshold=2))


def test_a_prediction_without_a_class_cannot_be_sorted(digits_run, images, tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text('def prediction(output, classes, *, top=3):\n    return "x", {"value": 1.0}\n')
    with pytest.raises(UsageError, match=r'--copy-to needs a "class", which prediction\(\) of the recipe'):
        predict(Predict((str(images),), str(digits_run), recipe=str(recipe), copy_to=str(tmp_path / "sorted")))
    assert not (tmp_path / "sorted").exists()


def test_several_processes_print_in_order(digits_run, images, program, tmp_path):
    (tmp_path / "list").write_text("".join(f"{path}\n" for path in [*find_images((str(images),)), "gone.png"]))
    setup = f"import os; os.dup2(os.open({str(tmp_path / 'list')!r}, os.O_RDONLY), 0)"
    arguments = ["predict", "-", "--run", digits_run, "--batch-size", "1", "--jsonl", "-"]
    one, two = (program(*arguments, cwd=tmp_path, target="trainer", processes=number, setup=setup) for number in (1, 2))
    assert (one.returncode, two.returncode) == (65, 65), two.stderr
    assert two.stdout == one.stdout
    assert len(two.stdout.splitlines()) == 4
    assert two.stderr.count("1 of 4 files could not be read") == 1
