"""Class activation maps: exact where they promise it."""

import numpy as np
import torch
from PIL import Image
from torch import nn

from trainer.report.heatmap import cam, grad_cam, layer, overlay


def test_cam_adds_up_to_the_logit():
    maps, head = torch.randn(16, 5, 7, dtype=torch.double), nn.Linear(16, 3).double()
    logits = head(maps.mean((1, 2)))
    for target in range(3):
        found = cam(maps, head.weight[target])
        assert found.shape == (5, 7)
        torch.testing.assert_close(found.mean() + head.bias[target], logits[target])


def test_grad_cam_of_a_pooled_linear_tail_is_its_cam():
    maps = torch.randn(16, 5, 7)
    tail = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))
    with torch.no_grad():  # as in an evaluation
        found = grad_cam(maps, 2, tail=tail)
    torch.testing.assert_close(found, cam(maps, tail[2].weight[2]).relu() / 35)
    assert not found.requires_grad
    assert maps.grad is None
    assert tail[2].weight.grad is None


def test_layer_is_brightest_at_the_highest_place_and_darkest_below_zero():
    colours = np.asarray(layer(torch.tensor([[-3.0, 0.0], [1.0, 2.0]]))).astype(int)
    assert colours.shape == (2, 2, 4)
    sums = colours[..., :3].sum(-1)
    assert sums[0, 0] == sums[0, 1] < sums[1, 0] < sums[1, 1]
    assert (np.asarray(layer(np.zeros((2, 3)))) == colours[0, 0]).all()  # nothing spoke for it


def test_overlay_has_the_size_of_the_image():
    image = Image.new("L", (40, 30), 200)
    found = np.asarray(overlay(image, np.array([[0.0, 1.0]])))
    assert found.shape == (30, 40, 3)
    assert (found[:, -1, 0] > found[:, 0, 0]).all()
