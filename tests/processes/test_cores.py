import os

from trainer.processes import cores, startup


def test_cores_are_shared(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    accelerator = startup.start()
    monkeypatch.setattr(cores, "_QUOTA", tmp_path / "cpu.max")
    assert cores.cores_per_process(accelerator) == 12
    for quota, expected in (("max 100000", 12), ("350000 100000", 3), ("50000 100000", 1)):
        cores._QUOTA.write_text(f"{quota}\n")
        assert cores.cores_per_process(accelerator) == expected
    cores._QUOTA.unlink()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    assert cores.cores_per_process(accelerator) == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "50")
    assert cores.cores_per_process(accelerator) == 1
