import pytest

from trainer.processes import startup, together


@pytest.mark.parametrize("turns", [together.on_main, together.main_first, together.on_all, together.on_each_machine])
def test_a_function_gets_its_arguments_and_its_result_comes_back(turns):
    accelerator = startup.start()
    assert turns(accelerator, sorted, [2, 3, 1], reverse=True) == [3, 2, 1]
    assert turns(accelerator, lambda: 5) == 5
    with pytest.raises(ValueError, match="invalid literal"):
        turns(accelerator, int, "x")


def test_gather_alone():
    assert together.gather(startup.start(), "a") == ["a"]
