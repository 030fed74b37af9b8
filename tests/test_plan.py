"""The simple planner: as high as fits, evenly, and never over the pool."""

import numpy as np
import pytest

from comoe.policy.plan import BITS2, BITS3, BITS4, BITS8, EXACT, BudgetError, EvenPlanner, Sizes
from comoe.policy.predictor import PrefetchGauge
from comoe.policy.upgrades import RecentUse

# Two layers of different shape; records of 2, 1, 1, 4 and 16 bits.
SIZES = Sizes(
    np.array([[200, 100, 100, 400, 1600], [400, 200, 200, 800, 3200]], np.int64),
    np.array([8, 4], np.int64),
)


@pytest.mark.parametrize(
    ("pool", "level", "resident"),
    [
        (2 * 1600 * 8, EXACT, True),
        (2 * 800 * 8, BITS8, True),
        (2 * 800 * 8 - 1, BITS4, True),
        (2 * 400 * 8 - 1, BITS3, True),
        (2 * 200 * 8, BITS2, True),
        (2 * 200 * 8 - 1, BITS2, False),
        (400, BITS2, False),
    ],
)
def test_level_is_the_highest_that_fits(pool, level, resident):
    plan = EvenPlanner().plan(SIZES, pool, exact=False)
    assert (plan.min_level, plan.resident) == (level, resident)
    if resident:
        assert SIZES.total(plan.min_level) + plan.spare == pool
        higher = [lv for lv in range(EXACT + 1) if lv > level]
        assert all(SIZES.total(lv) > pool for lv in higher)


def test_exact_never_uses_a_rung():
    for pool in (3200, 20_000, 30_000, 10**6):
        plan = EvenPlanner().plan(SIZES, pool, exact=True)
        assert (plan.min_level, plan.want_level) == (EXACT, EXACT)
        assert plan.resident == (pool >= SIZES.total(EXACT))


def test_too_small_says_what_is_needed():
    with pytest.raises(BudgetError, match="399 bytes.*2-bit.*400"):
        EvenPlanner().plan(SIZES, 399, exact=False)
    with pytest.raises(BudgetError, match="exact.*3,200"):
        EvenPlanner().plan(SIZES, 3199, exact=True)


def test_upgrades_prefer_what_was_used_last_and_often():
    policy = RecentUse([3, 2], half_life=2.0)
    policy.note([np.array([1, 0, 3], np.uint8), np.array([0, 0], np.uint8)])
    policy.note([np.array([0, 0, 2], np.uint8), np.array([0, 1], np.uint8)])
    choices = {layer: (experts.tolist(), values) for layer, experts, values in policy.choose()}
    assert choices[0][0] == [2, 0, 1]
    assert choices[1][0] == [1, 0]
    first = 2**-0.5  # used once, one step ago
    np.testing.assert_allclose(choices[0][1][1], first / (1 + first))
    for values in (choices[0][1], choices[1][1]):
        assert ((values >= 0) & (values < 1)).all()


def test_gauge_stops_useless_speculation_and_counts():
    gauge = PrefetchGauge(least_share=0.5, smoothing=0.5, probe_every=10)
    gauge.note(np.array([1, 2]), np.array([2, 3]))
    assert gauge.stats() == {"recall": 0.5, "precision": 0.5, "share_of_reads_used": 1.0}
    assert gauge.useful
    gauge.note_step(100, 20)
    assert gauge.stats()["share_of_reads_used"] == pytest.approx(0.6)
    assert gauge.useful
    gauge.note_step(100, 20)  # nothing was read, so nothing is learnt
    assert gauge.useful
    gauge.note_step(200, 40)
    assert not gauge.useful
    steps = [gauge.note_step(200, 40) or gauge.useful for _ in range(20)]
    assert [i + 4 for i, useful in enumerate(steps) if useful] == [10, 20]
    for better in (100, 200, 300):  # the guesses have become good
        gauge.note_step(200 + better, 40 + better)
    assert gauge.useful
