"""Entries of features: whole or absent, whoever else writes, and whatever was killed."""

import json
import multiprocessing
import os
import signal

import pytest
import torch

from trainer.trunk import cache

LIKE = [((5, 3), torch.float32), ((5,), torch.int64)]
KEY = cache.key_of(a=1)


def _entry(folder, writer="here-1"):
    return cache.Entry(folder, KEY, LIKE, writer=writer)


def _fill(entry, value):
    entry.reserve()
    for tensor in entry.open_for_writing():
        tensor.fill_(value)


def _is(entry, value):
    return entry.is_good() and all(bool((tensor == value).all()) for tensor in entry.open())


def test_two_runs_that_finish_one_entry_at_once_both_succeed(tmp_path):
    one, two = _entry(tmp_path), _entry(tmp_path, "here-2")
    _fill(one, 1)
    _fill(two, 2)
    one.commit()
    mapped = one.open()
    two.commit()  # the first stays: it is the same by its key, and may be in use
    assert _is(two, 1)
    assert mapped[0][0, 0] == 1
    assert os.listdir(tmp_path) == [KEY]


def test_an_entry_put_there_between_two_steps_is_no_error(tmp_path, monkeypatch):
    one, two = _entry(tmp_path), _entry(tmp_path, "here-2")
    _fill(one, 1)
    one.commit()
    (one.path / "0.bin").write_bytes(b"damaged")
    _fill(one, 3)
    _fill(two, 2)
    rename = type(one.path).rename

    def interrupted(path, target):
        rename(path, target)
        if path == one.path:
            monkeypatch.undo()
            two.commit()

    monkeypatch.setattr(type(one.path), "rename", interrupted)
    one.commit()
    assert _is(one, 2)
    assert os.listdir(tmp_path) == [KEY]


@pytest.mark.parametrize("sha256", [[], ["0" * 64], None, "x"])
def test_an_entry_without_the_hash_of_each_file_is_not_taken(tmp_path, sha256, caplog):
    entry = _entry(tmp_path)
    _fill(entry, 1)
    entry.commit()
    content = json.loads((entry.path / "entry.json").read_text())
    (entry.path / "entry.json").write_text(json.dumps(content | {"sha256": sha256}))
    assert not entry.is_good()
    assert "are not used, and computed again" in caplog.text


@pytest.mark.parametrize("kind", ["file", "link", "dangling link"])
def test_something_else_in_the_place_of_an_entry_is_found_before_the_work(tmp_path, kind):
    entry = _entry(tmp_path)
    if kind == "file":
        entry.path.write_text("")
    else:
        (tmp_path / "there").mkdir()
        entry.path.symlink_to(tmp_path / ("there" if kind == "link" else "nowhere"))
    assert not entry.is_good()
    with pytest.raises(FileExistsError, match=f"a file or a link is in the place .*remove it.*{KEY}"):
        entry.reserve()
    assert entry.path.is_symlink() or entry.path.is_file()


def test_a_file_cut_short_is_an_error_and_no_signal(tmp_path):
    entry = _entry(tmp_path)
    _fill(entry, 1)
    entry.commit()
    os.truncate(entry.path / "0.bin", 10)
    with pytest.raises(OSError, match=r"it has 10 bytes; expected 60.*0\.bin"):
        entry.open()


def _killed(folder, name):
    entry = _entry(folder, name)
    entry.reserve()
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_run_reserved_is_removed_and_what_is_in_use_stays(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(tmp_path, "there-7"))
    process.start()
    process.join()
    (left,) = tmp_path.iterdir()
    assert (left / "0.bin").stat().st_size == 60
    mine = _entry(tmp_path, "here-2")
    _fill(mine, 2)
    for path in tmp_path.iterdir():
        os.utime(path, (0, 0))
    _fill(_entry(tmp_path), 1)
    assert not left.exists()
    mine.commit()
    assert _is(mine, 2)
