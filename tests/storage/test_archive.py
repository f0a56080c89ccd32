import io
import json
import os
import subprocess
import sys
import zipfile

import hostile
import pytest
import torch
from launching import ROOT

from trainer.storage import archive


def test_what_torch_saves_of_plain_types_and_tensors_passes():
    kinds = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64")
    tensors = [torch.zeros(3, dtype=getattr(torch, kind)) for kind in kinds]
    views = {"view": torch.arange(10)[3:5], "empty": torch.zeros(0), "number": torch.tensor(3.0)}
    views |= {"turned": torch.ones(2, 3).T, "nhwc": torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)}
    plain = {"list": [1, -5, 2**40, 2**70, 2.5, None, True, "naïve", (1, 2)], "many": list(map(str, range(3000)))}
    archive.check(io.BytesIO(hostile.saved({"tensors": tensors, **views, **plain})))


@pytest.mark.parametrize("override", ["0", "1"])
def test_hostile_files_run_nothing_allocate_nothing_and_write_nothing(tmp_path, override):
    """Each in its own words; the environment variable turns torch's own protection off where it is not asked for."""
    hostile.main(tmp_path)
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "support" / "hostile.py"), str(tmp_path)],
        env={
            "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
            "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": override,
            "PATH": "",
        },
        capture_output=True,
        text=True,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == len(list(tmp_path.glob("*.pt"))), done.stderr
    for name, says, grown, written in lines:
        assert (says or "").startswith("CheckpointError: "), f"{name}: {says}"
        assert grown < 50, f"{name}: {grown} MB"
        assert written == [], name
    assert not (tmp_path / "marker").exists()
    said = {name: says for name, says, *_ in lines}
    assert "holds torch.storage.UntypedStorage" in said["a terabyte of storage"]
    assert "compressed" in said["zip bomb"]
    assert "larger than the file" in said["overlapping members"]
    assert "a tensor of shape (1000000000000,) with 1 elements" in said["stride 0"]
    assert "says 1000000000000 × Float where there are 4 bytes" in said["more than its bytes"]
    assert "LONG_BINPUT" in said["memo of 2^31 entries"]


def test_members_of_other_zip_files_are_checked_too():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr("a/data.pkl", b"x")
    with zipfile.ZipFile(buffer) as source, pytest.raises(ValueError, match="compressed"):
        archive.check_members(source.infolist(), len(buffer.getvalue()))
