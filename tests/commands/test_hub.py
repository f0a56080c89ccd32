"""An export is pushed to a Hub of the test, on this machine."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from launching import search_path

import trainer
from trainer.commands import hub
from trainer.errors import UsageError


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as takes one commit of small files."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append((self.path, self.headers["Authorization"]))
        if self.server.refuses:
            return self._answer({"error": "You don't have the rights"}, status=403)
        if self.path == "/api/repos/create":
            self.server.made = json.loads(body)
            return self._answer({"url": f"{self.server.address}/me/digits", "id": "me/digits", "private": True})
        if self.path.endswith("/preupload/main"):
            paths = [file["path"] for file in json.loads(body)["files"]]
            regular = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
            return self._answer({"files": regular})
        if self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self._answer({"commitUrl": f"{self.server.address}/me/digits/commit/1", "commitOid": "1"})
        return self._answer({})  # such as the check of the card

    def _answer(self, value, *, status: int = 200):
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *about):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.asked, server.files, server.made, server.refuses = [], {}, {}, False
        server.address = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def _push(run, server, output, *more: str):
    env = {**os.environ, "PYTHONPATH": search_path(), "HF_ENDPOINT": server.address, "HF_TOKEN": "hf_secret"}
    env |= {"HF_HOME": str(output.parent / "hf"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "trainer", "export", "--run", str(run), "--push", "me/digits", "--formats", "tail"]
    return subprocess.run(
        [*command, "--output", str(output), *more], env=env, capture_output=True, text=True, timeout=200
    )


def test_an_export_is_pushed_and_can_be_loaded_from_what_was_pushed(digits_run, server, tmp_path):
    done = _push(digits_run, server, tmp_path / "export")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"pushed: {server.address}/me/digits"
    assert server.made.get("visibility", "private" if server.made.get("private") else "public") == "private"
    assert {token for _, token in server.asked} == {"Bearer hf_secret"}
    assert set(server.files) == {"README.md", "model.json", "tail.safetensors"}
    card = server.files["README.md"].decode()
    _, front, text = card.split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["pipeline_tag"] == "image-classification"
    assert "resnet18" in front["tags"]
    (result,) = front["model-index"][0]["results"]
    about = json.loads(server.files["model.json"])
    assert {m["type"]: m["value"] for m in result["metrics"]} == about["metrics"]["val"]
    assert result["dataset"]["name"] == "digits"
    assert "Classes, in the order of the logits: 0, 1, 2" in text
    assert 'trainer.load(snapshot_download("me/digits"))' in text
    (tmp_path / "snapshot").mkdir()
    for name, content in server.files.items():
        (tmp_path / "snapshot" / name).write_bytes(content)
    image = trainer.load_data("digits")[1][0]
    assert trainer.load(tmp_path / "snapshot")(image) == trainer.load(digits_run)(image)


def test_a_hub_that_refuses_leaves_the_export(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.refuses = True
    for name in ("README.md", "model.json", "tail.safetensors"):
        (tmp_path / name).write_text("{}")
    about = {"files": {"tail.safetensors": {}}, "checkpoint": "best.pt", "metrics": {}, "builder": None}
    about |= {"config": {"data": {"data": "/home/me/photos"}}}
    with pytest.raises(OSError, match="cannot push to me/digits: ") as caught:
        hub.push(tmp_path, "me/digits", about=about, name="photos")
    assert f"The export stands in {tmp_path}; push it again with --overwrite." in str(caught.value)
    assert "hf_secret" not in str(caught.value)
    assert (tmp_path / "tail.safetensors").exists()
    assert "/home/me" not in hub.front_matter(about, "photos")


@pytest.mark.parametrize("repo", ["digits", "me/my digits", "me/digits/1"])
def test_a_name_that_is_none_is_refused_before_any_work(repo, monkeypatch):
    monkeypatch.setattr(hub, "get_token", lambda: "hf_secret")
    with pytest.raises(UsageError, match="expected USER/NAME"):
        hub.check(repo)


def test_without_a_token_nothing_is_exported(monkeypatch):
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(UsageError, match="hf auth login"):
        hub.check("me/digits")
