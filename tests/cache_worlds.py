"""Small stores, plans and traces for the tests of caches, predictors and the simulator."""

from __future__ import annotations

import numpy as np

from comoe.policy.costs import Costs
from comoe.policy.plan import LADDER, Levels, Sizes
from comoe.trace import Trace

ONE = Levels(("exact",), (1,))


def sizes_of(num_layers=3, experts=6, nbytes=1000, levels=ONE) -> Sizes:
    """Every expert has every record, of nbytes; of LADDER's each takes as much as it has bits, `exact` 16,
    where the first is of nbytes."""
    width = max(mask.bit_length() for mask in levels.masks)
    total = num_layers * experts
    records = np.arange(total * width, dtype=np.int32).reshape(total, width)
    bits = np.array([2, 1, 1, 4, 16] if width == 5 else [2])
    sizes = np.tile(nbytes * bits // 2, total).astype(np.int64)
    return Sizes(levels, records, sizes, np.full(num_layers, experts))


def costs_of(sizes: Sizes, *, compute=0.0, dense=0.0, bandwidth=1e6, latency=0.0) -> Costs:
    seconds = np.full((len(sizes.records), len(sizes.levels)), compute)
    return Costs(seconds, dense, bandwidth, latency)


def trace_of(experts: np.ndarray, num_experts=6, sequence=None, token=None, **more) -> Trace:
    """experts: int [N, L, K]; gate weights all alike."""
    experts = np.asarray(experts, np.int16)
    n, layers, k = experts.shape
    return Trace(
        "made",
        tuple(f"layers.{i}" for i in range(layers)),
        np.full(layers, num_experts, np.int32),
        np.zeros(n, np.int32) if sequence is None else np.asarray(sequence, np.int32),
        np.arange(n, dtype=np.int32),
        np.full(n, -1, np.int32) if token is None else np.asarray(token, np.int32),
        experts,
        np.where(experts >= 0, np.float32(1 / k), np.float32(0)),
        **more,
    )


def random_trace(seed=0, n=60, num_layers=3, k=2, num_experts=6, skew=1.0) -> Trace:
    """Tokens repeat, and each has its own experts; `skew` makes some more frequent."""
    rng = np.random.default_rng(seed)
    tokens = rng.zipf(1.5, n) % 12
    own = np.stack(
        [
            np.stack(
                [
                    rng.choice(num_experts, k, replace=False, p=_skewed(rng, num_experts, skew))
                    for _ in range(num_layers)
                ]
            )
            for _ in range(12)
        ]
    )
    return trace_of(own[tokens], num_experts, token=tokens, sequence=np.arange(n) // 25)


def _skewed(rng: np.random.Generator, count: int, skew: float) -> np.ndarray:
    p = rng.random(count) ** skew + 0.01
    return p / p.sum()


__all__ = ["LADDER", "ONE", "costs_of", "random_trace", "sizes_of", "trace_of"]
