import math

import torch

from trainer.metrics import Totals, means

CPU = torch.device("cpu")


def test_means_are_over_samples_not_batches():
    totals = Totals(CPU)
    assert totals.sums() == means(totals.sums()) == {}
    totals.add({"loss": torch.tensor([1.0, 3.0, 5.0]), "accuracy": torch.tensor([True, False, True])})
    mark = totals.sums()
    totals.add({"accuracy": torch.tensor([False]), "loss": torch.tensor([7.0])})
    assert totals.sums() == {"accuracy": 2.0, "loss": 16.0, "samples": 4.0}
    assert means(totals.sums()) == {"accuracy": 0.5, "loss": 4.0}
    assert means(totals.sums(), since=mark) == {"accuracy": 0.0, "loss": 7.0}
    assert means(totals.sums(), since=totals.sums()) == {}


def test_counts_stay_exact_where_float32_would_not():
    totals = Totals(CPU)
    hits = torch.ones(2**20, dtype=torch.bool)
    for _ in range(20):
        totals.add({"accuracy": hits})
    totals.add({"accuracy": hits[:1]})
    assert totals.sums() == {"accuracy": 20 * 2**20 + 1, "samples": 20 * 2**20 + 1}  # above 2**24


def test_sums_do_not_depend_on_order_or_grouping():
    losses = torch.rand(10_000, generator=torch.Generator().manual_seed(0)) * 5
    one, many, resumed = Totals(CPU), Totals(CPU), Totals(CPU)
    one.add({"loss": losses})
    for part in losses.flip(0).split(7):
        many.add({"loss": part})
    for part in losses.split(1000):
        resumed = Totals(CPU, start=resumed.sums())
        resumed.add({"loss": part})
    assert one.sums() == many.sums() == resumed.sums()
    assert math.isclose(means(one.sums())["loss"], losses.double().mean().item(), abs_tol=2**-25)


def test_a_value_that_is_not_a_number_is_not_hidden():
    totals = Totals(CPU)
    totals.add({"loss": torch.tensor([1.0, math.nan])})
    assert math.isnan(means(totals.sums())["loss"])
