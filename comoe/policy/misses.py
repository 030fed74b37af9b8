"""What to do about experts of which something is missing: wait, use what is here, have them computed where
they lie, or leave them out.

A rule is asked once per layer, with all experts that the router has chosen there. Everything is decided
from what is resident at that moment; the gate weight of an expert is what its output counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from comoe.policy.elsewhere import Elsewhere

SKIP, SENT = -1, -2


@dataclass(frozen=True)
class Chosen:
    """The experts of one layer in one call, n of them; X numbers the experts of all layers.

    experts: int64 [n], of X.  weights: float64 [n], root of the sum over tokens of squared gate weights.
    rank_mass: float64 [n], gate mass of the experts chosen before it, 0 to 1, by falling weight.
    resident: int64 [n], finest level at most `want` that is complete, -1: none.
    low, want: int64 [n], the level that the plan aims at, and the finest that may be used.
    tokens: of the call.
    """

    experts: np.ndarray
    weights: np.ndarray
    rank_mass: np.ndarray
    resident: np.ndarray
    low: np.ndarray
    want: np.ndarray
    tokens: int = 1


class MissRule(Protocol):
    def decide(self, chosen: Chosen) -> np.ndarray:
        """int64 [n]: the coarsest level to compute at; above `resident` it is waited for; SKIP: left out;
        SENT: another machine computes it."""
        ...


class Wait:
    """Always the planned level, whatever it takes: the only rule that `exact` allows."""

    def decide(self, chosen: Chosen) -> np.ndarray:
        return chosen.low


class UseResident:
    """Whatever is here, at any level; only an expert of which nothing is here is waited for."""

    def decide(self, chosen: Chosen) -> np.ndarray:
        return np.where(chosen.resident >= 0, np.minimum(chosen.resident, chosen.low), chosen.low)


class Hobbit:
    """By the gate mass s of the experts before it: s <= high the planned level, s <= low what is here,
    else left out. HOBBIT (arXiv 2411.01433), section on dynamic expert loading: 0.6 and 0.9."""

    def __init__(self, high: float = 0.6, low: float = 0.9):
        self.high, self.low = high, low

    def decide(self, chosen: Chosen) -> np.ndarray:
        here = np.where(chosen.resident >= 0, np.minimum(chosen.resident, chosen.low), SKIP)
        coarse = np.where(here >= 0, here, np.where(chosen.rank_mass <= self.low, chosen.low, SKIP))
        missing = chosen.resident < chosen.low
        return np.where(missing & (chosen.rank_mass > self.high), coarse, chosen.low)


class AdapMoE:
    """Leaves an expert out if its gate weight is below sqrt(threshold / sensitivity of its layer), missing
    or not, but never a token's first. AdapMoE (arXiv 2408.10284), adaptive gating: threshold 0.005."""

    def __init__(self, sensitivity: np.ndarray, threshold: float = 0.005):
        """sensitivity: float [X], of each expert's layer, mean 1."""
        self._least = np.sqrt(threshold / np.maximum(sensitivity, 1e-12))

    def decide(self, chosen: Chosen) -> np.ndarray:
        light = chosen.weights < self._least[chosen.experts] * np.sqrt(chosen.tokens)
        return np.where(light & (chosen.rank_mass > 0), SKIP, chosen.low)


class SkipLight:
    """Leaves an expert out only if it is missing and its gate weight is below factor / K; otherwise
    waits. Seen to avoid two thirds of the reads at factor 1 for a tenth of the router's mass."""

    def __init__(self, experts_per_token: int, factor: float = 1.0):
        self._least = factor / experts_per_token

    def decide(self, chosen: Chosen) -> np.ndarray:
        light = chosen.weights < self._least * np.sqrt(chosen.tokens)
        return np.where((chosen.resident < 0) & light, SKIP, chosen.low)


class LeastCost:
    """The choice with the least gate-weighted loss + price * time.

    A use of expert x at level l with gate weight g loses loss[x, l] / use[x] * g^2 / E[g^2], all three as
    measured. Waiting costs the reading of what is missing, and once per layer the latency of waiting at
    all; sending activations away costs the call, once per layer (elsewhere.py). `price` is the planner's multiplier of its
    time limit, in nats per second: what the rule gives away for time is worth as much as what the plan gave
    away. What cannot be here before `deadline` is not waited for, unless there is no other way to compute.
    """

    def __init__(
        self,
        loss: np.ndarray,
        weight: np.ndarray,
        bytes_at: np.ndarray,
        step_bytes: np.ndarray,
        *,
        price: float,
        bandwidth: float,
        latency: float,
        skip_loss: np.ndarray | None = None,
        deadline: float = np.inf,
        elsewhere: Elsewhere | None = None,
    ):
        """loss: float [X, L] nats per token, nan or inf: no such level.  weight: float [X], gate weight
        squared per token, use * E[g^2] of a use, at the uses for which the losses hold.  bytes_at: int64 [X, L].  step_bytes: int64 [X, L, L],
        what level j needs beside the records of level i.  skip_loss: float [X], nats per token if the
        expert is always left out; None: it never is.  bandwidth: bytes/s.  latency, deadline: seconds.
        elsewhere: a machine that computes experts; None: there is none."""
        per_square = 1.0 / np.maximum(weight, 1e-12)
        self._loss = np.where(np.isfinite(loss), loss * per_square[:, None], np.inf)
        self._skip = None if skip_loss is None else skip_loss * per_square
        self._bytes, self._steps = bytes_at, step_bytes
        self.price, self.bandwidth, self.latency = price, bandwidth, latency
        self.deadline, self.elsewhere = deadline, elsewhere

    @property
    def tables(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(loss per squared gate weight float64 [X, L], inf: no such level; bytes [X, L]; steps [X, L, L])."""
        return self._loss, self._bytes, self._steps

    def decide(self, chosen: Chosen) -> np.ndarray:
        x, here = chosen.experts, chosen.resident
        rows, square = np.arange(len(x)), chosen.weights**2
        missing = np.where((here >= 0)[:, None], self._steps[x, here], self._bytes[x])
        cost = self._loss[x] * square[:, None] + self.price / self.bandwidth * missing
        levels = np.arange(cost.shape[1])
        cost[(levels > chosen.low[:, None]) | (levels < here[:, None])] = np.inf
        # To compute with what is here, or to leave out, costs no time.
        stay, stay_cost = here, np.where(here >= 0, self._loss[x, here] * square, np.inf)
        if self._skip is not None:
            skip_cost = self._skip[x] * square
            stay = np.where(skip_cost < stay_cost, SKIP, stay)
            stay_cost = np.minimum(skip_cost, stay_cost)
        if self.deadline < np.inf:
            self._in_time(cost, missing, levels > here[:, None], stay_cost)
        best = cost.argmin(1)
        wait_cost = cost[rows, best]
        wait_price = self.price * self.latency
        # All who wait share the price of waiting at all, all who are sent that of the call.
        waits = wait_cost < stay_cost
        if (stay_cost - wait_cost)[waits].sum() <= wait_price:
            waits[:] = False
        # An expert that is here at a finer level than planned is computed at the finer one anyway.
        decided = np.where(waits, best, np.minimum(stay, chosen.low))
        sent_cost = self._sent_cost(chosen, square)
        if sent_cost is None:
            return decided
        call_price = self.price * self.elsewhere.seconds(chosen.tokens)
        total = np.where(waits, wait_cost, stay_cost).sum() + wait_price * waits.any()
        # All that is worth sending where nothing is waited for, and where something is.
        would_wait = wait_cost < stay_cost
        for waiting in (False, True):
            others = np.where(waiting & would_wait, wait_cost, stay_cost)
            sent = sent_cost < others
            late = waiting & would_wait & ~sent
            price = call_price + wait_price * late.any()
            sum_of = np.where(sent, sent_cost, others).sum() + price
            if sent.any() and (sum_of < total or not np.isfinite(total)):
                total = sum_of
                decided = np.where(late, best, np.minimum(stay, chosen.low))
                decided = np.where(sent, SENT, decided)
        return decided

    def _in_time(
        self, cost: np.ndarray, missing: np.ndarray, waits: np.ndarray, stay_cost: np.ndarray
    ) -> None:
        """Takes out of cost [n, L] what does not come before the deadline; all of a layer share the link. What
        gains most comes first. An expert with no other way keeps its least."""
        left = max(self.deadline - self.latency, 0.0) * self.bandwidth
        gain = np.where(np.isfinite(stay_cost), stay_cost - cost.min(1), np.inf)
        for i in np.argsort(-gain, kind="stable"):
            late = waits[i] & (missing[i] > left)
            if not np.isfinite(stay_cost[i]):
                late[missing[i] == np.where(np.isfinite(cost[i]), missing[i], np.inf).min()] = False
            cost[i, late] = np.inf
            best = cost[i].argmin()
            if np.isfinite(cost[i, best]) and waits[i, best] and cost[i, best] < stay_cost[i]:
                left -= missing[i, best]

    def _sent_cost(self, chosen: Chosen, square: np.ndarray) -> np.ndarray | None:
        """float [n]: loss of what is missing at the level of the other machine; inf where it cannot."""
        there = self.elsewhere
        if there is None or not there.available:
            return None
        level = there.level[chosen.experts]
        can = (level >= 0) & (chosen.resident < chosen.low)
        loss = self._loss[chosen.experts, np.maximum(level, 0)]
        return np.where(can, loss * square, np.inf)
