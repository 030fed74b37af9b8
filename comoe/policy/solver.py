"""The one optimiser: an option for every expert, so that the loss is least under a few limits.

    minimise   sum_x (loss[x, o_x] + penalty[x, o_x])
    subject to sum_x cost[r, x, o_x] + sum_{shared s in use} shared_cost[r, s] <= limits[r]     for every r

A multiple-choice knapsack. With a multiplier m_r >= 0 for each limit it falls apart: every expert takes
the option with the least loss + penalty + sum_r m_r cost_r, one argmin, which only ever picks vertices
of the lower convex hull of its options. The multipliers are found by bracketing and interpolation in
their logarithms, one inside the other where there are several limits, from the last ones if they are
given. What they leave over is filled greedily along the edges of the hulls, steepest first, and so the
result is worse than the best possible by less than one step of one expert per limit that binds.

Shared costs (a base that many experts add to) are charged once: for given multipliers all are open at
first, and those that save less than they cost are closed, the worse half of them in each round. That is
exact where an expert's options know one shared cost, and a local search where there are more.

numpy only. One evaluation over X experts with O options reads (1 + limits) X O doubles.
Lagrangian relaxation of the multiple-choice knapsack: Kellerer, Pferschy, Pisinger, Knapsack Problems
(2004), chapter 11.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

GAP = 1e-4  # the search ends when what is left over is worth less than this share of the loss
MAX_STEPS = 60  # of each search for one multiplier
FIRST_FACTOR = 1.05  # from a multiplier to the next one tried; squared each time
MAX_FILLS = 24  # rounds of the greedy fill
TINY = 1e-300
STEEPEST = 1e18  # a multiplier above this many times the mean slope: the limit cannot be met


@dataclass(frozen=True)
class Problem:
    """X experts with O options each, R limits.

    loss: float [X, O], nats per token; inf or nan: not offered.  cost: float [R, X, O], >= 0.
    limits: float [R].  names: of the limits, for messages.  penalty: float [X, O] counted like loss but
    reported apart, e.g. nats for the bytes of moving there from the present plan.
    shared: int [X, O, M], what an option shares with others, -1 for nothing.  shared_cost: [R, S].
    """

    loss: np.ndarray
    cost: np.ndarray
    limits: np.ndarray
    names: tuple[str, ...] = ()
    penalty: np.ndarray | None = None
    shared: np.ndarray | None = None
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
    point = _Search(priced, multipliers).run()
    if point is None:
        point = _feasible_point(problem, priced)
    return priced.solution(_fill(priced, point))


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
        self.shared = _Shared.of(problem, self.shape, offered)
        self.evaluations = 0
        self.focus: _Focus | None = None

    def choose(self, multipliers: np.ndarray) -> _Point:
        """The best choice when each unit of cost r has the price multipliers[r]."""
        self.evaluations += 1
        if self.focus is not None:
            return self.focus.choose(multipliers)
        values = _values(self.table, multipliers, self.buffers).reshape(self.shape)
        choice = values.argmin(1)
        if self.shared is not None:
            choice = self.shared.choose(values, choice, multipliers)
        return self.point(choice, multipliers)

    def point(self, choice: np.ndarray, multipliers: np.ndarray) -> _Point:
        totals = self.table.take(self.first + choice, axis=1).sum(1)
        used = totals[1:]
        if self.shared is not None:
            used = used + self.shared.used(choice)
        return _Point(choice, used, float(totals[0]), multipliers.copy())

    def focus_on(self, rows: np.ndarray, point: _Point) -> None:
        """From now on only these experts are evaluated, where that pays; the others stay as they are."""
        before = self.shape[0] if self.focus is None else self.focus.rows.size
        if 2 * rows.size < before:
            self.focus = _Focus(self, rows, point)

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

    def solution(self, point: _Point) -> Solution:
        loss = float(self.loss.reshape(-1)[self.first + point.choice].sum())
        bound = math.nan
        if self.shared is None:
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


def _values(table: np.ndarray, multipliers: np.ndarray, buffers: np.ndarray) -> np.ndarray:
    """Loss plus priced costs of every option, in buffers[0]."""
    values, term = buffers[:, : table.shape[1]]
    np.copyto(values, table[0])
    for multiplier, cost in zip(multipliers, table[1:], strict=True):
        if multiplier:
            np.multiply(cost, multiplier, out=term)
            np.add(values, term, out=values)
    return values


class _Focus:
    """Only the experts that choose differently at two ends of a range of one multiplier.

    The others keep their choice: an option that is best at both ends is best in between, since the
    value of each option is linear in the multiplier.
    """

    def __init__(self, priced: _Priced, rows: np.ndarray, point: _Point):
        table = priced.table.reshape(-1, *priced.shape)[:, rows]
        self.rows, self.options = rows, priced.shape[1]
        self.table = table.reshape(len(table), -1)
        self.first = np.arange(rows.size) * self.options
        self.buffers = priced.buffers
        self.choice = point.choice
        mine = self.table.take(self.first + point.choice[rows], axis=1).sum(1)
        self.rest = np.append(point.objective, point.used) - mine

    def choose(self, multipliers: np.ndarray) -> _Point:
        values = _values(self.table, multipliers, self.buffers)
        chosen = values.reshape(-1, self.options).argmin(1)
        totals = self.rest + self.table.take(self.first + chosen, axis=1).sum(1)
        choice = self.choice.copy()
        choice[self.rows] = chosen
        return _Point(choice, totals[1:], float(totals[0]), multipliers.copy())


class _Shared:
    """Costs that are paid once, by whoever of their users comes first."""

    def __init__(self, ids: np.ndarray, cost: np.ndarray):
        self.ids, self.cost = ids, cost  # [X, O, M], [R, S]
        self.rows = np.flatnonzero((ids >= 0).any((1, 2)))
        self.row_ids = ids[self.rows]
        # Where no expert knows two of them, whether one pays does not depend on the others.
        known = np.where(self.row_ids >= 0, self.row_ids, self.row_ids.max((1, 2), keepdims=True))
        self.independent = bool((known == known.max((1, 2), keepdims=True)).all())

    @classmethod
    def of(cls, problem: Problem, shape: tuple, offered: np.ndarray) -> _Shared | None:
        if problem.shared is None or problem.shared_cost is None:
            return None
        ids = np.asarray(problem.shared)
        cost = np.asarray(problem.shared_cost, np.float64)
        good = ids.ndim == 3 and ids.shape[:2] == shape and cost.ndim == 2
        if not good or len(cost) != len(problem.limits) or ids.max() >= cost.shape[1]:
            raise ValueError(
                f"solve: expected shared [X, O, M] with ids below S and shared_cost [R, S], got {ids.shape} "
                f"with ids up to {ids.max()} and {cost.shape}"
            )
        ids = np.where(offered[..., None], ids, -1)
        return cls(ids, cost) if (ids >= 0).any() else None

    def choose(self, values: np.ndarray, choice: np.ndarray, multipliers: np.ndarray) -> np.ndarray:
        """The best choice with shared costs, from option values [X, O] and the choice without."""
        price = multipliers @ self.cost
        closed = np.zeros(price.size, bool)
        part, lines = values[self.rows], np.arange(self.rows.size)
        while True:
            chosen = part.argmin(1)
            best = part[lines, chosen]
            mine = self.row_ids[lines, chosen]  # [rows, M]
            saved = np.zeros(price.size)
            for ids in mine.T:
                users = np.flatnonzero(ids >= 0)
                without = (self.row_ids[users] == ids[users, None, None]).any(2)
                other = np.where(without, np.inf, part[users]).min(1)
                saved += np.bincount(ids[users], other - best[users], minlength=price.size)
            in_use = np.unique(mine[mine >= 0])
            waste = in_use[saved[in_use] < price[in_use]]
            if not waste.size:
                choice[self.rows] = chosen
                return choice
            order = np.argsort(saved[waste] / price[waste], kind="stable")
            closed[waste[order[: waste.size if self.independent else -(-waste.size // 2)]]] = True
            banned = (closed[self.row_ids] & (self.row_ids >= 0)).any(2)
            part = np.where(banned, np.inf, part)

    def used(self, choice: np.ndarray) -> np.ndarray:
        """float [R]: the shared costs of a choice."""
        ids = self.open(choice)
        return self.cost[:, ids].sum(1)

    def open(self, choice: np.ndarray) -> np.ndarray:
        ids = np.unique(self.ids[np.arange(choice.size), choice])
        return ids[ids >= 0]


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
            if self._spent(r, best) or high <= low * (1 + 1e-9):
                break
            if below is not None:
                rows = np.flatnonzero(below.choice != best.choice)
                if rows.size <= 1 + r:
                    break  # the fill decides about these
                if r == 0 and self.priced.shared is None:
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


def _fill(priced: _Priced, point: _Point) -> _Point:
    """Spends what is left over: in each round every expert's steepest edge that fits, best first."""
    table, limits = priced.table.reshape(-1, *priced.shape), priced.limits
    allowed = np.isfinite(table[0])
    if priced.shared is not None:
        # What is paid for is open to all; nothing else is opened here.
        is_open = np.zeros(priced.shared.cost.shape[1] + 1, bool)
        is_open[priced.shared.open(point.choice)] = True
        is_open[-1] = True  # where id -1 looks
        allowed &= is_open[priced.shared.ids].all(2)
    # A limit that binds nobody yet has multiplier 0, but filling it is not free.
    least = 1e-6 * abs(point.objective) / np.maximum(limits, TINY)
    weights = np.maximum(np.maximum(point.multipliers, least), TINY)
    choice, used = point.choice.copy(), point.used
    rows = _may_improve(priced, point, allowed)
    for _ in range(MAX_FILLS):
        slack = limits - used
        now = table[:, rows, choice[rows]]  # [1 + R, rows]
        gain = now[0][:, None] - table[0][rows]
        fits = allowed[rows] & (gain > 0)
        price = np.zeros(fits.shape)
        for r in range(len(limits)):
            more = table[1 + r][rows] - now[1 + r][:, None]
            fits &= more <= slack[r]
            price += weights[r] * np.maximum(more, 0.0)
        # What no longer fits will not fit later.
        kept = fits.any(1)
        if not kept.any():
            break
        rows, now = rows[kept], now[:, kept]
        slope = np.where(fits[kept], gain[kept] / np.maximum(price[kept], TINY), -1.0)
        option = slope.argmax(1)
        order = np.argsort(-slope.max(1), kind="stable")
        step = table[1:, rows[order], option[order]] - now[1:, order]
        over = (np.cumsum(np.maximum(step, 0.0), axis=1) > slack[:, None]).any(0)
        taken = order[: int(over.argmax()) if over.any() else order.size]
        choice[rows[taken]] = option[taken]
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
        costs_only.table[0] = costs_only.table[1 + r] + np.where(costs_only.offered, 0.0, np.inf)
        costs_only.limits[r:] = np.inf
        point = _fill(costs_only, search.settle(r - 1))
        costs_only.limits[:] = priced.limits
        costs_only.table[0] = np.where(costs_only.offered, 0.0, np.inf)
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
