from trainer.errors import DataError, Elsewhere, UsageError
from trainer.processes import ending


def test_fail_prints_one_line_and_gives_the_exit_code(capsys):
    assert ending.fail(UsageError("wrong")) == 2
    assert ending.fail(DataError("bad")) == 65
    assert ending.fail(OSError(28, "No space left on device")) == 74
    assert ending.fail(Elsewhere(1, "DataError", 65, "bad")) == 65
    assert capsys.readouterr().err.splitlines()[:2] == ["error: wrong", "error: bad"]


def test_what_all_processes_of_a_machine_find_is_said_once(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert ending.fail(UsageError("wrong")) == 2
    assert ending.fail(Elsewhere(0, "DataError", 65, "bad")) == 65
    assert ending.fail(DataError("my bad")) == 65
    assert capsys.readouterr().err == "error: my bad\n"
