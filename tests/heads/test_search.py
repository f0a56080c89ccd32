"""One choice, the same each time, on any number of processes."""

import json
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from trainer.errors import DataError, UsageError
from trainer.heads.grid import Course, HeadSetting, default_settings
from trainer.heads.search import choose, pooled, search_head

SAMPLES = 60


def windows(epoch: int) -> list[list[int]]:
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(epoch)).tolist()
    return [order[first : first + 16] for first in range(0, SAMPLES, 16)]


COURSE = Course(windows, lambda progress: 1 - progress)


def data(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(SAMPLES) % 3
    features = torch.randn(SAMPLES, *shape, generator=generator)
    features[torch.arange(SAMPLES), labels] += 4
    return features, labels


def tail(size: int) -> nn.Linear:
    linear = nn.Linear(size, 3)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def test_it_finds_a_head_and_can_be_written_and_read():
    x, labels = data(5)
    found = search_head(x, labels, tail(5), COURSE, classes=3, settings=default_settings(x, epochs=(4,)))
    assert found.accuracy > 0.9
    assert found.ridge > 0.9
    assert found.knn > 0.9
    assert found.worst <= found.median <= found.best
    assert len(found.table) == 15
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False)) == found.to_dict()
    assert str(found).startswith(f"lr {found.setting.lr:.3g}, weight decay")
    assert "\n" not in str(found)
    assert search_head(x, labels, tail(5), COURSE, classes=3, settings=default_settings(x, epochs=(4,))) == found


def test_processes_share_the_settings():
    x, labels = data(5)
    run = partial(search_head, x, labels, tail(5), COURSE, classes=3, settings=default_settings(x, epochs=(2,)))
    parts: list[list[dict]] = []

    def note(rows: list[dict]) -> list[list[dict]]:
        parts.append(rows)
        return [rows]

    for rank in range(3):
        run(rank=rank, ranks=3, merge=note)
    assert [len(part) for part in parts] == [5, 5, 5]
    whole = run()
    for rank in range(3):
        found = run(rank=rank, ranks=3, merge=lambda rows: parts)
        assert found.setting == whole.setting
        assert [row["accuracy"] for row in found.table] == [row["accuracy"] for row in whole.table]


def _table(*accuracies: float, nll: float | None = 1.0) -> list[dict]:
    return [
        {"lr": 2.0**n, "weight_decay": 0.1, "epochs": 9, "accuracy": value, "nll": nll}
        for n, value in enumerate(accuracies)
    ]


def test_neighbours_decide_and_then_the_nll():
    assert choose(_table(0.5, 0.80, 0.5, 0.5, 0.75, 0.79, 0.74)) == 5, "an accuracy that no neighbour shares is luck"
    shuffled = _table(0.5, 0.80, 0.5, 0.5, 0.75, 0.79, 0.74)[::-1]
    assert choose(shuffled) == 1, "whatever the order of the rows"
    table = _table(0.7, 0.7, 0.7)
    table[1]["nll"] = 0.5
    assert choose(table) == 1
    table[1] |= {"nll": None, "accuracy": 0.99}  # diverged
    assert choose(table) != 1
    other = [{**row, "epochs": 3, "accuracy": 0.1} for row in _table(0.7, 0.9, 0.7)]
    assert choose([*other, *_table(0.5, 0.6, 0.5)]) == 4, "other lengths of run are no neighbours"
    with pytest.raises(DataError, match="all 2 heads"):
        choose(_table(0.9, 0.9, nll=None))


def test_a_setting_that_diverges_harms_no_other():
    x, labels = data(5)
    good = HeadSetting(0.1, epochs=3)
    bad = HeadSetting(1e30, 1e30, epochs=3)
    course = Course(windows, lambda progress: 1.0, optimizer="sgd")
    run = partial(search_head, x, labels, tail(5), course, classes=3)
    found, alone = run(settings=[bad, good]), run(settings=[good])
    assert found.setting == good
    assert found.diverged == 1
    assert found.table[0]["nll"] is None
    assert found.accuracy == alone.accuracy


def test_maps_are_searched_and_pooled_for_what_needs_no_training():
    x, labels = data(4, 3, 3)
    maps = nn.Sequential(nn.Conv2d(4, 3, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    found = search_head(x, labels, maps, COURSE, classes=3, settings=default_settings(x, epochs=(3, 5)))
    assert len(found.table) == 2 * 15
    assert {row["epochs"] for row in found.table} == {3, 5}
    assert pooled((x, x.flatten(1)), 20).shape == (20, 4 + 36)


def test_without_dropout_a_tail_is_searched_as_one_that_has_none():
    x, labels = data(5)
    layer = tail(5)
    dropping = nn.Sequential(nn.Dropout(0.9), layer)
    run = partial(search_head, x, labels, course=COURSE, classes=3, settings=default_settings(x, epochs=(3,)))
    bare = run(layer).table
    assert run(dropping, dropout=False).table == bare
    assert run(dropping).table != bare
    assert dropping[0].p == 0.9


def test_what_cannot_be_searched():
    x, labels = data(5)
    with pytest.raises(UsageError, match="folds is 1"):
        search_head(x, labels, tail(5), COURSE, classes=3, settings=default_settings(x), folds=1)
    with pytest.raises(UsageError, match="no settings"):
        search_head(x, labels, tail(5), COURSE, classes=3, settings=[])
    with pytest.raises(DataError, match="not finite"):
        search_head(x * torch.nan, labels, tail(5), COURSE, classes=3, settings=default_settings(x))
