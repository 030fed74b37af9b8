"""Observe, plan, decide: when a running model gets another plan, and why.

    what changes            worse                       better
    free memory             at once, and 5 % more       after 2 s, to the least of these seconds
    bandwidth, compute      at once, from 10 %          after 2 s, from 10 %
    power source            at once                     at once
    memory, quality and latency that the user sets: at once

See cautious.py for what keeps a figure that swings from changing the plan with every swing. Applying a
decision is the caller's work: a demotion at once, a promotion as background upgrades.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from comoe.config import format_bytes
from comoe.policy.cautious import Cautious
from comoe.policy.costs import Costs
from comoe.policy.joint import GoalError
from comoe.policy.plan import BudgetError, Plan, Planner, Sizes
from comoe.policy.snapshot import Snapshot

SLACK = 0.05  # share of the pool that a demotion gives back beyond what is needed, and a rise takes
LOG = 256  # decisions that are kept
SAME = 0.1  # relative change of speed that no plan is made for
WORTHWHILE = 0.1  # share of loss or time that another plan for the same memory must save
HEEDED = math.log(1.5)  # factor of the price of time that another plan is made for
LEAST_CAUTION = 1e-3
NOISE = 3.0  # standard deviations of a speed that are noise


@dataclass(frozen=True)
class Decision:
    """time: seconds on the snapshots' clock.  reason: for people.  before: None for the first plan."""

    time: float
    reason: str
    before: Plan | None
    after: Plan

    @property
    def demotes(self) -> bool:
        """Whether the pool shrinks: memory must be given back now."""
        return self.before is not None and self.after.pool_bytes < self.before.pool_bytes

    def describe(self) -> str:
        pools = format_bytes(self.after.pool_bytes)
        if self.before is not None and self.before.pool_bytes != self.after.pool_bytes:
            pools = f"{format_bytes(self.before.pool_bytes)} -> {pools}"
        return f"{self.time:9.2f} s  {self.reason}: pool {pools}; {self.after.describe()}"


class Controller:
    """Keeps the plan of one model true to what the monitor sees and the user asks.

    planner: any Planner; one with a `situation` (JointPlanner) is also told goal, costs and use.
    memory: bytes of pool that the user allows.
    costs: what things take now, given a snapshot; None, or a planner without a situation: speeds are not
        looked at.  goal: of the situation, for set_quality and set_latency_target.
    reserve: bytes of the system's free memory that stay free.  grain: pools are whole multiples of it.
    calm: see Cautious.
    """

    def __init__(
        self,
        planner: Planner,
        sizes: Sizes,
        memory: int,
        *,
        exact: bool = False,
        costs: Callable[[Snapshot], Costs] | None = None,
        goal: Any = None,
        reserve: int = 0,
        grain: int = 1,
        calm: float = 2.0,
        time: float = 0.0,
    ):
        self.planner, self.sizes, self.exact = planner, sizes, exact
        self.log: deque[Decision] = deque(maxlen=LOG)
        self._memory, self._costs_of, self._goal, self._reserve = memory, costs, goal, reserve
        self._grain = grain
        least = sizes.largest(planner.least(sizes, exact=exact))
        self._least = -(-least // grain) * grain
        self._pool = Cautious(0.0, SLACK, overshoot=SLACK, calm=calm)
        self._pool.reset(float(memory))
        self._bandwidth = Cautious(SAME, SAME, calm=calm)
        self._compute = Cautious(SAME, SAME, calm=calm)
        self._power: str | None = None
        self._costs: Costs | None = None
        self._use: np.ndarray | None = None
        self.caution = 1.0  # see Situation
        self._time = time
        self.plan = self._make(memory)
        self._decide("start", None, self.plan)

    # ---- what the user asks -------------------------------------------------------------------

    def set_memory(self, pool_bytes: int) -> Decision:
        """The pool's new limit; with too little for the goal, the plan that comes nearest to it. Raises
        BudgetError, and changes nothing, if the model cannot run in it."""
        plan, missed = self._make_nearest(pool_bytes)
        reason = "; ".join([f"memory set to {format_bytes(pool_bytes)}", *missed])
        self._memory = pool_bytes
        self._pool.reset(float(pool_bytes))
        return self._decide(reason, self.plan, plan)

    def set_quality(self, loss: float | None) -> Decision:
        """Nats per token that may be lost; None: no bound. Raises as the planner does."""
        text = "no bound" if loss is None else f"{loss:g} nats per token"
        return self._set_goal(f"quality set to {text}", loss=loss)

    def set_latency_target(self, seconds: float | None) -> Decision:
        """Seconds that a token may take; None: no target. Raises as the planner does."""
        text = "none" if seconds is None else f"{seconds * 1e3:g} ms per token"
        return self._set_goal(f"latency target set to {text}", latency=seconds)

    def set_use(self, use: np.ndarray | None) -> None:
        """float [X]: probability that a token uses each expert, for the next plans."""
        self._use = use

    def _set_goal(self, reason: str, **changes: float | None) -> Decision:
        if not hasattr(self.planner, "situation") or self._goal is None:
            raise ValueError(
                f"{next(iter(changes))}: this planner knows memory only; use JointPlanner and give the "
                "controller a goal"
            )
        before = self._goal
        self._goal = replace(before, **changes)
        try:
            plan = self._make(self.plan.pool_bytes)
        except ValueError:
            self._goal = before
            raise
        return self._decide(reason, self.plan, plan)

    # ---- what the monitor sees ----------------------------------------------------------------

    def observe(self, snapshot: Snapshot, held: int | None = None) -> Decision | None:
        """What to change now, if anything. held: bytes that the pool has taken from the system; default:
        all that it is planned to have."""
        self._time = max(self._time, snapshot.time)
        pool, reason = self._pool_for(snapshot, self.plan.pool_bytes if held is None else held)
        reasons = [reason] if reason else []
        reasons += self._speed_reasons(snapshot)
        if not reasons:
            return None
        try:
            plan, missed = self._make_nearest(pool)
        except BudgetError:
            plan, missed = self._make_nearest(self._least)
            missed = ["the least pool that computes", *missed]
        if _alike(plan, self.plan):
            return None
        return self._decide("; ".join([*reasons, *missed]), self.plan, plan)

    def heed(self, caution: float) -> Decision | None:
        """Of what is really lost: to keep to the goal, time had to be priced `caution` times as the plan says.
        Another plan, if that is far from it."""
        if self.plan.loss_limit == 0 or abs(math.log(caution)) < HEEDED:
            return None
        before = self.caution
        self.caution = min(max(before * caution, LEAST_CAUTION), 1.0)
        plan, _ = self._make_nearest(self.plan.pool_bytes)
        if _alike(plan, self.plan) and plan.price == self.plan.price:
            return None
        word = "more" if self.caution < before else "less"
        return self._decide(f"{word} is lost than allowed", self.plan, plan)

    def follow(self, use: np.ndarray) -> Decision | None:
        """Another plan, if one for the text at hand, which uses experts with probabilities float [X], is
        better by WORTHWHILE than the present one; the planner must be one with a situation."""
        self._use = use
        plan, _ = self._make_nearest(self.plan.pool_bytes)
        loss, seconds = self.planner.judge(self.sizes, self.plan)
        better = (plan.loss or 0.0) < (1.0 - WORTHWHILE) * loss  # None: every expert exact
        if plan.seconds is not None and seconds is not None and plan.price < math.inf:
            goal = self.planner.situation.goal
            if goal.loss is not None and loss <= goal.loss:
                better = plan.seconds < (1.0 - WORTHWHILE) * seconds
        if not better or _alike(plan, self.plan):
            return None
        return self._decide("the text uses other experts", self.plan, plan)

    def path_changed(self, snapshot: Snapshot, reason: str) -> Decision | None:
        """Another plan, if the way to where experts lie has become another one: its figures are believed
        at once, also when they are better."""
        if self._costs_of is None or not hasattr(self.planner, "situation"):
            return None
        self._time = max(self._time, snapshot.time)
        self._costs = self._costs_of(snapshot)
        self._bandwidth.reset(self._costs.bandwidth)
        plan, missed = self._make_nearest(self.plan.pool_bytes)
        if _alike(plan, self.plan):
            return None
        return self._decide("; ".join([reason, *missed]), self.plan, plan)

    def _pool_for(self, snapshot: Snapshot, held: int) -> tuple[int, str]:
        """Bytes of pool to plan with, and why they are others than now ("": they are not)."""
        now = self.plan.pool_bytes
        if snapshot.host_free is None:
            return now, ""
        # What the pool could have if it took all that is free.
        could = held + snapshot.host_free - self._reserve
        value = self._pool.update(self._time, float(min(could, self._memory)))
        target = max(int(value), self._least)
        if target < now:
            return target, f"memory is short by {format_bytes(now - could)}"
        return target, f"memory has been free for {self._pool.calm:g} s" if target > now else ""

    def _speed_reasons(self, snapshot: Snapshot) -> list[str]:
        """What has changed of speeds and power so much that the plan may be wrong; takes note of it."""
        if self._costs_of is None or not hasattr(self.planner, "situation"):
            return []
        fresh = self._costs_of(snapshot)
        reasons = [] if self._costs is not None else ["speeds are known"]
        noise = max((link.bandwidth.std for link in snapshot.tiers.values()), default=0.0)
        offered = np.isfinite(fresh.compute)
        # Only its changes matter: passes per second through all experts at all levels.
        speed = 1.0 / max(float(fresh.compute[offered].sum()), 1e-12)
        found = (
            (
                "bandwidth",
                self._bandwidth,
                fresh.bandwidth,
                min(NOISE * noise, 0.5 * fresh.bandwidth),
            ),
            ("compute", self._compute, speed, 0.0),
        )
        for name, cautious, figure, spread in found:
            before = cautious.value
            after = cautious.update(self._time, figure, spread)
            if before is not None and after != before:
                word = "fell" if after < before else "rose"
                reasons.append(f"{name} {word} to {after / before:.0%} of what was planned with")
        if self._power not in (None, snapshot.power):
            reasons.append(f"power is now {snapshot.power}")
        self._power = snapshot.power
        if reasons:
            self._costs = replace(fresh, bandwidth=self._bandwidth.value)
        return reasons

    # ---- parts --------------------------------------------------------------------------------

    def explain(self) -> str:
        """The decisions so far, one line each."""
        return "\n".join(decision.describe() for decision in self.log)

    def _make_nearest(self, pool_bytes: int) -> tuple[Plan, list[str]]:
        """A plan, and that it misses the goal if it does."""
        try:
            return self._make(pool_bytes), []
        except GoalError as error:
            if error.nearest is None:
                raise
            return error.nearest, [f"goal missed: {error}"]

    def _make(self, pool_bytes: int) -> Plan:
        if hasattr(self.planner, "situation"):
            known = {"goal": self._goal, "costs": self._costs, "use": self._use}
            known["caution"] = self.caution
            known = {name: value for name, value in known.items() if value is not None}
            self.planner.situation = replace(self.planner.situation, **known)
        pool_bytes = max(pool_bytes // self._grain * self._grain, 1)
        return self.planner.plan(self.sizes, pool_bytes, exact=self.exact)

    def _decide(self, reason: str, before: Plan | None, after: Plan) -> Decision:
        decision = Decision(self._time, reason, before, after)
        self.plan = after
        self.log.append(decision)
        return decision


def _alike(one: Plan, other: Plan) -> bool:
    return one.pool_bytes == other.pool_bytes and all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for name in ("held", "min_level", "want_level")
    )
