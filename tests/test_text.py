"""Counts, sizes and lists read well."""

from trainer.text import counted, listed, short


def test_one_and_many():
    assert [counted(number, "image") for number in (0, 1, 2, 1000)] == [
        "0 images",
        "1 image",
        "2 images",
        "1,000 images",
    ]
    assert [counted(number, "class") for number in (1, 2)] == ["1 class", "2 classes"]


def test_three_digits_and_a_prefix():
    assert [short(size, "B") for size in (0, 999, 2048, 999_600, 1.5e6, 2e9, 3e15)] == [
        *("0 B", "999 B", "2.05 kB", "1 MB", "1.5 MB", "2 GB", "3e+03 TB")
    ]
    assert [short(value) for value in (7, 11_181_642, 1.8e9)] == ["7", "11.2M", "1.8G"]


def test_long_lists_say_how_long():
    assert listed(range(3)) == "0, 1, 2"
    assert listed(range(3000), 2) == "0, 1, ... (3,000 in all)"
