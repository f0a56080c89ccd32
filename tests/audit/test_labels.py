"""Wrong labels come first."""

import pytest
import torch

from trainer.audit.labels import LeftOut, held_out_hits
from trainer.audit.neighbours import Neighbours


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_flipped_labels_of_the_digits_are_found(digits, seed):
    features, true = digits.features[: digits.train], digits.labels[: digits.train]
    generator, wrong = torch.Generator().manual_seed(seed), round(0.05 * digits.train)
    chosen = torch.randperm(digits.train, generator=generator)[:wrong]
    labels = true.clone()
    labels[chosen] = (labels[chosen] + torch.randint(1, 10, (wrong,), generator=generator)) % 10
    found = LeftOut.of(features, labels, classes=10)
    flipped = set(chosen.tolist())
    first = flipped.intersection(found.ranked()[:wrong])
    assert len(first) >= 0.85 * wrong
    assert sum(bool(found.suggested[image] == true[image]) for image in first) >= 0.95 * len(first)
    suspects = found.suspects(Neighbours.of(features).index)
    assert len(flipped.intersection(suspects)) >= 0.85 * wrong
    assert len(flipped.intersection(suspects)) >= 0.85 * len(suspects), "few false alarms"


def test_labels_that_are_right_are_left_alone(digits):
    found = LeftOut.of(digits.features, digits.labels, classes=10)
    assert len(found.suspects(Neighbours.of(digits.features).index)) <= 7  # of 1,797
    confusion = found.confusion(10)
    assert confusion.sum() == 1797
    assert int(confusion.diagonal().sum()) / 1797 == pytest.approx(found.accuracy)


def test_hits_are_those_of_a_head_of_the_training_images():
    features = torch.tensor([[0.0, 0.0], [0.1, 0.0], [1.0, 0.0], [0.9, 0.1]])
    labels = torch.tensor([0, 0, 1, 1])
    seen = held_out_hits((features, labels), (torch.tensor([[0.0, 0.1], [1.0, 0.1]]), torch.tensor([0, 0])), classes=2)
    assert seen.tolist() == [True, False]
