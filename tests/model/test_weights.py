"""Weights are found or refused, downloads are whole or absent, and a file fits the model exactly."""

import argparse
import dataclasses
import hashlib
import os
import re
import socket
import subprocess
import sys
import threading
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import hostile
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torchvision import models

from trainer.config import WeightsConfig
from trainer.errors import DataError, UsageError
from trainer.model import download
from trainer.model.classifiers import model_names
from trainer.model.weights import (
    Report,
    Source,
    base_weights,
    fetch_weights,
    find_enum,
    load_backbone_state,
)
from trainer.model.weights_filter import from_stored, to_stored

WAYS_ON = ("--weights FILE", "--weights URL", "--weights none")


class FileServer(ThreadingHTTPServer):
    """Serves `files` (name to bytes) on a free port, and writes down what was asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FileHandler)
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.closing = threading.Event()
        self.cut = 0  # bytes at the end of every file that are promised, and not sent
        self.drips = ""  # "header" or "body": comes in little drops, without an end
        self.silent = False  # take the request and never answer

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"


class FileHandler(BaseHTTPRequestHandler):
    server: FileServer

    def do_GET(self) -> None:
        name = self.path.lstrip("/").partition("?")[0]
        self.server.asked.append(name)
        if self.server.silent:
            self.server.closing.wait(30)
        elif name not in self.server.files:
            self.send_error(404)
        else:
            body = self.server.files[name]
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.flush_headers()
            if self.server.drips:
                drop = b"X: y\r\n" if self.server.drips == "header" else b"x"
                self.wfile.write(b"" if self.server.drips == "header" else b"\r\n")
                with suppress(OSError):
                    while not self.server.closing.wait(0.1):
                        self.wfile.write(drop)
                return
            self.end_headers()
            self.wfile.write(body[: len(body) - self.server.cut])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.closing.set()
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch.hub's folder for downloads: a new one for each test, not there yet."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "torch_home" / "hub" / "checkpoints"


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    parts = {"conv": nn.Conv2d(3, 4, 3, bias=False), "bn": nn.BatchNorm2d(4), "fc": nn.Linear(4, 5)}
    return nn.Sequential(torch.nn.modules.container.OrderedDict(parts))


def other_values(net: nn.Module) -> dict[str, Tensor]:
    """A state dict for `net` in which nothing equals what `net` holds."""
    return {name: value + 1 + torch.rand(value.shape).to(value.dtype) for name, value in net.state_dict().items()}


def write(path: Path, content: object) -> Path:
    save = safetensors.torch.save_file if path.suffix == ".safetensors" else torch.save
    save(content, path)
    return path


def load(net: nn.Module, path: Path, **options: object) -> Report:
    return load_backbone_state(net, Source(path, {}), **options)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    """Bytes of a small state dict."""
    return write(tmp_path / "small.pth", {"fc.weight": torch.arange(3000.0)}).read_bytes()


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


# ---------------------------------------------------------------------------------------------- which weights are meant


@pytest.mark.parametrize(
    ("weights", "name"),
    [
        ("default", "IMAGENET1K_V2"),
        ("IMAGENET1K_V1", "IMAGENET1K_V1"),
        ("imagenet1k_v1", "IMAGENET1K_V1"),
        ("ResNet50_Weights.IMAGENET1K_V1", "IMAGENET1K_V1"),
        ("ResNet50_Weights.DEFAULT", "IMAGENET1K_V2"),
    ],
)
def test_names_of_torchvision_weights(weights, name):
    assert find_enum("resnet50", weights) is models.ResNet50_Weights[name]


@pytest.mark.parametrize(
    ("model", "weights", "listed"),
    [
        ("resnet50", "IMAGENET1K_V9", "default, none, IMAGENET1K_V1, IMAGENET1K_V2"),
        ("resnet50", "ResNet18_Weights.IMAGENET1K_V1", "IMAGENET1K_V2"),  # another model's
        ("resnet18", "not-here.pth", "neither a file"),
        ("resnet18", ".", "is a folder; expected a file, such as checkpoints/best.pt in a run"),
        ("resnet18", "s3://bucket/resnet18.pth", "http, https or file URL"),
        ("vgg16", "IMAGENET1K_FEATURES", "default, none, IMAGENET1K_V1"),  # no classifier in it
    ],
)
def test_unknown_weights_are_a_usage_error(model, weights, listed):
    with pytest.raises(UsageError, match=re.escape(listed)) as error:
        fetch_weights(model, weights)
    assert repr(weights) in str(error.value)


def test_none_means_random_features():
    assert fetch_weights("resnet18", "none") == Source(None, {"source": "random"})


def test_every_torchvision_url_carries_a_hash_to_verify():
    for model in model_names():
        for enum in models.get_model_weights(model):
            assert download._HASH.search(enum.url), enum


def test_a_file_is_found_again_from_another_folder(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    source = fetch_weights("resnet18", "small.pth")
    path = tmp_path / "small.pth"
    assert source == Source(path, {"source": "file", "path": str(path), "sha256": sha256(content)})


# ---------------------------------------------------------------------------------------------------------- downloading


def test_torchvisions_own_weights_are_downloaded_once(server, cache, monkeypatch, content):
    enum, name = models.SqueezeNet1_1_Weights.IMAGENET1K_V1, f"squeezenet1_1-{sha256(content)[:8]}.pth"
    monkeypatch.setattr(enum.value, "url", server.url(name))
    server.files[name] = content
    source = fetch_weights("squeezenet1_1", "default")
    assert source.path == cache / name  # where torch.hub looks too
    assert source.path.read_bytes() == content
    assert source.base == {
        "source": "torchvision",
        "weights": "SqueezeNet1_1_Weights.IMAGENET1K_V1",
        "url": server.url(name),
        "sha256": sha256(content),
    }
    assert fetch_weights("squeezenet1_1", source.base["weights"]) == source
    assert server.asked == [name]


def test_a_url_without_a_hash_is_taken_and_its_hash_recorded(server, cache, content):
    server.files["model.pth"] = content
    source = fetch_weights("resnet18", server.url("model.pth"))
    assert source.base == {"source": "url", "url": server.url("model.pth"), "sha256": sha256(content)}
    assert fetch_weights("resnet18", server.url("model.pth")) == source
    assert server.asked == ["model.pth"]
    assert files_below(cache) == [source.path]


def test_equal_names_of_two_urls_are_two_files(server, tmp_path, content):
    server.files["a/model.pth"] = content
    server.files["b/model.pth"] = write(tmp_path / "b.pth", {"fc.weight": torch.zeros(7)}).read_bytes()
    a, b = (fetch_weights("resnet18", server.url(f"{folder}/model.pth")) for folder in "ab")
    assert a.path.read_bytes() == server.files["a/model.pth"]
    assert b.path.read_bytes() == server.files["b/model.pth"]


@pytest.mark.parametrize("name", ["small.pth", "small.safetensors"])
def test_file_urls_and_url_queries(tmp_path, name):
    path = write(tmp_path / name, {"fc.weight": torch.zeros(3)})
    source = fetch_weights("resnet18", path.as_uri())
    assert source.base["source"] == "url"
    assert source.path.suffix == path.suffix  # says how to read it
    assert source.path.read_bytes() == path.read_bytes()


def test_the_suffix_of_a_url_ends_at_its_query(server, tmp_path):
    server.files["m.safetensors"] = write(tmp_path / "m.safetensors", {"fc.weight": torch.zeros(3)}).read_bytes()
    assert fetch_weights("resnet18", server.url("m.safetensors?download=true")).path.suffix == ".safetensors"


@pytest.mark.parametrize("cut", [0, 1000], ids=["other content", "cut off"])
def test_a_download_that_does_not_match_its_hash_leaves_nothing(server, cache, content, cut):
    name = f"model-{'0123abcd' if not cut else sha256(content)[:8]}.pth"
    server.files[name], server.cut = content, cut
    with pytest.raises(DataError, match=r"invalid hash|the connection broke after") as error:
        fetch_weights("resnet18", server.url(name))
    assert all(way in str(error.value) for way in WAYS_ON)
    assert files_below(cache) == []


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_a_download_without_hash_that_was_cut_off_leaves_nothing(server, cache, tmp_path, name):
    server.files[name] = write(tmp_path / name, {"fc.weight": torch.arange(3000.0)}).read_bytes()
    server.cut = 1000
    with pytest.raises(DataError, match="cannot download") as error:
        fetch_weights("resnet18", server.url(name))
    assert all(way in str(error.value) for way in WAYS_ON)
    assert files_below(cache) == []
    server.cut = 0
    assert fetch_weights("resnet18", server.url(name)).path.read_bytes() == server.files[name]


def test_a_page_that_is_not_there(server, cache):
    with pytest.raises(DataError, match="HTTP Error 404") as error:
        fetch_weights("resnet18", server.url("missing.pth"))
    assert all(way in str(error.value) for way in WAYS_ON)
    assert files_below(cache) == []


def test_nobody_listening():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(DataError, match="Connection refused") as error:
        fetch_weights("resnet18", f"http://127.0.0.1:{port}/model-0123abcd.pth")
    assert all(way in str(error.value) for way in WAYS_ON)


def test_a_silent_server_is_given_up(server, monkeypatch):
    server.silent = True
    monkeypatch.setattr(download, "_TIMEOUT", 0.1)
    with pytest.raises(DataError, match="timed out"):
        fetch_weights("resnet18", server.url("model-0123abcd.pth"))
    assert socket.getdefaulttimeout() is None  # the process's own default is back


@pytest.mark.parametrize("url", ["http:///model.pth", "http://127.0.0.1:port/model.pth"])
def test_a_malformed_url(url):
    with pytest.raises(DataError, match="cannot download"):
        fetch_weights("resnet18", url)


def test_a_cache_folder_that_cannot_be_made(server, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    with pytest.raises(DataError, match="Not a directory"):
        fetch_weights("resnet18", server.url("model-0123abcd.pth"))


def test_a_cached_file_that_was_altered_is_refused(server, content):
    name = f"model-{sha256(content)[:8]}.pth"
    server.files[name] = content
    path = fetch_weights("resnet18", server.url(name)).path
    altered = bytearray(content)
    altered[len(altered) // 2] ^= 1  # one bit: torch.load would not notice
    path.write_bytes(altered)
    with pytest.raises(DataError, match="delete it") as error:
        fetch_weights("resnet18", server.url(name))
    assert all(text in str(error.value) for text in (str(path), sha256(content)[:8], sha256(altered)))


@pytest.mark.parametrize("where", ["header", "body"])
def test_a_server_that_drips_is_given_up(server, cache, monkeypatch, where):
    server.drips = where
    server.files["model-0123abcd.pth"] = bytes(10**6)
    monkeypatch.setattr(download, "_TIMEOUT", 0.5)
    monkeypatch.setattr(download, "_WINDOW", 0.5)
    with pytest.raises(DataError, match=r"timed out|only \d+ bytes came in 0.5 s"):
        fetch_weights("resnet18", server.url("model-0123abcd.pth"))
    assert files_below(cache) == []


def test_what_a_killed_download_left_is_removed_by_the_next(server, cache, content):
    left = cache / ".download-of-a-dead-process"
    left.mkdir(parents=True)
    (left / "model.pth").write_bytes(content)
    (cache / "other-program.part").write_bytes(b"")
    os.utime(left, (0, 0))
    server.files["model.pth"] = content
    fetch_weights("resnet18", server.url("model.pth"))
    assert not left.exists()
    assert (cache / "other-program.part").exists()


def test_a_known_hash_is_checked_before_anything_reads_the_file(server, cache, tmp_path, content, monkeypatch):
    monkeypatch.setattr(download, "read_state", None)
    server.files["model.pth"] = content
    with pytest.raises(DataError, match="invalid hash"):
        fetch_weights("resnet18", server.url("model.pth"), sha256="0" * 64)
    assert files_below(cache) == []
    assert fetch_weights("resnet18", server.url("model.pth"), sha256=sha256(content)).path.read_bytes() == content
    (tmp_path / "small.pth").write_bytes(content)
    with pytest.raises(DataError, match="is not the file that was meant: expected a sha256 of 0000"):
        fetch_weights("resnet18", str(tmp_path / "small.pth"), sha256="0" * 64)


# ----------------------------------------------------------------------------------------- what a checkpoint may name

SHA = "0" * 64


@pytest.mark.parametrize(
    ("base", "says"),
    [
        ({}, "does not record the sha256"),
        ({"source": "url", "url": "https://example.org/a.pth"}, "does not record the sha256"),
        ({"source": "url", "url": "https://example.org/a.pth", "sha256": ""}, "does not record the sha256"),
        ({"source": "url", "url": "https://example.org/a.pth", "sha256": SHA}, "download them, --weights https://exa"),
        ({"source": "url", "url": "file:///etc/passwd", "sha256": SHA}, "names weights at 'file:///etc/passwd'"),
        ({"source": "url", "url": "ftp://example.org/a.pth", "sha256": SHA}, "if you trust that, repeat it"),
        ({"source": "file", "path": "/nowhere/a.pth", "sha256": SHA}, "are not at /nowhere/a.pth any more"),
        ({"source": "file", "path": "/dev/zero", "sha256": SHA}, "are not at /dev/zero any more"),
        ({"source": "file", "path": "/proc/self/environ", "sha256": SHA}, "which is empty"),
        ({"source": "torchvision", "weights": "https://example.org/a.pth", "sha256": SHA}, "does not say where"),
        ({"source": "torchvision", "weights": ["x"], "sha256": SHA}, "does not say where"),
        ({"source": 3, "sha256": SHA}, "does not say where"),
    ],
)
def test_a_checkpoint_has_nothing_fetched_that_the_user_did_not_name(base, says):
    with pytest.raises((DataError, UsageError), match=re.escape(says)):
        base_weights("resnet18", base)


def test_what_a_checkpoint_may_name(server, tmp_path, content):
    enum = models.ResNet18_Weights.IMAGENET1K_V1
    base = {"source": "torchvision", "weights": str(enum), "url": "https://example.org/x.pth", "sha256": SHA}
    assert base_weights("resnet18", base) == (str(enum), SHA)
    assert base_weights("resnet18", {"source": "random", "seed": 1}) == ("none", None)
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    base = {"source": "file", "path": str(path), "sha256": SHA}
    assert base_weights("resnet18", base) == (str(path), SHA)
    server.files["a.pth"] = content
    base = fetch_weights("resnet18", server.url("a.pth")).base
    assert base_weights("resnet18", base) == (server.url("a.pth"), sha256(content))


# -------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("override", ["0", "1"], ids=["", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
def test_code_in_a_file_is_not_run(net, tmp_path, monkeypatch, override):
    class Code:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", override)
    path = write(tmp_path / "code.pth", {"conv.weight": Code()})
    with pytest.raises(DataError, match=r"posix\.system") as error:
        load(net, path)
    assert not (tmp_path / "ran").exists()
    assert "weights_only" not in str(error.value)  # torch's advice to switch the protection off


def half_of(path: Path) -> bytes:
    content = path.read_bytes()
    return content[: len(content) // 2]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "damage", [lambda _: b"", lambda _: b"<!DOCTYPE html>" * 99, half_of], ids=["0", "html", "half"]
)
def test_damaged_files_are_named(net, tmp_path, suffix, damage):
    path = write(tmp_path / f"damaged{suffix}", net.state_dict())
    path.write_bytes(damage(path))
    with pytest.raises(DataError, match=f"cannot read {re.escape(str(path))} as weights: ") as error:
        load(net, path)
    assert "\n" not in str(error.value)  # errors are printed as one line
    assert "weights_only" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ([1, 2], "list"),
        ({"epoch": 3, "net": {}}, r"'epoch' \(int\), 'net' \(dict\)"),
        (torch.zeros(3), "Tensor"),
        ({"state_dict": {}}, "no entries"),
    ],
)
def test_files_that_hold_something_else(net, tmp_path, content, found):
    with pytest.raises(DataError, match=f"not a state dict.*{found}"):
        load(net, write(tmp_path / "other.pth", content))


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({1: torch.zeros(1)}, "1 (Tensor)"),
        ({"state_dict": {"conv.weight": [1.0]}}, "'conv.weight' (list)"),
        ({"conv.weight": torch.zeros(1), "epoch": 3}, "'epoch' (int)"),
        ({"model": {"ema": {"model": 3}}}, "'model' (int)"),
    ],
)
def test_files_with_odd_keys_and_values(net, tmp_path, content, found):
    says = r"is not a state dict, nor holds one as state_dict, model, .*: found " + re.escape(found)
    with pytest.raises(DataError, match=f"{says}$"):
        load(net, write(tmp_path / "odd.pth", content))


def test_a_dict_that_holds_itself(net, tmp_path):
    content = {}
    content["model"] = content
    with pytest.raises(DataError, match=r"is not a state dict, nor holds one as .*: found 'model' \(dict\)"):
        load(net, write(tmp_path / "endless.pth", content))


def test_files_that_are_not_what_they_are_called(net, tmp_path):
    saved, kept = tmp_path / "saved.pt", tmp_path / "kept.safetensors"
    torch.save(net.state_dict(), saved)
    safetensors.torch.save_file(net.state_dict(), kept)
    for name, content, says in (
        ("a.safetensors", saved.read_bytes(), "by its content it is a .pt file: rename it"),
        ("b.pt", kept.read_bytes(), "by its content it is a .safetensors file: rename it"),
        ("c.pth", b"<html>404</html>", "it begins with b'<html>404'"),
        ("d.safetensors", b"hello", "it begins with b'hello'"),
        ("e.pt", b"", "it is empty"),
        ("f.safetensors", b"", "it is empty"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"cannot read .*{name} as weights: {says}"):
            load(net, tmp_path / name)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize("odd", [torch.eye(3).to_sparse(), torch.zeros(3, device="meta")])
def test_tensors_without_plain_values(net, tmp_path, odd):
    with pytest.raises(DataError, match=r"conv.weight is a sparse, nested or meta tensor; expected plain ones"):
        load(net, write(tmp_path / "odd.pth", {"conv.weight": odd}))


@pytest.mark.parametrize(
    ("change", "report"),
    [
        (lambda s: s.update({"conv.weight": s["conv.weight"].to(torch.int8)}), "torch.int8, not torch.float32"),
        (lambda s: s.update({"bn.bias": torch.zeros(4, dtype=torch.complex64)}), "torch.complex64, not torch.float32"),
    ],
)
@pytest.mark.parametrize("by", ["exact", "shape"])
def test_numbers_of_another_kind_are_not_converted(net, tmp_path, change, report, by):
    state = other_values(net)
    change(state)
    with pytest.raises(DataError, match=f"1 of another type .*{report}"):
        load(net, write(tmp_path / "kind.pth", state), match=WeightsConfig(weights_match=by, weights_coverage=0))


def test_a_compressed_archive_is_refused_before_it_is_unpacked(net, tmp_path):
    path = write(tmp_path / "plain.pth", {"conv.weight": torch.zeros(1 << 20)})
    bomb = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path) as plain, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed:
        for member in plain.namelist():
            packed.writestr(member, plain.read(member))
    assert bomb.stat().st_size < 20_000
    with pytest.raises(DataError, match="compressed or encrypted members"):
        load(net, bomb)


def test_a_tensor_larger_than_its_file_is_not_made(net, tmp_path):
    state = other_values(net)
    state["conv.weight"] = torch.zeros(()).expand(1 << 40)  # one number in the file, 4 TiB in memory
    with pytest.raises(DataError, match=r"1 of another shape \(conv.weight \[1099511627776\], not \[4, 3, 3, 3\]\)"):
        load(net, write(tmp_path / "wide.pth", state))


def test_a_torchscript_file_is_called_by_its_name(net, tmp_path):
    path = tmp_path / "script.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(net.conv, torch.zeros(1, 3, 8, 8)), path)
    with pytest.raises(
        DataError, match=r"it is a TorchScript program .*torch\.save\(torch\.jit\.load\(FILE\)\.state_dict"
    ):
        load(net, path)


@pytest.mark.parametrize("legacy", [False, True])
def test_harmless_values_beside_the_tensors(net, tmp_path, legacy):
    state, path = other_values(net), tmp_path / "x.pth"
    beside = {"acc": np.float64(0.5), "n": np.int64(3), "mean": np.zeros(3), "from": Path("a/b"), "raw": b"x"}
    beside |= {"at": datetime.now(), "args": argparse.Namespace(out=Path("c")), "z": 1j, "kinds": {1, 2}}
    torch.save({"model": state, **beside}, path, _use_new_zipfile_serialization=not legacy)
    load(net, path)
    assert loaded_of(net, state) == state.keys()


def test_other_values_beside_the_tensors_are_refused_with_what_to_do(net, tmp_path):
    path = write(tmp_path / "x.pth", {"model": other_values(net), "server": Source(None, {})})
    with pytest.raises(
        DataError, match=r"it holds trainer\.model\.weights\.Source, .* save the tensors alone: torch\.save\("
    ):
        load(net, path)


GREEDY = {
    "bytearray": hostile._call("__builtin__", "bytearray", 6 * 10**9),
    "bytearray of today": hostile._call("builtins", "bytearray", 6 * 10**9),
    "storage": hostile._call("torch.storage", "UntypedStorage", 6 * 10**9),
    "typed storage": hostile._call("torch.storage", "TypedStorage", 6 * 10**9),
    "tensor": hostile._call("torch", "FloatTensor", 6 * 10**9),
    "plain tensor": hostile._call("torch", "Tensor", 6 * 10**9),
    "numbers of NumPy": hostile._call("numpy", "zeros", 6 * 10**9),
    "memo": b"\x80\x02Nr\xff\xff\xff\x7f.",
}


@pytest.mark.parametrize("name", [*GREEDY, "extent", "count", "legacy count"])
def test_a_small_file_takes_little_memory(tmp_path, name):
    path = tmp_path / "x.pth"
    if name == "legacy count":
        torch.save({"x": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
        content = path.read_bytes()
        assert content.count(b"K\x03N") == 1  # elements of the storage
        path.write_bytes(content.replace(b"K\x03N", b"J\xff\xff\xff\x7fN"))
    elif name in GREEDY:
        path.write_bytes(hostile.with_pickle(GREEDY[name]))
    else:
        path.write_bytes(hostile._tensor(10**10 if name == "count" else 1, 0, 10**10, 1))
    script = "import resource, sys; from pathlib import Path; from trainer.model.weights_file import read_state\n"
    script += "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
    script += "try: read_state(Path(sys.argv[1]))\nexcept Exception as error: print(type(error).__name__)\n"
    script += "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True)
    kind, grown = done.stdout.split()
    assert kind == "DataError", done.stderr
    assert int(grown) < 100, f"{grown} MB"


@pytest.mark.parametrize("name", ["plain.pt", "plain.safetensors", "zipped.pth", "legacy.pth"])
def test_formats(net, tmp_path, name):
    state = other_values(net)
    path = tmp_path / name
    if name == "legacy.pth":  # before PyTorch 1.6, as torchvision's older files
        torch.save(state, path, _use_new_zipfile_serialization=False)
    else:
        write(path, state)
    load(net, path)
    for key, value in net.state_dict().items():
        assert torch.equal(value, state[key]), key


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model_state": state, "ema": {}, "epoch": 3},
        lambda state: {"ema": {"n_averaged": torch.tensor(3)} | {f"module.{k}": v for k, v in state.items()}},
        lambda state: {"model": {"state_dict": {f"_orig_mod.{k}": v for k, v in state.items()}}},
        lambda state: {"model": state, "optimizer": {}, "args": argparse.Namespace(lr=0.1)},  # torchvision's references
        lambda state: {f"module.{k}": v for k, v in state.items()},
        lambda state: {f"_orig_mod.module.{k}": v for k, v in state.items()},
        lambda state: {k.replace("conv.", "conv._orig_mod."): v for k, v in state.items()},
    ],
    ids=[
        "state_dict",
        "model_state",
        "average",
        "nested",
        "reference script",
        "DataParallel",
        "compiled DDP",
        "compiled part",
    ],
)
def test_wrappings_are_taken_off(net, tmp_path, wrap):
    state = other_values(net)
    load(net, write(tmp_path / "wrapped.pth", wrap(state)))
    for key, value in net.state_dict().items():
        assert torch.equal(value, state[key]), key


# ----------------------------------------------------------------------------------------------- matching to the model


@pytest.mark.parametrize(
    ("change", "report"),
    [
        (lambda s: s.pop("conv.weight"), "1 missing (conv.weight)"),
        (lambda s: s.pop("bn.running_var"), "1 missing (bn.running_var)"),  # a buffer
        (lambda s: s.update({"conv.bias": torch.zeros(4)}), "1 unexpected (conv.bias)"),
        (lambda s: s.update({"bn.bias": torch.zeros(1)}), "1 of another shape (bn.bias [1], not [4])"),
        (lambda s: s["bn.weight"].fill_(float("nan")), "1 not finite (bn.weight)"),
        (
            lambda s: s.update({f"x{i}": torch.zeros(1) for i in range(9)}),
            "9 unexpected (x0, x1, x2, x3, x4, x5, x6, x7,",
        ),
        (lambda s: s.update({"bn.b": s.pop("bn.bias")}), "1 missing (bn.bias); 1 unexpected (bn.b)"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_and_changes_nothing(net, tmp_path, change, report):
    state = other_values(net)
    change(state)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    path = write(tmp_path / "misfit.pth", state)
    with pytest.raises(DataError, match=re.escape(report)) as error:
        load(net, path)
    assert str(path) in str(error.value)
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("in_file", ["nothing", "another shape", "the same shape"])
def test_the_head_is_left_alone(net, tmp_path, in_file):
    state = other_values(net)
    before = net.fc.weight.clone()
    if in_file == "nothing":
        state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    elif in_file == "another shape":
        state["fc.weight"] = torch.zeros(1000, 4)
    load(net, write(tmp_path / "x.pth", state), heads=("fc",))
    assert torch.equal(net.fc.weight, before)
    assert torch.equal(net.conv.weight, state["conv.weight"])


def test_leaving_fc_alone_does_not_leave_fc2_alone(tmp_path):
    net = nn.ModuleDict({"fc": nn.Linear(2, 2), "fc2": nn.Linear(2, 2)})
    state = other_values(net)
    load(net, write(tmp_path / "x.pth", state), heads=("fc",))
    assert torch.equal(net["fc2"].weight, state["fc2.weight"])


def test_old_files_lack_num_batches_tracked(net, tmp_path):
    state = other_values(net)
    del state["bn.num_batches_tracked"]
    load(net, write(tmp_path / "old.pth", state))
    assert torch.equal(net.bn.running_mean, state["bn.running_mean"])
    assert net.bn.num_batches_tracked == 0


def test_half_precision_in_a_file_becomes_the_models_dtype(net, tmp_path):
    state = {key: value.half() if value.is_floating_point() else value for key, value in other_values(net).items()}
    load(net, write(tmp_path / "half.pth", state))
    assert {value.dtype for value in net.parameters()} == {torch.float32}
    assert net.bn.num_batches_tracked.dtype == torch.int64
    assert torch.equal(net.conv.weight, state["conv.weight"].float())


def test_tensors_that_share_memory_in_a_file_do_not_in_the_model(net, tmp_path):
    state = other_values(net)
    state["bn.bias"] = state["bn.weight"]
    load(net, write(tmp_path / "tied.pth", state))
    assert torch.equal(net.bn.bias, net.bn.weight)
    assert net.bn.bias.data_ptr() != net.bn.weight.data_ptr()


def test_parameters_train_and_buffers_do_not_whatever_the_file_says(net, tmp_path):
    state = {key: nn.Parameter(value, value.is_floating_point()) for key, value in other_values(net).items()}
    load(net, write(tmp_path / "parameters.pth", state))
    assert torch.equal(net.bn.running_mean, state["bn.running_mean"])
    assert all(value.requires_grad and value.is_leaf for value in net.parameters())
    assert not any(value.requires_grad for value in net.buffers())


def test_names_of_old_densenet_files(tmp_path):
    net = models.DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, num_classes=3)
    state = other_values(net)
    old = {re.sub(r"(denselayer\d\.(?:norm|conv))(\d)", r"\1.\2", key): value for key, value in state.items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    load(net, write(tmp_path / "densenet.pth", old))
    for key, value in net.state_dict().items():
        assert torch.equal(value, state[key]), key


def small_vit(image_size: int) -> nn.Module:
    return models.VisionTransformer(image_size, patch_size=16, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16)


def test_names_of_old_vit_files(tmp_path):
    net, same = small_vit(32), small_vit(32)
    old = {
        key.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): value
        for key, value in other_values(net).items()
    }
    assert len({key for key in old if ".linear_" in key}) == 8
    load(net, write(tmp_path / "vit.pth", old))
    same.load_state_dict(old)  # torchvision's own translation
    for key, value in net.state_dict().items():
        assert torch.equal(value, same.state_dict()[key]), key


def test_a_vit_of_another_image_size_is_recognised(tmp_path):
    path = write(tmp_path / "vit.pth", small_vit(64).state_dict())
    with pytest.raises(DataError, match=r"another image size\?.*pos_embedding \[1, 17, 8\], not \[1, 5, 8\]"):
        load(small_vit(32), path)


def test_mnasnet_loads_without_the_version_it_insists_on(tmp_path):
    net = models.mnasnet0_5()
    state = other_values(net)
    with pytest.raises(ValueError, match="version"):
        models.mnasnet0_5().load_state_dict(state)
    load(net, write(tmp_path / "mnasnet.safetensors", state))
    assert torch.equal(net.layers[0].weight, state["layers.0.weight"])


# ------------------------------------------------------------------------------------------------------------- choosing


def loaded_of(net: nn.Module, state: dict[str, Tensor]) -> set[str]:
    """The names under which `net` holds the values of `state`."""
    return {k for k, v in net.state_dict().items() if k in state and torch.equal(v, state[k])}


@pytest.mark.parametrize(
    ("match", "loaded"),
    [
        (WeightsConfig(weights_only=("conv",)), ["conv.weight"]),
        (WeightsConfig(weights_only=("re:bn.(weight|bias)", "fc")), ["bn.weight", "bn.bias", "fc.weight", "fc.bias"]),
        (
            WeightsConfig(weights_only=("[:2]",), weights_except=("*.running_*", "*.num_*")),
            ["conv.weight", "bn.weight", "bn.bias"],
        ),
        (WeightsConfig(weights_except=("head", "bn")), ["conv.weight"]),
        (WeightsConfig(weights_first=2), ["conv.weight", "bn.weight"]),
        (WeightsConfig(weights_first=3, weights_except=("conv",)), ["bn.weight", "bn.bias"]),
    ],
)
def test_part_of_a_file(net, tmp_path, match, loaded):
    state = other_values(net)
    path = write(tmp_path / "x.pth", state)
    report = load(net, path, own_head="fc", match=dataclasses.replace(match, weights_coverage=0))
    assert loaded_of(net, state) == set(loaded)
    assert report.loaded == loaded
    assert sorted(report.loaded + report.left_out) == sorted(state)
    assert report.unexpected == report.shape_differs == report.set_aside == []
    if report.coverage == 1:
        return
    with pytest.raises(DataError, match=r"expected at least 99% \(--weights-coverage\): \d missing"):
        load(net, path, own_head="fc", match=dataclasses.replace(match, weights_coverage=0.99))


def test_what_is_chosen_must_still_fit(net, tmp_path):
    """Choosing excuses what it leaves out, and nothing else."""
    state = other_values(net)
    del state["bn.bias"]
    with pytest.raises(DataError, match=r"does not fit Sequential: 1 missing \(bn.bias\)\. To take what fits"):
        load(net, write(tmp_path / "x.pth", state), match=WeightsConfig(weights_except=("fc",), weights_coverage=0))


@pytest.mark.parametrize(
    ("rename", "to_file"),
    [
        (("encoder.body", ""), lambda k: f"encoder.body.{k}"),
        (("encoder.body.", ""), lambda k: f"encoder.body.{k}"),
        (("", "net"), lambda k: k.removeprefix("net.")),
        (
            ("stem", "net.conv", "top.fc", "net.fc", "", "net"),
            lambda k: {"conv": "stem", "fc": "top.fc", "bn": "bn"}[k[4:].split(".")[0]] + k[k.rindex(".") :],
        ),
        (("re:^n(\\w+)\\.gamma$", r"n\1.weight", "", "net"), None),
    ],
)
def test_renaming(net, tmp_path, rename, to_file):
    net = nn.ModuleDict({"net": net}) if "net" in rename else net
    state = other_values(net)
    if to_file is None:
        rename, to_file = (
            ("re:^bn\\.gamma$", "net.bn.weight", "", "net"),
            lambda k: k[4:].replace("bn.weight", "bn.gamma"),
        )
    file = {to_file(k): v for k, v in state.items()}
    assert file.keys() != state.keys()
    load(net, write(tmp_path / "x.pth", file), match=WeightsConfig(weights_rename=rename))
    assert loaded_of(net, state) == state.keys()


@pytest.mark.parametrize(
    ("match", "says"),
    [
        (WeightsConfig(weights_rename=("conv", "bn")), "two tensors of .*x.pth would be called bn.weight here"),
        (
            WeightsConfig(weights_rename=("con", "bn")),
            r"--weights-rename 'con' fits no name in .*x.pth; there are conv, bn, fc",
        ),
        (
            WeightsConfig(weights_rename=("re:(", "")),
            r"--weights-rename 're:\(' '': '\(' is not a regular expression: missing \)",
        ),
        (WeightsConfig(weights_rename=("re:conv", r"\2")), "--weights-rename 're:conv'"),
        (
            WeightsConfig(weights_only=("layer1",)),
            "--weights-only 'layer1' fits no name in .*x.pth; there are conv, bn, fc",
        ),
        (WeightsConfig(weights_except=("conv", "layer1")), "--weights-except 'layer1' fits no name"),
        (
            WeightsConfig(weights_only=("fc",), weights_coverage=0),
            r"only 0% of the parameters .* \(--weights-coverage\)",
        ),  # the head alone
    ],
)
def test_a_choice_that_fits_nothing_changes_nothing(net, tmp_path, match, says):
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises((DataError, UsageError), match=says):
        load(net, write(tmp_path / "x.pth", other_values(net)), heads=("fc",), match=match)
    assert loaded_of(net, before) == before.keys()


@pytest.mark.parametrize(
    ("match", "says"),
    [
        (WeightsConfig(weights_rename=("a",)), "--weights-rename has 1 name; expected pairs"),
        (WeightsConfig(weights_match="size"), "--weights-match is 'size'; expected exact or shape"),
    ],
)
def test_choices_that_cannot_be(net, tmp_path, match, says):
    with pytest.raises(UsageError, match=says):
        load(net, write(tmp_path / "x.pth", other_values(net)), match=match)


def test_choices_are_stored_and_found_again():
    match = WeightsConfig("x", "shape", ("a", "b"), 3, weights_only=("a",), weights_except=("b",), weights_coverage=0.5)
    assert from_stored(to_stored(match), weights="x") == match
    assert to_stored(WeightsConfig("x")) == {}
    old = {"by": "shape", "rename": ["a", "b"], "first": 3, "only": ["a"], "but": ["b"], "coverage": 0.5}
    assert from_stored(old, weights="x") == match  # as in checkpoints of earlier versions
    with pytest.raises(TypeError):
        from_stored({"epochs": 3}, weights="x")


def test_safetensors_have_no_first_entries(net, tmp_path):
    with pytest.raises(UsageError, match="in no order; use --weights-only"):
        load(net, write(tmp_path / "x.safetensors", other_values(net)), match=WeightsConfig(weights_first=2))


def test_equal_names_under_two_wrappers_are_refused(net, tmp_path):
    state = other_values(net)
    state["module.bn.bias"] = state["bn.bias"] + 1
    with pytest.raises(DataError, match=r"two tensors of .* would be called bn.bias"):
        load(net, write(tmp_path / "x.pth", state))


def test_by_shape_what_fits_is_taken_and_the_rest_reported(net, tmp_path):
    state = other_values(net)
    state["bn.bias"], state["extra"] = torch.zeros(5), torch.zeros(3)
    del state["bn.running_var"], state["bn.num_batches_tracked"]
    state["fc.weight"] = torch.zeros(1000, 4)
    path = write(tmp_path / "x.pth", state)
    report = load(net, path, own_head="fc", match=WeightsConfig(weights_match="shape"))
    assert loaded_of(net, state) == {"conv.weight", "bn.weight", "bn.running_mean"}
    assert report.to_dict() == {
        "coverage": 112 / 116,  # 4·3·3·3 + 4 of 4 more
        "file": str(path),
        "loaded": ["conv.weight", "bn.weight", "bn.running_mean"],
        "missing": ["bn.running_var"],
        "unexpected": ["extra"],
        "shape_differs": ["bn.bias [5], not [4]"],
        "left_out": [],
        "set_aside": ["fc.weight", "fc.bias"],
        "parameters": [112, 116],
    }
    assert str(report) == (
        "96.5% of the parameters outside the head; tensors: 3 loaded, 1 missing, 1 unexpected, 1 shape differs, "
        "2 set aside"
    )
    with pytest.raises(
        DataError, match=r"only 96.5% of .*; expected at least 97% .*1 missing \(bn.running_var\); 1 unex"
    ):
        load(net, path, own_head="fc", match=WeightsConfig(weights_match="shape", weights_coverage=0.97))


def test_tied_parameters_stay_tied(tmp_path):
    net = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    net["b"].weight = net["a"].weight
    state = other_values(net)
    state["b.weight"] = state["a.weight"]
    load(net, write(tmp_path / "x.pth", state))
    assert net["a"].weight is net["b"].weight
    assert torch.equal(net["a"].weight, state["a.weight"])
