"""The one optimiser: an option for every expert, so that the loss is least under a few limits.

    minimise   sum_x (loss[x, o_x] + penalty[x, o_x])
    subject to sum_x cost[r, x, o_x] + sum_{shared s in use} shared_cost[r, s] <= limits[r]     for every r

A multiple-choice knapsack. With a multiplier m_r >= 0 for each limit it falls apart: every expert takes
the option with the least loss + penalty + sum_r m_r cost_r, one argmin, which only ever picks vertices
of the lower convex hull of its options. The multipliers are found by bracketing and interpolation in
their logarithms, one inside the other where there are several limits, from the last ones if they are
given. What they leave over is filled greedily along the edges of the hulls, steepest first, and so the
result is worse than the best possible by less than one step of one expert per limit that binds.

Shared costs (a base that many experts add to) are charged once, see shared_costs.py: exactly where few
of them hang together, by a local search where many do.

numpy only. One evaluation over X experts with O options reads (1 + limits) X O doubles.
Lagrangian relaxation of the multiple-choice knapsack: Kellerer, Pferschy, Pisinger, Knapsack Problems
(2004), chapter 11.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from comoe.policy.shared_costs import Groups, LocalSearch, Sharing, priced_values

GAP = 1e-4  # the search ends when what is left over is worth less than this share of the loss
SAME = 1e-4  # multipliers nearer than this share are one: whose edges lie between them is up to the fill
MAX_STEPS = 60  # of each search for one multiplier
FIRST_FACTOR = 1.05  # from a multiplier to the next one tried; squared each time
MAX_FILLS = 24  # rounds of the greedy fill
FEW_LEFT = 256  # experts among which it goes on where they are many
TINY = 1e-300
CLOSE = 1e-2  # a quicker search will do if it ends within this share of the bound
MANY = 500  # experts from which the sums are smooth enough for it
MAX_NEWTON = 24  # steps of it
MOST_IDLE = 12  # of them that come no nearer
AHEAD = 1.05  # factor of a multiplier for differences
SMOOTH = 0.02  # logarithm of a multiplier over which steps of single experts average out
FLAT = 1e-3  # share of a limit that a factor e must change at least
MOST_REACH = 100.0
MOST = 1e25  # beyond that no price makes a limit hold
FARTHEST = 1e-12  # of where it starts; a price below that is as good as none
REACH = 1.0  # of its first step, in logarithms
STEPS_APART = 4.0  # mean shares of an expert from the limits at which it ends
WIDER = 1.5  # how much further below the limits it aims after each step that came near
STEEPEST = 1e18  # a multiplier above this many times the mean slope: the limit cannot be met


@dataclass(frozen=True)
class Problem:
    """X experts with O options each, R limits.

    loss: float [X, O], nats per token; inf or nan: not offered.  cost: float [R, X, O], >= 0.
    limits: float [R].  names: of the limits, for messages.  penalty: float [X, O] counted like loss but
    reported apart, e.g. nats for the bytes of moving there from the present plan.
    shared: int [X, O, M], what an option shares with others, -1 for nothing; or a Sharing, which spares
    later problems of the same options some of the work.  shared_cost: [R, S].
    """

    loss: np.ndarray
    cost: np.ndarray
    limits: np.ndarray
    names: tuple[str, ...] = ()
    penalty: np.ndarray | None = None
    shared: np.ndarray | Sharing | None = None
    shared_cost: np.ndarray | None = None


@dataclass(frozen=True)
class Solution:
    """choice: int64 [X].  loss, penalty: their sums.  used: float [R], shared costs included.
    multipliers: float [R], to start the next search from.  bound: no choice has less loss + penalty
    than this (nan where costs are shared).  evaluations: of all options."""

    choice: np.ndarray
    loss: float
    penalty: float
    used: np.ndarray
    multipliers: np.ndarray
    bound: float
    evaluations: int


class InfeasibleError(ValueError):
    """No choice meets the limits. `limit`: index of the first that cannot be met beside those before
    it; `least`: what it would have to be; `nearest`: the best Solution when it is that."""

    def __init__(self, message: str, limit: int, least: float, nearest: Solution):
        super().__init__(message)
        self.limit, self.least, self.nearest = limit, least, nearest


def solve(problem: Problem, start: np.ndarray | None = None) -> Solution:
    """The option for every expert.

    start: multipliers of an earlier Solution of a similar problem; makes the search shorter, not
    different.  Raises InfeasibleError, and ValueError for arrays that do not fit together.
    """
    priced = _Priced(problem)
    multipliers = priced.guess() if start is None else _checked_start(start, priced)
    if _smooth(priced) and (multipliers > 0).all():
        newton = _Newton(priced, multipliers)
        point = newton.run()
        if point is not None:
            return priced.solution(point, newton.bound)
        multipliers = newton.nearest.multipliers
    point = _Search(priced, multipliers).run()
    if point is None:
        point = _feasible_point(problem, priced)
    return priced.solution(_fill(priced, point))


def _smooth(priced: _Priced) -> bool:
    """Whether there are limits to search for together, and experts enough to do so."""
    return len(priced.limits) > 1 and priced.all is not None and priced.shape[0] >= MANY


@dataclass(frozen=True)
class _Point:
    """A choice, what it uses, and the multipliers that it is best for."""

    choice: np.ndarray
    used: np.ndarray
    objective: float
    multipliers: np.ndarray


class _Priced:
    """The problem as one table: row 0 the loss, row 1 + r cost r, columns expert by expert."""

    def __init__(self, problem: Problem):
        loss = np.asarray(problem.loss, np.float64)
        cost = np.asarray(problem.cost, np.float64)
        self.limits = np.array(problem.limits, np.float64)
        if loss.ndim != 2 or 0 in loss.shape or cost.shape != (len(self.limits), *loss.shape):
            raise ValueError(
                "solve: expected loss [X, O], cost [R, X, O] and limits [R] with X, O >= 1, got "
                f"{loss.shape}, {cost.shape} and {self.limits.shape}"
            )
        self.names = problem.names or tuple(f"limit {r}" for r in range(len(self.limits)))
        self.shape = loss.shape
        self.penalty = None if problem.penalty is None else np.asarray(problem.penalty, np.float64)
        offered = np.isfinite(loss)
        if not offered.any(1).all():
            raise ValueError(
                f"solve: expert {int(np.argmin(offered.any(1)))} has no option with a finite loss; "
                "give it one, such as its exact weights"
            )
        if not (cost >= 0).all() and not (np.where(offered, cost, 0) >= 0).all():
            raise ValueError("solve: cost: expected finite values >= 0; check sizes and times")
        objective = loss if self.penalty is None else loss + self.penalty
        self.loss = loss
        self.offered = offered.reshape(-1)
        self.table = np.empty((1 + len(self.limits), loss.size))
        self.table[0] = np.where(offered, objective, np.inf).reshape(-1)
        self.table[1:] = np.where(offered, cost, 0).reshape(len(self.limits), loss.size)
        # Buffers of our own: fresh megabytes would be paged in anew at each evaluation.
        self.buffers = np.empty((2, loss.size))
        self.first = np.arange(loss.shape[0]) * loss.shape[1]
        self.shared, self.shared_cost = _shared_of(problem, self.shape)
        self.evaluations = 0
        self.focus: _Part | None = None
        self.all, self.local = self._evaluators()

    def _evaluators(self) -> tuple[_Part | None, LocalSearch | None]:
        """What chooses for all experts: one of the two."""
        if self.shared is None:
            return _Part(self, np.arange(self.shape[0]), None), None
        if self.shared.layout is None:
            return None, LocalSearch(self.shared, self.shared_cost)
        table = self.table.reshape(-1, *self.shape)
        groups = Groups.of(self.shared.layout, table, self.shared_cost)
        return _Part(self, np.flatnonzero(self.shared.free), groups), None

    def set_objective(self, objective: np.ndarray) -> None:
        """Another one than the loss: float [X * O], or [1] for all alike."""
        self.table[0] = np.where(self.offered, objective, np.inf)
        self.all, self.local = self._evaluators()

    def choose(self, multipliers: np.ndarray) -> _Point:
        """The best choice when each unit of cost r has the price multipliers[r]."""
        self.evaluations += 1
        part = self.focus or self.all
        if part is not None:
            return part.choose(multipliers)
        values = priced_values(self.table, multipliers, self.buffers).reshape(self.shape)
        choice = self.local.choose(values, values.argmin(1), multipliers)
        return self.point(choice, multipliers)

    def point(self, choice: np.ndarray, multipliers: np.ndarray) -> _Point:
        totals = self.table.take(self.first + choice, axis=1).sum(1)
        used = totals[1:]
        if self.shared is not None:
            used = used + self.shared_used(choice)
        return _Point(choice, used, float(totals[0]), multipliers.copy())

    def shared_used(self, choice: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """float [R]: the shared costs of a choice [X], or of that of some experts alone."""
        return self.shared_cost[:, self.shared.open(choice, rows)].sum(1)

    def parties(self, rows: np.ndarray) -> int:
        """How many decide for these experts: each for itself, or its group."""
        if self.shared is None or self.shared.layout is None:
            return rows.size
        group = self.shared.layout.group_of[rows]
        return int((group < 0).sum()) + np.unique(group[group >= 0]).size

    def focus_on(self, rows: np.ndarray, point: _Point) -> None:
        """From now on only these experts, and who shares costs with them, are evaluated, where that pays.

        The others stay as they are: a group that is best at two ends of a range of one multiplier is
        best in between, since the value of each of its choices is linear in the multiplier.
        """
        now = self.focus or self.all
        if now is None:
            return
        groups, plain = now.groups, rows
        if groups is not None:
            among = np.zeros(self.shape[0], bool)
            among[rows] = True
            groups, plain = groups.only(among), rows[self.shared.free[rows]]
        part = _Part(self, plain, groups)
        if 2 * part.size < now.size:
            self.focus = part.beside(self, point)

    def guess(self) -> np.ndarray:
        """Mean slope between everybody's least loss and least cost, shared out among the limits."""
        table = self.table.reshape(-1, *self.shape)
        offered = np.isfinite(table[0])
        best = table[0].min(1).sum()
        multipliers = np.zeros(len(self.limits))
        for r, limit in enumerate(self.limits):
            at_least = np.where(offered, table[1 + r], np.inf).argmin(1)
            cheap = table[:, np.arange(self.shape[0]), at_least].sum(1)
            most = table[1 + r].max(1).sum()
            width = max(limit - cheap[1 + r], 1e-3 * most) or 1.0
            multipliers[r] = max(cheap[0] - best, 0.0) / width / len(self.limits)
        return multipliers

    @property
    def exact(self) -> bool:
        """Whether `choose` finds the best choice for its multipliers, and so bounds every other."""
        return self.local is None

    def solution(self, point: _Point, bound: float = math.nan) -> Solution:
        loss = float(self.loss.reshape(-1)[self.first + point.choice].sum())
        if math.isnan(bound) and self.exact:
            best = self.choose(point.multipliers)
            bound = best.objective + float(point.multipliers @ (best.used - self.limits))
        return Solution(
            point.choice,
            loss,
            point.objective - loss if self.penalty is not None else 0.0,
            point.used,
            point.multipliers,
            bound,
            self.evaluations,
        )


class _Part:
    """Some experts, evaluated by themselves, beside others that stay as they are.

    plain: experts that share nothing.  groups: the others, in whole groups.
    """

    def __init__(self, priced: _Priced, plain: np.ndarray, groups: Groups | None):
        self.plain, self.groups, self.options = plain, groups, priced.shape[1]
        everything = plain.size == priced.shape[0]
        table = priced.table.reshape(-1, *priced.shape)
        self.table = priced.table if everything else table[:, plain].reshape(len(table), -1)
        self.first = np.arange(plain.size) * self.options
        self.buffers = priced.buffers
        self.choice = np.zeros(priced.shape[0], np.int64)
        self.rest = np.zeros(len(table))

    @property
    def size(self) -> int:
        return self.plain.size + (0 if self.groups is None else self.groups.rows.size)

    def beside(self, priced: _Priced, point: _Point) -> _Part:
        """Experts that are not here choose as in `point`."""
        rows = self.plain
        if self.groups is not None:
            rows = np.concatenate([rows, self.groups.rows])
        here = priced.table.take(priced.first[rows] + point.choice[rows], axis=1).sum(1)
        if self.groups is not None:
            here[1:] += priced.shared_used(point.choice, self.groups.rows)
        self.choice = point.choice
        self.rest = np.append(point.objective, point.used) - here
        return self

    def choose(self, multipliers: np.ndarray) -> _Point:
        choice, totals = self.choice.copy(), self.rest
        if self.plain.size:
            values = priced_values(self.table, multipliers, self.buffers)
            chosen = values.reshape(-1, self.options).argmin(1)
            totals = totals + self.table.take(self.first + chosen, axis=1).sum(1)
            choice[self.plain] = chosen
        if self.groups is not None:
            choice[self.groups.rows], more = self.groups.choose(multipliers)
            totals = totals + more
        return _Point(choice, totals[1:], float(totals[0]), multipliers.copy())


class _Newton:
    """Finds multipliers for all limits at once, where there are many experts and the sums are almost smooth.

    Where losses fall exponentially with what they cost, what is used is linear in the logarithms of the
    multipliers: Newton's steps there, with differences for the first derivatives and then Broyden's update.
    """

    def __init__(self, priced: _Priced, multipliers: np.ndarray):
        self.priced, self.start = priced, multipliers.astype(np.float64)
        self.bound = -math.inf  # no choice that meets the limits has a lower objective
        self.nearest: _Point | None = None
        self._apart = math.inf  # of `nearest` from the limits, as a share of them
        self._least = FARTHEST * self.start

    def at(self, multipliers: np.ndarray) -> np.ndarray:
        """float [R], the share of each limit that is used there, less 1."""
        point, limits = self.priced.choose(multipliers), self.priced.limits
        over = point.used - limits
        self.bound = max(self.bound, point.objective + float(multipliers @ over))
        over, self._last = over / np.maximum(limits, TINY), point
        if np.abs(over).max() < self._apart:
            self.nearest, self._apart = point, float(np.abs(over).max())
        return over

    def run(self) -> _Point | None:
        """A point that meets all limits, filled, within CLOSE of the best possible; None: none was found."""
        now, margin = self.start, 1.0 / self.priced.shape[0]
        over = self.at(now)
        slopes = self._differences(now, over)
        reach = np.full(now.size, REACH)  # of a step in each logarithm
        before = np.zeros(now.size)
        apart, idle = math.inf, 0
        for _ in range(MAX_NEWTON):
            apart, idle = (self._apart, 0) if self._apart < apart else (apart, idle + 1)
            if idle > MOST_IDLE:
                break  # experts that are alike change all at once: the sums have steps, and no slopes
            if (over <= 0).all() and (over >= -STEPS_APART * margin).all():
                filled = _fill(self.priced, self._last)
                if filled.objective - self.bound <= CLOSE * abs(filled.objective):
                    return filled
            step = _newton_step(slopes, over + margin)
            far = np.abs(step) > reach
            step = np.clip(step, -reach, reach)
            # On and on in one direction: it may be far.
            turned = step * before < 0
            reach = np.where(turned, np.maximum(0.5 * reach, 0.5 * REACH), reach)
            reach = np.where(far & ~turned, 2.0 * reach, reach)
            now, before = now * np.exp(np.minimum(step, MOST_REACH)), step
            if not ((now > self._least) & (now < MOST)).all():
                break
            last, over = over, self.at(now)
            if far.any():
                slopes = self._differences(now, over)
            elif np.abs(step).max() > SMOOTH:
                slopes += np.outer(over - last - slopes @ step, step) / float(step @ step)
            if np.abs(over).max() < STEPS_APART * margin:
                margin *= WIDER  # between the steps of the sums there is no way to be this near
        return None

    def _differences(self, now: np.ndarray, over: np.ndarray) -> np.ndarray:
        """float [R, R]: what a logarithm of a multiplier changes."""
        slopes = np.empty((now.size, now.size))
        for r in range(now.size):
            ahead = now.copy()
            ahead[r] *= AHEAD
            slopes[:, r] = (self.at(ahead) - over) / math.log(AHEAD)
        return slopes


def _newton_step(slopes: np.ndarray, over: np.ndarray) -> np.ndarray:
    """float [R], infinite where what is used does not depend on the multiplier: whichever way it must go."""
    step = np.sign(over) * np.inf
    steep = np.flatnonzero(np.diag(slopes) < -FLAT)
    inside = slopes[np.ix_(steep, steep)]
    step[steep] = np.linalg.lstsq(inside, -over[steep], rcond=1e-6)[0]
    return step


class _Search:
    """Finds the least multipliers for which every limit holds: limit r's with those below it inside."""

    def __init__(self, priced: _Priced, multipliers: np.ndarray):
        self.priced, self.limits = priced, priced.limits
        self.now = multipliers.astype(np.float64)
        self.scale = np.maximum(priced.guess(), TINY)

    def run(self) -> _Point | None:
        return self.settle(len(self.limits) - 1)

    def _at(self, r: int, multiplier: float) -> _Point | None:
        self.now[r] = multiplier
        return self.settle(r - 1)

    def settle(self, r: int) -> _Point | None:
        """The best point in which limits 0..r hold, for the multipliers above r as they are."""
        if r < 0:
            return self.priced.choose(self.now)
        if self.now[r] == 0.0:
            point = self._at(r, 0.0)
            if point is None or point.used[r] <= self.limits[r]:
                return point
        low, below, best = self._bracket(r)
        if best is None:
            return None
        return self._narrow(r, low, below, best)

    def _bracket(self, r: int) -> tuple[float, _Point | None, _Point | None]:
        """A multiplier that is too low with its point, and a point that meets the limit."""
        multiplier = self.now[r] or self.scale[r]
        least, most = self.scale[r] * 1e-12, self.scale[r] * STEEPEST
        point, factor, below = self._at(r, multiplier), FIRST_FACTOR, None
        while point is not None and point.used[r] > self.limits[r] and multiplier <= most:
            low, below = multiplier, point
            multiplier, factor = multiplier * factor, factor * factor
            point = self._at(r, multiplier)
        if point is None or point.used[r] > self.limits[r]:
            return 0.0, None, None
        if below is not None:
            return low, below, point
        while multiplier > least and not self._spent(r, point):
            multiplier, factor = multiplier / factor, factor * factor
            coarser = self._at(r, multiplier)
            if coarser is None or coarser.used[r] > self.limits[r]:
                return multiplier, coarser, point
            point = coarser
        return multiplier, None, point

    def _spent(self, r: int, point: _Point) -> bool:
        """Whether what is left of limit r is worth nothing any more."""
        return point.multipliers[r] * (self.limits[r] - point.used[r]) <= GAP * abs(point.objective)

    def _narrow(self, r: int, low: float, below: _Point | None, best: _Point) -> _Point:
        """Between the multiplier `low` (too much used) and that of `best` (not too much)."""
        limit = self.limits[r]
        for step in range(MAX_STEPS):
            high = best.multipliers[r]
            if self._spent(r, best) or high <= low * (1 + SAME):
                break
            if below is not None:
                rows = np.flatnonzero(below.choice != best.choice)
                if self.priced.parties(rows) <= 1 + r:
                    break  # the fill decides about these
                if r == 0:
                    self.priced.focus_on(rows, best)
            share = 0.5
            if step % 3 and below is not None and below.used[r] > limit > best.used[r]:
                # Secant on log(used), kept off the ends.
                over = below.used[r]
                share = math.log(over / limit) / math.log(over / max(best.used[r], TINY))
                share = min(max(share, 0.02), 0.98)
            trial = math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
            point = self._at(r, trial)
            if point is None or point.used[r] > limit:
                low, below = trial, point
            else:
                best = point
        if r == 0:
            self.priced.focus = None
        self.now[:] = best.multipliers
        return best


def _allowed(priced: _Priced, point: _Point) -> np.ndarray:
    """bool [X, O]: options that are offered and open no shared cost: what is paid for is open to all."""
    allowed = priced.offered.reshape(priced.shape)
    if priced.shared is not None:
        is_open = np.zeros(priced.shared.count + 1, bool)
        is_open[priced.shared.open(point.choice)] = True
        is_open[-1] = True  # where id -1 looks
        allowed = allowed & is_open[priced.shared.ids].all(2)
    return allowed


def _shared_of(problem: Problem, shape: tuple) -> tuple[Sharing | None, np.ndarray | None]:
    if problem.shared is None or problem.shared_cost is None:
        return None, None
    sharing = problem.shared if isinstance(problem.shared, Sharing) else Sharing(problem.shared)
    ids, cost = sharing.ids, np.asarray(problem.shared_cost, np.float64)
    good = ids.ndim == 3 and ids.shape[:2] == shape and cost.ndim == 2
    if not good or len(cost) != len(problem.limits) or sharing.count > cost.shape[1]:
        raise ValueError(
            f"solve: expected shared [X, O, M] with ids below S and shared_cost [R, S], got {ids.shape} "
            f"with ids up to {ids.max()} and {cost.shape}"
        )
    return (sharing, cost[:, : sharing.count]) if sharing.rows.size else (None, None)


def _fill(priced: _Priced, point: _Point) -> _Point:
    """Spends what is left over: in each round every expert's steepest edge that fits, best first."""
    table, limits = priced.table.reshape(-1, *priced.shape), priced.limits
    allowed = _allowed(priced, point)
    # A limit that binds nobody yet has multiplier 0, but filling it is not free.
    least = 1e-6 * abs(point.objective) / np.maximum(limits, TINY)
    weights = np.maximum(np.maximum(point.multipliers, least), TINY)
    choice, used = point.choice.copy(), point.used
    rows = _may_improve(priced, point, allowed)
    part, may = table[:, rows], allowed[rows]  # of experts that may still improve
    for _ in range(MAX_FILLS):
        slack = limits - used
        now = part[:, np.arange(rows.size), choice[rows]]  # [1 + R, rows]
        gain = now[0][:, None] - part[0]
        fits = may & (gain > 0)
        price = np.zeros(fits.shape)
        for r in range(len(limits)):
            more = part[1 + r] - now[1 + r][:, None]
            fits &= more <= slack[r]
            price += weights[r] * np.maximum(more, 0.0)
        # What no longer fits will not fit later.
        kept = fits.any(1)
        if not kept.any():
            break
        rows, now, part, may = rows[kept], now[:, kept], part[:, kept], may[kept]
        slope = np.where(fits[kept], gain[kept] / np.maximum(price[kept], TINY), -1.0)
        option = slope.argmax(1)
        order = np.argsort(-slope.max(1), kind="stable")
        step = part[1:, order, option[order]] - now[1:, order]
        over = (np.cumsum(np.maximum(step, 0.0), axis=1) > slack[:, None]).any(0)
        count = int(over.argmax()) if over.any() else order.size
        choice[rows[order[:count]]] = option[order[:count]]
        if rows.size > FEW_LEFT and count < rows.size // 8:
            # Little is left: of these the best will take it.
            order = order[: max(rows.size // 4, FEW_LEFT)]
            rows, part, may = rows[order], part[:, order], may[order]
        used = priced.point(choice, point.multipliers).used
    return priced.point(choice, point.multipliers)


def _may_improve(priced: _Priced, point: _Point, allowed: np.ndarray) -> np.ndarray:
    """Experts that have a better option within what is left over; by far most have none."""
    table = priced.table.reshape(-1, *priced.shape)
    now = priced.table.take(priced.first + point.choice, axis=1)[:, :, None]
    fits = allowed & (table[0] < now[0])
    more = priced.buffers[0].reshape(priced.shape)
    for r, slack in enumerate(priced.limits - point.used):
        np.subtract(table[1 + r], now[1 + r], out=more)
        fits &= more <= slack
    return np.flatnonzero(fits.any(1))


def _feasible_point(problem: Problem, priced: _Priced) -> _Point:
    """A point that meets limits which the search did not meet, or InfeasibleError.

    Makes each limit's cost least in turn, beside the limits before it.
    """
    costs_only = _Priced(
        replace(problem, loss=np.where(np.isfinite(problem.loss), 0.0, np.inf), penalty=None)
    )
    for r, limit in enumerate(priced.limits):
        search = _Search(costs_only, np.zeros(len(priced.limits)))
        search.scale[:] = 1.0 / np.maximum(costs_only.table[1:].max(1), TINY)
        search.now[r] = search.scale[r]
        # The last step towards the least cost is a fill, as in `solve`, with that cost for the loss.
        costs_only.set_objective(costs_only.table[1 + r])
        costs_only.limits[r:] = np.inf
        point = _fill(costs_only, search.settle(r - 1))
        costs_only.limits[:] = priced.limits
        costs_only.set_objective(np.zeros(1))
        if point.used[r] > limit:
            least = float(point.used[r])
            limits = priced.limits.copy()
            limits[r] = least
            try:
                nearest = solve(replace(problem, limits=limits))
            except InfeasibleError as error:  # a later limit cannot be met either
                nearest = error.nearest
            beside = " beside " + " and ".join(priced.names[:r]) if r else ""
            raise InfeasibleError(
                f"solve: {priced.names[r]}: at least {least:.6g} is needed{beside}, the limit is {limit:.6g}; "
                f"with that much the loss is {nearest.loss:.4g} nats per token",
                r,
                least,
                nearest,
            )
    return priced.point(point.choice, priced.guess())


def _checked_start(start: np.ndarray, priced: _Priced) -> np.ndarray:
    start = np.asarray(start, np.float64)
    if start.shape != priced.limits.shape or not (start >= 0).all() or not np.isfinite(start).all():
        raise ValueError(
            f"solve: start: expected {priced.limits.size} finite multipliers >= 0, got {start}"
        )
    return start
