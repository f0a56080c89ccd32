"""Votes of nearest neighbours."""

import pytest
import torch

from trainer.heads import knn
from trainer.heads.knn import knn_accuracy

# Angles in degrees: two groups, and one sample of class 1 amid class 0.
ANGLES = torch.deg2rad(torch.tensor([0.0, 2.0, 5.0, 3.0, 90.0, 93.0, 97.0]))
FEATURES = torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1) * torch.arange(1, 8)[:, None]
LABELS = torch.tensor([0, 0, 0, 1, 1, 1, 1])


@pytest.mark.parametrize("rows", [2, 1024])
def test_a_sample_does_not_vote_for_itself(monkeypatch, rows):
    monkeypatch.setattr(knn, "_ROWS", rows)
    # k = 1: nearest of 0 is 2, of 2 and 5 it is 3 (wrong), of 3 it is 2 (wrong), the group at 90 is right.
    assert knn_accuracy(FEATURES, LABELS, ks=(1, 3, 99)) == {1: 4 / 7, 3: 6 / 7}


def test_others_are_classified_by_all_and_ties_by_similarity():
    query = torch.deg2rad(torch.tensor([2.4, 100.0]))
    query = torch.stack([query.cos(), query.sin()], dim=1), torch.tensor([0, 1])
    assert knn_accuracy(FEATURES, LABELS, ks=(1, 2), queries=query) == {1: 1.0, 2: 1.0}
    assert knn_accuracy(FEATURES[:1], LABELS[:1]) == {}
