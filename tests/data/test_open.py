"""What is opened: names and folders, splits, labels."""

import random
from collections import Counter

import numpy as np
import pytest
from pictures import rows, write_classes

from trainer.data import folders
from trainer.data.images import Images, Subset
from trainer.data.labels import check_labels, stratified_split
from trainer.data.open import load_data
from trainer.errors import DataError, UsageError


def test_split_keeps_the_shares_of_the_classes():
    labels = [0] * 50 + [1] * 10 + [2] * 2 + [3]
    random.Random(0).shuffle(labels)
    train, val = stratified_split(labels, 0.2, seed=0)
    assert sorted(train + val) == list(range(len(labels)))
    assert (train, val) == (sorted(train), sorted(val))
    assert Counter(labels[i] for i in val) == {0: 10, 1: 2, 2: 1}
    assert Counter(labels[i] for i in train) == {0: 40, 1: 8, 2: 1, 3: 1}
    assert Counter(labels[i] for i in stratified_split(labels, 0.99, seed=0)[0]) == {0: 1, 1: 1, 2: 1, 3: 1}


def test_split_depends_on_the_seed_alone():
    labels = [0] * 10 + [1] * 10
    assert stratified_split(labels, 0.3, seed=0)[1] == [0, 5, 7, 11, 15, 16]  # the same on every machine, for ever
    assert stratified_split(labels, 0.3, seed=1)[1] != stratified_split(labels, 0.3, seed=0)[1]
    more = stratified_split([*labels, 1, 1, 1, 1], 0.3, seed=0)[1]
    assert [i for i in more if i < 10] == [0, 5, 7]  # new images of class 1 do not move class 0


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 20, float("nan")])
def test_split_refuses_other_fractions(fraction):
    with pytest.raises(UsageError, match="between 0 and 1"):
        stratified_split([0, 0, 1, 1], fraction, seed=0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("cifar", r"no folder 'cifar' and no data set of that name \(did you mean CIFAR10"),
        ("nowhere/at/all", "no folder 'nowhere/at/all' and"),
        ("", "no folder"),
        ("VOCDetection", "VOCDetection is not a data set of images with one class"),
        ("fakedata", "FakeData is not"),
    ],
)
def test_unknown_names(data, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=rf"{message}.*digits, or a data set .* such as CIFAR10 or Flowers102$"):
        load_data(data)


def test_unknown_folders(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(UsageError, match=rf"did you mean {tmp_path}/photos\?"):
        load_data(f"{tmp_path}/fotos/")
    (tmp_path / "photos.zip").touch()
    with pytest.raises(UsageError, match=r"photos\.zip' is not a folder"):
        load_data(f"{tmp_path}/photos.zip")


def test_folder_wins_over_name(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    write_classes("MNIST", a=2, b=2)
    assert load_data("MNIST")[0].classes == ("a", "b")
    assert "taking the folder" in caplog.text
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_data("~/MNIST")[0].classes == ("a", "b")
    write_classes("digits", a=2, b=2)
    assert len(load_data("digits")[0].classes) == 10, "what the demo is must not depend on the folder it starts in"
    assert "give ./digits" in caplog.text
    assert load_data("./digits")[0].classes == ("a", "b")


@pytest.mark.parametrize("label", [2, -1, -100, 1.0, None, True, np.int64(1)])
def test_labels_that_are_no_index_are_errors(label):
    class Own(Images):
        classes = ("a", "b")

    images = Own()
    images.labels = [0, 1, label]
    with pytest.raises(DataError, match=r"Own\[2\] has the label .*an int from 0 to 1"):
        check_labels(images)
    images.labels = [0, 1]
    check_labels(images)
    with pytest.raises(NotImplementedError):
        images[0]


def test_subsets_of_subsets(tmp_path):
    images = folders._class_folders(write_classes(tmp_path, a=3, b=3))
    subset = Subset(Subset(images, [5, 0, 3]), [2, 0])
    assert subset.labels == [1, 1]
    assert [rows(subset[i])[0][0] for i in range(2)] == [[1, 0, 7], [1, 2, 7]]
    assert subset.name(1) == images.name(5)
