"""What the planner is told about a running model: what the text uses, and what reading and computing take."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from comoe import _C
from comoe.policy.costs import Costs
from comoe.policy.increments import nothing_loss
from comoe.policy.misses import LeastCost, MissRule
from comoe.policy.monitor import Monitor
from comoe.policy.plan import Plan, Sizes
from comoe.policy.profile import InputProfile
from comoe.policy.smoothing import Smoothed
from comoe.policy.snapshot import Estimate, Link, Snapshot
from comoe.runtime.spec import ExpertsSpec

TIER = "disk"
FIRST_LINK = Link(Estimate(5e8), Estimate(2e-4))  # until transfers have told more
KERNEL_SHARE = 0.8  # of the memory's read bandwidth, docs/performance.md
LAYER_SECONDS = 3e-4  # outside the experts, per MoE layer, until steps have told more
PROBE_BYTES = 64 << 20
COUNTERS = ("demand_bytes", "waits", "wait_seconds")
LEAST_USE = 1e-3  # of an expert that the calibration text hardly used


def memory_bandwidth(num_bytes: int) -> float:
    """Bytes/s at which the kernels' threads read a block of that size, which is taken for a moment."""
    block = np.ones(max(num_bytes, 1 << 16), np.uint8)
    best = np.inf
    for _ in range(3):
        begin = time.perf_counter()
        _C.stream_read(block)
        best = min(best, time.perf_counter() - begin)
    return block.size / best


class Live:
    """Of one runtime. Steps of one token per sequence teach it; longer ones are another kind of work."""

    def __init__(
        self,
        sizes: Sizes,
        specs: Sequence[ExpertsSpec],
        dense_bytes: int,
        pool_bytes: int,
        experts_per_token: int,
    ):
        """dense_bytes: read by every token.  pool_bytes: that experts may take, but do not yet."""
        self.monitor = Monitor(prior={TIER: FIRST_LINK})
        # Until routing was seen: a token's gate weights add up to one, and are alike.
        square = 1.0 / experts_per_token**2
        self.profile = InputProfile([spec.num_experts for spec in specs], square=square)
        self._sizes, self._layers = sizes, len(specs)
        self._dense_bytes, self._pool_bytes = dense_bytes, pool_bytes
        self.network: Callable[[], Link] | None = (
            None  # the present link, of experts that lie elsewhere
        )
        self._dense = Smoothed()
        self._priced = False
        self._step_began: float | None = None
        self._engine: dict | None = None  # its figures when the last step began
        self._tokens = 0

    def note_step(self, tokens: int, used: Sequence[np.ndarray], engine: dict) -> None:
        """A step begins; the one before computed experts at used[l] - 1, uint8 [E], 0: not used."""
        now = time.perf_counter()
        was, self._engine = self._engine, engine
        if was is not None:
            since = {name: engine[name] - was[name] for name in COUNTERS}
            # What demand costs on top of computing: what was hidden behind it costs nothing.
            if since["demand_bytes"] > 0 and since["waits"] > 0:
                self.monitor.note_transfer(
                    TIER, since["demand_bytes"], since["wait_seconds"], since["waits"]
                )
            if self._step_began is not None and self._tokens == 1 and self._priced:
                self._learn(now - self._step_began, since["wait_seconds"], used)
        self._step_began, self._tokens = now, tokens

    def _learn(self, total: float, waited: float, used: Sequence[np.ndarray]) -> None:
        """What neither waiting nor the kernels' reading of weights explains is the same at any level."""
        levels = np.concatenate(used).astype(np.int64) - 1
        rows = np.flatnonzero(levels >= 0)
        dense = total - waited - self._costs.compute[rows, levels[rows]].sum()
        if dense > 0:
            self._dense.add(dense)

    @cached_property
    def _costs(self) -> Costs:
        """Before anything was learnt. Asked for first when a plan is made for time, with the pool still empty:
        the probe stays within what experts will take."""
        bandwidth = memory_bandwidth(min(PROBE_BYTES, self._pool_bytes))
        self._priced = True
        return Costs(
            np.where(self._sizes.has, self._sizes.bytes_at / (KERNEL_SHARE * bandwidth), np.inf),
            self._dense_bytes / bandwidth + LAYER_SECONDS * self._layers,
            FIRST_LINK.bandwidth.mean,
            FIRST_LINK.latency.mean,
        )

    def costs(self, snapshot: Snapshot | None = None) -> Costs:
        """What things take, as far as this run has shown."""
        if self.network is None:
            link = (snapshot or self.monitor.poll()).tiers.get(TIER, FIRST_LINK)
        else:
            link = self.network()
        changes: dict = {"bandwidth": link.bandwidth.mean, "latency": link.latency.mean}
        if self._dense.estimate.samples:
            changes["dense"] = self._dense.estimate.mean
        return replace(self._costs, **changes)

    def rule(self, plan: Plan, loss: np.ndarray, use: np.ndarray) -> MissRule | None:
        """What to do about misses under `plan`; None: wait, which is all there is to decide.

        loss: float [X, L] nats per token at `use` float [X], as the planner has them."""
        if plan.resident or plan.price <= 0:
            return None
        return self.least_cost(plan, loss, use, price=plan.price)

    def losses(self, loss: np.ndarray, use: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(nats of a use at each level per squared gate weight, float [X, L], inf: no such level; nats of a use
        that is left out, [X]), with the gate weights that were seen; arguments as of `rule`."""
        per_square = 1.0 / self._weight(use)
        at_levels = np.where(np.isfinite(loss), loss * per_square[:, None], np.inf)
        return at_levels.astype(np.float64), nothing_loss(loss) * per_square

    def _weight(self, use: np.ndarray) -> np.ndarray:
        """float64 [X]: gate weight squared per token, at the uses for which losses hold."""
        return np.maximum(use, LEAST_USE).astype(np.float64) * self.profile.mean_square()

    def least_cost(
        self, plan: Plan, loss: np.ndarray, use: np.ndarray, *, price: float, **more: Any
    ) -> LeastCost:
        """The rule at `price` nats per second; arguments as of `rule`, more: of LeastCost."""
        costs = self.costs()
        return LeastCost(
            loss,
            self._weight(use),
            self._sizes.bytes_at,
            self._sizes.step_bytes,
            price=price,
            bandwidth=costs.bandwidth,
            latency=costs.latency,
            **more,
        )
