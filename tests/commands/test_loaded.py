"""A trained model is found again, whole, on any device, or it is an error that says why."""

import copy
import json
import shutil
from functools import partial

import pytest
import torch
from made_run import write_run
from networks import TinyNet
from PIL import Image

import trainer
from trainer.commands import loaded as loading
from trainer.data.datasets import Digits
from trainer.data.open import load_data
from trainer.errors import CheckpointError, DataError, UsageError
from trainer.model.classifiers import build_model
from trainer.model.freezing import fingerprint
from trainer.storage import checkpoint


def test_a_run_is_loaded_ready_to_use(digits_run, tmp_path):
    loaded = trainer.load(digits_run)
    state = checkpoint.read(digits_run / "checkpoints" / "best.pt")
    assert loaded.path == digits_run / "checkpoints" / "best.pt"
    assert loaded.classes == tuple("0123456789")
    assert not any(module.training for module in loaded.model.modules())
    assert torch.equal(loaded.model.fc.weight, state["model"]["fc.weight"])
    assert not any(value.requires_grad for value in loaded.model.parameters())  # outputs need no .detach()
    assert not loaded.model(torch.zeros(1, 3, 64, 64)).requires_grad
    frozen = loading.load_frozen(digits_run).model
    assert [name for name, value in frozen.named_parameters() if value.requires_grad] == ["fc.weight", "fc.bias"]
    # Counted by hand on the validation images: what training counted.
    _, images = load_data("digits", val_fraction=0.2, seed=0)
    with torch.no_grad():
        logits = loaded.model(torch.stack([loaded.transform(image) for image in images]))
    right = (logits.argmax(dim=1) == torch.tensor(images.labels)).sum().item()
    assert right / len(images) == state["metrics"]["val"]["accuracy"]


def test_a_loaded_model_classifies_what_it_is_called_with(digits_run, tmp_path):
    loaded, picture = trainer.load(digits_run), Image.fromarray(Digits().images[7])
    picture.save(tmp_path / "a.png")
    probabilities = loaded.model(loaded.transform(picture)[None]).softmax(dim=1)[0].tolist()
    (found,) = loaded(tmp_path / "a.png")
    best = max(range(10), key=probabilities.__getitem__)
    assert found == {
        "class": str(best),
        "probability": max(probabilities),
        **dict(zip(loaded.classes, probabilities, strict=True)),
    }
    assert loaded(str(tmp_path / "a.png")) == loaded(picture) == loaded(Digits()[7]) == [found]
    many = loaded(picture, [picture, tmp_path / "a.png"], torch.stack([Digits()[7]] * 40))
    assert len(many) == 43
    assert all(one["probability"] == pytest.approx(found["probability"], rel=1e-4) for one in many)
    assert loaded() == []


def test_a_loaded_model_is_saved_copied_and_read_again(digits_run, tmp_path):
    loaded = trainer.load(digits_run, device="cpu")
    torch.save(loaded.model, tmp_path / "whole.pt")
    images = torch.randn(2, 3, 64, 64)
    expected = loaded.model(images)
    for twin in (torch.load(tmp_path / "whole.pt", weights_only=False), copy.deepcopy(loaded).model):
        assert torch.equal(twin(images), expected)
        assert not twin.train().bn1.training


def test_the_transform_takes_paths_pictures_and_tensors(digits_run, tmp_path):
    transform = trainer.load(digits_run).transform
    picture = Image.fromarray(Digits().images[0])
    picture.save(tmp_path / "a.png")
    tensor = transform(Digits()[0])
    assert (tensor.shape, tensor.dtype) == ((3, 64, 64), torch.float32)
    for other in (tmp_path / "a.png", str(tmp_path / "a.png"), picture):
        assert torch.equal(transform(other), tensor)


def test_the_transform_takes_batches_and_nothing_else(digits_run):
    transform, images = trainer.load(digits_run).transform, torch.stack([Digits()[0], Digits()[1]])  # [2, 3, H, W]
    assert torch.equal(transform(images), torch.stack([transform(image) for image in images]))
    assert torch.equal(transform(images[None]), transform(images)[None])  # views of one sample
    for wrong, given in (
        (images[0].float() / 255, r"torch\.float32 \[3, "),
        (images[0, :1], r"torch\.uint8 \[1, "),
        (images[0].permute(1, 2, 0), r"torch\.uint8 \[\d+, \d+, 3\]"),
        (images[0].numpy(), "ndarray"),
    ):
        with pytest.raises(UsageError, match=rf"the image is {given}.*; expected a path, .*\[B, 3, H, W\]"):
            transform(wrong)


def test_on_another_device(digits_run):
    loaded = trainer.load(digits_run, device="meta")
    assert {value.device.type for value in loaded.model.state_dict().values()} == {"meta"}
    assert loaded.model(loaded.transform(Digits()[0])[None]).shape == (1, 10)


def test_without_a_best_checkpoint_the_newest_counts(digits_run, tmp_path):
    shutil.copytree(digits_run / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "best.pt").unlink()
    assert loading.find(tmp_path).name == "step-00000046.pt"
    assert loading.find(tmp_path / "checkpoints").name == "step-00000046.pt"  # named itself
    assert loading.find(digits_run / "checkpoints").name == "best.pt"


def test_a_base_from_a_file_and_when_the_file_has_moved(tmp_path):
    stock = build_model("shufflenet_v2_x0_5", 1000, weights="none", seed=5).model
    torch.save(stock.state_dict(), tmp_path / "base.pth")
    run = write_run(tmp_path / "run", "shufflenet_v2_x0_5", 32, weights=str(tmp_path / "base.pth"))
    loaded = trainer.load(run)
    assert torch.equal(loaded.model.conv1[0].weight, stock.conv1[0].weight)
    (tmp_path / "base.pth").rename(tmp_path / "moved.pth")
    with pytest.raises(DataError, match=r"not at .*base\.pth any more: say where, with --weights"):
        trainer.load(run)
    again = trainer.load(run, weights=str(tmp_path / "moved.pth"))
    assert torch.equal(again.model.conv1[0].weight, stock.conv1[0].weight)
    stock.conv1[0].weight.data[0] += 1
    torch.save(stock.state_dict(), tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"1 of \d+ tensors differ:\n  conv1.0.weight: expected sha256"):
        trainer.load(run, weights=str(tmp_path / "other.pth"))


def test_a_module_of_ones_own_is_passed_in(tmp_path):
    def classifier(*_, own_seed=0, **__):
        with torch.random.fork_rng():
            torch.manual_seed(own_seed)
            return build_model(TinyNet(), 3, head="fc", image_size=8)

    run = write_run(tmp_path / "run", "resnet18", 8)
    path = run / "checkpoints" / "best.pt"
    state = checkpoint.read(path)
    net = classifier().model
    plan = trainer.freeze(net, ["fc"])
    state.base, state.freeze_plan, state.fingerprint = {"source": "module"}, plan.to_dict(), fingerprint(net)
    state.model = {"fc.weight": torch.ones(3, 8), "fc.bias": torch.zeros(3)}
    checkpoint.write(path, state)
    with pytest.raises(UsageError, match=r"base not at hand: give --recipe FILE.*trained from a module of your own"):
        trainer.load(run)
    loaded = trainer.load(run, recipe=trainer.Recipe(model=classifier))
    assert torch.equal(loaded.model.fc.weight, torch.ones(3, 8))
    assert loaded.builder is None
    with pytest.raises(CheckpointError, match=r"conv\.weight: expected sha256"):
        trainer.load(run, recipe=trainer.Recipe(model=partial(classifier, own_seed=1)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: state["model"].pop("fc.bias"), "missing fc.bias"),
        (lambda state: state["model"].update(x=torch.ones(1)), "unexpected x"),
        (lambda state: state["model"].update({"fc.bias": torch.ones(4)}), r"fc.bias is torch.float32 \(4,\); expected"),
        (lambda state: state["fingerprint"].update({"conv1.weight": "0"}), "conv1.weight: expected sha256 0"),
    ],
)
def test_a_checkpoint_that_does_not_fit(tmp_path, change, says):
    path = write_run(tmp_path / "run", "resnet18", 32) / "checkpoints" / "best.pt"
    state = checkpoint.read(path)
    change(state)
    checkpoint.write(path, state)
    with pytest.raises(CheckpointError, match=says):
        trainer.load(path)


def test_what_is_no_run(tmp_path):
    with pytest.raises(UsageError, match="nothing does not exist; expected a run such as"):
        trainer.load(tmp_path / "nothing")
    with pytest.raises(UsageError, match="holds neither checkpoints nor an exported model"):
        trainer.load(tmp_path)
    torch.save({}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="it has no trailer"):
        trainer.load(tmp_path / "other.pt")
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"nor is it tail\.safetensors of an export"):
        trainer.load(tmp_path / "x.safetensors")
    (tmp_path / "model.json").write_text(json.dumps({"classes": []}))
    (tmp_path / "model.pt").write_bytes(b"zip")
    with pytest.raises(CheckpointError, match=r"model\.pt cannot be read: [^.]*\.$"):  # not torch's advice
        trainer.load(tmp_path)
    torch.save({}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"model\.json was edited, or is damaged"):
        trainer.load(tmp_path)


def test_global_randomness_is_untouched(digits_run):
    before = torch.get_rng_state()
    trainer.load(digits_run)
    loading.stock({"name": "shufflenet_v2_x0_5", "num_classes": 3})
    assert torch.equal(torch.get_rng_state(), before)
