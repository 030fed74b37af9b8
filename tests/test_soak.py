"""The soak, for some seconds: outputs as in fresh runs and nothing leaked; and what it looks for is found."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import comoe

BENCH = Path(__file__).parent.parent / "bench"
sys.path.insert(0, str(BENCH))
import soak  # noqa: E402
from fits import exponent, slope  # noqa: E402


@pytest.mark.parametrize("mode", ["exact", "dial"])
def test_some_seconds(packed_demo, mode):
    command = [sys.executable, BENCH / "soak.py", "--model", packed_demo, "--mode", mode]
    done = subprocess.run(
        [*command, "--minutes", "0.15", "--json"], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["problems"] == []
    assert result["jobs"] > 0
    assert result["equal"] == (result["jobs"] if mode == "exact" else 0)
    assert result["end"]["held_after"] == 0


def test_another_output_is_a_problem(packed_demo, monkeypatch):
    found = soak.Soak(packed_demo, "exact", 0, print)
    monkeypatch.setattr(found.fresh, "digest", lambda job: "another")
    found.job(soak.FIXED)
    found.judge(keep=0)
    found.runtime.close()
    (problem,) = found.problems
    assert problem.startswith("not as in a fresh run")


def test_what_is_kept_is_found(packed_demo):
    model = comoe.load(packed_demo, memory="100MB", exact=True)
    runtime = model.comoe
    assert soak.faults(soak.stand_still(runtime)) == []
    soak.run(model, soak.FIXED)
    session = runtime.engine.session(
        np.zeros(1, np.int32), np.full(1, 4, np.uint8), np.full(1, 4, np.uint8)
    )
    session.next()
    found = soak.faults(soak.stand_still(runtime))
    assert any("sessions are open" in fault for fault in found)
    assert any("pages are held though" in fault for fault in found)
    session.close()
    assert soak.faults(soak.stand_still(runtime)) == []
    runtime.close()


def test_slopes_and_their_intervals():
    minutes = np.arange(100) / 4
    noise = np.random.default_rng(0).normal(0, 1e5, 100)
    flat, leak = slope(minutes, 5e8 + noise), slope(minutes, 5e8 + 2e4 * minutes + noise)
    assert flat.low < 0 < flat.high < 1e4
    assert 1e4 < leak.low < 2e4 < leak.high < 3e4
    # Neighbours that resemble each other tell less: the interval of a random walk is wider than shuffled.
    walk = np.cumsum(noise)
    alike, shuffled = (
        slope(minutes, y) for y in (walk, np.random.default_rng(1).permutation(walk))
    )
    assert alike.high - alike.low > 2 * (shuffled.high - shuffled.low)
    assert np.isnan(slope([1, 2], [1, 2]).value)
    assert exponent([1, 2, 4, 8], [3, 12, 48, 192]).value == pytest.approx(2)


def test_jobs_are_the_same_for_a_seed():
    first, second = (soak.draw(np.random.default_rng(7)) for _ in range(2))
    assert first == second
