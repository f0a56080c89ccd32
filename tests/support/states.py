"""Checkpoint states with nothing of interest in them."""

from typing import Any

from trainer.storage.state import State


def made_state(**fields: Any) -> State:
    """A valid state, with these fields instead of empty or minimal ones."""
    numbers = dict.fromkeys(("epoch", "step", "samples", "skipped_samples", "training_samples"), 1)
    dicts = ("model", "totals", "metrics", "fingerprint", "freeze_plan", "data", "base", "config", "compute")
    defaults = {"optimizer": {"kind": "AdamW", "state": {}}, "scaler": None, "classes": []}
    return State(**defaults | numbers | {name: {} for name in dicts} | fields)
