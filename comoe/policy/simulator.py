"""Replays a routing trace against a plan, a cache policy and a predictor, in simulated time.

Discrete events on two servers. *Compute* runs the dense part of a layer, then the experts that are here, then
each missing one when it has come. *Read* serves one request at a time, demand before speculation; a chunk of
1 MiB that has begun is not interrupted. A request of demand waits `latency` before its bytes flow at
`bandwidth`; those of one layer wait it together. What is waited for beyond compute is the stall.

Memory is as in the engine: records, a budget in bytes, evicted by least value, then least recently used, then
finest record; what the layer at hand needs is pinned; if that does not fit at once it goes in waves.
Speculation may evict what is worth at most as much and was not used or fetched since the layer before began;
a wrong guess about a layer is cancelled when it runs. Each row of the trace is one pass of one token.
Everything is deterministic.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from comoe.policy.cache import CachePolicy
from comoe.policy.costs import Costs
from comoe.policy.misses import SKIP, Chosen, MissRule
from comoe.policy.plan import BudgetError, Plan, Sizes
from comoe.policy.predictor import NoPredictor, Predictor, PrefetchGauge, RankChances
from comoe.policy.prefetch_gauge import TimedGauge

if TYPE_CHECKING:
    from comoe.trace import Trace

CHUNK = 1 << 20
RUNNING = 32 << 20  # bytes of speculation queued at most, as in the engine
ABSENT, QUEUED, RESIDENT = 0, 1, 2


class ReplayError(ValueError):
    """A trace that does not belong to the model, or has nothing to replay."""


@dataclass
class Result:
    """Arrays are per token, float64 [N]: seconds, and nats where losses were given."""

    token_time: np.ndarray
    stall: np.ndarray
    loss: np.ndarray
    bytes_read: int = 0  # by demand
    prefetch_bytes: int = 0
    prefetch_used_bytes: int = 0
    hits: int = 0
    misses: int = 0
    skipped: int = 0
    levels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # uses by level

    @property
    def hit_rate(self) -> float:
        return self.hits / max(self.hits + self.misses + self.skipped, 1)

    def summary(self) -> dict[str, float]:
        """Figures per token: milliseconds, bytes, nats."""
        tokens = len(self.token_time)
        return {
            "hit_rate": self.hit_rate,
            "stall_ms": 1e3 * float(self.stall.mean()),
            "token_ms": 1e3 * float(self.token_time.mean()),
            "bytes_per_token": (self.bytes_read + self.prefetch_bytes) / tokens,
            "wasted_per_token": (self.prefetch_bytes - self.prefetch_used_bytes) / tokens,
            "loss": float(self.loss.mean()),
        }


def check_trace(trace: Trace, sizes: Sizes) -> None:
    """ReplayError unless the trace is one of a model of these sizes."""
    if trace.num_tokens == 0:
        raise ReplayError("replay: the trace has no tokens; record one with comoe trace")
    got, expected = trace.num_experts.tolist(), sizes.num_experts.tolist()
    if got != expected:
        raise ReplayError(
            f"replay: expected a trace of {_shape(expected)}, got one of {_shape(got)} ({trace.model}); "
            "record it with the same model: comoe trace DST"
        )


def _shape(num_experts: Sequence[int]) -> str:
    counts = sorted(set(num_experts))
    return f"{len(num_experts)} layers of {' or '.join(map(str, counts))} experts"


class Simulator:
    """One replay; `run` may be called once.

    predictor: asked before each layer. prefetch: whether what it says is also read ahead (while the gauge
    finds that it pays), or only told to the cache policy.  loss: float [X, levels], nats per token;
    a skipped expert loses as much as at its coarsest level, or skip_loss [X].  All are of one use; with
    mean_square [X], the mean square of the gate weights of an expert's uses, of one at that weight.
    script: (seconds, "memory", bytes) and (seconds, "bandwidth", factor of costs.bandwidth), by time.
    on_token: called after each token with the simulated time, the simulator and the token's seconds; a
    controller sits here and may call `set_plan`.
    """

    def __init__(
        self,
        sizes: Sizes,
        costs: Costs,
        plan: Plan,
        *,
        trace: Trace,
        cache: CachePolicy,
        predictor: Predictor | None = None,
        prefetch: bool = True,
        misses: MissRule | None = None,
        gauge: PrefetchGauge | None = None,
        loss: np.ndarray | None = None,
        skip_loss: np.ndarray | None = None,
        mean_square: np.ndarray | None = None,
        script: Sequence[tuple[float, str, float]] = (),
        on_token: Callable[[float, Simulator, float], None] | None = None,
    ):
        check_trace(trace, sizes)
        for at, what, amount in script:
            if what not in ("memory", "bandwidth") or not (at >= 0 and 0 < amount < np.inf):
                raise ValueError(
                    "replay: script: expected (seconds >= 0, 'memory' or 'bandwidth', amount > 0), got "
                    f"({at}, {what!r}, {amount})"
                )
        if costs.compute.shape != (len(sizes.records), len(sizes.levels)):
            raise ValueError(
                f"replay: costs.compute: expected shape {(len(sizes.records), len(sizes.levels))}, got "
                f"{costs.compute.shape}; make the costs for this store"
            )
        if not (0 < costs.bandwidth < np.inf and 0 <= costs.latency < np.inf):
            raise ValueError(
                "replay: costs: expected bandwidth > 0 bytes/s and latency >= 0 s, got "
                f"{costs.bandwidth} and {costs.latency}; measure the disk with comoe doctor"
            )
        self.sizes, self.costs, self.trace, self.cache = sizes, costs, trace, cache
        self.predictor = predictor or NoPredictor()
        self.prefetch, self._rule = prefetch, misses
        self.gauge = gauge or TimedGauge()
        self._loss, self._skip_loss, self._mean_square = loss, skip_loss, mean_square
        self._script = deque(sorted(script))
        self._on_token = on_token
        self._chances = RankChances(len(sizes.num_experts))

        self._first = np.concatenate([[0], np.cumsum(sizes.num_experts)])
        self._of_layer = [
            sizes.records[a:b] for a, b in zip(self._first[:-1], self._first[1:], strict=True)
        ]
        ids = len(sizes.record_bytes)
        self._state = np.zeros(ids, np.int8)
        self._value = np.zeros(ids)
        self._last = np.full(ids, -1.0)  # tick of the last use
        self._came = np.full(ids, -1.0)  # tick of arrival
        self._fresh = np.zeros(ids, bool)  # read ahead, not used yet
        self._arrival = np.zeros(ids)  # of what is on its way, seconds
        self._nbytes = sizes.record_bytes.tolist()
        self._column = np.zeros(ids, np.int64)
        for r in range(sizes.records.shape[1]):
            column = sizes.records[:, r]
            self._column[column[column >= 0]] = r
        self._ids: dict[tuple[int, int], list[int]] = {}
        self._used = 0
        self._tick = 0.0
        self.time = 0.0
        self._free_at = 0.0  # of the read server
        self._bandwidth = costs.bandwidth
        self._queue: deque[tuple[int, int, float]] = deque()  # (layer, record, asked at)
        self._running: tuple[int, float] | None = None  # record and bytes left
        n = trace.num_tokens
        self.result = Result(*(np.zeros(n) for _ in range(3)))
        self.result.levels = np.zeros(len(sizes.levels), np.int64)
        self.set_plan(plan)
        self._fill()

    # ---- plan and memory ----------------------------------------------------------------------------

    def set_plan(self, plan: Plan) -> None:
        """Levels and budget from now on; records above the plan go at once."""
        need = self.sizes.largest(plan.min_level)
        if plan.pool_bytes < need:
            raise BudgetError(
                f"replay: the pool has {plan.pool_bytes:,} bytes, but one expert needs {need:,}"
            )
        self.plan, self._budget = plan, plan.pool_bytes
        wanted = plan.base | self.sizes.chosen(plan.min_level)
        wanted |= self.sizes.chosen(np.maximum(plan.min_level, plan.want_level))
        self._evict(np.flatnonzero(~wanted & (self._state == RESIDENT)))
        self._value[np.isinf(self._value)] = 0.0
        self._value[plan.base] = np.inf
        self._make_room(0, np.zeros(0, np.int64))

    def _fill(self) -> None:
        """What the plan holds, then what it aims at, coarsest records first, until memory is full: it was
        read before the start."""
        aimed = self.sizes.chosen(self.plan.min_level)
        for wanted in (self.plan.base, aimed & ~self.plan.base):
            for record in self.sizes.records.T.ravel().tolist():
                if record < 0 or not wanted[record] or self._state[record] != ABSENT:
                    continue
                if self._used + self._nbytes[record] > self._budget:
                    return
                self._state[record] = RESIDENT
                self._used += self._nbytes[record]

    def _evict(self, ids: np.ndarray) -> None:
        self._state[ids] = ABSENT
        self._fresh[ids] = False
        self._used -= int(self.sizes.record_bytes[ids].sum())

    def _make_room(
        self, nbytes: int, pinned: np.ndarray, most: float = np.inf, since: float = np.inf
    ) -> bool:
        """Evicts until `nbytes` fit, but nothing pinned, worth more than `most`, or used or come after the
        tick `since`; evicts nothing and says False if that is not enough."""
        lacking = self._used + nbytes - self._budget
        if lacking <= 0:
            return True
        may = self._state == RESIDENT
        may[pinned] = False
        if since < np.inf:
            may &= (self._value <= most) & (np.maximum(self._last, self._came) < since)
        candidates = np.flatnonzero(may)
        sizes = self.sizes.record_bytes[candidates]
        if sizes.sum() < lacking:
            return False
        order = np.lexsort(
            (-self._column[candidates], self._last[candidates], self._value[candidates])
        )
        count = int(np.searchsorted(np.cumsum(sizes[order]), lacking)) + 1
        self._evict(candidates[order[:count]])
        return True

    def _records(self, expert: int, level: int) -> list[int]:
        """Ids of what an expert needs at a level."""
        key = (expert, level)
        if key not in self._ids:
            ids = self.sizes.records[expert][self.sizes.needs[level]]
            self._ids[key] = ids[ids >= 0].tolist()
        return self._ids[key]

    # ---- reading --------------------------------------------------------------------------------------

    def _advance(self, until: float) -> None:
        """Lets the read server work on speculation until then; a chunk that has begun is finished."""
        while True:
            if self._running is None:
                if not self._queue:
                    return
                _, record, asked = self._queue[0]
                if max(self._free_at, asked) >= until:
                    return
                self._queue.popleft()
                if self._state[record] != ABSENT:
                    continue
                room = self._make_room(
                    self._nbytes[record],
                    np.zeros(0, np.int64),
                    float(self._value[record]),
                    self._tick - 1,
                )
                if not room:
                    continue
                self._free_at = max(self._free_at, asked + self.costs.latency)
                self._state[record] = QUEUED
                self._used += self._nbytes[record]
                self._running = record, float(self._nbytes[record])
                self.result.prefetch_bytes += self._nbytes[record]
            record, left = self._running
            if self._free_at >= until:
                return
            part = min(left, CHUNK)
            self._free_at += part / self._bandwidth
            self._running = (record, left - part) if left > part else None
            if self._running is None:
                self._publish(record, self._free_at, fresh=True)

    def _publish(self, record: int, at: float, fresh: bool) -> None:
        self._state[record] = RESIDENT
        self._arrival[record] = at
        self._came[record] = self._tick
        self._fresh[record] = fresh

    def _demand(self, records: list[int], now: float) -> float:
        """Reads what is missing of one expert; returns when all has come."""
        ready = now
        for record in records:
            if self._running is not None and self._running[0] == record:
                # Joined: what is left of it goes first.
                self._free_at = max(self._free_at, now) + self._running[1] / self._bandwidth
                self._running = None
                self._publish(record, self._free_at, fresh=True)
            elif self._state[record] == ABSENT:
                start = max(self._free_at, now + self.costs.latency)
                self._free_at = start + self._nbytes[record] / self._bandwidth
                self._used += self._nbytes[record]
                self.result.bytes_read += self._nbytes[record]
                self._publish(record, self._free_at, fresh=False)
            ready = max(ready, float(self._arrival[record]))
        return ready

    # ---- computing ------------------------------------------------------------------------------------

    def run(self) -> Result:
        trace, layers = self.trace, len(self.sizes.num_experts)
        experts = trace.experts.astype(np.int64)
        sequence = tokens_read = None
        for row in range(trace.num_tokens):
            begin = self.time
            self._follow_script()
            if trace.sequence[row] != sequence:
                sequence = trace.sequence[row]
                self.cache.new_sequence()
                self.predictor.new_sequence()
                self._next: dict[int, np.ndarray] = {}
            self._predicted: dict[int, list[tuple[int, np.ndarray]]] = {}
            self.predictor.begin_token(int(trace.token[row]))
            for layer_idx in range(layers):
                self._set_values(layer_idx)
            self._predict(-1)
            for layer_idx in range(layers):
                chosen = experts[row, layer_idx]
                weights = trace.weights[row, layer_idx][chosen >= 0].astype(float)
                chosen = chosen[chosen >= 0]
                if chosen.size:
                    self._layer(row, layer_idx, chosen, weights)
            self.result.token_time[row] = self.time - begin
            tokens_read = self.result.prefetch_bytes, self.result.prefetch_used_bytes
            self.gauge.note_step(*tokens_read)
            self.gauge.note_seconds(self.time - begin)
            if self._on_token is not None:
                self._on_token(self.time, self, self.time - begin)
        return self.result

    def _follow_script(self) -> None:
        while self._script and self._script[0][0] <= self.time:
            _, what, amount = self._script.popleft()
            if what == "bandwidth":
                self._bandwidth = self.costs.bandwidth * amount
                continue
            self._budget = int(amount)
            need = self.sizes.largest(self.plan.min_level)
            if self._budget < need:
                raise BudgetError(
                    f"replay: script: {self._budget:,} bytes are too few, one expert needs {need:,}"
                )
            self._make_room(0, np.zeros(0, np.int64))

    def _set_values(self, layer_idx: int) -> None:
        values = self.cache.values(layer_idx)
        for r in range(self.sizes.records.shape[1]):
            ids = self._of_layer[layer_idx][:, r]
            has = ids >= 0
            if has.any():
                self._value[ids[has]] = np.where(self.plan.base[ids[has]], np.inf, values[has])

    def _predict(self, layer_idx: int) -> None:
        """Tells the cache policy, and asks for what is likely and missing."""
        ahead = self.predictor.predict(layer_idx, None)
        useful = self.prefetch and self.gauge.useful
        for later, experts in ahead:
            self._predicted.setdefault(later, []).append((layer_idx, experts))
            chances = self._chances.of(later, later - layer_idx, experts.size)
            self.cache.predicted(later, experts, chances)
            self._set_values(later)
            if not useful:
                continue
            first = int(self._first[later])
            for expert in experts.tolist():
                level = int(self.plan.min_level[first + expert])
                for record in self._records(first + expert, level):
                    if self._state[record] == ABSENT:
                        self._queue.append((later, record, self.time))
        queued = 0
        for i, (_, record, _) in enumerate(self._queue):
            queued += self._nbytes[record]
            if queued > RUNNING:
                while len(self._queue) > i:
                    self._queue.pop()
                break

    def _layer(self, row: int, layer_idx: int, chosen: np.ndarray, weights: np.ndarray) -> None:
        outside = self.costs.outside(self.sizes, resident=self.plan.resident)
        dense = outside / len(self.sizes.num_experts)
        self._advance(self.time + dense)
        self.time += dense
        self._tick += 1
        self.predictor.note(layer_idx, chosen, weights)
        # Guesses about this layer that were wrong are no longer wanted.
        self._queue = deque(q for q in self._queue if q[0] != layer_idx)
        for source, guess in self._predicted.pop(layer_idx, []):
            self._chances.note(layer_idx, layer_idx - source, guess, chosen)
            if source == layer_idx - 1 or source == -1:
                self.gauge.note(guess, chosen)
        self._predict(layer_idx)

        levels = self._decide(layer_idx, chosen, weights)
        first = int(self._first[layer_idx])
        computed, waiting = [], []
        for expert, level in zip((first + chosen).tolist(), levels.tolist(), strict=True):
            if level == SKIP:
                self.result.skipped += 1
                continue
            needed = self._records(expert, level)
            self.result.levels[level] += 1
            for record in needed:
                if self._fresh[record]:
                    self._fresh[record] = False
                    self.result.prefetch_used_bytes += self._nbytes[record]
            here = all(self._state[r] == RESIDENT and self._arrival[r] <= self.time for r in needed)
            (computed if here else waiting).append((expert, level, needed))
        self.result.hits += len(computed)
        self.result.misses += len(waiting)
        self._compute(row, computed, waiting)
        if self._loss is not None:
            self.result.loss[row] += self._lost(first + chosen, weights, levels)
        self.cache.note(layer_idx, chosen, weights, levels)
        layers = len(self.sizes.num_experts)
        if layer_idx in self._next:
            self._chances.note(layer_idx, layers, self._next.pop(layer_idx), chosen)
        likely = self.predictor.predict_next(layer_idx)
        if likely is not None:
            self._next[layer_idx] = likely
            chances = self._chances.of(layer_idx, layers, likely.size)
            self.cache.predicted(layer_idx, likely, chances)
        self._set_values(layer_idx)

    def _decide(self, layer_idx: int, chosen: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """int64 [n]: the level to compute each at; -1: skipped."""
        x = self._first[layer_idx] + chosen
        low = self.plan.min_level[x].astype(np.int64)
        want = np.maximum(self.plan.want_level[x].astype(np.int64), low)
        if self._rule is None and np.array_equal(low, want):
            return low
        records = self.sizes.records[x]
        here = (records < 0) | (self._state[records] == RESIDENT)
        lacks = (~here).astype(np.int64) @ self.sizes.needs.T.astype(np.int64)
        whole = (lacks == 0) & self.sizes.has[x]
        grid = np.arange(len(self.sizes.levels))
        resident = np.where(whole & (grid <= want[:, None]), grid, -1).max(1)
        least = low
        if self._rule is not None:
            order = np.argsort(-weights, kind="stable")
            mass = np.empty(len(weights))
            mass[order] = np.cumsum(weights[order]) - weights[order]
            mass /= max(float(weights.sum()), 1e-12)
            least = self._rule.decide(Chosen(x, weights, mass, resident, low, want))
        level = np.where(resident >= least, resident, least)
        return np.where(least == SKIP, SKIP, level)

    def _compute(self, row: int, computed: list, waiting: list) -> None:
        """Hits first, then what comes, in the order in which it was asked for; in waves if it must be."""
        begin = clock = self.time
        spent = 0.0
        pinned: list[int] = [r for _, _, needed in (*computed, *waiting) for r in needed]
        for record in pinned:
            self._last[record] = self._tick
        arrivals = []
        for expert, level, needed in waiting:
            missing = [r for r in needed if self._state[r] == ABSENT]
            room = sum(self._nbytes[r] for r in missing)
            if not self._make_room(room, np.array(pinned, np.int64)):
                # The next wave: everything before it is computed, and lets go.
                clock, spent = self._drain(clock, spent, computed, arrivals)
                computed, arrivals = [], []
                self._advance(clock)
                self._cancel_running()
                if not self._make_room(room, np.array(needed, np.int64)):
                    raise BudgetError(
                        f"replay: {self._budget:,} bytes do not hold one expert; it needs {room:,}"
                    )
                pinned = needed
            arrivals.append((self._demand(needed, clock), expert, level))
        clock, spent = self._drain(clock, spent, computed, arrivals)
        self._advance(clock)
        self.time = clock
        self.result.stall[row] += clock - begin - spent

    def _cancel_running(self) -> None:
        """Speculation gives its pages to demand that cannot be met otherwise."""
        if self._running is not None:
            record, _ = self._running
            self._running = None
            self._state[record] = ABSENT
            self._used -= self._nbytes[record]

    def _drain(
        self, clock: float, spent: float, computed: list, arrivals: list
    ) -> tuple[float, float]:
        """Time when all of these are computed, and seconds of compute so far."""
        for expert, level, _ in computed:
            seconds = float(self.costs.compute[expert, level])
            clock, spent = clock + seconds, spent + seconds
        for ready, expert, level in sorted(arrivals):
            seconds = float(self.costs.compute[expert, level])
            clock, spent = max(clock, ready) + seconds, spent + seconds
        return clock, spent

    def _lost(self, x: np.ndarray, weights: np.ndarray, levels: np.ndarray) -> float:
        """Nats that the levels used lose in expectation, per use."""
        skipped = levels == SKIP
        lost = self._loss[x, np.maximum(levels, 0)].astype(float)
        if skipped.any() and self._skip_loss is not None:
            lost = np.where(skipped, self._skip_loss[x], lost)
        if self._mean_square is not None:
            lost *= weights**2 / np.maximum(self._mean_square[x], 1e-12)
        return float(lost.sum())
