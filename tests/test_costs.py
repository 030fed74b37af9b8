"""What a token takes: against a Monte Carlo of the same rules, and by hand."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from comoe.policy.costs import Costs
from comoe.policy.plan import LADDER, Levels, Sizes
from comoe.policy.snapshot import Estimate, Link, Snapshot

ROOT = Path(__file__).resolve().parent.parent
X, LAYERS = 12, np.array([8, 4], np.int64)
SIZES = Sizes(
    LADDER,
    np.arange(60, dtype=np.int32).reshape(X, 5),
    np.array([200, 100, 100, 400, 1600] * 8 + [400, 200, 200, 800, 3200] * 4, np.int64),
    LAYERS,
)
WEIGHTS = np.repeat([800.0, 1600.0], LAYERS)


def costs(**changes):
    base = {"compute": SIZES.bytes_at * 1e-6, "dense": 2e-3, "bandwidth": 1e5, "latency": 3e-4}
    return Costs(**(base | changes))


def simulate(c, levels, use, missing, tokens, passes=20_000):
    """Mean seconds of a pass when every token draws every expert independently."""
    rng = np.random.default_rng(0)
    drawn = (rng.random((passes, tokens, X)) < use).any(1)
    total = np.full(passes, c.dense)
    for part in SIZES.of_layer(np.arange(X)):
        compute = drawn[:, part] @ c.compute[part, levels[part]]
        read = drawn[:, part] @ missing[part] / c.bandwidth
        read += drawn[:, part][:, missing[part] > 0].any(1) * c.latency
        total += compute + read
    return total.mean()


@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_expected_time_is_the_mean_over_draws(tokens):
    rng = np.random.default_rng(1)
    use = rng.uniform(0, 0.5, X)
    levels = rng.integers(0, 5, X)
    missing = np.where(rng.random(X) < 0.5, SIZES.bytes_at[np.arange(X), levels], 0)
    c = costs()
    expected = c.token_time(SIZES, levels, use, missing, tokens=tokens)
    assert expected == pytest.approx(simulate(c, levels, use, missing, tokens), rel=0.01)


def test_nothing_missing_is_compute_alone():
    use = np.full(X, 0.25)
    levels = SIZES.all_at(2)
    took = costs().token_time(SIZES, levels, use, np.zeros(X))
    assert took == pytest.approx(2e-3 + 0.25 * 1e-6 * SIZES.total(2))


def test_hidden_reads_are_never_more_than_the_layer_computes():
    use, levels, none = np.full(X, 0.5), SIZES.all_at(1), np.zeros(X)
    little, much = np.full(X, 10.0), np.full(X, 1e6)
    alone = costs().token_time(SIZES, levels, use, none)
    kind = costs(overlap=1.0, latency=0.0)
    assert kind.token_time(SIZES, levels, use, little) == pytest.approx(alone)
    apart = costs(latency=0.0).token_time(SIZES, levels, use, much)
    # At most the experts' compute and the dense part of the token hide anything.
    assert kind.token_time(SIZES, levels, use, much) == pytest.approx(apart - alone)


def test_a_skipped_expert_takes_no_time_and_misses_by_share():
    use = np.ones(X)
    levels = np.full(X, -1)
    assert costs().token_time(SIZES, levels, use, np.zeros(X)) == pytest.approx(2e-3)
    half = costs().token_time(SIZES, levels, use, np.zeros(X), misses=np.full(X, 0.5))
    assert half == pytest.approx(2e-3 + 3e-4 * ((1 - 0.5**8) + (1 - 0.5**4)))


def test_a_level_that_an_expert_lacks_is_an_error():
    records = SIZES.records.copy()
    records[3, 4] = -1  # no exact weights
    sizes = Sizes(LADDER, records, SIZES.record_bytes, LAYERS)
    c = costs(compute=np.where(sizes.has, 1e-6, np.inf))
    with pytest.raises(ValueError, match="expert 3 has no level exact"):
        c.token_time(sizes, sizes.all_at(4), np.zeros(X), np.zeros(X))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"bandwidth": 0.0}, "bandwidth: expected bytes/s > 0, got 0"),
        ({"bandwidth": float("nan")}, "bandwidth"),
        ({"dense": -1.0}, "dense: expected a number >= 0"),
        ({"latency": float("inf")}, "latency"),
        ({"overlap": 1.5}, "overlap: expected a share"),
        ({"compute": np.full((X, 5), np.nan)}, "compute: expected seconds"),
        ({"compute": np.zeros(5)}, "compute: expected seconds"),
    ],
)
def test_absurd_costs_are_refused(change, match):
    with pytest.raises(ValueError, match=match):
        costs(**change)


def test_measured_speeds_replace_those_of_the_profile_and_scale_the_rest():
    base = costs(
        compute=np.where(SIZES.has, 1e-6 * WEIGHTS[:, None], np.inf), joules_per_second=9.0
    )
    snapshot = Snapshot(
        0.0,
        compute={
            "2": Estimate(3e-6, 0, 10),
            "4": Estimate(2e-6, 0, 10),
            "8": Estimate(9.0, 0, 1),  # one sample is not believed
        },
        dense=Estimate(5e-3, 0, 10),
        tiers={"disk": Link(Estimate(7e5, 0, 10), Estimate(1e-4, 0, 10))},
        power="mains",
    )
    known = base.measured(snapshot, SIZES, WEIGHTS)
    assert known.compute[:, 0] == pytest.approx(3e-6 * WEIGHTS)
    assert known.compute[:, 2] == pytest.approx(2e-6 * WEIGHTS)
    assert known.compute[:, 3] == pytest.approx(2.5e-6 * WEIGHTS)  # the median of 3 and 2
    assert (known.dense, known.bandwidth, known.latency) == (5e-3, 7e5, 1e-4)
    assert known.joules_per_second == 0
    battery = base.measured(Snapshot(0.0, power="battery"), SIZES, WEIGHTS)
    assert battery.joules_per_second == 9.0
    np.testing.assert_array_equal(battery.compute, base.compute)
    assert costs(joules_per_byte=2.0, joules_per_second=3.0).token_joules(4, 5) == 22


def test_shared_levels_beyond_the_records_cost_infinity():
    levels = Levels(("2", "9"), (1, 1 << 9))
    sizes = Sizes(levels, np.zeros((2, 1), np.int32), np.array([10]), np.array([2]))
    assert sizes.has.tolist() == [[True, False]] * 2
    base = Costs(np.where(sizes.has, 1.0, np.inf), 0.0, 1.0, 0.0)
    slower = base.measured(Snapshot(0.0, compute={"2": Estimate(2.0, 0, 9)}), sizes, np.ones(2))
    assert slower.compute.tolist() == [[2.0, np.inf]] * 2


def test_policy_needs_neither_torch_nor_what_lies_above_it():
    """Runs in a simulation and on a device without torch: numpy and psutil only."""
    code = """
import importlib, pkgutil, sys
import comoe.policy
for module in pkgutil.iter_modules(comoe.policy.__path__):
    importlib.import_module("comoe.policy." + module.name)
heavy = {"torch", "transformers", "scipy", "comoe._C", "comoe_kernels"}
above = {f"comoe.{n}" for n in ("runtime", "store", "tiers", "hf", "aggregate", "cli", "loading")}
sys.exit(str(sorted((heavy | above) & set(sys.modules))) if (heavy | above) & set(sys.modules) else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_deciding_is_paid_where_something_may_be_read():
    c = costs(deciding=1e-3)
    use, levels, nothing = np.full(X, 0.25), SIZES.all_at(2), np.zeros(X)
    assert c.outside(SIZES, resident=True) == 2e-3
    assert c.outside(SIZES, resident=False) == pytest.approx(2e-3 + 2 * 1e-3)
    resident = c.token_time(SIZES, levels, use, nothing)
    assert resident == costs().token_time(SIZES, levels, use, nothing)
    missing = np.eye(X)[0] * 100.0
    more = c.token_time(SIZES, levels, use, missing) - costs().token_time(
        SIZES, levels, use, missing
    )
    assert more == pytest.approx(2e-3)
    with pytest.raises(ValueError, match="deciding"):
        costs(deciding=-1.0)
