"""Recipes: what they say of themselves, what they must return, and one that is edited in place."""

import importlib.util
import shutil

import pytest
from forks import SMALL, use
from launching import ROOT

import trainer
from trainer.errors import UsageError

CHANGES = {
    "a network": """
from torch import nn
from trainer.data import InputSpec
from trainer.model import build_model

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, images):
        return self.fc(self.conv(images).mean((2, 3)))

def model(config, weights, classes, *, image_size, seed):
    return build_model(Net(), len(classes), head="fc", input=InputSpec.square(32), seed=seed)
""",
    "another head": """
_plain = model

def model(config, weights, classes, **rest):
    net = _plain(config, weights, classes, **rest)
    net.model.fc = nn.Sequential(nn.Dropout(0.2), nn.Linear(512, len(classes)))
    return net
""",
}
HELPED = """
import torch
SCALE: float = 2.0
UNUSED = 1

class Scaled:
    def by(self, value):
        return SCALE * value

def helper(value):
    return Scaled().by(value)

def score(val):
    return helper(val["accuracy"])

def prediction(output, classes, *, top=3):
    return "", {}
"""


def sources(path, text):
    path.write_text(text)
    return trainer.load_recipe(str(path)).sources()


PARTS = ["SCALE: float = 2.0", "return SCALE * value", "Scaled().by(value)", 'val["accuracy"]']


@pytest.mark.parametrize("part", PARTS)
def test_what_a_function_uses_of_its_file_belongs_to_its_source(tmp_path, part):
    before = sources(tmp_path / "mine.py", HELPED)
    after = sources(tmp_path / "mine.py", HELPED.replace(part, f"{part} + 0"))
    assert before["score"][0] == after["score"][0] == "mine.score"
    assert {name for name in before if before[name] != after[name]} == {"score"}
    assert sources(tmp_path / "mine.py", HELPED.replace("UNUSED = 1", "UNUSED = 2\n\n")) == before


def test_a_recipe_edited_between_two_parts_of_a_run_is_said(pictures, program, tmp_path, capsys):
    recipe = tmp_path / "mine.py"
    recipe.write_text('def score(val):\n    return val["accuracy"]\n')
    options = ["--data", pictures / "classes", *SMALL, "--recipe", recipe, "--output", "run"]
    assert program(*options, "--epochs", "1", cwd=tmp_path).returncode == 0
    recipe.write_text('def score(val):\n    return -val["loss"]\n')
    done = program("--resume", "auto", "--output", "run", "--epochs", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "recipe  score: trained with mine.score" in done.stdout
    assert done.stdout.count("recipe  ") == 1
    trainer.load(tmp_path / "run", device="cpu")
    assert "recipe  score: trained with mine.score" in capsys.readouterr().out


WRONG = {
    "images() of the recipe returned int": """
def images(config, *, seed):
    return [1, 2]
""",
    "transforms() of the recipe returned Compose; expected two": """
def transforms(config, spec):
    return spec.eval_transform()
""",
    "transforms() of the recipe made torch.float32 of torch.uint8": """
import torch
from torchvision.transforms import v2

def transforms(config, spec):
    mine = v2.Compose([spec.eval_transform(), v2.ToDtype(torch.float32, scale=True)])
    return mine, mine
""",
    "has 1 channel(s), and the model takes 3": """
from functools import partial
from trainer.data import Decoded, decode, load_data

def images(config, *, seed):
    return tuple(Decoded(part, partial(decode, channels=1)) for part in load_data(config.data))
""",
    "the max_value of its InputSpec is 255 for 8 bits": """
from functools import partial
from trainer.data import Decoded, decode, load_data

def images(config, *, seed):
    return tuple(Decoded(part, partial(decode, depth=16)) for part in load_data(config.data))
""",
    "makes different images with the same seed": """
import numpy as np

def transforms(config, spec):
    plain, generator = spec.eval_transform(), np.random.default_rng(0)
    return lambda image: plain(image) ^ int(generator.integers(1, 255)), plain
""",
    "model() of the recipe returned Linear": """
from torch import nn

def model(*_, **__):
    return nn.Linear(1, 1)
""",
    "optimizer() of the recipe returned StepLR": """
import torch

def optimizer(model, config, *, fused):
    return torch.optim.lr_scheduler.StepLR(torch.optim.SGD(model.fc.parameters(), lr=1), 3)
""",
    "step(config) return functions": """
def learning_rate(config):
    return config.lr
""",
    "metrics() of the recipe returns a dict": """
def metrics(outputs, labels):
    return {"x": labels}
""",
}


@pytest.mark.parametrize("says", WRONG)
def test_what_a_function_must_not_return_is_said(pictures, program, tmp_path, says):
    (tmp_path / "mine.py").write_text(WRONG[says])
    options = ["--data", pictures / "classes", *SMALL, "--epochs", "1", "--output", "run"]
    done = program(*options, "--recipe", "mine.py", cwd=tmp_path)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_recipe_may_import_a_file_beside_it(pictures, program, tmp_path):
    folder = tmp_path / "beside"
    folder.mkdir()
    (folder / "my_parts_of_it.py").write_text("def best(val):\n    return val['accuracy']\n")
    (folder / "mine.py").write_text("import my_parts_of_it\n\ndef score(val):\n    return my_parts_of_it.best(val)\n")
    options = ["--data", pictures / "classes", *SMALL, "--epochs", "1", "--output", "run"]
    done = program(*options, "--recipe", "beside/mine.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_recipe_that_cannot_be_read_is_said(tmp_path):
    (tmp_path / "mine.py").write_text("def score(val)\n")
    with pytest.raises(UsageError, match=r"expected ':' \(mine.py, line 1\)"):
        trainer.load_recipe(str(tmp_path / "mine.py"))


@pytest.fixture
def edited(tmp_path):
    """Programs of a copy of this project whose trainer/recipe.py has other lines at its end."""
    started = []

    def start(lines):
        root = tmp_path / "copy"
        shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(".*", "runs", "docs", "__pycache__", "benchmarks"))
        with open(root / "trainer" / "recipe.py", "a") as file:
            file.write(lines)
        spec = importlib.util.spec_from_file_location("launching_of_copy", root / "tests" / "support" / "launching.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        started.append(module.Program())
        return lambda *words, target=root / "train.py", **where: started[-1](*words, target=target, **where)

    yield start
    for program in started:
        program.server.kill()
        program.server.communicate()


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_edited_into_the_recipe_is_found_by_every_command(edited, pictures, program, tmp_path, change):
    mine = edited(CHANGES[change])
    options = ["--data", pictures / "classes", *SMALL, "--epochs", "1", "--output", "run"]
    done = mine(*options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert change == "another head" or "by the recipe: Net, with its own weights" in done.stdout
    row = use(mine, tmp_path, recipe=[], image=pictures / "0.png")
    assert row["class"] in "ab"
    done = program("evaluate", "--run", "run", cwd=tmp_path, target="trainer")  # as if it was not edited
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert "recipe  model: trained with trainer.recipe.model" in done.stdout
