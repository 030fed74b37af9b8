"""`comoe plan --replay`: what each cache policy would have done with a recorded text, against Belady.

Every policy gets the same records, memory, costs and trace, and starts from the same memory. The main figure
is stall time without reading ahead; the policies that use predictions get them as advice about what to keep.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from comoe.policy.cache import LFU, LRU, CachePolicy
from comoe.policy.cache_scores import GreedyDual, Hobbit, HybriMoE
from comoe.policy.costs import Costs
from comoe.policy.next_use import Belady, NextUse
from comoe.policy.plan import BudgetError, Sizes, all_cached
from comoe.policy.predictor import Predictor
from comoe.policy.predictors import BestOf, Recorded
from comoe.policy.simulator import Result, Simulator, check_trace
from comoe.policy.token_table import TokenTable
from comoe.trace import Trace

SHARES = (0.1, 0.2, 0.3, 0.5)  # of the bytes of all experts at the level replayed
# Of a 2-core machine with an NVMe-backed virtual disk: bytes/s, seconds, bytes/s of weights through a core.
DISK_BANDWIDTH, DISK_LATENCY, COMPUTE = 1.1e9, 100e-6, 10e9
MOST_TOKENS = 2048

POLICIES: dict[str, Callable[[Trace], CachePolicy]] = {
    "lru": lambda trace: LRU(trace.num_experts),
    "lfu": lambda trace: LFU(trace.num_experts),
    "hobbit": lambda trace: Hobbit(trace.num_experts),
    "hybrimoe": lambda trace: HybriMoE(trace.num_experts),
    "greedy-dual": lambda trace: GreedyDual(trace.num_experts),
    "next-use": lambda trace: NextUse(trace.num_experts),
    "belady": lambda trace: Belady(trace.num_experts, trace.experts),
}
DEFAULT = "next-use"


def first_tokens(trace: Trace, tokens: int) -> Trace:
    """The trace's first rows."""
    rows = slice(0, tokens)
    arrays = (trace.sequence, trace.position, trace.token, trace.experts, trace.weights)
    predicted = None if trace.predicted is None else trace.predicted[rows]
    return Trace(
        trace.model,
        trace.layers,
        trace.num_experts,
        *(array[rows] for array in arrays),
        predicted,
        trace.depth,
    )


def predictor_for(trace: Trace) -> Predictor:
    """What production predicts with: the token's last routing, and the next layers' routers where the
    trace has recorded them."""
    k = trace.experts.shape[2]
    predictors: list[Predictor] = [TokenTable(trace.num_experts.tolist(), k)]
    if trace.predicted is not None and trace.predicted.shape[2]:
        predictors.append(Recorded(trace.predicted, trace.depth, trace.depth))
    return BestOf(predictors)


def default_costs(sizes: Sizes, bandwidth: float, latency: float, dense_bytes: int = 0) -> Costs:
    """Costs of a CPU that streams weights at 10 GB/s, with a disk of `bandwidth` and `latency`."""
    compute = np.where(sizes.has, sizes.bytes_at / COMPUTE, np.inf)
    return Costs(compute, dense_bytes / COMPUTE, bandwidth, latency)


def compare(
    sizes: Sizes,
    costs: Costs,
    trace: Trace,
    pool_bytes: int,
    level: int,
    *,
    prefetch: bool = False,
    policies: Sequence[str] = tuple(POLICIES),
    progress: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """A row for each policy: hit_rate, stall_ms, token_ms, bytes_per_token, wasted_per_token, and `closed`,
    the share of the stall between LRU and Belady that it avoids (None where they are alike).

    prefetch: all read ahead alike, by the same predictions.
    """
    check_trace(trace, sizes)
    plan = all_cached(sizes, sizes.all_at(level), pool_bytes)
    rows = []
    for name in policies:
        result: Result = Simulator(
            sizes,
            costs,
            plan,
            trace=trace,
            cache=POLICIES[name](trace),
            predictor=predictor_for(trace),
            prefetch=prefetch,
        ).run()
        rows.append({"policy": name, "prefetch": prefetch, **result.summary()})
        progress()
    stall = {row["policy"]: row["stall_ms"] for row in rows}
    for row in rows:
        gap = stall["lru"] - stall["belady"] if {"lru", "belady"} <= stall.keys() else 0.0
        row["closed"] = (stall["lru"] - row["stall_ms"]) / gap if gap > 1e-9 else None
    return rows


def replay(
    folder: str | os.PathLike,
    trace_file: str | os.PathLike,
    *,
    memory: Sequence[int] = (),
    bandwidth: float = DISK_BANDWIDTH,
    latency: float = DISK_LATENCY,
    tokens: int = MOST_TOKENS,
    prefetch: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Rows of `compare` for a packed folder, its experts at the original weights, and a trace of its model.

    memory: bytes for experts, several; default: 10, 20, 30 and 50% of all.  bandwidth: of the disk, bytes/s.
    latency: seconds per wait.  tokens: at most so many of the trace.
    """
    if not (0 < bandwidth < np.inf):
        raise ValueError(f"replay: --bandwidth: expected bytes/s above 0, got {bandwidth}")
    if not (0 <= latency < np.inf):
        raise ValueError(f"replay: --latency: expected seconds of at least 0, got {latency}")
    if tokens < 1:
        raise ValueError(f"replay: --tokens: expected at least 1, got {tokens}")
    from comoe.runtime.engine import RecordTable, store_sizes
    from comoe.store import Store

    store = Store.open(folder)
    sizes = store_sizes(store, RecordTable(store))
    trace = first_tokens(Trace.read(trace_file), tokens)
    check_trace(trace, sizes)
    level = sizes.levels.exact
    total, one = sizes.total(level), sizes.largest(sizes.all_at(level))
    budgets = list(memory) or [max(int(share * total), one) for share in SHARES]
    for pool_bytes in budgets:
        if pool_bytes < one:
            raise BudgetError(
                f"replay: --memory: {pool_bytes:,} bytes do not hold one expert, which takes {one:,}"
            )
    costs = default_costs(sizes, bandwidth, latency, store.manifest.dense_bytes)
    rows, done = [], 0

    def step() -> None:
        nonlocal done
        done += 1
        progress(done, len(budgets) * len(POLICIES))

    for pool_bytes in budgets:
        found = compare(sizes, costs, trace, pool_bytes, level, prefetch=prefetch, progress=step)
        rows += [{"memory": pool_bytes, "share": pool_bytes / total, **row} for row in found]
    return rows
