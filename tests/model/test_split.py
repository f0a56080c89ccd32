import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, build
from torch import nn

from trainer.errors import UsageError
from trainer.model.freezing import freeze, frozen_tensors, trained_tensors
from trainer.model.split import split_model

# One builder of each family, and what follows the cut when the head alone trains.
PARTLY = {
    "convnext_tiny": ["features.7", "classifier.2"],
    "densenet121": ["features.denseblock4.denselayer16", "classifier"],
    "efficientnet_b0": ["features.8", "classifier.1"],
    "mobilenet_v3_small": ["features.1[12]", "classifier"],
    "resnet18": ["layer4", "fc"],
    "shufflenet_v2_x0_5": ["conv5", "fc"],
    "swin_t": ["features.7.1", "norm", "head"],
    "vgg11_bn": ["classifier"],
    "vit_b_32": ["encoder.layers.encoder_layer_11", "encoder.ln", "heads.head"],
}


def _check(model: nn.Module, images: torch.Tensor):
    parts = split_model(model, images)
    assert parts.has_trunk, str(parts)
    model.eval()
    with torch.no_grad():
        assert torch.equal(parts.tail.eval()(*parts.trunk(images)), model(images))
    tail = dict(parts.tail.named_parameters())
    plain = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(tail[name] is parameter for name, parameter in plain.items()), "shared, under the model's own names"
    assert not any(parameter.requires_grad for parameter in parts.trunk.parameters())
    return parts


@pytest.mark.parametrize("name", [*FAMILIES, pytest.param("maxvit_t", marks=pytest.mark.slow)])
def test_head_only_is_bit_equal_in_every_family(name):
    model, images = build(name)
    head, before = FAMILIES.get(name, ("classifier.5", "classifier.5"))
    freeze(model, ["head"], head=[head])
    parts = _check(model, images)
    assert parts.before == before
    assert set(dict(parts.tail.named_parameters())) == set(trained_tensors(model))
    model.train(), parts.trunk.train()
    assert not any(module.training for module in parts.trunk.modules())


@pytest.mark.parametrize("name", PARTLY)
def test_partly_unfrozen_is_bit_equal(name):
    model, images = build(name)
    freeze(model, PARTLY[name])
    _check(model, images)


def test_training_the_tail_leaves_every_frozen_bit(tiny):
    freeze(tiny, ["fc"])
    images = torch.randn(4, 3, 8, 8)
    parts = split_model(tiny, images)
    before = {name: tensor.clone() for name, tensor in frozen_tensors(tiny).items()}
    optimizer = torch.optim.AdamW([p for p in tiny.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        tiny.train(), parts.trunk.train(), parts.tail.train()
        parts.tail(*parts.trunk(images)).sum().backward()
        optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in frozen_tensors(tiny).items())


def test_dropout_is_live_only_where_nothing_frozen_follows(tiny):
    freeze(tiny, ["fc"])
    parts = split_model(tiny, torch.randn(2, 3, 8, 8))
    parts.tail.train(), tiny.train()
    assert parts.before == "late"
    assert tiny.late.training
    assert not tiny.early.training, "it would make frozen features noisy"
    freeze(tiny, ["conv", "fc"])  # now it regularises what trains
    assert split_model(tiny, torch.randn(2, 3, 8, 8)).has_trunk is False
    assert tiny.early.training


def test_all_trains_without_a_trunk(tiny):
    freeze(tiny, ["all"])
    parts = split_model(tiny, torch.randn(2, 3, 8, 8))
    assert parts.tail is tiny
    assert str(parts) == "uncut: nothing is frozen before the first trainable parameter"


class _Skip(nn.Module):
    """Two tensors cross the cut; a frozen parameter of the model itself is used after it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.full((4,), 2.0))
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        return self.fc(a) * self.scale[:3] + b.sum(1, keepdim=True)


def test_the_frontier_may_be_several_tensors():
    model = _Skip()
    freeze(model, ["fc"])
    parts = _check(model, torch.randn(2, 4))
    assert parts.cut == ("a", "sum_1")


class _Branches(nn.Module):
    def __init__(self, how: str):
        super().__init__()
        self.how, self.body, self.drop, self.fc = how, nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 3)

    def forward(self, x):
        if self.how == "data":
            x = self.body(x) if x.sum() > 0 else x
        if self.how == "mode":
            x = F.dropout(self.body(x), 0.5, training=self.training)
        if self.how == "shared":
            x = self.drop(self.body(self.drop(x)))
        if self.how == "size":
            x = self.body(x) * len(x)
        return self.fc(x)


@pytest.mark.parametrize(
    ("how", "reason"), [("data", "control flow"), ("mode", "train and eval mode"), ("shared", "one dropout module")]
)
def test_what_cannot_be_cut_runs_uncut_and_says_why(how, reason):
    model = _Branches(how)
    freeze(model, ["fc"])
    parts = split_model(model, torch.randn(2, 4))
    assert parts.tail is model
    assert not parts.has_trunk
    assert reason in str(parts)
    assert model.training, "left as it was found"
    model.train()
    assert not model.body.training
    assert model.fc.training


def test_images_the_model_cannot_take_are_a_usage_error():
    model, _ = build("vit_b_32")
    freeze(model, ["heads"])
    with pytest.raises(UsageError, match=r"VisionTransformer cannot take images of 96×96 pixels: .*224"):
        split_model(model, torch.randn(2, 3, 96, 96))
