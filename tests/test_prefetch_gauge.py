"""The gauge of reading ahead goes by the time of the steps: it keeps what pays, drops what does not, and looks again."""

import math

import numpy as np
import pytest

from comoe.policy.prefetch_gauge import BLOCK, PROBE_EVERY, TimedGauge


def run(gauge, steps, seconds, seed=0, noise=0.1):
    """Share of the steps that read ahead. seconds: (step, on) -> mean seconds."""
    rng = np.random.default_rng(seed)
    on = 0
    for step in range(steps):
        on += gauge.useful
        gauge.note_seconds(seconds(step, gauge.useful) * rng.lognormal(0, noise))
    return on / steps


@pytest.mark.parametrize("seed", range(5))
def test_what_saves_time_stays_on_and_what_costs_goes_off(seed):
    assert run(TimedGauge(), 2000, lambda _, on: 0.010 if on else 0.012, seed) > 0.85
    assert run(TimedGauge(), 2000, lambda _, on: 0.012 if on else 0.010, seed) < 0.15


def test_a_share_of_wasted_bytes_alone_changes_nothing():
    gauge = TimedGauge()
    for step in range(400):
        gauge.note_step(100 * step, 10 * step)  # nine of ten bytes for nothing
        gauge.note_seconds(0.010 if gauge.useful else 0.013)
    assert gauge.clear and gauge.saved == pytest.approx(math.log(1.3), rel=0.05)
    assert gauge.stats()["time_saved"] == gauge.saved and gauge.share < 0.2


def test_a_change_is_found():
    gauge = TimedGauge()
    run(gauge, 1000, lambda _, on: 0.010 if on else 0.013)
    assert gauge.saved > 0
    steps = 8 * PROBE_EVERY * BLOCK
    run(gauge, steps, lambda _, on: 0.013 if on else 0.010, seed=1)
    assert gauge.saved < 0
    assert run(gauge, 1000, lambda _, on: 0.013 if on else 0.010, seed=2) < 0.2


def test_drift_is_not_taken_for_a_difference():
    # Steps that grow by a tenth in every block, and do not depend on it: neither way wins for long.
    gauge = TimedGauge()
    on = run(gauge, 600, lambda step, _: 0.01 * 1.1 ** (step / BLOCK), noise=0.0)
    assert abs(gauge.saved) < 1e-9 and 0.4 < on < 0.6


def test_interruptions_and_absurd_times_are_left_out():
    gauge = TimedGauge()
    for step in range(800):
        slow = 50.0 if step % 7 == 3 else 1.0
        gauge.note_seconds(slow * (0.010 if gauge.useful else 0.012))
        for absurd in (0.0, -1.0, math.nan, math.inf):
            gauge.note_seconds(absurd)
    assert gauge.clear and gauge.saved == pytest.approx(math.log(1.2), rel=0.05)


def test_on_until_something_was_measured():
    assert TimedGauge().useful and not TimedGauge().clear
