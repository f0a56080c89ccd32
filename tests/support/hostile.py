"""Checkpoints that somebody made to do harm, each with a valid trailer; used by test_archive.py.

    python tests/support/hostile.py FOLDER      # reads each, prints what it says, and how far memory has grown, in MB

Nothing of this is dangerous to make: the harm would be in loading it without care.
"""

import io
import json
import os
import pickle
import resource
import struct
import sys
import zipfile
from pathlib import Path

import torch

from trainer.storage import checkpoint
from trainer.storage.state import State


class _Runs:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def rezipped(members: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as target:
        for name, content in members:
            target.writestr(name, content)
    return buffer.getvalue()


def with_pickle(program: bytes, **data: bytes) -> bytes:
    members = [("a/data.pkl", program), ("a/version", b"3\n"), ("a/byteorder", b"little")]
    return rezipped(members + [(f"a/data/{key}", content) for key, content in data.items()])


def _long(value: int) -> bytes:
    return b"\x8a" + bytes([16]) + value.to_bytes(16, "little", signed=True)


def _call(module: str, name: str, *arguments: int) -> bytes:
    return b"\x80\x02c" + f"{module}\n{name}\n(".encode() + b"".join(map(_long, arguments)) + b"tR."


def _tensor(count: int, offset: int, size: int, stride: int, bytes_there: int = 4) -> bytes:
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0" + b"0X\x03\0\0\0cpu" + _long(count) + b"tQ"
    rest = _long(offset) + _long(size) + b"\x85" + _long(stride) + b"\x85" + b"\x89ccollections\nOrderedDict\n)Rt"
    return with_pickle(
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"R.", **{"0": bytes(bytes_there)}
    )


def _overlapping() -> bytes:
    """Many entries of the list of members that are all the same bytes."""
    content = bytes(1 << 20)
    archive = rezipped([("a/data.pkl", pickle.dumps({}, 2)), ("a/data/0", content)])
    start = archive.rindex(b"PK\x01\x02")
    end = archive.index(b"PK\x05\x06")
    entry, tail = archive[start:end], archive[end:]
    entries = [entry.replace(b"a/data/0", b"a/data/" + bytes([48 + i])) for i in range(60)]
    both = archive[archive.index(b"PK\x01\x02") : start] + b"".join(entries)
    tail = struct.pack("<4sHHHHIIH", tail[:4], 0, 0, 61, 61, len(both), archive.index(b"PK\x01\x02"), 0)
    return archive[: archive.index(b"PK\x01\x02")] + both + tail


def corpus(marker: Path) -> dict[str, bytes]:
    plain = zipfile.ZipFile(io.BytesIO(saved({"format": 1, "zeros": torch.zeros(1 << 24)})))  # 64 MiB
    members = [(name, plain.read(name)) for name in plain.namelist()]
    touch = f"touch '{marker}'"
    return {
        "runs os.system": saved({"format": 1, "model": _Runs(os.system, touch)}),
        "runs eval": saved({"format": 1, "model": _Runs(eval, f"open({str(marker)!r}, 'w')")}),
        "bare pickle": pickle.dumps(_Runs(os.system, touch)),
        "whole module": saved({"format": 1, "model": torch.nn.Linear(1, 1)}),
        "zip bomb": rezipped(members, zipfile.ZIP_DEFLATED),
        "overlapping members": _overlapping(),
        "one name twice": rezipped([("a/data.pkl", pickle.dumps({}, 2)), ("A/data.pkl", saved({}))]),
        "bytes before the archive": b"#!/bin/sh\n" + saved({"format": 1}),
        "name upwards": rezipped([("a/data.pkl", pickle.dumps({}, 2)), ("a/../../x", b"")]),
        "absolute name": rezipped([("/tmp/data.pkl", pickle.dumps({}, 2))]),
        "no pickle": rezipped([("a/x", b"")]),
        "no members": rezipped([]),
        "stride 0": _tensor(1, 0, 10**12, 0),
        "stride 0 by torch": saved({"format": 1, "model": {"x": torch.zeros(1).expand(10**6, 10**6)}}),
        "more than its bytes": _tensor(10**12, 0, 10**12, 1),
        "negative size": _tensor(1, 0, -5, 1),
        "offset before its bytes": _tensor(1, -(10**9), 1, 1),
        "offset behind its bytes": _tensor(1, 10**9, 1, 1),
        "no such bytes": _tensor(1, 0, 1, 1, bytes_there=0),
        "a hundred GB of bytearray": with_pickle(_call("__builtin__", "bytearray", 10**11)),
        "a terabyte of storage": with_pickle(_call("torch.storage", "UntypedStorage", 10**12)),
        "a terabyte of tensor": with_pickle(_call("torch", "FloatTensor", 10**12)),
        "memo of 2^31 entries": with_pickle(b"\x80\x02Nr\xff\xff\xff\x7f."),
        "BYTEARRAY8 of 2^40": with_pickle(b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"."),
        "cut off pickle": with_pickle(pickle.dumps({"format": 1}, 2)[:-3]),
        "a list": saved([1, 2, 3]),
        "format is text": saved({"format": "1"}),
        "entries of other types": saved({**dict.fromkeys(State.__dataclass_fields__, "x"), "step": 1, "format": 1}),
    }


def main(folder: Path) -> None:
    for number, (name, archive) in enumerate(corpus(folder / "marker").items()):
        (folder / f"{number:02} {name}.pt").write_bytes(archive + checkpoint._trailer(archive))
    with open(folder / "98 a terabyte of nothing.pt", "wb") as file:
        file.truncate(1 << 40)


def read_all(folder: Path) -> None:
    checkpoint.check(io.BytesIO(saved({"x": torch.zeros(3)})))  # imports, and the first use of anything
    torch.load(io.BytesIO(saved({"x": torch.zeros(3)})), weights_only=True)
    outside = []
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    sys.addaudithook(lambda event, a: outside.append(a[0]) if event == "open" and (a[2] or 0) & writing else None)
    for path in sorted(folder.glob("*.pt")):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            checkpoint.read(path)
            says = None
        except Exception as error:
            says = f"{type(error).__name__}: {error}"
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        print(json.dumps([path.stem[3:], says, grown, [str(name) for name in outside]]))


if __name__ == "__main__":
    read_all(Path(sys.argv[1]))
