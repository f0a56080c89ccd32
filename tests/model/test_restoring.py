"""A checkpoint becomes its model again, and names nothing that is then fetched or read."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from made_run import write_own_run, write_run

from trainer.errors import CheckpointError, DataError, UsageError
from trainer.model.classifiers import build_model
from trainer.model.freezing import fingerprint
from trainer.model.restoring import restore
from trainer.recipes import Recipe, load_recipe
from trainer.storage import checkpoint


@pytest.fixture
def server():
    """Counts requests, and answers none of them."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.paths.append(self.path)
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.paths = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def of_run(folder: Path, **base: object) -> checkpoint.State:
    state = checkpoint.read(write_run(folder, "squeezenet1_1", 32) / "checkpoints" / "best.pt")
    state.base = state.base | base
    return state


def test_the_restored_model_is_the_trained_one(tmp_path):
    state = of_run(tmp_path / "run")
    before = torch.get_rng_state()
    found = Recipe().restore(state)
    assert torch.equal(torch.get_rng_state(), before)
    tensors = found.model.state_dict()
    assert all(torch.equal(tensors[name], value) for name, value in state.model.items())
    assert fingerprint(found.model) == state.fingerprint
    assert [name for name, value in found.model.named_parameters() if value.requires_grad] == list(state.model)
    assert found.model.training
    assert found.model.classifier.training
    assert not found.model.features.training
    assert found.base == {"source": "random", "seed": 0}


def test_a_url_in_a_checkpoint_is_fetched_only_if_the_user_repeats_it(tmp_path, server, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    url = f"http://127.0.0.1:{server.server_port}/base.pth"
    state = of_run(tmp_path / "run", source="url", url=url, sha256="0" * 64)
    with pytest.raises(UsageError, match=f"not on this machine: to download them, --weights {url}"):
        Recipe().restore(state)
    assert server.paths == []
    with pytest.raises(DataError, match=r"cannot download .*404"):
        Recipe().restore(state, weights=url)
    assert server.paths == ["/base.pth"]


def test_a_file_is_read_only_with_its_hash(tmp_path):
    base = tmp_path / "base.pth"
    torch.save(build_model("squeezenet1_1", 1000, weights="none").model.state_dict(), base)
    right = hashlib.sha256(base.read_bytes()).hexdigest()
    state = of_run(tmp_path / "run", source="file", path=str(base), sha256=right)
    assert Recipe().restore(state).base == {"source": "file", "path": str(base), "sha256": right}
    base.write_bytes(b"\x80\x02cposix\nsystem\n.")  # not parsed: its hash is wrong
    with pytest.raises(DataError, match=r"base\.pth is not the file that was meant: expected a sha256"):
        Recipe().restore(state)
    for path in ("/dev/zero", str(tmp_path / "gone")):
        state.base["path"] = path
        with pytest.raises(DataError, match="say where, with --weights"):
            Recipe().restore(state)


def test_a_module_of_ones_own_needs_its_recipe(tmp_path):
    run, file = write_own_run(tmp_path / "run")
    state = checkpoint.read(run / "checkpoints" / "best.pt")
    with pytest.raises(UsageError, match="base not at hand: give --recipe FILE"):
        Recipe().restore(state)
    found = load_recipe(str(file)).restore(state)
    assert torch.all(found.model.fc.weight == 0.5)
    assert not found.model.bn.training
    state.fingerprint["conv.weight"] = "0"
    with pytest.raises(CheckpointError, match=r"conv\.weight: expected sha256 0"):
        load_recipe(str(file)).restore(state)


@pytest.mark.parametrize("weights", ["https://example.org/x.pth", "/etc/passwd", "weights.pth"])
def test_weights_that_only_the_settings_of_a_module_name_are_repeated(tmp_path, weights):
    run, file = write_own_run(tmp_path / "run", weights=weights)
    state, recipe = checkpoint.read(run / "checkpoints" / "best.pt"), load_recipe(str(file))
    with pytest.raises(UsageError, match=f"names weights at '{weights}'; if you trust that, repeat it"):
        recipe.restore(state)
    assert torch.all(recipe.restore(state, weights=weights).model.fc.weight == 0.5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"freeze_plan": {}}, "does not say how its model is built: KeyError"),
        ({"base": {"source": "random", "match": {"size": 3}}}, "does not say how its model is built: TypeError"),
        ({"base": {"source": "random", "match": 5}}, "does not say how its model is built: AttributeError"),
    ],
)
def test_a_checkpoint_that_describes_no_model(tmp_path, change, says):
    state = of_run(tmp_path / "run")
    vars(state).update(change)
    with pytest.raises(CheckpointError, match=says):
        restore(state, build=lambda config: pytest.fail("built"))
