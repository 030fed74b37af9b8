"""The controller: demotes at once, promotes with patience, never thrashes, and says why."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest

from comoe.policy.cautious import CALM, FORGIVE, LONGEST_CALM, Cautious
from comoe.policy.controller import LOG, SLACK, Controller
from comoe.policy.costs import Costs
from comoe.policy.curve import Curve, CurvePlanner
from comoe.policy.goal import Goal
from comoe.policy.joint import GoalError
from comoe.policy.plan import LADDER, BudgetError, EvenPlanner, Sizes
from comoe.policy.snapshot import Estimate, Link, Snapshot

X = 12
SIZES = Sizes(
    LADDER,
    np.arange(60, dtype=np.int32).reshape(X, 5),
    np.array([2, 1, 1, 4, 16] * X, np.int64) * 1000,
    np.array([8, 4], np.int64),
)
FULL, BITS4, BITS2 = (SIZES.total(level) for level in (4, 2, 0))


def controller(memory=FULL, planner=None, **options):
    return Controller(planner or EvenPlanner(), SIZES, memory, **options)


def seen(time, free, **rest):
    return Snapshot(time, host_free=int(free), host_total=10**9, **rest)


class World:
    """A machine with `room` bytes for pool and free memory together; the pool takes what is planned."""

    def __init__(self, controller):
        self.controller = controller
        self.decisions = []

    def at(self, time, room, **rest):
        pool = self.controller.plan.pool_bytes
        decision = self.controller.observe(seen(time, max(room - pool, 0), **rest), min(pool, room))
        if decision is not None:
            self.decisions.append(decision)
        return decision


def test_shortage_demotes_at_once_and_below_what_there_is():
    world = World(controller())
    assert world.at(0.0, FULL) is None
    decision = world.at(0.01, BITS4)
    assert decision.demotes and decision.before.pool_bytes == FULL
    assert decision.after.pool_bytes == int((1 - SLACK) * BITS4)
    assert "memory is short by" in decision.reason
    # A little less again is within what was given back beyond need.
    assert world.at(0.02, BITS4 * (1 - 0.9 * SLACK)) is None


def test_memory_given_back_is_taken_after_it_lasted_and_within_five_seconds():
    world = World(controller())
    world.at(0.0, BITS4)
    times = np.arange(0.1, 10, 0.1)
    rises = [(t, d) for t in times if (d := world.at(t, 2 * FULL)) is not None]
    assert len(rises) == 1
    assert CALM <= rises[0][0] <= 5.0
    assert rises[0][1].after.pool_bytes == FULL
    assert not rises[0][1].demotes


def test_a_reserve_stays_free():
    world = World(controller(reserve=5000))
    assert world.at(0.0, FULL).after.pool_bytes == int((1 - SLACK) * (FULL - 5000))


def test_noise_about_the_limit_changes_nothing():
    rng = np.random.default_rng(0)
    world = World(controller())
    for i in range(1000):
        world.at(0.1 * i, FULL * rng.uniform(1.0, 1.3))
    assert not world.decisions


@pytest.mark.parametrize("hertz", [0.05, 0.2, 1.0, 3.0, 20.0])
@pytest.mark.parametrize("shape", [np.sin, lambda x: np.sign(np.sin(x))])
@pytest.mark.parametrize("sampled", [0.01, 0.1])
def test_oscillating_memory_does_not_thrash(hertz, shape, sampled):
    world = World(controller())
    seconds = 120
    for t in np.arange(0, seconds, sampled):
        world.at(t, 0.5 * FULL * (1 + 0.2 * shape(2 * math.pi * hertz * t)))
    fast = hertz * CALM >= 1
    # Fast swings: down to the bottom, in steps of 5 %, and no more. Slow ones: once per swing.
    falls = 2 + math.log(0.6 / 0.4) / -math.log(1 - SLACK)
    assert len(world.decisions) <= (falls if fast else falls * (1 + hertz * seconds))
    assert len(world.decisions) / seconds <= 1.0
    if fast and sampled < 0.1:
        assert (
            sum(not d.demotes for d in world.decisions) <= 1
        )  # from 5 % below the bottom up to it
        assert world.controller.plan.pool_bytes <= 0.41 * FULL
        assert world.controller.plan.pool_bytes >= 0.36 * FULL


def test_any_input_changes_the_plan_a_bounded_number_of_times():
    """Free memory at random at 100 Hz: rises are CALM apart, falls 5 % each."""
    rng = np.random.default_rng(1)
    world, seconds = World(controller()), 60
    for t in np.arange(0, seconds, 0.01):
        world.at(t, FULL * rng.uniform(0.3, 1.2) if rng.random() < 0.5 else FULL)
    rises = sum(not d.demotes for d in world.decisions)
    assert rises <= seconds / CALM
    assert len(world.decisions) <= (1 + rises) * (2 + math.log(0.3) / math.log(1 - SLACK))


def test_less_than_the_least_is_the_least():
    world = World(controller())
    decision = world.at(0.0, 10)
    assert decision.after.pool_bytes == SIZES.largest(SIZES.all_at(0))
    assert world.at(1.0, 10) is None


def test_unknown_memory_decides_nothing():
    assert controller().observe(Snapshot(1.0)) is None


# ---- what the user asks ------------------------------------------------------------------------


def test_set_memory_acts_at_once_both_ways_and_is_not_undone():
    world = World(controller())
    half = world.controller.set_memory(FULL // 2)
    assert half.demotes and half.after.pool_bytes == FULL // 2
    assert world.at(1.0, 3 * FULL) is None  # more is free, but the user said so
    for t in np.arange(1, 20, 0.5):
        assert world.at(t, 3 * FULL) is None
    whole = world.controller.set_memory(FULL)
    assert whole.after.pool_bytes == FULL and "memory set to" in whole.reason


def test_set_memory_that_cannot_be_changes_nothing():
    control = controller()
    before = control.plan
    with pytest.raises(BudgetError, match="one expert at 2-bit needs"):
        control.set_memory(10)
    assert control.plan is before and len(control.log) == 1


def test_planners_that_know_memory_only_refuse_goals():
    with pytest.raises(ValueError, match="loss: this planner knows memory only"):
        controller().set_quality(0.1)
    with pytest.raises(ValueError, match="latency: this planner knows memory only"):
        controller().set_latency_target(0.1)


def test_a_curve_planner_works_too():
    levels = np.stack([SIZES.all_at(level) for level in (0, 1, 2, 3)])
    curve = CurvePlanner(Curve(levels, np.array([0.4, 0.3, 0.2, 0.1], np.float32)))
    world = World(controller(planner=curve))
    decision = world.at(0.0, 1.1 * BITS4)
    assert decision.after.loss == pytest.approx(0.2)


# ---- speeds, with a planner that knows them ----------------------------------------------------


@dataclass(frozen=True)
class FakeSituation:
    goal: Goal = Goal()  # noqa: RUF009 (frozen)
    costs: Costs | None = None
    use: np.ndarray | None = None
    caution: float = 1.0


class FakePlanner(EvenPlanner):
    """Wants 2 bits where reading is slow, so that a change of speed is a change of plan."""

    def __init__(self):
        self.situation = FakeSituation()
        self.plans = 0

    def plan(self, sizes, pool_bytes, *, exact):
        self.plans += 1
        plan = super().plan(sizes, pool_bytes, exact=exact)
        costs, goal = self.situation.costs, self.situation.goal
        if costs is not None:
            # Another price with every bandwidth, so that plans differ.
            plan = replace(plan, want_level=plan.want_level, price=costs.bandwidth)
            level = int(np.clip(math.log2(costs.bandwidth / 1e8), 0, 3))
            plan = replace(plan, want_level=sizes.all_at(level))
        if goal.latency is not None and goal.latency < 1e-3:
            raise GoalError("a latency of 1 ms cannot be met", plan)
        return plan


def costs_of(snapshot):
    slow = 2.0 if snapshot.power == "battery" else 1.0
    bandwidth = snapshot.tiers["disk"].bandwidth.mean
    return Costs(slow * SIZES.bytes_at * 1e-9, 1e-3, bandwidth, 1e-4)


def disk(bandwidth, std=0.0, **rest):
    return {"tiers": {"disk": Link(Estimate(bandwidth, std, 9), Estimate(1e-4))}} | rest


def joint(**options):
    control = controller(planner=FakePlanner(), costs=costs_of, goal=Goal(), **options)
    world = World(control)
    assert "speeds are known" in world.at(0.0, 2 * FULL, **disk(8e8)).reason
    return world


def test_a_slower_disk_is_planned_with_at_once_a_faster_one_later():
    world = joint()
    assert world.at(0.1, 2 * FULL, **disk(7.9e8)) is None  # no news
    slower = world.at(0.2, 2 * FULL, **disk(3e8))
    assert "bandwidth fell to 38% of what was planned with" in slower.reason
    assert world.controller.planner.situation.costs.bandwidth == 3e8
    rises = [t for t in np.arange(0.3, 6, 0.1) if world.at(t, 2 * FULL, **disk(9e8)) is not None]
    assert len(rises) == 1 and CALM <= rises[0] - 0.3 <= CALM + 0.2
    assert world.controller.planner.situation.costs.bandwidth == 9e8


@pytest.mark.parametrize("hertz", [1.0, 20.0])
def test_a_flapping_link_does_not_thrash(hertz):
    world = joint()
    for t in np.arange(0, 60, 0.01):
        bandwidth = 8e8 if math.sin(2 * math.pi * hertz * t) > 0 else 2e8
        world.at(t, 2 * FULL, **disk(bandwidth))
    assert len(world.decisions) == 2
    assert world.controller.planner.situation.costs.bandwidth == 2e8
    assert world.controller.planner.plans <= 4


def test_noise_that_the_monitor_knows_of_is_no_news():
    rng = np.random.default_rng(2)
    world = joint()
    for i in range(500):
        world.at(0.1 * i, 2 * FULL, **disk(8e8 * (1 + 0.1 * rng.standard_normal()), 1e8))
    assert len(world.decisions) <= 2


def test_power_changes_are_planned_with():
    world = joint()
    world.at(0.1, 2 * FULL, **disk(8e8, power="mains"))
    world.at(0.2, 2 * FULL, **disk(2e8, power="battery"))
    assert "power is now battery" in world.decisions[-1].reason
    assert "compute fell to 50%" in world.decisions[-1].reason


def test_goals_reach_the_planner_and_one_that_cannot_be_met_changes_nothing():
    world = joint()
    control = world.controller
    decision = control.set_latency_target(0.05)
    assert "latency target set to 50 ms per token" in decision.reason
    assert control.planner.situation.goal == Goal(latency=0.05)
    control.set_quality(0.01)
    assert control.planner.situation.goal == Goal(0.01, 0.05)
    before = control.plan
    with pytest.raises(ValueError, match="cannot be met"):
        control.set_latency_target(1e-4)
    assert control.plan is before
    control.set_use(np.full(X, 0.5))
    control.set_memory(FULL)
    assert control.planner.situation.use[0] == 0.5
    assert control.planner.situation.goal == Goal(0.01, 0.05)


def test_when_a_goal_is_lost_on_the_way_the_nearest_plan_is_taken():
    world = joint()
    world.controller._goal = Goal(latency=1e-4)
    decision = world.at(0.1, BITS4, **disk(8e8))
    assert "goal missed: a latency of 1 ms cannot be met" in decision.reason
    assert decision.demotes


# ---- the log -----------------------------------------------------------------------------------


def test_the_log_can_be_read():
    world = World(controller())
    world.at(12.5, BITS4)
    world.controller.set_memory(BITS2 + 100)
    lines = world.controller.explain().splitlines()
    assert len(lines) == 3
    assert "start: pool" in lines[0] and "every expert resident at exact" in lines[0]
    assert lines[1].lstrip().startswith("12.50 s  memory is short by")
    assert " -> " in lines[1] and "3-bit" in lines[1]
    assert "2-bit" in lines[2]


def test_the_log_does_not_grow_for_ever():
    control = controller()
    for i in range(3 * LOG):
        control.set_memory(FULL - i)
    assert len(control.log) == LOG


# ---- cautious ----------------------------------------------------------------------------------


def test_rises_that_were_wrong_take_longer_and_are_forgiven():
    cautious = Cautious(0.0, 0.05)
    cautious.update(0.0, 1.0)

    def rise(time):
        begin = time
        while cautious.update(time, 2.0) < 2.0:
            time += 0.1
        cautious.update(time + 0.1, 1.0)
        return time - begin, time + 0.2

    first, time = rise(0.0)
    second, time = rise(time)
    third, time = rise(time)
    assert first == pytest.approx(CALM, abs=0.11)
    assert second == pytest.approx(2 * CALM, abs=0.11)
    assert third == pytest.approx(LONGEST_CALM, abs=0.11)
    time += FORGIVE
    cautious.update(time, 1.0)
    assert rise(time)[0] == pytest.approx(CALM, abs=0.11)
