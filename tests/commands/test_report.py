"""The page about a run, from a real run."""

import shutil

import pytest
import torch

from trainer.commands.arguments import Report
from trainer.commands.report import report
from trainer.errors import UsageError
from trainer.storage import checkpoint


def test_a_page_about_a_run_has_its_numbers(digits_run, tmp_path):
    path = report(Report((str(digits_run),), output=str(tmp_path / "page.html")))
    page = path.read_text(encoding="utf-8")
    accuracy = checkpoint.read(digits_run / "checkpoints" / "best.pt").metrics["val"]["accuracy"]
    assert f"{round(accuracy * 359)} of 359" in page
    assert "http-equiv" in page
    assert len(page) < 5_000_000


def test_several_runs_are_compared(digits_run, tmp_path):
    shutil.copytree(digits_run, tmp_path / "other")
    file = tmp_path / "other" / "checkpoints" / "best.pt"
    state = checkpoint.read(file)
    state.model["fc.weight"] += 0.1 * torch.randn(state.model["fc.weight"].shape)
    checkpoint.write(file, state)
    path = report(Report((str(digits_run), str(tmp_path / "other")), output=str(tmp_path / "page.html")))
    page = path.read_text(encoding="utf-8")
    assert "2 runs compared" in page
    assert "other" in page


def test_labels_that_are_no_classes_have_a_page_of_curves(digits_run, tmp_path, capsys):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "import torch\nfrom trainer.recipe import images as plain\ndef images(config, *, seed):\n"
        "    train, val = plain(config, seed=seed)\n    val.labels = torch.tensor(val.labels).float()\n"
        "    return train, val\n"
    )
    page = report(Report((str(digits_run),), recipe=str(recipe), output=str(tmp_path / "page.html"))).read_text()
    assert "its answers are no classes; the page has its curves and settings" in capsys.readouterr().out
    assert "<h2>Curves" in page or "Curves</h2>" in page
    assert "Confusion" not in page
    with pytest.raises(UsageError, match="is no run of a classifier, and only those can be compared"):
        report(Report((str(digits_run), str(digits_run)), recipe=str(recipe)))


def test_the_command(digits_run, program, tmp_path):
    shutil.copytree(digits_run, tmp_path / "run")
    done = program("report", "run", cwd=tmp_path, target="trainer")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("run/report.html: ")
    assert (tmp_path / "run" / "report.html").exists()
