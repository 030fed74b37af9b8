"""What to do about experts of which something is missing: wait, use what is here, or leave them out.

A rule is asked once per layer, with all experts that the router has chosen there. Everything is decided
from what is resident at that moment; the gate weight of an expert is what its output counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

SKIP = -1


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
        """int64 [n]: the coarsest level to compute at; above `resident` it is waited for; SKIP: left out."""
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
    """The level with the least gate-weighted loss + price * time to wait.

    A use of expert x at level l with gate weight g loses loss[x, l] / use[x] * g^2 / E[g^2], all three as
    measured; waiting costs the reading of what is missing, and once per layer the latency of waiting at
    all. `price` is the planner's multiplier of its time limit, in nats per second: what the rule gives
    away for time is worth as much as what the plan gave away.
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
    ):
        """loss: float [X, L] nats per token, nan or inf: no such level.  weight: float [X], gate weight
        squared per token, use * E[g^2] of a use, at the uses for which the losses hold.  bytes_at: int64 [X, L].  step_bytes: int64 [X, L, L],
        what level j needs beside the records of level i.  skip_loss: float [X], nats per token if the
        expert is always left out; None: it never is.  bandwidth: bytes/s.  latency: seconds."""
        per_square = 1.0 / np.maximum(weight, 1e-12)
        self._loss = np.where(np.isfinite(loss), loss * per_square[:, None], np.inf)
        self._skip = None if skip_loss is None else skip_loss * per_square
        self._bytes, self._steps = bytes_at, step_bytes
        self.price, self.bandwidth, self.latency = price, bandwidth, latency

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
        best = cost.argmin(1)
        # To compute with what is here, or to leave out, costs no time.
        stay, stay_cost = here, np.where(here >= 0, self._loss[x, here] * square, np.inf)
        if self._skip is not None:
            skip_cost = self._skip[x] * square
            stay = np.where(skip_cost < stay_cost, SKIP, stay)
            stay_cost = np.minimum(skip_cost, stay_cost)
        gain = stay_cost - cost[rows, best]
        waits = gain > 0
        if gain[waits].sum() <= self.price * self.latency:
            waits[:] = False  # all who wait share the price of waiting at all
        # An expert that is here at a finer level than planned is computed at the finer one anyway.
        return np.where(waits, best, np.minimum(stay, chosen.low))
