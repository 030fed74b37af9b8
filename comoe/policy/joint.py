"""The joint planner: how coarse every expert is and where its bytes live, decided at once.

An expert's option is a pair (held, used), see options.py. What is used and not held is read when a token
uses the expert, and then stays in the cache until other reads have pushed it out. With a cache that is
shared by all, that happens `age` tokens after its last use, the same for all experts (Che, Tung and Wang,
Hierarchical Web caching systems, 2002). So an expert with use p per token

    takes    held + missing * (1 - exp(-p age))                        bytes of memory on average
    costs    p * (compute + exp(-p age) * (missing / bandwidth + latency))    seconds per token
    loses    loss(used)                                                nats per token

and for a given age the choice is one knapsack (solver.py), with the cache's own memory counted in it. The
age is searched on a short grid for the first plan; later ones keep it. Latency is paid by layers, not by experts;
what follows from that is in whole_layers.py, and the plan is the best by Costs.token_time, which knows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from comoe.policy import whole_layers
from comoe.policy.costs import Costs
from comoe.policy.elsewhere import Elsewhere, calls_per_token
from comoe.policy.goal import Goal
from comoe.policy.options import SHARED, Options, expert_options
from comoe.policy.plan import EvenPlanner, Plan, Sizes, all_cached, require_room
from comoe.policy.solver import InfeasibleError, Problem, Solution, solve

AGES = (0.25, 1.0, 4.0, 16.0, 64.0)  # tokens
FIRST_AGE = 2  # of AGES
SLACK = 0.02  # share of the pool kept out of the plan: slabs, pages, and reads on their way
NEVER_WAIT = 1e12  # nats per second
SECONDS_PER_NAT = 1e-12  # the least price that is told from none


class GoalError(ValueError):
    """A loss or latency that no plan meets; the message says which, and what can be had.
    nearest: the Plan that comes nearest to it; None from least_memory."""

    def __init__(self, message: str, nearest: Plan | None = None):
        super().__init__(message)
        self.nearest = nearest


@dataclass(frozen=True)
class Situation:
    """What a plan is made for. use: float [X], probability that a token uses the expert; None: as
    measured by aggregation.  costs: None: reading is not priced, so nothing may be waited for.  caution: share, up to 1, of
    the price of time at which the plan alone loses all that the goal allows; the rest is for what is given
    away at misses.  elsewhere: a machine that computes experts; None: there is none."""

    goal: Goal = field(default_factory=Goal)
    costs: Costs | None = None
    use: np.ndarray | None = None
    caution: float = 1.0
    elsewhere: Elsewhere | None = None


@dataclass(frozen=True)
class _Answer:
    solution: Solution
    age_step: int  # of AGES; -1: nothing is read
    price: float
    whole: np.ndarray | None = (
        None  # bool [layers], held whole; None: every expert pays a latency of its own
    )


class JointPlanner:
    """Plans for one model; keeps the last multipliers and age, from which the next plan starts.

    loss: float [X, L] nats per token at `use`, nan: no such level.  use: float [X].  floor: int [X].
    """

    def __init__(self, loss: np.ndarray, use: np.ndarray, floor: np.ndarray | None = None):
        self.situation = Situation()
        self.loss, self.use, self._floor = loss, np.clip(use, 0.0, 1.0), floor
        self._options: Options | None = None
        self._options_with: tuple[np.ndarray, Options] | None = None  # levels of the other machine
        self._finer: np.ndarray | None = None
        self._multipliers: dict[str, np.ndarray] = {}
        self._age: int | None = None  # of AGES
        self._whole: tuple[object, np.ndarray | None] | None = None  # what for, and its last answer

    def least(self, sizes: Sizes, *, exact: bool) -> np.ndarray:
        """uint8 [X]: the coarsest levels that `plan` may choose."""
        if exact:
            return sizes.all_at(sizes.levels.exact)
        options = self._options_of(sizes)
        here = np.isfinite(options.loss) & ~options.away
        whole = np.where(here, options.held_bytes + options.missing, np.inf)
        return options.used[np.arange(len(whole)), whole.argmin(1)].astype(np.uint8)

    def plan(self, sizes: Sizes, pool_bytes: int, *, exact: bool) -> Plan:
        """The best plan for the pool and the situation.

        Raises BudgetError where the pool cannot hold one expert, GoalError where the goal cannot be met.
        """
        if exact or sizes.total(sizes.levels.exact) <= pool_bytes:
            return EvenPlanner().plan(sizes, pool_bytes, exact=True)
        least = self.least(sizes, exact=False)
        require_room(sizes, least, pool_bytes)
        options, situation = self._options_of(sizes), self.situation
        scale, room = self._scale(options), (1.0 - SLACK) * pool_bytes
        if situation.costs is None or situation.goal == Goal():
            answer = self._without_waiting(options, scale, room)
            if answer is None:
                return all_cached(sizes, least, pool_bytes)
        else:
            answer = self._with_waiting(sizes, options, scale, room, pool_bytes)
        return self._plan_of(sizes, options, answer, pool_bytes)

    def judge(self, sizes: Sizes, plan: Plan) -> tuple[float, float | None]:
        """(loss, seconds) per token of a plan in the present situation; seconds None without costs."""
        rows = np.arange(len(plan.min_level))
        loss = self.loss[rows, plan.min_level] @ self._scale(self._options_of(sizes))
        needed = sizes.needs[plan.min_level] & (sizes.records >= 0)
        absent = needed & ~plan.base[np.maximum(sizes.records, 0)]
        missing = np.where(absent, sizes.record_bytes[sizes.records], 0).sum(1)
        if plan.away is not None:
            missing[plan.away] = 0
        return float(loss), self._seconds(sizes, plan.min_level, missing, self._age, plan.away)

    def least_memory(self, sizes: Sizes) -> int:
        """Bytes of pool with which both the loss and the latency of the goal can be met. Raises GoalError
        if no memory is enough, ValueError unless goal has both and there are costs."""
        goal, costs = self.situation.goal, self.situation.costs
        if goal.loss is None or goal.latency is None or costs is None:
            raise ValueError("least_memory: expected a goal with a loss and a latency, and costs")
        options = self._options_of(sizes)
        found, why = [], None
        for step in range(len(AGES)):
            table = self._table(sizes, options, self._scale(options), step, None)
            limits = {"loss": goal.loss, "seconds": goal.latency - costs.dense}
            try:
                found.append(solve(table.problem("memory", limits)).loss)
            except InfeasibleError as error:
                why = error
        if not found:
            raise GoalError(f"no memory is enough for the goal: {why}") from why
        return int(np.ceil(min(found) / (1.0 - SLACK)))

    # ---- the objectives -----------------------------------------------------------------------

    def _without_waiting(self, options: Options, scale: np.ndarray, room: float) -> _Answer | None:
        """Least loss with all that is used held; None if not even the coarsest levels fit."""
        whole = np.isfinite(options.loss) & (options.missing == 0) & ~options.away
        loss = np.where(whole, options.loss * scale[:, None], np.inf)
        problem = replace(options.problem(room), loss=loss)
        try:
            solution = self._solve("memory", problem)
        except InfeasibleError:
            return None
        return _Answer(solution, -1, NEVER_WAIT)

    def _with_waiting(
        self, sizes: Sizes, options: Options, scale: np.ndarray, room: float, pool_bytes: int
    ) -> _Answer:
        """Least time for a loss, or least loss for a time."""
        goal, costs = self.situation.goal, self.situation.costs
        by_time = goal.latency is None
        objective, second = ("seconds", "loss") if by_time else ("loss", "seconds")
        limit = goal.loss if by_time else goal.latency - costs.dense
        why: list[InfeasibleError] = []

        def at(step: int, whole: np.ndarray | None = None) -> _Answer | None:
            table = self._table(sizes, options, scale, step, whole)
            spent = 0.0 if by_time or whole is None else (~whole).sum() * costs.latency
            try:
                problem = table.problem(objective, {"memory": room, second: limit - spent})
                solution = self._solve(objective, problem)
            except InfeasibleError as error:
                if whole is None:
                    why.append(error)
                return None
            multiplier = float(solution.multipliers[1])
            price = 1.0 / max(multiplier, SECONDS_PER_NAT) if by_time else multiplier
            return _Answer(solution, step, price, whole)

        best = self._best_age(at)
        if best is None:
            raise self._goal_error(sizes, options, min(why, key=_distance), pool_bytes)
        self._age = best.age_step
        if costs.latency > 0:
            best = self._best_whole(sizes, options, scale, pool_bytes, best, at)
        if by_time and self.situation.caution < 1.0:
            price = self.situation.caution * best.price
            best = self._at_price(sizes, options, scale, room, best, price)
        if not by_time and goal.loss is not None and best.solution.loss > goal.loss:
            nearest = self._plan_of(sizes, options, best, pool_bytes)
            raise GoalError(
                f"the latency of {goal.latency * 1e3:.3g} ms per token can be met, but then the expected "
                f"loss is {nearest.loss:.3g} nats per token, above the {goal.loss:.3g} allowed; give "
                "more memory or time, or allow more loss",
                nearest,
            )
        return best

    def _best_whole(
        self,
        sizes: Sizes,
        options: Options,
        scale: np.ndarray,
        pool_bytes: int,
        first: _Answer,
        at: Callable[[int, np.ndarray | None], _Answer | None],
    ) -> _Answer:
        """The best of `first`, in which no layer is held whole on purpose, and of those with some that are; for
        the same goal and memory the last ones again."""
        wanted = (self.situation.goal, pool_bytes)
        if self._whole is not None and self._whole[0] == wanted:
            again = first if self._whole[1] is None else at(first.age_step, self._whole[1])
            if again is not None:
                return again
        best, least = first, self._true_objective(sizes, options, first)
        order, low, high = self._dearer(sizes, options, scale, first)[0], 0, len(sizes.num_experts)
        for _ in range(whole_layers.TRIED):
            number = (low + high + 1) // 2
            whole = np.zeros(len(order), bool)
            whole[order[:number]] = True
            answer = at(first.age_step, whole)
            more = False
            if answer is not None:
                found = self._true_objective(sizes, options, answer)
                if found < least:
                    best, least = answer, found
                # Whether at these prices the next layer would be cheaper whole, or the last one was not.
                more = whole_layers.next_pays(number, *self._dearer(sizes, options, scale, answer))
            low, high = (number, high) if more else (low, number - 1)
            if low >= high:
                break
        self._whole = (wanted, best.whole)
        return best

    def _dearer(
        self, sizes: Sizes, options: Options, scale: np.ndarray, answer: _Answer
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """(layers, those that cost least to hold whole first; what each costs more then, latency left out; what a
        latency costs), at the prices of memory, time and loss of `answer`, in units of the objective."""
        none = np.zeros(len(sizes.num_experts), bool)
        table = self._table(sizes, options, scale, answer.age_step, none)
        memory, second = answer.solution.multipliers
        by_time = self.situation.goal.latency is None
        names = ("seconds", "loss") if by_time else ("loss", "seconds")
        value = table.values[names[0]] + second * table.values[names[1]]
        value = np.where(np.isfinite(options.loss), value + memory * table.values["memory"], np.inf)
        layer = np.repeat(np.arange(len(none)), sizes.num_experts)
        latency = self.situation.costs.latency * (1.0 if by_time else second)
        waits = (options.missing > 0) | options.away
        return *whole_layers.dearer(value, waits, layer), latency

    def _true_objective(self, sizes: Sizes, options: Options, answer: _Answer) -> float:
        """Seconds per token, or nats where the goal is a latency."""
        if self.situation.goal.latency is not None:
            return answer.solution.loss
        rows, choice = np.arange(len(options.used)), answer.solution.choice
        used, missing = options.used[rows, choice], options.missing[rows, choice]
        away = options.away[rows, choice]
        return self._seconds(sizes, used.astype(np.uint8), missing, answer.age_step, away)

    def _at_price(
        self,
        sizes: Sizes,
        options: Options,
        scale: np.ndarray,
        room: float,
        answer: _Answer,
        price: float,
    ) -> _Answer:
        """Least loss + price * time, with the cache and the whole layers of `answer`."""
        table = self._table(sizes, options, scale, answer.age_step, answer.whole)
        table.values["both"] = table.values["loss"] + price * table.values["seconds"]
        solution = self._solve("both", table.problem("both", {"memory": room}))
        return replace(answer, solution=solution, price=price)

    def _goal_error(
        self, sizes: Sizes, options: Options, why: InfeasibleError, pool_bytes: int
    ) -> GoalError:
        goal, costs = self.situation.goal, self.situation.costs
        if why.limit == 0:
            nearest = all_cached(sizes, self.least(sizes, exact=False), pool_bytes)
            return GoalError(f"the pool is too small for any plan: {why}", nearest)
        nearest = self._plan_of(
            sizes, options, _Answer(why.nearest, FIRST_AGE, NEVER_WAIT), pool_bytes
        )
        if goal.latency is None:
            return GoalError(
                f"an expected loss of {goal.loss:.3g} nats per token cannot be met; the least is "
                f"{why.least:.3g}",
                nearest,
            )
        return GoalError(
            f"a latency of {goal.latency * 1e3:.3g} ms per token cannot be met in {pool_bytes:,} bytes; "
            f"the least is {(why.least + costs.dense) * 1e3:.3g} ms, of which {costs.dense * 1e3:.3g} are "
            f"outside the experts, with a loss of {nearest.loss:.3g} nats per token; allow that much "
            "time, or give more memory",
            nearest,
        )

    def _best_age(self, at: Callable[[int], _Answer | None]) -> _Answer | None:
        """The last age, if it still does; else the best one uphill from the first."""
        if self._age is not None:
            best = at(self._age)
            if best is not None:
                return best
        best = at(FIRST_AGE)
        for way in (-1, 1):
            step = FIRST_AGE + way
            while 0 <= step < len(AGES):
                answer = at(step)
                better = answer is not None and (
                    best is None or answer.solution.loss < best.solution.loss
                )
                if not better and best is not None:
                    break
                best, step = (answer if better else best), step + way
        return best

    # ---- parts --------------------------------------------------------------------------------

    def _table(
        self,
        sizes: Sizes,
        options: Options,
        scale: np.ndarray,
        age_step: int,
        whole: np.ndarray | None,
    ) -> _Table:
        costs, use = self.situation.costs, self._live_use()
        if whole is not None:
            costs = replace(costs, latency=0.0)
        there = self.situation.elsewhere
        call = np.inf if there is None else there.seconds(1)
        table = _Table(options, costs, scale, use, AGES[age_step], call)
        if whole is not None:
            waits = (options.missing > 0) | options.away
            forbidden = np.repeat(whole, sizes.num_experts)[:, None] & waits
            for name in ("seconds", "loss"):
                table.values[name] = np.where(forbidden, np.inf, table.values[name])
        return table

    def _solve(self, name: str, problem: Problem) -> Solution:
        start = self._multipliers.get(name)
        solution = solve(problem, start)
        self._multipliers[name] = solution.multipliers
        return solution

    def _options_of(self, sizes: Sizes) -> Options:
        """Made once: sizes and losses of a store do not change."""
        if self._options is None:
            self._options = expert_options(sizes, self.loss, self.use, floor=self._floor)
        there = self.situation.elsewhere
        if there is None or not there.available:
            return self._options
        if self._options_with is None or not np.array_equal(self._options_with[0], there.level):
            floor = 0 if self._floor is None else np.asarray(self._floor)
            level = np.where(there.level >= floor, there.level, -1)
            with_it = self._options.with_elsewhere(level, self.loss)
            self._options_with = (there.level.copy(), with_it)
        return self._options_with[1]

    def _live_use(self) -> np.ndarray:
        use = self.situation.use
        return self.use if use is None else np.clip(use, 0.0, 1.0)

    def _scale(self, options: Options) -> np.ndarray:
        """float [X]: loss at the present uses over that at the measured ones. An expert that was never
        seen has no measured loss to scale."""
        if self.situation.use is None:
            return np.ones(len(options.use))
        live, before = self._live_use(), options.use
        ratio = live.sum() / max(before.sum(), 1e-9)  # experts per token may have been a guess
        return np.where(before > 0, live / np.maximum(ratio * before, 1e-9), 1.0)

    def _plan_of(self, sizes: Sizes, options: Options, answer: _Answer, pool_bytes: int) -> Plan:
        rows = np.arange(len(options.held))
        choice = answer.solution.choice
        held, used = options.held[rows, choice], options.used[rows, choice].astype(np.uint8)
        goal = self.situation.goal
        base = sizes.chosen(held)
        with_base = held == SHARED
        if with_base.any():
            base |= sizes.shared & sizes.chosen(np.where(with_base, used.astype(np.int8), -1))
        loss = options.loss[rows, choice] @ self._scale(options)
        away = options.away[rows, choice]
        missing = options.missing[rows, choice]
        seconds = self._seconds(sizes, used, missing, answer.age_step, away)
        return Plan(
            sizes.levels,
            np.maximum(held, -1),
            used,
            self._finer_than(sizes, used),
            int(pool_bytes - sizes.record_bytes[base].sum()),
            pool_bytes,
            base=base,
            price=answer.price,
            loss=float(loss),
            seconds=seconds,
            away=away if away.any() else None,
            loss_limit=goal.loss if goal.loss is not None and goal.latency is None else 0.0,
            caution=self.situation.caution,
        )

    def _seconds(
        self,
        sizes: Sizes,
        used: np.ndarray,
        missing: np.ndarray,
        age_step: int | None,
        away: np.ndarray | None = None,
    ) -> float | None:
        """Expected per token; missing: [X] bytes that a use needs beside what is held.  away: bool [X]."""
        if self.situation.costs is None:
            return None
        use = self._live_use()
        age = AGES[FIRST_AGE if age_step is None or age_step < 0 else age_step]
        misses = np.exp(-use * age) * (missing > 0)
        here, calls = used.astype(np.int64), 0.0
        if away is not None and away.any():
            here = np.where(away, -1, here)
            calls = calls_per_token(away, use, sizes.num_experts)
            calls *= self.situation.elsewhere.seconds(1)
        costs = self.situation.costs
        return calls + costs.token_time(sizes, here, use, missing * misses, misses=misses)

    def _finer_than(self, sizes: Sizes, levels: np.ndarray) -> np.ndarray:
        """uint8 [X]: the next finer level of each expert, one that adds to the records of the present
        one if there is one; the present one where there is none but the exact weights."""
        if self._finer is None:
            needs, count = sizes.needs, len(sizes.levels)
            adds = ~(needs[:, None] & ~needs[None]).any(2)  # [from, to]
            later = np.arange(count)[:, None] < np.arange(count)
            later[:, sizes.levels.exact] = False
            known = sizes.has & np.isfinite(self.loss)
            self._finer = np.tile(np.arange(count, dtype=np.uint8), (len(sizes.has), 1))
            for level in range(count):
                for wanted in (later[level], later[level] & adds[level]):
                    offered = known & wanted
                    found = offered.any(1)
                    self._finer[found, level] = offered[found].argmax(1)
        return self._finer[np.arange(len(levels)), levels]


def _distance(error: InfeasibleError) -> tuple[bool, float]:
    """For the infeasible problem that came nearest: memory is the harder limit."""
    return error.limit == 0, error.least


class _Table:
    """Memory, seconds and loss of every option, float64 [X, O], for a given age of the cache."""

    def __init__(
        self,
        options: Options,
        costs: Costs,
        scale: np.ndarray,
        use: np.ndarray,
        age: float,
        call: float,
    ):
        """call: seconds of having an expert computed on another machine."""
        stays = np.exp(-use * age)[:, None]
        rows = np.arange(len(use))[:, None]
        offered = np.isfinite(options.loss)
        read = (options.missing > 0) * costs.latency + options.missing / costs.bandwidth
        seconds = costs.compute[rows, options.used] + (1.0 - costs.overlap) * stays * read
        if options.away.any():
            seconds = np.where(options.away, call, seconds)
            offered = offered & np.isfinite(seconds)
        self._sharing, self._shared_bytes = options.sharing, options.shared_bytes
        self.values = {
            "memory": options.held_bytes + options.missing * (1.0 - stays),
            "seconds": np.where(offered, use[:, None] * seconds, np.inf),
            "loss": np.where(offered, options.loss * scale[:, None], np.inf),
        }

    def problem(self, objective: str, limits: dict[str, float]) -> Problem:
        """Least `objective` within `limits`."""
        shared_cost = [self._shared_bytes * (name == "memory") for name in limits]
        return Problem(
            self.values[objective],
            np.stack(
                [np.where(np.isfinite(self.values[name]), self.values[name], 0) for name in limits]
            ),
            np.array(list(limits.values())),
            tuple(limits),
            shared=self._sharing,
            shared_cost=np.stack(shared_cost).astype(np.float64),
        )
