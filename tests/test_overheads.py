"""Overheads are measured on small models, in every way of running, and nothing is left behind."""

import math
from dataclasses import asdict

from comoe import overheads


def test_small_models_tell_what_tokens_take(tmp_path, monkeypatch):
    monkeypatch.setattr(overheads, "LAYERS", (1, 3))
    monkeypatch.setattr(overheads, "WARM_UP", 8)
    monkeypatch.setattr(overheads, "TOKENS", 8)
    before = set(tmp_path.iterdir())
    found = asdict(overheads.measure_overheads(tmp_path, 1e9))
    assert set(found) == {"step", "layer", "deciding", "wait"}
    assert all(0 <= seconds < math.inf for seconds in found.values())
    assert found["layer"] > 0
    assert set(tmp_path.iterdir()) == before
