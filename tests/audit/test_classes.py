"""Names, numbers and confusions of classes."""

import torch

from trainer.audit.classes import alike, same_names, too_few


def test_names_that_differ_in_case_or_spacing_alone():
    names = ("Cat", "cat ", "hot dog", "hot_dog", "hotdogs", "Ｄog", "dog")
    assert same_names(names) == [("Cat", "cat "), ("hot dog", "hot_dog"), ("Ｄog", "dog")]


def test_small_classes():
    assert too_few([0] * 10 + [1] * 9, ("a", "b", "c")) == [("c", 0), ("b", 9)]


def test_classes_that_are_taken_for_each_other():
    confusion = torch.tensor([[6, 4, 0], [3, 7, 0], [1, 1, 20]])
    assert alike(confusion, ("a", "b", "c")) == [("a", "b", 0.35)]
    assert alike(confusion // 2, ("a", "b", "c")) == [], "too few images to say"
