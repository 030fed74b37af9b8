"""The joint planner: limits hold, waiting is bought only where it pays, and goals that cannot be met say so."""

from dataclasses import replace

import numpy as np
import pytest

from comoe.policy.assumed import assumed_losses
from comoe.policy.costs import Costs
from comoe.policy.elsewhere import Elsewhere
from comoe.policy.goal import Goal
from comoe.policy.joint import GoalError, JointPlanner, Situation
from comoe.policy.plan import LADDER, BudgetError, Levels, Sizes
from comoe.policy.profile import InputProfile
from comoe.policy.snapshot import Estimate, Link

EXPERTS, LAYERS = 16, 4
SIZES = Sizes(
    LADDER,
    np.arange(EXPERTS * LAYERS * 5, dtype=np.int32).reshape(-1, 5),
    np.array([200, 100, 100, 400, 1600] * EXPERTS * LAYERS, np.int64),
    np.full(LAYERS, EXPERTS),
)
ALL = SIZES.total(LADDER.exact)


def losses(seed=0):
    """Some experts are used ten times as often as others, and matter as much more."""
    rng = np.random.default_rng(seed)
    use = rng.gamma(0.5, 1.0, EXPERTS * LAYERS)
    use = np.clip(use / use.mean() * 2 / EXPERTS, 1e-3, 0.9)
    loss = use[:, None] * np.array([0.125, 0.036, 0.0095, 2.4e-5, 0]) * 0.1
    return loss, use


def costs(bandwidth=1e6, **changes) -> Costs:
    compute = SIZES.bytes_at / 1e8
    return Costs(
        **({"compute": compute, "dense": 1e-3, "bandwidth": bandwidth, "latency": 1e-4} | changes)
    )


def planner(goal=None, seed=0, **changes) -> JointPlanner:
    made = JointPlanner(*losses(seed))
    made.situation = Situation(goal or Goal(), costs(**changes))
    return made


@pytest.mark.parametrize("share", [0.14, 0.2, 0.3, 0.5])
def test_without_a_goal_nothing_is_waited_for(share):
    pool = int(share * ALL)
    plan = planner().plan(SIZES, pool, exact=False)
    assert plan.resident and SIZES.total(plan.min_level) <= pool
    loss, _ = losses()
    assert plan.loss == pytest.approx(loss[np.arange(len(loss)), plan.min_level].sum())
    # No worse than the same level for all.
    for level in range(4):
        if SIZES.total(level) <= 0.98 * pool:
            assert plan.loss <= loss[:, level].sum() + 1e-12
    assert (plan.want_level >= plan.min_level).all() and plan.want_level.max() < LADDER.exact


def test_too_little_for_all_is_cached():
    plan = planner().plan(SIZES, 3000, exact=False)
    assert not plan.resident and not plan.base.any() and plan.min_level.max() == 0
    with pytest.raises(BudgetError, match="one expert"):
        planner().plan(SIZES, 199, exact=False)


def test_everything_fits():
    plan = planner(Goal(loss=0.01)).plan(SIZES, ALL, exact=False)
    assert plan.resident and plan.min_level.min() == LADDER.exact


@pytest.mark.parametrize("share", [0.1, 0.2, 0.3])
def test_a_loss_is_kept_and_time_falls_with_memory(share):
    goal = Goal(loss=0.001)
    plan = planner(goal).plan(SIZES, int(share * ALL), exact=False)
    assert plan.loss <= goal.loss
    assert SIZES.record_bytes[plan.base].sum() <= share * ALL
    more = planner(goal).plan(SIZES, int(1.5 * share * ALL), exact=False)
    assert more.seconds < plan.seconds


def test_a_stricter_loss_takes_longer():
    seconds = [
        planner(Goal(loss=loss)).plan(SIZES, int(0.2 * ALL), exact=False).seconds
        for loss in (0.02, 0.005, 0.001, 0.0001)
    ]
    assert seconds == sorted(seconds) and seconds[-1] > seconds[0]


def test_a_latency_is_kept_and_buys_quality():
    pool = int(0.2 * ALL)
    still = planner().plan(SIZES, pool, exact=False)
    free = planner(Goal(loss=1e-9)).plan(SIZES, pool, exact=False)
    plans = [
        planner(Goal(latency=still.seconds + share * (free.seconds - still.seconds))).plan(
            SIZES, pool, exact=False
        )
        for share in (0.1, 0.3, 0.6)
    ]
    found = [plan.loss for plan in plans]
    assert found == sorted(found, reverse=True) and found[0] < still.loss
    assert all(plan.price > 0 for plan in plans)


def test_what_cannot_be_met_says_what_can():
    with pytest.raises(GoalError, match=r"latency of 0\.5 ms .* the least is") as caught:
        planner(Goal(latency=5e-4)).plan(SIZES, int(0.2 * ALL), exact=False)
    assert caught.value.nearest is not None
    with pytest.raises(GoalError, match="allow more loss"):
        planner(Goal(loss=1e-6, latency=2e-3)).plan(SIZES, int(0.2 * ALL), exact=False)


def test_least_memory_meets_both():
    made = planner(Goal(loss=0.002, latency=4e-3))
    pool = made.least_memory(SIZES)
    plan = made.plan(SIZES, int(1.02 * pool), exact=False)
    assert plan.loss <= 0.002 and 0 < pool < ALL
    made = planner(Goal(loss=0.002, latency=1e-3))
    with pytest.raises(GoalError, match="no memory"):
        made.least_memory(SIZES)
    with pytest.raises(ValueError, match="least_memory"):
        planner(Goal(loss=1.0)).least_memory(SIZES)


def test_the_plan_follows_the_text():
    """What this text uses gets the bits, also where calibration saw little of it."""
    loss, use = losses()
    made = JointPlanner(loss, use)
    before = made.plan(SIZES, int(0.2 * ALL), exact=False)
    made.situation = Situation(use=use[::-1].copy())
    after = made.plan(SIZES, int(0.2 * ALL), exact=False)
    hot, cold = use.argmin(), use.argmax()  # of the reversed use: the other way round
    assert after.min_level[len(use) - 1 - cold] >= before.min_level[len(use) - 1 - cold]
    live = use[::-1] / use
    rows = np.arange(len(use))
    assert (loss[rows, after.min_level] * live).sum() < (loss[rows, before.min_level] * live).sum()
    assert hot != cold


def test_exact_is_exact():
    plan = planner(Goal(loss=1.0)).plan(SIZES, 5000, exact=True)
    assert set(plan.min_level.tolist()) == {LADDER.exact} and not plan.resident


def test_assumed_losses_order_levels():
    loss, use = assumed_losses(SIZES, 2)
    assert (np.diff(loss, axis=1) < 0).all() and np.allclose(use, 2 / EXPERTS)
    other = Sizes(
        Levels(("x", "exact"), (0b1, 0b10)),
        SIZES.records[:, [0, 4]],
        SIZES.record_bytes,
        SIZES.num_experts,
    )
    assert np.isfinite(assumed_losses(other, 2)[0][:, 0]).all()  # bits of packing by their mask


def test_profile_finds_the_domain_and_then_the_text():
    rng = np.random.default_rng(0)
    stored = np.stack(
        [np.r_[np.full(8, 0.2), np.full(8, 0.05)], np.r_[np.full(8, 0.05), np.full(8, 0.2)]]
    )
    profile = InputProfile([16], stored)
    assert not profile.seen and np.allclose(profile.mixture(), 0.5)
    for _ in range(20):
        experts = rng.choice(16, (1, 2), replace=False, p=stored[1] / stored[1].sum())
        profile.note(0, experts, np.full((1, 2), 0.5))
    assert profile.mixture()[1] > 0.99
    assert profile.use()[8:].mean() > 2 * profile.use()[:8].mean()
    assert np.allclose(profile.mean_square(), 0.25)
    profile.note(0, np.array([[16, -1]]), np.ones((1, 2)))  # no expert
    profile.new_sequence()
    assert not profile.seen
    with pytest.raises(ValueError, match="expected finite"):
        InputProfile([16], np.ones(15))


def test_a_plan_that_waits_uses_what_experts_share_where_that_pays():
    # Pairs share a merged set as large as one of them at 2 bits: half the memory, a little more loss.
    pairs = np.repeat(np.arange(8), 2)
    records = np.stack([np.arange(16), 16 + pairs, 24 + np.arange(16)], 1).astype(np.int32)
    sizes = Sizes(
        Levels(("merge", "2", "exact"), (0b010, 0b001, 0b100)),
        records,
        np.r_[np.full(16, 1000), np.full(8, 1000), np.full(16, 8000)].astype(np.int64),
        np.array([16]),
    )
    loss, use = np.tile([0.012, 0.01, 0.0], (16, 1)), np.full(16, 0.25)
    made = JointPlanner(loss, use)
    goal = Goal(loss=0.2)
    made.situation = Situation(goal, costs(compute=sizes.bytes_at / 1e8))
    plan = made.plan(sizes, 8800, exact=False)
    merged = plan.min_level == 0
    assert merged.sum() >= 12 and plan.loss <= goal.loss
    assert plan.base[16:24].sum() == np.unique(pairs[merged]).size  # in memory, each once
    assert plan.spare == 8800 - sizes.record_bytes[plan.base].sum()
    # What is held is not read: judged as it was planned.
    own = np.where(np.tile([True, False, False], (16, 1)), np.nan, loss)
    alone = JointPlanner(own, use)
    alone.situation = made.situation
    slower = alone.plan(sizes, 8800, exact=False)
    assert made.judge(sizes, plan)[1] < 0.5 * alone.judge(sizes, slower)[1]
    assert made.judge(sizes, plan) == pytest.approx((plan.loss, plan.seconds))


def test_some_layers_are_held_whole_where_waiting_costs_latency():
    """A latency per layer, paid whatever number of its experts is missing: the plan leaves some layers without any
    miss, and expects less time than one that was made as if every expert paid a latency of its own."""
    use = np.full(
        EXPERTS * LAYERS, 0.4
    )  # of 16: each layer misses something, however much of it is held
    matters = np.random.default_rng(0).gamma(1.0, 1.0, len(use))
    loss = (use * matters)[:, None] * np.array([0.125, 0.036, 0.0095, 2.4e-5, 0]) * 0.01

    def even() -> JointPlanner:
        made = JointPlanner(loss, use)
        made.situation = Situation(Goal(loss=0.01), costs(1e9, latency=2e-3))
        return made

    made, pool = even(), int(0.12 * ALL)
    plan = made.plan(SIZES, pool, exact=False)
    whole = (plan.held >= plan.min_level).reshape(LAYERS, EXPERTS).all(1)
    assert whole.any() and not whole.all() and plan.loss <= 0.01
    assert SIZES.record_bytes[plan.base].sum() <= pool
    apart = even()
    apart._best_whole = lambda sizes, options, scale, pool, first, at: first
    assert plan.seconds < 0.9 * apart.plan(SIZES, pool, exact=False).seconds
    # The same again from what it remembers; other memory is searched anew.
    again = made.plan(SIZES, pool, exact=False)
    assert (again.held == plan.held).mean() > 0.95
    assert made.plan(SIZES, int(0.3 * ALL), exact=False).seconds < plan.seconds


def test_caution_trades_time_for_loss():
    plans = []
    for caution in (1.0, 0.3, 0.03):
        made = planner(Goal(loss=0.004))
        made.situation = replace(made.situation, caution=caution)
        plans.append(made.plan(SIZES, int(0.15 * ALL), exact=False))
    losses_, prices = [p.loss for p in plans], [p.price for p in plans]
    assert losses_ == sorted(losses_, reverse=True) and losses_[2] < losses_[0]
    assert prices[2] == pytest.approx(0.03 * prices[0], rel=1e-6)
    assert [p.seconds for p in plans] == sorted(p.seconds for p in plans)


def elsewhere(level=4, rtt=0.002, bandwidth=1e8, seconds=1e-4) -> Elsewhere:
    """A server with every second expert."""
    has = np.where(np.arange(EXPERTS * LAYERS) % 2, level, -1)
    there = Elsewhere(has, 1024, prior=Link(Estimate(bandwidth), Estimate(rtt)))
    for _ in range(20):
        there.succeeded(1, rtt + 2048 / bandwidth + seconds, seconds)
    return there


@pytest.mark.parametrize("goal", [Goal(loss=0.001), Goal(latency=0.012)], ids=["loss", "latency"])
def test_a_slow_link_and_a_quick_server_send_activations(goal):
    """What lies behind a slow link is computed where it lies, if a server there is quick; never without one."""
    slow, pool = {"bandwidth": 2e5, "latency": 0.01}, int(0.15 * ALL)
    alone = planner(goal if goal.latency is None else Goal(latency=1.0), **slow)
    alone = alone.plan(SIZES, pool, exact=False)
    assert alone.away is None
    made = planner(goal, **slow)
    made.situation = replace(made.situation, elsewhere=elsewhere())
    plan = made.plan(SIZES, pool, exact=False)
    assert plan.away.any() and not plan.away[::2].any()
    assert (plan.min_level[plan.away] == 4).all() and (plan.held[plan.away] < 0).all()
    assert (plan.aimed[plan.away] == -1).all() and not plan.resident
    assert "computed on another machine" in plan.describe()
    records = SIZES.records[plan.away]
    assert not plan.base[records].any()
    if goal.latency is None:
        assert plan.seconds < 0.8 * alone.seconds and plan.loss <= goal.loss
    else:
        assert plan.seconds <= goal.latency
    assert made.judge(SIZES, plan)[1] == pytest.approx(plan.seconds, rel=1e-6)
    # Nothing is held less finely for it where nobody may be waited for.
    assert planner().plan(SIZES, pool, exact=False).away is None


def test_a_server_that_is_slow_or_put_aside_is_not_planned_with():
    goal, pool = Goal(loss=0.001), int(0.15 * ALL)
    slow, gone = elsewhere(rtt=1.0), elsewhere()
    gone.failed_call()
    for there in (
        slow,
        gone,
        elsewhere(level=0),
    ):  # the last one has too coarse a level to keep the loss alone
        made = planner(goal, bandwidth=1e8)
        made.situation = replace(made.situation, elsewhere=there)
        plan = made.plan(SIZES, pool, exact=False)
        assert plan.away is None and plan.loss <= goal.loss
    made = planner(Goal(), bandwidth=2e5)
    made.situation = replace(made.situation, elsewhere=elsewhere())
    plan = made.plan(SIZES, pool, exact=False)
    assert plan.away is None and plan.resident
    floor = np.full(EXPERTS * LAYERS, 3)
    made = JointPlanner(*losses(), floor)
    made.situation = Situation(Goal(loss=0.01), costs(2e5, latency=0.01), elsewhere=elsewhere(2))
    assert made.plan(SIZES, pool, exact=False).away is None
