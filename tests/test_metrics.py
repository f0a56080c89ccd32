import torch

from trainer.metrics import Totals


def test_means_are_over_samples_not_batches():
    totals = Totals(torch.device("cpu"))
    assert totals.means() == {}
    assert totals.count == 0
    totals.add({"loss": torch.tensor([1.0, 3.0, 5.0]), "accuracy": torch.tensor([True, False, True])})
    mark = totals.sums()
    totals.add({"accuracy": torch.tensor([False]), "loss": torch.tensor([7.0])})
    assert totals.count == 4
    assert totals.means() == {"accuracy": 0.5, "loss": 4.0}
    assert totals.means(since=mark) == {"accuracy": 0.0, "loss": 7.0}
    assert totals.means(since=totals.sums()) == {}


def test_counts_stay_exact_where_float32_would_not():
    totals = Totals(torch.device("cpu"))
    hits = torch.ones(2**20, dtype=torch.bool)
    for _ in range(20):
        totals.add({"accuracy": hits})
    totals.add({"accuracy": hits[:1]})
    assert totals.count == 20 * 2**20 + 1  # above 2**24, where float32 stops counting
    assert totals.means() == {"accuracy": 1.0}
