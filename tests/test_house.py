"""The house itself: its public names, its sizes, and what may be imported before torch."""

import ast
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT, search_path

STUBS = sorted((ROOT / "trainer").rglob("__init__.pyi"))
MODULES = {path.stem for path in (ROOT / "trainer").rglob("*.py")} | {path.parent.name for path in STUBS}


@pytest.fixture(scope="module")
def budgets():
    spec = importlib.util.spec_from_file_location("budgets", ROOT / ".ci" / "budgets.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def names_in(stub: Path) -> list[tuple[str, str]]:
    """The module and the name of each line of a stub."""
    return [
        (node.module, alias.asname) for node in ast.parse(stub.read_text(encoding="utf-8")).body for alias in node.names
    ]


def name_of(stub: Path) -> str:
    return ".".join(stub.parent.relative_to(ROOT).parts)


@pytest.mark.parametrize("stub", STUBS, ids=name_of)
def test_every_listed_name_is_there(stub):
    package = importlib.import_module(name_of(stub))
    names = [name for _, name in names_in(stub)]
    assert sorted(package.__all__) == sorted(names)
    for module, name in names_in(stub):
        assert getattr(package, name) is getattr(importlib.import_module(f"{name_of(stub)}.{module}"), name)


@pytest.mark.parametrize("stub", STUBS, ids=name_of)
def test_names_are_listed_once_and_in_order(stub):
    names = names_in(stub)
    assert names == sorted(set(names))
    assert len({name for _, name in names}) == len(names)


@pytest.mark.parametrize("stub", STUBS, ids=name_of)
def test_no_listed_name_is_that_of_a_module(stub):
    """Importing a module sets it as an attribute of its package, in the place of a function with its name."""
    assert {name for _, name in names_in(stub)} & MODULES == set()


def test_every_room_has_its_list():
    rooms = {path.parent for path in (ROOT / "trainer").rglob("*.py")}
    assert rooms == {stub.parent for stub in STUBS}


def test_nothing_has_grown_over_its_limit(budgets):
    over = [f"{name}: {size} of {limit}" for name, size, limit in budgets.sizes() if size > limit]
    assert not over, over


def test_lines_of_code_are_counted_without_words(budgets, tmp_path):
    file = tmp_path / "code.py"
    file.write_text(
        '"""Doc.\n\nMore.\n"""\n\n# why\nx = """a\n\nb"""  # counts\n'
        'y = 1\n"""Of y."""\n\n\ndef f():\n    """Doc."""\n    return (\n        1\n    )\n'
    )
    assert budgets.lines_of_code(file) == 3 + 1 + 1 + 3


@pytest.mark.parametrize("code", ["import trainer", "import trainer.cli", "import trainer.commands"])
def test_imports_no_torch(code):
    check = f"import sys; {code}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], env={"PYTHONPATH": search_path()}, cwd=ROOT)
    assert done.returncode == 0
