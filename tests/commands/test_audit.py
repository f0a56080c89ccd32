"""What is planted in real files is found, comes first, and is left out by a run."""

import csv
import json
import shutil

import pytest
from PIL import Image

from trainer.audit import Accuracy, Row, summarise, with_ticks
from trainer.commands.arguments import Audit
from trainer.commands.audit import audit
from trainer.data.datasets import Digits
from trainer.errors import UsageError
from trainer.processes.startup import finish

SMALL = ["--model", "resnet18", "--weights", "none", "--workers", "0"]


@pytest.fixture(autouse=True)
def no_watch():
    yield
    finish()


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Digits as files of 64 pixels; of the training images six are in validation too: copied, encoded again, halved."""
    root, digits, written = tmp_path_factory.mktemp("planted") / "data", Digits(), []
    for index in range(400):
        part, name = "val" if index >= 300 else "train", str(digits.labels[index])
        file = root / part / name / f"{index:04}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(digits.images[index]).resize((64, 64), Image.Resampling.BICUBIC).convert("RGB")
        image.save(file)
        written.append((image, root / "val" / name))
    for index in (0, 1):
        shutil.copy(root / "train" / written[index][1].name / f"{index:04}.png", written[index][1] / f"copy{index}.png")
    for index in (2, 3):
        written[index][0].save(written[index][1] / f"jpeg{index}.jpg", quality=80)
    for index in (4, 5):
        written[index][0].resize((40, 40), Image.Resampling.BICUBIC).save(written[index][1] / f"small{index}.png")
    shutil.copy(root / "train" / "6" / "0006.png", root / "train" / "7" / "wrong.png")  # under another label
    (root / "train" / "8" / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    Image.new("RGB", (64, 300), "white").save(root / "train" / "1" / "long.png")
    return root


def run(program, *arguments, cwd, processes=1):
    done = program("audit", *arguments, *SMALL, cwd=cwd, target="trainer", processes=processes)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_planted_copies_come_first_and_are_left_out(planted, program, tmp_path):
    text = run(program, "--data", planted, "--json", "found.json", cwd=tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())
    rows = found["findings"]
    leaks = [row for row in rows if row["finding"] == "leak"]
    assert rows[: len(leaks)] == leaks
    copies = {row["path"]: row["other"] for row in leaks}
    for index, kind in enumerate(("copy0.png", "copy1.png", "jpeg2.jpg", "jpeg3.jpg", "small4.png", "small5.png")):
        assert copies.pop(f"val/{index}/{kind}") == f"train/{index}/{index:04}.png"
    assert len(copies) <= 2, "few others are taken for copies"
    assert [row["score"] for row in leaks[:2]] == [1, 1], "exact ones first"
    assert found["accuracy"]["validation"] >= 0.8
    assert found["images"] == [302, 106]
    by = {kind: [row for row in rows if row["finding"] == kind] for kind in {row["finding"] for row in rows}}
    assert [row["path"] for row in by["unreadable"]] == ["train/8/torn.png"]
    (wrong,) = [row for row in by["duplicate"] if row["suggested"]]
    assert (wrong["path"], wrong["given"], wrong["suggested"]) == ("train/7/wrong.png", "7", "6")
    assert [row["path"] for row in by["crop"]] == ["train/1/long.png"]
    assert "images of validation in training as well, or nearly (2 pixel for pixel" in text.split("→")[0]
    assert list(planted.rglob("*.csv")) == []

    with open(tmp_path / "audit.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [*table[0]] == ["path", "finding", "score", "given", "suggested", "other", "exclude"]
    for row in table:
        row["exclude"] = "x" * (row["finding"] in ("leak", "unreadable"))
    with open(tmp_path / "audit.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)
    options = ["--data", planted, "--exclude", "audit.csv", *SMALL, "--image-size", "32", "--epochs", "1"]
    done = program(*options, "--output", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{302} training, {106 - len(leaks)} validation images" in done.stdout

    # An audit of that run no longer sees them, and its own table is in its folder.
    done = program("audit", "--run", "run", "--workers", "0", cwd=tmp_path, target="trainer")
    assert done.returncode == 0, done.stderr
    assert "run/audit.csv lists" in done.stdout
    names = {row["path"] for row in csv.DictReader((tmp_path / "run" / "audit.csv").read_text().splitlines())}
    assert names.isdisjoint(row["path"] for row in table if row["exclude"])
    assert "train/7/wrong.png" in names
    text = run(program, "--data", planted, cwd=tmp_path)
    assert f"{len(leaks) + 1} ticks in its column exclude" in text
    assert (tmp_path / "audit.csv").read_text().count(",x\n") >= len(leaks) + 1


@pytest.mark.slow
def test_two_processes_find_the_same(planted, program, tmp_path):
    one = run(program, "--data", planted, "--json", "-", "--output", "one.csv", cwd=tmp_path)
    two = run(program, "--data", planted, "--json", "-", "--output", "two.csv", cwd=tmp_path, processes=2)
    first, second = (json.loads(text)["findings"] for text in (one, two))
    assert [(row["path"], row["finding"], row["other"]) for row in first] == [
        (row["path"], row["finding"], row["other"]) for row in second
    ]
    for row, other in zip(first, second, strict=True):
        assert row["score"] == pytest.approx(other["score"], abs=1e-3)


def test_images_without_files_and_recipes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from trainer.data import Digits, Subset\ndef images(config, *, seed):\n"
        "    digits = Digits()\n    digits.labels[7] = 3\n"
        "    return Subset(digits, range(300)), Subset(digits, [5, *range(300, 400)])\n"
    )
    found = audit(Audit(data="digits", recipe=str(recipe), workers=0))
    assert found["findings"][0]["path"] == found["findings"][0]["other"] == "digits[5]"
    assert "digits[7]" in [row["path"] for row in found["findings"] if row["finding"] == "label"]
    assert "1 image of validation in training as well, or nearly (1 pixel for pixel" in capsys.readouterr().out


def test_what_cannot_be_audited_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="an audit needs --data FOLDER or --run RUN"):
        audit(Audit())
    with pytest.raises(UsageError, match="workers is -1"):
        audit(Audit(data="digits", workers=-1))
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "import torch\nfrom trainer.recipe import images as plain\ndef images(config, *, seed):\n"
        "    parts = plain(config, seed=seed)\n    for part in parts:\n"
        "        part.labels, part.classes = torch.tensor(part.labels).float(), ()\n    return parts\n"
    )
    with pytest.raises(UsageError, match="labels are no classes: an audit needs one class for each image"):
        audit(Audit(data="digits", recipe=str(recipe), workers=0))
    with pytest.raises(OSError, match="missing"):
        audit(Audit(data="digits", output="missing/audit.csv"))


def test_ticks_are_kept_though_their_rows_are_gone():
    rows = [Row("a", "label", 0.5, "x", "y"), Row("a", "outlier", 4.0), Row("b", "outlier", 4.0), Row("", "crop", 0.1)]
    old = [{"path": "a", "exclude": "x"}, {"path": "b", "exclude": " "}, {"path": "c", "exclude": "1", "given": "k"}]
    kept, marked = with_ticks(rows, old)
    assert [row.exclude for row in kept] == ["x", "x", "", "", "1"]
    assert (kept[-1].path, kept[-1].finding, kept[-1].given, marked) == ("c", "earlier", "k", 2)


def test_the_summary_has_the_most_important_first():
    rows = [Row("", "few images", 3, "cat"), Row("v.jpg", "leak", 1.0, "a", "b", "t.jpg")]
    rows += [Row(f"{n}.jpg", "outlier", 9.0 - n) for n in range(8)]
    leak, outlier, few = summarise(rows, Accuracy(0.9, 0.8, 0.95))
    assert leak.what.endswith(
        "1 under another label); a ridge head gets 90.0% of validation right, 80.0% of the others"
    )
    assert leak.images == ["v.jpg = t.jpg  (a → b, 1)"]
    assert (outlier.what, len(outlier.images)) == ("8 images unlike all others", 5)
    assert few.images == ["cat  (3)"]
    assert summarise([]) == []
