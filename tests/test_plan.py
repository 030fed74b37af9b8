"""The simple planner: as high as fits, evenly, and never over the pool."""

import numpy as np
import pytest

from comoe.policy.curve import Curve, CurvePlanner
from comoe.policy.plan import LADDER, BudgetError, EvenPlanner, Levels, Sizes
from comoe.policy.predictor import PrefetchGauge
from comoe.policy.upgrades import RecentUse

BITS2, BITS3, BITS4, BITS8, EXACT = range(5)
# Two layers of different shape; records of 2, 1, 1, 4 and 16 bits.
SIZES = Sizes(
    LADDER,
    np.arange(60, dtype=np.int32).reshape(12, 5),
    np.array([200, 100, 100, 400, 1600] * 8 + [400, 200, 200, 800, 3200] * 4, np.int64),
    np.array([8, 4], np.int64),
)


def level_of(levels):
    """The one level of all experts."""
    (level,) = set(levels.tolist())
    return level


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
    assert (level_of(plan.min_level), plan.resident) == (level, resident)
    if resident:
        assert SIZES.total(plan.min_level) + plan.spare == pool
        assert SIZES.total(level) + plan.spare == pool
        higher = [lv for lv in range(EXACT + 1) if lv > level]
        assert all(SIZES.total(lv) > pool for lv in higher)


@pytest.mark.parametrize(
    ("exact", "levels", "wants"),
    [
        (1600, [BITS2, BITS3, BITS4, BITS8, EXACT], [BITS3, BITS4, BITS8, BITS8, EXACT]),
        (802, [BITS2, BITS3, BITS4, BITS8, EXACT], [BITS3, BITS4, BITS8, BITS8, EXACT]),
        (800, [BITS2, BITS3, BITS4, EXACT], [BITS3, BITS4, BITS4, EXACT]),  # an FP8 source
        (425, [BITS2, BITS3, BITS4, EXACT], [BITS3, BITS4, BITS4, EXACT]),  # MXFP4
        (400, [BITS2, BITS3, EXACT], [BITS3, BITS3, EXACT]),
    ],
)
def test_no_level_costs_more_than_the_source(exact, levels, wants):
    sizes = Sizes(
        LADDER,
        np.arange(40, dtype=np.int32).reshape(8, 5),
        np.array([200, 100, 100, 400, exact] * 8, np.int64),
        np.array([8], np.int64),
    )
    assert sizes.worthwhile() == levels
    for level, want in zip(levels, wants, strict=True):
        plan = EvenPlanner().plan(sizes, sizes.total(level), exact=False)
        assert (level_of(plan.min_level), level_of(plan.want_level)) == (level, want)
    most = EvenPlanner().plan(sizes, sizes.total(EXACT), exact=False)
    assert level_of(most.min_level) == EXACT


def test_exact_never_uses_a_rung():
    for pool in (3200, 20_000, 30_000, 10**6):
        plan = EvenPlanner().plan(SIZES, pool, exact=True)
        assert (level_of(plan.min_level), level_of(plan.want_level)) == (EXACT, EXACT)
        assert plan.resident == (pool >= SIZES.total(EXACT))


def test_too_small_says_what_is_needed():
    with pytest.raises(BudgetError, match="399 bytes.*2-bit.*400"):
        EvenPlanner().plan(SIZES, 399, exact=False)
    with pytest.raises(BudgetError, match="exact.*3,200"):
        EvenPlanner().plan(SIZES, 3199, exact=True)


# Experts 0 and 1 share base 0 and have deltas; expert 2 has none of both, but all have the ladder.
MIXED = Sizes(
    Levels(("base", "base+lr", "2", "exact"), (1 << 5, 0b11 << 5, 1, 16)),
    np.array(
        [[1, -1, -1, -1, 2, 0, 3], [4, -1, -1, -1, 5, 0, 6], [7, -1, -1, -1, 8, -1, -1]], np.int32
    ),
    np.array([90, 100, 800, 10, 100, 800, 20, 100, 800], np.int64),
    np.array([2, 1], np.int64),
)
CURVE = Curve(
    np.array([[0, 0, 2], [1, 0, 2], [1, 2, 2], [2, 2, 2], [3, 3, 3]], np.uint8),
    np.array([0.9, 0.5, 0.3, 0.2, 0.0], np.float32),
)


def test_sizes_with_shared_and_absent_records():
    assert MIXED.has.tolist() == [[True] * 4, [True] * 4, [False, False, True, True]]
    assert MIXED.bytes_at.tolist() == [[90, 100, 100, 800], [90, 110, 100, 800], [0, 0, 100, 800]]
    assert MIXED.total(np.array([0, 0, 2])) == 190  # the base once
    assert MIXED.total(np.array([1, 2, 2])) == 300
    assert MIXED.total(2) == 300 and MIXED.largest(np.array([0, 1, 2])) == 110
    assert [part.tolist() for part in MIXED.of_layer(np.arange(3))] == [[0, 1], [2]]


@pytest.mark.parametrize(
    ("pool", "levels", "want", "loss"),
    [
        (190, [0, 0, 2], [1, 0, 2], 0.9),
        (199, [0, 0, 2], [1, 0, 2], 0.9),
        (200, [1, 0, 2], [1, 2, 2], 0.5),
        (299, [1, 0, 2], [1, 2, 2], 0.5),
        (300, [2, 2, 2], [3, 3, 3], 0.2),  # as large as the point before it, and better
        (2399, [2, 2, 2], [3, 3, 3], 0.2),
        (2400, [3, 3, 3], [3, 3, 3], None),
    ],
)
def test_the_curve_gives_each_expert_its_level(pool, levels, want, loss):
    plan = CurvePlanner(CURVE).plan(MIXED, pool, exact=False)
    assert plan.resident and plan.spare == pool - MIXED.total(np.array(levels))
    assert (plan.min_level.tolist(), plan.want_level.tolist()) == (levels, want)
    assert plan.loss == (loss if loss is None else pytest.approx(loss))
    if loss is not None:
        assert f"expected loss {loss}" in plan.describe()


def test_the_curve_below_its_first_point_and_exact():
    planner = CurvePlanner(CURVE)
    plan = planner.plan(MIXED, 150, exact=False)
    assert not plan.resident and plan.min_level.tolist() == [0, 0, 2]
    assert "base 67%, 2-bit 33%" in plan.describe() and "read from disk" in plan.describe()
    with pytest.raises(BudgetError, match="99 bytes.*2-bit needs 100"):
        planner.plan(MIXED, 99, exact=False)
    plan = planner.plan(MIXED, 1000, exact=True)
    assert not plan.resident and level_of(plan.min_level) == 3
    assert planner.least(MIXED, exact=True).tolist() == [3, 3, 3]
    assert planner.least(MIXED, exact=False).tolist() == [0, 0, 2]


def test_without_a_curve_only_the_ladder_is_used():
    plan = EvenPlanner().plan(MIXED, 299, exact=False)
    assert level_of(plan.min_level) == 2 and not plan.resident
    assert level_of(EvenPlanner().plan(MIXED, 300, exact=False).want_level) == 2


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
