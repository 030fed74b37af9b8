"""Costs that are paid once by all who use them: the solver's shared bases.

Experts that know the same shared costs, directly or through others, are a group. What a group pays
depends on which of its costs are open: with B of them there are 2^B states, and for given multipliers
the best one is found by trying all (`Groups`, up to MOST_TOGETHER in a group). Where more hang together
all are open at first, and those that save less than they cost are closed, the worse half of them in each
round: a local search (`LocalSearch`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

MOST_TOGETHER = 3  # shared costs in a group of which all states are tried


def priced_values(table: np.ndarray, multipliers: np.ndarray, buffers: np.ndarray) -> np.ndarray:
    """Loss (row 0 of table) plus priced costs (the other rows) of every option, in buffers[0]."""
    values, term = buffers[:, : table.shape[1]]
    np.copyto(values, table[0])
    for multiplier, cost in zip(multipliers, table[1:], strict=True):
        if multiplier:
            np.multiply(cost, multiplier, out=term)
            np.add(values, term, out=values)
    return values


class Sharing:
    """Which options share what. ids: int [X, O, M], -1 for nothing. Costs nothing until it is asked for, and
    that once: keep it for problems that differ in losses and costs only."""

    def __init__(self, ids: np.ndarray):
        self.ids = np.asarray(ids)

    @property
    def count(self) -> int:
        """Shared costs are numbered below it."""
        return int(self.ids.max(initial=-1)) + 1

    @cached_property
    def free(self) -> np.ndarray:
        """bool [X]: experts that share nothing."""
        return (self.ids < 0).all((1, 2))

    @cached_property
    def rows(self) -> np.ndarray:
        """int [n]: the others."""
        return np.flatnonzero(~self.free)

    @cached_property
    def layout(self) -> Layout | None:
        """None where a group is too large to try all its states."""
        return Layout.of(self)

    def open(self, choice: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """What is paid for by a choice [X], or by that of some experts alone, each once."""
        rows = self.rows if rows is None else rows
        paid = np.zeros(self.count + 1, bool)  # the last is where id -1 looks
        paid[self.ids[rows, choice[rows]]] = True
        return np.flatnonzero(paid[:-1])


@dataclass(frozen=True)
class Layout:
    """Experts that share, group by group, with options that need the same side by side.

    rows: int [n], the experts.  sizes: int [G], experts of each group.  order: int [n, P], the option in each
    column; -1: none.  blocks: for each class that occurs (its bits, first column, end); a class is the set of
    the group's shared costs that an option needs.  group, bit: int [S], of each shared cost; group -1: unused.
    group_of: int [X], -1 for experts that share nothing.
    """

    rows: np.ndarray
    sizes: np.ndarray
    order: np.ndarray
    blocks: list[tuple[int, int, int]]
    group: np.ndarray
    bit: np.ndarray
    group_of: np.ndarray

    @classmethod
    def of(cls, sharing: Sharing) -> Layout | None:
        ids = sharing.ids[sharing.rows]
        label = _components(ids, sharing.count)
        _, inverse, counts = np.unique(label, return_inverse=True, return_counts=True)
        if counts.max() > MOST_TOGETHER:
            return None
        by_label = np.argsort(label, kind="stable")
        bit = np.empty(label.size, np.int64)
        bit[by_label] = np.arange(label.size) - np.repeat(np.cumsum(counts) - counts, counts)
        bits = np.bitwise_or.reduce(np.where(ids >= 0, 1 << bit[ids], 0), axis=2)  # [n, O]
        mine = inverse[ids.max((1, 2))]
        line = np.argsort(mine, kind="stable")
        bits = bits[line]
        known, sizes = np.unique(mine, return_counts=True)
        group = np.full(counts.size, -1)
        group[known] = np.arange(known.size)
        blocks, columns, last = [], np.empty(bits.shape, np.int64), 0
        for one in range(1 << counts.max()):
            place = np.cumsum(bits == one, axis=1)
            width = int(place[:, -1].max())
            if width:
                columns = np.where(bits == one, last + place - 1, columns)
                blocks.append((one, last, last + width))
                last += width
        order = np.full((len(bits), last), -1)
        np.put_along_axis(order, columns, np.arange(bits.shape[1])[None], 1)
        group_of = np.full(len(sharing.ids), -1)
        group_of[sharing.rows] = group[mine]
        return cls(sharing.rows[line], sizes, order, blocks, group[inverse], bit, group_of)


class LocalSearch:
    """The best choice with shared costs, as far as closing them one after the other finds it."""

    def __init__(self, sharing: Sharing, cost: np.ndarray):
        """cost: float [R, S]."""
        self.rows, self.cost = sharing.rows, cost
        self.ids = sharing.ids[self.rows]

    def choose(self, values: np.ndarray, choice: np.ndarray, multipliers: np.ndarray) -> np.ndarray:
        """From option values [X, O] and the best choice [X] without shared costs, which is changed."""
        price = multipliers @ self.cost
        closed = np.zeros(price.size, bool)
        part, lines = values[self.rows], np.arange(self.rows.size)
        while True:
            chosen = part.argmin(1)
            best = part[lines, chosen]
            mine = self.ids[lines, chosen]  # [rows, M]
            saved = np.zeros(price.size)
            for ids in mine.T:
                users = np.flatnonzero(ids >= 0)
                without = (self.ids[users] == ids[users, None, None]).any(2)
                other = np.where(without, np.inf, part[users]).min(1)
                saved += np.bincount(ids[users], other - best[users], minlength=price.size)
            in_use = np.unique(mine[mine >= 0])
            waste = in_use[saved[in_use] < price[in_use]]
            if not waste.size:
                choice[self.rows] = chosen
                return choice
            order = np.argsort(saved[waste] / price[waste], kind="stable")
            closed[waste[order[: -(-waste.size // 2)]]] = True
            banned = (closed[self.ids] & (self.ids >= 0)).any(2)
            part = np.where(banned, np.inf, part)


class Groups:
    """Experts in groups that share costs, evaluated exactly.

    rows, sizes, order, blocks: as in Layout.  table: float [1 + R, n, P], as the solver's, in that order.
    cost: float [R, 2^B, G] of each state of each group.
    """

    def __init__(
        self,
        rows: np.ndarray,
        sizes: np.ndarray,
        table: np.ndarray,
        order: np.ndarray,
        blocks: list[tuple[int, int, int]],
        cost: np.ndarray,
    ):
        self.rows, self.sizes, self.table, self.order = rows, sizes, table, order
        self.blocks, self.cost = blocks, cost
        self._starts = np.cumsum(sizes) - sizes
        self._lines = np.arange(len(rows))
        bits = np.array([bits for bits, _, _ in blocks])
        states = np.arange(cost.shape[1])
        allows = (bits & ~states[:, None]) == 0  # [states, classes]
        self._allowed = [np.flatnonzero(row) for row in allows]
        self._forbids = np.where(allows, 0.0, np.inf).T
        self._group = np.repeat(np.arange(len(sizes)), sizes)
        self._flat, self._flat_cost = table.reshape(len(table), -1), cost.reshape(len(cost), -1)
        self._buffers = np.empty((2, self._flat.shape[1]))

    @classmethod
    def of(cls, layout: Layout, table: np.ndarray, shared_cost: np.ndarray) -> Groups:
        """table: float [1 + R, X, O], loss inf where not offered.  shared_cost: [R, S]."""
        at = (layout.rows[:, None] * table.shape[2] + np.maximum(layout.order, 0)).ravel()
        mine = table.reshape(len(table), -1).take(at, axis=1).reshape(-1, *layout.order.shape)
        mine[0][layout.order < 0] = np.inf
        most = int(layout.bit.max()) + 1
        cost = np.zeros((len(shared_cost), 1 << most, len(layout.sizes)))
        for state in range(1, 1 << most):
            paid = np.flatnonzero((layout.group >= 0) & (state >> layout.bit & 1 > 0))
            for r, each in enumerate(shared_cost[:, paid]):
                cost[r, state] = np.bincount(layout.group[paid], each, len(layout.sizes))
        return cls(layout.rows, layout.sizes, mine, layout.order, layout.blocks, cost)

    def only(self, among: np.ndarray) -> Groups | None:
        """The groups in which any of the experts bool [X] is; None if there is none."""
        touched = np.logical_or.reduceat(among[self.rows], self._starts)
        if not touched.any():
            return None
        kept = np.repeat(touched, self.sizes)
        table, order = self.table[:, kept], self.order[kept]
        sizes, cost = self.sizes[touched], self.cost[:, :, touched]
        return Groups(self.rows[kept], sizes, table, order, self.blocks, cost)

    def choose(self, multipliers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(option of each of `rows`, [1 + R] totals of loss and costs, shared ones included)."""
        values = priced_values(self._flat, multipliers, self._buffers).reshape(self.order.shape)
        column = np.empty((len(self.blocks), len(self.rows)), np.int64)
        least = np.empty(column.shape)
        for i, (_, first, end) in enumerate(self.blocks):
            if end == first + 1:
                column[i], least[i] = first, values[:, first]
            else:
                column[i] = first + values[:, first:end].argmin(1)
                least[i] = values[self._lines, column[i]]
        states = np.empty((len(self._allowed), len(self.rows)))
        for state, blocks in zip(states, self._allowed, strict=True):
            if len(blocks) == 1:
                state[:] = least[blocks[0]]
            else:
                np.minimum.reduce(least[blocks], axis=0, out=state)
        sums = np.add.reduceat(states, self._starts, axis=1)
        sums += (multipliers @ self._flat_cost).reshape(sums.shape)
        state = sums.argmin(0)  # of equal ones the one with fewer open
        block = (least + self._forbids[:, state[self._group]]).argmin(0)
        chosen = column[block, self._lines]
        totals = self._flat.take(self._lines * self.order.shape[1] + chosen, axis=1).sum(1)
        totals[1:] += self.cost[:, state, np.arange(len(state))].sum(1)
        return self.order[self._lines, chosen], totals


def _components(ids: np.ndarray, count: int) -> np.ndarray:
    """int [S]: a number that is the same for shared costs which hang together through experts. ids: [n, O, M]."""
    flat = ids.reshape(len(ids), -1)
    group = np.arange(count)
    while True:
        least = np.where(flat >= 0, group[flat], count).min(1)
        before = group.copy()
        line, column = np.nonzero(flat >= 0)
        np.minimum.at(group, flat[line, column], least[line])
        group = group[group]
        if np.array_equal(group, before):
            return group
