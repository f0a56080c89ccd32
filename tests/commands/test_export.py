"""What is exported is the trained model, and torchvision takes it."""

import json
import os
import re
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from launching import ROOT
from made_run import write_own_run, write_run
from PIL import Image
from torch import nn
from torchvision import models

import trainer
from trainer.commands import export as exporting
from trainer.commands.arguments import Export, Inspect, Predict, Verify
from trainer.commands.export import Preprocess, export
from trainer.commands.inspect import inspect
from trainer.commands.model_card import public
from trainer.commands.predict import predict
from trainer.commands.verify import verify
from trainer.data.datasets import Digits
from trainer.data.transforms import InputSpec
from trainer.errors import CheckpointError, DataError, UsageError
from trainer.storage import checkpoint

slow = pytest.mark.slow
GUIDE = (ROOT / "docs" / "use-a-model.md").read_text(encoding="utf-8")
FAMILIES = [
    pytest.param("convnext_tiny", 32, marks=slow),
    pytest.param("densenet121", 32, marks=slow),
    pytest.param("efficientnet_b0", 32, marks=slow),
    pytest.param("googlenet", 32, marks=slow),
    pytest.param("inception_v3", 80, marks=slow),
    pytest.param("mnasnet0_5", 32, marks=slow),
    pytest.param("mobilenet_v2", 32, marks=slow),
    ("mobilenet_v3_small", 32),
    pytest.param("regnet_y_400mf", 32, marks=slow),
    ("resnet18", 32),
    pytest.param("shufflenet_v2_x0_5", 32, marks=slow),
    ("squeezenet1_1", 32),
    pytest.param("alexnet", 64, marks=slow),
    pytest.param("maxvit_t", 224, marks=slow),
    pytest.param("swin_t", 64, marks=slow),
    pytest.param("vgg11", 64, marks=slow),
    pytest.param("vit_b_32", 64, marks=slow),
]


@pytest.mark.parametrize(("name", "size"), FAMILIES)
def test_torchvisions_own_model_takes_the_merged_export(name, size, tmp_path):
    folder = export(Export(write_run(tmp_path / "run", name, size), formats=("tail", "merged", "npz")))
    about = json.loads((folder / "model.json").read_text())
    stock = models.get_model(**about["builder"]).eval()
    stock.load_state_dict(torch.load(folder / "model.pt", weights_only=True), strict=True)
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = trainer.load(tmp_path / "run", device="cpu").model(images)
        assert expected.std() > 0
        assert torch.equal(stock(images), expected)
        for file in ("tail.safetensors", "model.pt"):
            assert torch.equal(trainer.load(folder / file, device="cpu").model(images), expected)
    with np.load(folder / "model.npz", allow_pickle=False) as arrays:
        assert {key: value.shape for key, value in arrays.items()} == {
            key: tuple(value.shape) for key, value in stock.state_dict().items()
        }
    assert safetensors.torch.load_file(folder / "tail.safetensors").keys() == set(about["freeze_plan"]["trainable"])
    assert ("aux_logits=False" in (folder / "README.md").read_text()) == (name in ("googlenet", "inception_v3"))


def test_weights_that_want_their_input_transformed(tmp_path):
    """Pretrained googlenet moves its input to [-1, 1] inside, which a state dict does not say."""
    state = models.googlenet(init_weights=False, aux_logits=False).state_dict()
    torch.save(state, tmp_path / "base.pth")
    run = write_run(tmp_path / "run", "googlenet", 32, weights=str(tmp_path / "base.pth"))
    folder = export(Export(run, formats=("merged",)))
    assert json.loads((folder / "model.json").read_text())["builder"]["transform_input"] is True


def test_train_export_stock_torchvision_the_same_predictions(digits_run, program, tmp_path, monkeypatch):
    """By the code of the model card and of the guide, which use nothing but torch and torchvision."""
    done = program("export", "--run", digits_run, "--output", tmp_path / "export", target="trainer", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "bit-equal logits on 4 validation images" in done.stdout
    assert sorted(os.listdir(tmp_path / "export")) == ["README.md", "model.json", "model.pt", "tail.safetensors"]
    loaded = trainer.load(digits_run, device="cpu")
    monkeypatch.chdir(tmp_path / "export")
    card = (tmp_path / "export" / "README.md").read_text()
    code = re.search(r"## model\.pt\n\n```python\n(.*?)```", card, re.DOTALL)[1]
    assert set(re.findall(r"^(?:from|import) (\w+)", code, re.MULTILINE)) == {"torch", "torchvision"}
    guide = re.search(r"```python\n(import json, torch, torchvision\n.*?)```", GUIDE, re.DOTALL)[1]
    for index in range(3):
        Image.fromarray(Digits().images[index]).save("photo.jpg")
        names = {}
        exec(code, names)
        expected = loaded.model(loaded.transform("photo.jpg")[None])
        torch.testing.assert_close(names["logits"], expected, rtol=1e-4, atol=1e-4)
        assert names["logits"].argmax() == expected.argmax()
        names = {"images": loaded.transform("photo.jpg")[None]}
        exec(guide, names)
        assert torch.equal(names["logits"], expected)
    accuracy = checkpoint.read(digits_run / "checkpoints" / "best.pt")["metrics"]["val"]["accuracy"]
    assert f"fine-tuned on `digits` for 2 epochs. Validation: accuracy {accuracy:.4f}" in card
    assert "`model.pt` | 4 validation images | none, to the bit" in card


@pytest.mark.parametrize("preprocessing", [pytest.param(False, marks=slow), True])
def test_a_program_takes_any_number_of_images(tmp_path, preprocessing):
    run = write_run(tmp_path / "run", "mobilenet_v3_small", 32)
    folder = export(Export(run, formats=("program",), preprocessing=preprocessing))
    program, loaded = torch.export.load(folder / "model.pt2").module(), trainer.load(run, device="cpu")
    for count, height, width in ((1, 70, 70), (3, 33, 90)):
        images = torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8)
        ready = torch.stack([loaded.transform(image) for image in images])
        with torch.no_grad():
            torch.testing.assert_close(program(images if preprocessing else ready), loaded.model(ready))


@pytest.mark.parametrize("name", ["resnet18", pytest.param("swin_t", marks=slow), pytest.param("vit_b_32", marks=slow)])
@pytest.mark.parametrize("preprocessing", [False, True])
def test_onnx_takes_any_number_of_images(tmp_path, name, preprocessing):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    onnxruntime = pytest.importorskip("onnxruntime")
    run = write_run(tmp_path / "run", name, 64)
    folder = export(Export(run, formats=("onnx",), preprocessing=preprocessing))
    assert sorted(os.listdir(folder)) == ["README.md", "model.json", "model.onnx"]
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    loaded = trainer.load(run, device="cpu")
    for count, height, width in ((1, 70, 70), (3, 65, 90)):
        images = torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8)
        ready = torch.stack([loaded.transform(image) for image in images])
        (logits,) = session.run(None, {"images": (images if preprocessing else ready).numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), loaded.model(ready), rtol=1e-3, atol=1e-3)


def test_onnx_without_its_packages_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r'needs onnx, onnxscript, onnxruntime: pip install -e "\.\[onnx\]"'):
        export(Export(tmp_path, formats=("onnx",)))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_preprocessing_inside_is_that_of_training(interpolation):
    prepare = Preprocess(InputSpec(64, 73, (0.0,) * 3, (1.0,) * 3, interpolation))
    plain = InputSpec(64, 73, interpolation=interpolation).eval_transform()
    for height, width in ((8, 8), (64, 64), (101, 256), (375, 500), (500, 333), (73, 900)):
        generator = torch.Generator().manual_seed(0)
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
        difference = (prepare(image[None])[0] * 255 - plain(image)).abs()
        assert difference.max() < 1.01
        assert (difference > 0.01).float().mean() < 0.02


def test_an_export_that_differs_leaves_nothing(tmp_path, monkeypatch):
    def broken(builder):
        model = models.get_model(**builder)
        model.fc.register_forward_hook(lambda module, inputs, output: output + 1e-6)
        return model

    run = write_run(tmp_path / "run", "resnet18", 32)
    monkeypatch.setattr(exporting, "stock", broken)
    with pytest.raises(
        DataError, match=r"model\.pt computes other logits than the model, by \d.*: nothing was exported"
    ):
        export(Export(run))
    assert os.listdir(run) == ["checkpoints"]


def test_an_export_is_replaced_only_on_request_and_as_a_whole(tmp_path):
    run = write_run(tmp_path / "run", "squeezenet1_1", 32)
    export(Export(run))
    with pytest.raises(UsageError, match="export exists already; replace an export with --overwrite"):
        export(Export(run))
    export(Export(run, formats=("tail",), overwrite=True))
    assert sorted(os.listdir(run / "export")) == ["README.md", "model.json", "tail.safetensors"]
    assert sorted(os.listdir(run)) == ["checkpoints", "export"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match="mine exists already"):
        export(Export(run, output=str(tmp_path / "mine"), overwrite=True))
    assert os.listdir(tmp_path / "mine") == ["thesis.tex"]
    with pytest.raises(UsageError, match="is an export itself"):
        export(Export(run / "export", output=str(tmp_path / "again")))


def test_the_files_of_others_stay_in_an_export(tmp_path):
    run = write_run(tmp_path / "run", "squeezenet1_1", 32)
    folder = export(Export(run))
    (folder / "samples").mkdir()
    (folder / "samples" / "tit.jpg").write_text("x")
    (folder / "LICENSE").write_text("x")
    export(Export(run, formats=("tail",), overwrite=True))
    assert sorted(os.listdir(folder)) == ["LICENSE", "README.md", "model.json", "samples", "tail.safetensors"]
    assert os.listdir(folder / "samples") == ["tit.jpg"]
    verify(Verify(str(folder)))


def test_any_empty_folder_can_be_exported_to(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", "squeezenet1_1", 32).absolute()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setenv("HOME", str(tmp_path))
    for output, folder in ((".", "empty"), ("../new/../other", "other"), ("~/home", "home")):
        export(Export(run, formats=("tail",), output=output))
        assert sorted(os.listdir(tmp_path / folder)) == ["README.md", "model.json", "tail.safetensors"]
    assert sorted(os.listdir(".")) == ["README.md", "model.json", "tail.safetensors"]  # not another folder of that name
    with pytest.raises(UsageError, match="empty exists already"):
        export(Export(run, output="new/.."))
    assert sorted(os.listdir(tmp_path)) == ["empty", "home", "other", "run"]


def test_a_full_disk_leaves_the_old_export(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", "squeezenet1_1", 32)
    export(Export(run, formats=("tail",)))
    before = {path.name: path.read_bytes() for path in (run / "export").iterdir()}
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        export(Export(run, overwrite=True))
    assert {path.name: path.read_bytes() for path in (run / "export").iterdir()} == before
    assert sorted(os.listdir(run)) == ["checkpoints", "export"]


@pytest.mark.parametrize(
    ("formats", "says"),
    [
        (("pickle",), "a pickle of the whole model is not written.*runs? whatever code.*Take merged"),
        (("tail", "jpeg"), "--formats jpeg: expected some of tail, merged, program, onnx, npz"),
        ((), "--formats is empty: expected some of tail"),
    ],
)
def test_formats_that_are_refused(formats, says, tmp_path):
    with pytest.raises(UsageError, match=says):
        export(Export(tmp_path, formats=formats))


def test_a_pickled_module_is_not_opened(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pt")
    with pytest.raises(DataError, match=r"it holds torch\.nn\.modules\.linear\.Linear, not only tensors"):
        inspect(Inspect(str(tmp_path / "whole.pt")))


def test_a_damaged_export_is_found(tmp_path):
    run = write_run(tmp_path / "run", "squeezenet1_1", 32)
    folder = export(Export(run))
    shutil.copytree(folder, tmp_path / "copy")
    verify(Verify(str(tmp_path / "copy")))
    path = tmp_path / "copy" / "model.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.pt is damaged: its content does not match its sha256"):
        verify(Verify(str(tmp_path / "copy")))


def test_an_edited_description_is_found(tmp_path):
    folder = export(Export(write_run(tmp_path / "run", "squeezenet1_1", 32), formats=("tail",)))
    path = folder / "model.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps(about))  # laid out in another way, and the same
    verify(Verify(str(folder)))
    changes = {"classes": ["b", "a", "ç {x}"], "input": about["input"] | {"mean": [0.0] * 3}, "files": {}, "base": 5}
    edited = [json.dumps(about | {key: value}) for key, value in changes.items()]
    edited.append(json.dumps({key: value for key, value in about.items() if key != "input"}))
    for text in (*edited, json.dumps([about]), "{}", "5", "{", "\xff"):
        path.write_text(text, encoding="latin-1")
        for use in (lambda path: verify(Verify(path)), lambda path: inspect(Inspect(path)), trainer.load):
            with pytest.raises(CheckpointError, match=r"model\.json (was edited|is damaged: it is not JSON)"):
                use(str(folder))


def test_a_moved_base_is_where_the_export_says(tmp_path):
    torch.save(models.squeezenet1_1().state_dict(), tmp_path / "base.pth")
    run = write_run(tmp_path / "run", "squeezenet1_1", 32, weights=str(tmp_path / "base.pth"))
    (tmp_path / "base.pth").rename(tmp_path / "moved.pth")
    folder = export(Export(run, weights=str(tmp_path / "moved.pth")))
    assert json.loads((folder / "model.json").read_text())["base"]["path"] == str(tmp_path / "moved.pth")
    assert checkpoint.read(run / "checkpoints" / "best.pt")["base"]["path"] == str(tmp_path / "base.pth")


def test_a_module_of_ones_own_is_exported_and_used(tmp_path, capsys):
    run, recipe = write_own_run(tmp_path / "run")
    with pytest.raises(UsageError, match="base not at hand: give --recipe FILE"):
        export(Export(str(run)))
    folder = export(Export(str(run), recipe=str(recipe)))
    expected = trainer.load(run, recipe=str(recipe), device="cpu")
    images = torch.randn(2, 3, 8, 8)
    for file in ("tail.safetensors", "model.pt"):
        with pytest.raises(UsageError, match="base not at hand"):
            trainer.load(folder / file)
        loaded = trainer.load(folder / file, recipe=str(recipe), device="cpu")
        assert torch.equal(loaded.model(images), expected.model(images))
        assert loaded.input == expected.input
    verify(Verify(str(folder)))
    Image.fromarray(Digits().images[0]).save(tmp_path / "a.png")
    capsys.readouterr()
    predict(Predict((str(tmp_path / "a.png"),), str(run), recipe=str(recipe)))
    (answer,) = expected(tmp_path / "a.png")
    assert f"a.png  {answer['class']} {answer['probability']:.1%}" in capsys.readouterr().out


def test_no_folder_of_the_author_is_in_a_model_card(tmp_path):
    torch.save(models.squeezenet1_1().state_dict(), tmp_path / "base.pth")
    run = write_run(tmp_path / "run", "squeezenet1_1", 32, weights=str(tmp_path / "base.pth"))
    card = (export(Export(str(run), formats=("tail",))) / "README.md").read_text()
    assert str(tmp_path) not in card
    assert "frozen weights: source file path base.pth sha256 " in card
    run, recipe = write_own_run(tmp_path / "own")
    card = (export(Export(str(run), recipe=str(recipe))) / "README.md").read_text()
    assert "secret" not in card
    assert "fine-tuned on `photos`" in card


@pytest.mark.parametrize(
    "change",
    [
        {"weights": "DEFAULT"},
        {"name": "fasterrcnn_resnet50_fpn"},
        {"name": ["resnet18"]},
        {"num_classes": 10**9},
        {"progress": True},
    ],
)
def test_an_export_builds_nothing_but_its_model(tmp_path, change, monkeypatch):
    folder = export(Export(str(write_run(tmp_path / "run", "squeezenet1_1", 32)), formats=("merged",)))
    about = json.loads((folder / "model.json").read_text())
    about["builder"] |= change
    del about["sha256"]
    exporting._write_about(folder / "model.json", about)
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("downloads"))
    with pytest.raises(CheckpointError, match=r"model\.json(: its builder is| does not say how)"):
        trainer.load(folder)


@pytest.mark.parametrize("shape", [(20_000, 1), (1, 20_001), (3, 500), (2, 63), (70, 2_300)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_long_thin_images_are_cropped_as_in_training(shape, interpolation):
    """The whole strip at 73 pixels of width would have 1.4 million pixels of length."""
    spec = InputSpec(64, 73, (0.0,) * 3, (1.0,) * 3, interpolation)
    image = torch.randint(0, 256, (3, *shape), dtype=torch.uint8)
    difference = (Preprocess(spec)(image[None])[0] * 255 - spec.eval_transform()(image)).abs()
    assert difference.max() < 2.01  # noise, enlarged up to 73 times: with half a pixel of shift they differ by 50
    assert difference.mean() < 0.1


def test_no_private_folder_is_public():
    assert public("/home/me/weights.pth") == public("file:///home/me/weights.pth") == "weights.pth"
    assert public("https://example.org/weights.pth") == "https://example.org/weights.pth"
    assert (public("resnet18"), public(3)) == ("resnet18", 3)
