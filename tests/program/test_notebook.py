"""The notebook of the examples, executed by a Jupyter kernel."""

import os

import pytest
from launching import ROOT, free_port, search_path

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")


def _text(cell) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


def test_it_trains_resumes_and_shows_predictions(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), search_path()]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONWARNINGS", "default")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    source = (ROOT / "examples" / "notebook.ipynb").read_text(encoding="utf-8")
    for here, there in {"29500": str(free_port()), "image_size=64": "image_size=32"}.items():
        assert here in source
        source = source.replace(here, there)
    notebook = nbformat.reads(source, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells), "kept without outputs"
    kernel = nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}})
    kernel.execute()
    *_, two, one, resumed, use = (cell for cell in notebook.cells if cell.cell_type == "code")
    assert "64 = micro-batch 32 × 2 processes" in _text(two)
    for cell, epochs in ((two, 3), (one, 3), (resumed, 5)):
        assert f"epoch {epochs}/{epochs}  train accuracy" in _text(cell)
        assert "done: best validation epoch" in _text(cell)
    assert "resume  runs/notebook/checkpoints/step-00000069.pt" in _text(resumed)
    assert "epoch 3/5" not in _text(resumed)
    assert any("image/png" in output.get("data", {}) for output in use.outputs)
