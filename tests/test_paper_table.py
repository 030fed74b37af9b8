"""bench/switch_base_128.py on a small model: rows are measured, written, taken up again; bounds are judged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture(scope="module")
def table():
    sys.path.insert(0, str(BENCH))
    import switch_base_128

    return switch_base_128


@pytest.mark.slow
def test_small_model(tmp_path):
    def run(*more: str) -> dict:
        command = [sys.executable, str(BENCH / "switch_base_128.py"), "--folder", str(tmp_path)]
        command += ["--layers=2", "--experts=6", "--tokens=4", "--turns=1", "--warm=0", "--json"]
        path = {"PYTHONPATH": os.pathsep.join([str(BENCH.parent), str(BENCH)])}
        done = subprocess.run(
            [*command, *more], capture_output=True, text=True, env=os.environ | path, timeout=280
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    rows = {row["row"]: row for row in run("--rows", "plain", "lru@2.4GB", "comoe@2.4GB")["rows"]}
    assert not [row for row in rows.values() if "failed" in row]
    assert rows["plain"]["logits_error"] == 0
    assert rows["lru@2.4GB"]["logits_error"] < 0.02  # the same weights
    assert rows["lru@2.4GB"]["detail"]["hit rate"] > 0
    ours = rows["comoe@2.4GB"]
    assert ours["peak_rss"] < 2.4e9 and ours["bits_used"] > 2 and ours["encoder_error"] < 0.2
    assert (tmp_path / "switch_base_128.png").exists()
    # Nothing is measured twice, and what is there stays.
    again = run("--rows", "plain")
    assert {row["row"]: row for row in again["rows"]} == rows


def test_bounds_say_what_is_missed_and_what_is_not_measured(table):
    row = {
        "row": "comoe@2.4GB",
        "peak_rss": 2.5e9,
        "mean_ms_per_token": 10.0,
        "plain_mean_ms_per_token": 11.0,
        "moe_ms_per_token": 6.0,
        "plain_moe_ms_per_token": 11.0,
        "bits_used": 3.0,
        "bits_held": 2.0,
        "demo_loss_percent": 4.0,
    }
    met = [
        m for text, _, m in table.bounds({"comoe@2.4GB": row}) if text.startswith("comoe@2.4GB:")
    ]
    assert met == [False, True, True, False, None]


def test_the_demo_models_loss_falls_with_bits(table):
    losses = [table.demo_loss(bits)["demo_loss_percent"] for bits in (2.3, 3.2, 4.8, 8.0)]
    assert losses == sorted(losses, reverse=True) and losses[0] > 5 > losses[1] > 0.5
