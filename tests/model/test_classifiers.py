"""All 80 builders: the right head, the stock features, one set of values per seed."""

import dataclasses
import hashlib
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from states import made_state
from torch import Tensor, nn
from torchvision import models

from trainer.config import WeightsConfig
from trainer.data.transforms import InputSpec
from trainer.errors import CheckpointError, DataError, UsageError
from trainer.model import weights_file
from trainer.model.classifiers import Classifier, build_model, model_names
from trainer.model.freezing import fingerprint, freeze, trained_tensors
from trainer.model.weights_filter import from_stored
from trainer.recipes import Recipe
from trainer.storage import checkpoint

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # second classifiers of these two, which the backbones do without
WITH_AUXILIARY = ("googlenet", "inception_v3")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    return tmp_path / "torch_home"


def build_stock(name: str, **kwargs: object) -> nn.Module:
    """Torchvision's model as it is with pretrained weights, but with random ones; BatchNorm has seen something."""
    if name in WITH_AUXILIARY:
        kwargs |= {"transform_input": True, "init_weights": False}
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stock = models.get_model(name, weights=None, **kwargs)
    for key, buffer in stock.named_buffers():
        if key.endswith("running_mean"):
            buffer.uniform_(-0.5, 0.5, generator=generator)
        elif key.endswith("running_var"):
            buffer.uniform_(0.5, 1.5, generator=generator)
    return stock


def constant_file(name: str, path: Path, *, without: tuple[str, ...] = (), **kwargs: object) -> Path:
    """A state dict file for a model of any size that takes no room: all elements of a tensor are one."""
    if name in WITH_AUXILIARY:
        kwargs["init_weights"] = False
    with torch.device("meta"):
        state = models.get_model(name, weights=None, **kwargs).state_dict()
    torch.save({k: torch.ones(()).expand(v.shape) for k, v in state.items() if not k.startswith(without)}, path)
    return path


def states_equal(a: nn.Module, b: nn.Module, *, without: tuple[str, ...] = ()) -> bool:
    a, b = ({k: v for k, v in m.state_dict().items() if not k.startswith(without)} for m in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ------------------------------------------------------------------------------------------------------ all 80 builders


def test_there_are_80_models():
    assert len(model_names()) == 80
    assert set(model_names()) == set(models.list_models(module=models))


@pytest.mark.parametrize("name", model_names())
def test_every_builder(name):
    with torch.device("meta"):
        classifier = build_model(name, 7, weights="none")
        images = torch.empty(2, 3, classifier.input.size, classifier.input.size)  # [B, C, H, W]
    net, (head,) = classifier.model, classifier.head
    freeze(net, ["head"], head=classifier.head)
    logits = net.train()(images)
    assert logits.shape == (2, 7)  # in train mode: no tuple
    logits.sum().backward()
    assert {key for key, p in net.named_parameters() if p.grad is not None} == {
        f"{head}.{key}" for key, _ in net.get_submodule(head).named_parameters()
    }

    assert isinstance(net.get_submodule(head), nn.Conv2d) == name.startswith("squeezenet")
    assert (net.get_submodule(head).bias is None) == (name == "maxvit_t")
    assert getattr(net, "num_classes", 7) == 7
    assert 1000 not in [getattr(m, "out_features", getattr(m, "out_channels", None)) for m in net.modules()]

    preset = models.get_model_weights(name).DEFAULT.transforms()
    assert classifier.input.size == preset.crop_size[0]
    assert classifier.input.resize == preset.resize_size[0]
    assert classifier.input.interpolation == preset.interpolation.value
    assert [list(classifier.input.mean), list(classifier.input.std)] == [preset.mean, preset.std]
    assert classifier.base == {"source": "random", "seed": 0}
    # The names of today are not among those that are translated for old files.
    assert all(weights_file._todays_name(key) == key for key in net.state_dict())


# ---------------------------------------------------------------------------------------------------- pretrained values


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("densenet121", 64),
        ("efficientnet_b0", 64),
        ("googlenet", 64),
        ("mnasnet0_5", 64),
        ("mobilenet_v3_small", 64),
        ("regnet_y_400mf", 64),
        ("resnet18", 64),
        ("squeezenet1_1", 64),
        pytest.param("inception_v3", 96, marks=pytest.mark.slow),
        pytest.param("swin_t", 64, marks=pytest.mark.slow),
        pytest.param("vit_b_32", 224, marks=pytest.mark.slow),
    ],
)
def test_a_file_of_torchvisions_gives_torchvisions_features(tmp_path, name, size):
    stock = build_stock(name).eval()
    path = tmp_path / f"{name}.pth"
    torch.save(stock.state_dict(), path)
    classifier = build_model(name, 7, weights=str(path))
    assert classifier.base["source"] == "file"
    assert classifier.model.training
    model, (head,) = classifier.model.eval(), classifier.head
    for net in (stock, model):
        net.set_submodule(head, nn.Identity())
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        features = model(images)
        assert features.std() > 0
        assert torch.equal(features, stock(images))
    assert states_equal(model, stock, without=AUXILIARY)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_torchvisions_weights_bring_their_own_preset(tmp_path, monkeypatch):
    path = constant_file("mobilenet_v2", tmp_path / "file.pth")
    path = path.rename(tmp_path / f"mobilenet_v2-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth")
    monkeypatch.setattr(models.MobileNet_V2_Weights.IMAGENET1K_V1.value, "url", path.as_uri())
    classifier = build_model("mobilenet_v2", 3, weights="IMAGENET1K_V1")
    assert classifier.input == InputSpec(224, 256, *IMAGENET, "bilinear")  # the default's resize is 232
    assert classifier.base["weights"] == "MobileNet_V2_Weights.IMAGENET1K_V1"
    assert build_model("mobilenet_v2", 3, weights=str(path)).input.resize == 232


@pytest.mark.parametrize("name", WITH_AUXILIARY)
@pytest.mark.parametrize("in_file", [True, False])
def test_there_are_no_auxiliary_heads(name, in_file, tmp_path):
    path = constant_file(name, tmp_path / "x.pth", without=() if in_file else AUXILIARY)
    net = build_model(name, 7, weights=str(path)).model
    assert net.transform_input is True
    assert net.aux_logits is False
    assert net.train()(torch.zeros(2, 3, 96, 96)).shape == (2, 7)  # inception_v3's second classifier needs 299 pixels
    with torch.device("meta"):
        assert build_model(name, 7, weights="none").model.transform_input is False
    stock = models.get_model(name, num_classes=7, aux_logits=False, init_weights=False).state_dict()
    assert {key: value.shape for key, value in net.state_dict().items()} == {k: v.shape for k, v in stock.items()}


def test_a_file_of_another_model_is_refused(tmp_path):
    path = constant_file("resnet34", tmp_path / "resnet34.pth")
    with pytest.raises(DataError, match=r"does not fit ResNet: \d+ unexpected \(layer1\.2\.conv1\.weight"):
        build_model("resnet18", 7, weights=str(path))


FAST = ("mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "shufflenet_v2_x0_5", "squeezenet1_1")
SLOW = ("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "maxvit_t")
SLOW += ("resnet18", "swin_t", "vgg11", "vit_b_32")


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_part_of_a_file_over_random_values(name, tmp_path):
    """Of every family: the lower half of the model's tensors, averaged and wrapped, under another beginning."""
    plain = build_model(name, 7, weights="none", seed=3)
    stock = {k: torch.ones_like(v) for k, v in plain.model.state_dict().items() if not k.startswith(plain.head)}
    kept = list(stock)[: len(stock) // 2]
    file = {"ema": {f"module.net.{k}": stock[k] for k in kept} | {"n_averaged": torch.tensor(1)}, "epoch": 3}
    torch.save(file, tmp_path / "half.pt")
    weights = WeightsConfig(str(tmp_path / "half.pt"), "shape", weights_rename=("net", ""), weights_coverage=0)
    classifier = build_model(name, 7, weights=weights, seed=3)
    for key, value in classifier.model.state_dict().items():
        assert torch.equal(value, stock[key] if key in kept else plain.model.state_dict()[key]), key
    outside = {k: p.numel() for k, p in plain.model.named_parameters() if not k.startswith(plain.head)}
    covered = sum(size for k, size in outside.items() if k in kept)
    assert classifier.report.loaded == kept
    assert classifier.report.parameters == (covered, sum(outside.values()))
    assert classifier.base["match"] == {"weights_match": "shape", "weights_rename": ["net", ""], "weights_coverage": 0}
    assert classifier.base["seed"] == 3
    with pytest.raises(DataError, match=r"expected at least 99% \(--weights-coverage\)"):
        build_model(name, 7, weights=replace(weights, weights_coverage=0.99), seed=3)


def test_resnet18_into_resnet34(tmp_path):
    """The numbers were counted by hand, from the layers of the two models."""
    path = constant_file("resnet18", tmp_path / "resnet18.pth")
    with pytest.raises(DataError, match=r"only 52.5% of the parameters .*; expected at least 90%"):
        build_model("resnet34", 7, weights=WeightsConfig(str(path), weights_match="shape"))
    classifier = build_model(
        "resnet34", 7, weights=WeightsConfig(str(path), weights_match="shape", weights_coverage=0.5)
    )
    report = classifier.report
    # 1 + 5 of the stem, 4 · (2 · 12) of the blocks, 3 · 6 of the shortcuts.
    assert len(report.loaded) == 6 + 96 + 18
    # Blocks: 1 more in layer1, 2 in layer2, 4 in layer3, 1 in layer4; 2 + 2 · 4 tensors each without the counts.
    assert len(report.missing) == 8 * 10
    assert {key.rpartition(".")[0][:8] for key in report.missing} == {
        *("layer1.2", "layer2.2", "layer2.3", "layer3.2", "layer3.3", "layer3.4", "layer3.5", "layer4.2"),
    }
    assert (report.unexpected, report.shape_differs, report.left_out) == ([], [], [])
    assert report.set_aside == ["fc.weight", "fc.bias"]
    # A block of c channels has 2 · (9 c² + 2 c) parameters.
    more = sum(n * 2 * (9 * c * c + 2 * c) for n, c in ((1, 64), (2, 128), (4, 256), (1, 512)))
    assert report.parameters == (11_176_512, 11_176_512 + more) == (11_176_512, 21_284_672)
    assert torch.all(classifier.model.layer3[1].conv1.weight == 1)
    assert classifier.model.layer3[2].conv1.weight.std() > 0
    assert str(report) == "52.5% of the parameters outside the head; tensors: 120 loaded, 80 missing, 2 set aside"
    assert classifier.origin == f"weights {path}: {report}"


def test_a_head_of_the_same_number_of_classes_is_taken(tmp_path):
    path = constant_file("resnet18", tmp_path / "x.pth", num_classes=7)
    classifier = build_model("resnet18", 7, weights=str(path))
    assert torch.all(classifier.model.fc.weight == 1)
    assert classifier.report.set_aside == []
    assert classifier.report.loaded[-2:] == ["fc.weight", "fc.bias"]
    without = build_model("resnet18", 7, weights=WeightsConfig(str(path), weights_except=("fc",)))
    assert without.model.fc.weight.std() > 0
    assert without.report.left_out == ["fc.weight", "fc.bias"]
    assert without.report.coverage == 1


def test_there_must_be_a_file_to_match():
    for model, head in (("resnet18", None), (models.squeezenet1_1(), "classifier.1")):
        with pytest.raises(UsageError, match="give --weights a file"):
            build_model(model, 7, weights=WeightsConfig("none", weights_match="shape"), head=head)


# ----------------------------------------------------------------------------------------------- checkpoints as a start


def trained(
    path: Path, classifier: Classifier, rules: list[str], *, name: str, seed: int, size: int | None = None
) -> Path:
    """The checkpoint of a run that put 5 in the place of everything it trained."""
    plan = freeze(classifier.model, rules, head=classifier.head)
    for value in trained_tensors(classifier.model).values():
        value.data.fill_(5)
    match = from_stored(classifier.base.get("match", {}), weights="default")
    weights = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(match).items()}
    config = {"model": {"name": name}, "data": {"image_size": size}, "run": {"seed": seed}, "weights": weights}
    state = made_state(
        model={k: v.detach().clone() for k, v in trained_tensors(classifier.model).items()},
        fingerprint=fingerprint(classifier.model),
        freeze_plan=plan.to_dict(),
        classes=["a", "b", "c"],
        base=classifier.base,
        config=config,
    )
    checkpoint.write(path, state)
    return path


def test_a_checkpoint_is_a_start_and_so_is_what_started_from_it(tmp_path):
    base = constant_file("resnet18", tmp_path / "base.pth")
    first = build_model("resnet18", 3, weights=WeightsConfig(str(base), weights_except=("bn1",)), seed=1, image_size=64)
    path = trained(tmp_path / "1.pt", first, ["layer1.0", "head"], name="resnet18", seed=1, size=64)
    second = build_model("resnet18", 3, weights=str(path), seed=2)
    assert states_equal(second.model, first.model)
    assert second.base["path"] == str(path)
    assert second.report.loaded[-1] == "fc.bias"
    assert second.input == first.input == InputSpec(64, 73, *IMAGENET, "bilinear")
    assert build_model("resnet18", 3, weights=str(path), image_size=96).input.size == 96
    assert states_equal(build_model("resnet18", 9, weights=str(path)).model, first.model, without=("fc.",))

    path = trained(tmp_path / "2.pt", second, ["freeze:*.bias", "layer1[1:]", "head"], name="resnet18", seed=2)
    again = Recipe().restore(checkpoint.read(path))
    assert states_equal(again.model, second.model)
    plan = {k: p.requires_grad for k, p in second.model.named_parameters()}
    assert {k: p.requires_grad for k, p in again.model.named_parameters()} == plan
    assert again.model.training
    assert not again.model.layer1[0].training

    third = build_model("resnet34", 3, weights=WeightsConfig(str(path), weights_match="shape", weights_coverage=0.5))
    assert torch.all(third.model.layer1[1].conv1.weight == 5)
    assert torch.all(third.model.layer1[0].conv1.weight == 5)
    assert torch.all(third.model.layer3[1].conv1.weight == 1)


@pytest.mark.parametrize("name", [pytest.param("googlenet", marks=pytest.mark.slow), "squeezenet1_1"])
def test_a_checkpoint_over_random_features(name, tmp_path):
    first = build_model(name, 3, weights="none", seed=4)
    path = trained(tmp_path / "1.pt", first, ["head"], name=name, seed=4)
    second = build_model(name, 3, weights=str(path), seed=0)
    assert states_equal(second.model, first.model)
    assert getattr(second.model, "transform_input", None) == getattr(first.model, "transform_input", None)


def test_a_checkpoint_whose_base_is_gone_or_another(tmp_path):
    base = constant_file("resnet18", tmp_path / "base.pth")
    first = build_model("resnet18", 3, weights=str(base))
    path = trained(tmp_path / "1.pt", first, ["head"], name="resnet18", seed=0)
    torch.save({k: v + 1 for k, v in torch.load(base, weights_only=True).items()}, base)
    with pytest.raises(CheckpointError, match=r"base.pth is not the file that was meant: expected a sha256 of"):
        build_model("resnet18", 3, weights=str(path))
    base.unlink()
    with pytest.raises(CheckpointError, match=r"1.pt was trained on cannot be built again: .* not at .*base.pth"):
        build_model("resnet18", 3, weights=str(path))


def test_checkpoints_that_cannot_be_a_start(tmp_path):
    first = build_model("squeezenet1_1", 3, weights="none")
    path = trained(tmp_path / "1.pt", first, ["head"], name="squeezenet1_1", seed=0)

    def changed(**entries: object) -> str:
        checkpoint.write(tmp_path / "changed.pt", dataclasses.replace(checkpoint.read(path), **entries))
        return str(tmp_path / "changed.pt")

    for entries, says in (
        ({"base": {"source": "module"}}, "trained from a module of your own"),
        ({"base": None}, "has NoneType as base"),
        ({"base": {"source": "file", "path": 3}}, "does not record the sha256 of its weights"),
        ({"config": {}}, "the settings in the checkpoint name no model"),
        ({"config": {"model": {"name": "os.system"}, "data": {"image_size": None}, "run": {"seed": 0}}}, "os.system"),
        ({"freeze_plan": {"train": ["layer9"]}}, "cannot be built again: --train 'layer9' matches no parameter"),
        ({"classes": ["a", "b"]}, r"classifier.1.weight is .*; expected"),
        # A checkpoint that says it started from itself: no end to it.
        (
            {"base": {"source": "file", "path": str(tmp_path / "changed.pt"), "sha256": "0" * 64}},
            "not the file that was meant",
        ),
    ):
        with pytest.raises(CheckpointError, match=says):
            build_model("squeezenet1_1", 3, weights=changed(**entries))
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="is damaged"):
        build_model("squeezenet1_1", 3, weights=str(path))


# ----------------------------------------------------------------------------------------------------------- randomness


@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x0_5"])
def test_a_seed_decides_all_values(name):
    torch.manual_seed(1)
    one = build_model(name, 7, weights="none", seed=3)
    torch.manual_seed(2)
    same, other = (build_model(name, 7, weights="none", seed=seed) for seed in (3, 4))
    assert one.base == {"source": "random", "seed": 3}
    assert states_equal(one.model, same.model)
    assert not torch.equal(one.model.conv1.weight if name == "resnet18" else one.model.conv1[0].weight, torch.zeros(1))
    differ = {k for k, v in one.model.state_dict().items() if not torch.equal(v, other.model.state_dict()[k])}
    assert {"fc.weight", "conv1.weight" if name == "resnet18" else "conv1.0.weight"} <= differ


def test_features_do_not_depend_on_the_number_of_classes():
    a, b = (build_model("shufflenet_v2_x0_5", classes, weights="none").model for classes in (2, 1001))
    assert states_equal(a, b, without=("fc.",))


def test_the_head_does_not_depend_on_the_base(tmp_path):
    path = constant_file("resnet18", tmp_path / "x.pth")
    pretrained = build_model("resnet18", 7, weights=str(path), seed=5).model
    random = build_model("resnet18", 7, weights="none", seed=5).model
    assert torch.equal(pretrained.fc.weight, random.fc.weight)
    assert torch.equal(pretrained.fc.bias, random.fc.bias)
    assert pretrained.fc.weight.std() > 0
    assert torch.all(pretrained.conv1.weight == 1)
    assert not torch.all(random.conv1.weight == 1)


@pytest.mark.parametrize("weights", ["none", "file", "module"])
def test_global_randomness_is_untouched(tmp_path, monkeypatch, weights):
    def reseeded(_: int) -> None:
        raise AssertionError("the generators of all GPUs would be reseeded, and not put back")

    path = constant_file("resnet18", tmp_path / "x.pth")
    module = models.shufflenet_v2_x0_5()
    monkeypatch.setattr(torch, "manual_seed", reseeded)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", reseeded)
    before = torch.get_rng_state()
    if weights == "module":
        build_model(module, 7, head="fc")
    else:
        build_model("resnet18", 7, weights=weights.replace("file", str(path)))
    assert torch.equal(torch.get_rng_state(), before)


# ----------------------------------------------------------------------------------------------------------- image size


@pytest.mark.parametrize(
    ("name", "image_size", "size", "resize"),
    [
        ("resnet18", None, 224, 256),
        ("resnet18", 112, 112, 128),
        ("efficientnet_b1", 120, 120, 128),  # 240 from 255
        ("vit_b_32", 64, 64, 73),
        ("maxvit_t", 448, 448, 448),
        ("swin_v2_t", 96, 96, 98),  # 256 from 260: takes any size
    ],
)
def test_image_size(name, image_size, size, resize):
    with torch.device("meta"):
        classifier = build_model(name, 7, weights="none", image_size=image_size)
        assert (classifier.input.size, classifier.input.resize) == (size, resize)
        assert classifier.model.eval()(torch.empty(1, 3, size, size)).shape == (1, 7)


@pytest.mark.parametrize(
    ("name", "weights", "image_size", "says"),
    [
        ("vit_b_32", "default", 256, "ViT_B_32_Weights.IMAGENET1K_V1 takes images of 224 pixels"),
        ("vit_b_16", "IMAGENET1K_SWAG_E2E_V1", 224, "takes images of 384 pixels"),
        ("maxvit_t", "default", 448, "MaxVit_T_Weights.IMAGENET1K_V1 takes images of 224 pixels"),
        ("vit_b_32", "none", 100, "cannot be built for images of 100 pixels"),
        ("maxvit_t", "none", 100, "cannot be built for images of 100 pixels"),
        ("vit_b_32", "none", 0, "at least 1 pixel"),
        ("resnet18", "none", -32, "at least 1 pixel"),
    ],
)
def test_image_sizes_that_cannot_be(name, weights, image_size, says, cache):
    with pytest.raises(UsageError, match=re.escape(says)) as error:
        build_model(name, 7, weights=weights, image_size=image_size)
    assert str(image_size) in str(error.value)
    assert not cache.exists()  # said before anything is downloaded


def test_a_vit_file_decides_about_its_image_size(tmp_path):
    path = constant_file("vit_b_32", tmp_path / "x.pth", image_size=64)
    assert build_model("vit_b_32", 7, weights=str(path), image_size=64).input.size == 64
    with pytest.raises(DataError, match="another image size"):
        build_model("vit_b_32", 7, weights=str(path))


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("resnet-18", "resnet18"),
        ("ResNet18", "resnet18"),  # torchvision would take this one
        ("efficientnet_b8", "efficientnet_b7"),
        ("fasterrcnn_resnet50_fpn", "resnet50"),  # torchvision's, not a classifier
        ("os.system", "closest: "),
        ("__class__", "closest: "),
        ("", "closest: "),
    ],
)
def test_an_unknown_model_lists_close_names(name, close):
    with pytest.raises(UsageError, match=re.escape(close)) as error:
        build_model(name, 7, weights="none")
    assert repr(name) in str(error.value)


@pytest.mark.parametrize("num_classes", [0, -1])
def test_no_outputs(num_classes):
    with pytest.raises(UsageError, match=f"num_classes is {num_classes}"):
        build_model("resnet18", num_classes, weights="none")


def test_the_head_of_a_known_model_is_known():
    with torch.device("meta"):
        assert build_model("resnet18", 7, weights="none", head="fc").head == ("fc",)
        with pytest.raises(UsageError, match="the head of resnet18 is 'fc', not 'classifier'"):
            build_model("resnet18", 7, weights="none", head="classifier")


# -------------------------------------------------------------------------------------------------------- other modules


class Small(nn.Module):
    def __init__(self, head: nn.Module, num_classes: int = 10) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.ReLU(), nn.AdaptiveAvgPool2d(4))
        self.pool = nn.Flatten() if isinstance(head, nn.Linear) else nn.Identity()
        self.top = nn.ModuleDict({"head": head})

    def forward(self, images: Tensor) -> Tensor:
        return self.top["head"](self.pool(self.features(images))).flatten(1)  # [B, C, H, W] to [B, classes]


@pytest.mark.parametrize(
    "head",
    [
        lambda: nn.Linear(96, 10),
        lambda: nn.Linear(96, 10, bias=False),
        lambda: nn.Conv2d(6, 10, 4, bias=False),
        lambda: nn.Conv2d(6, 10, 2, stride=4, padding=1, dilation=5, padding_mode="replicate"),
    ],
)
def test_a_module_keeps_all_but_its_head(head: Callable[[], nn.Module]):
    module = Small(head()).double()
    old, features = module.top["head"], {key: value.clone() for key, value in module.features.state_dict().items()}
    classifier = build_model(module, 3, head="top.head")
    new = classifier.model.top["head"]
    assert classifier.model is module
    assert new is not old
    assert repr(new) == repr(old).replace("features=10", "features=3").replace("6, 10", "6, 3")
    assert new.weight.dtype == torch.float64
    assert module(torch.randn(2, 3, 9, 9).double()).shape == (2, 3)
    assert all(torch.equal(value, features[key]) for key, value in module.features.state_dict().items())
    assert module.num_classes == 3
    assert classifier.head == ("top.head",)
    assert classifier.base == {"source": "module"}
    assert classifier.input == InputSpec(224, 256, *IMAGENET, "bilinear")
    assert build_model(module, 3, head="top.head", image_size=112).input == InputSpec(112, 128, *IMAGENET, "bilinear")


def test_a_modules_head_is_made_on_its_device():
    with torch.device("meta"):
        module = Small(nn.Linear(96, 10))
    assert build_model(module, 3, head="top.head").model.top["head"].weight.is_meta


def test_a_head_of_the_right_size_is_kept():
    head = nn.Linear(96, 3)
    assert build_model(Small(head), 3, head="top.head", weights="none").model.top["head"] is head


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({}, "head None of Small: expected a Linear or ungrouped Conv2d layer, found no module of that name"),
        ({"head": "fc"}, "candidates, the last ones: top.head"),
        ({"head": ""}, "found Small"),
        ({"head": "top"}, "found ModuleDict"),
        ({"head": "features.0"}, "found Conv2d"),  # grouped
        ({"head": "top.head", "weights": "IMAGENET1K_V1"}, "a module is used as it is"),
        ({"head": "top.head", "image_size": 0}, "image_size is 0"),
    ],
)
def test_what_a_module_needs(kwargs, says):
    with pytest.raises(UsageError, match=re.escape(says)):
        build_model(Small(nn.Linear(96, 10)), 3, **kwargs)
