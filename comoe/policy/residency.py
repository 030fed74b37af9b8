"""What a plan leaves to be read: how often an expert is missing when it is used, and how much of it."""

from __future__ import annotations

import math

import numpy as np

from comoe.policy.plan import Plan, Sizes

STEPS = 60  # of the bisection


def cache_age(num_bytes: np.ndarray, use: np.ndarray, room: float) -> float:
    """Tokens for which a cache of `room` bytes that drops what was used longest ago keeps an expert; inf:
    all fit. num_bytes, use: [X], bytes of each, and probability that a token uses it.

    Che, Tung and Wang, Hierarchical Web caching systems (2002): the age t at which
    sum(bytes * (1 - exp(-use * t))) = room.
    """
    if float(num_bytes[use > 0].sum()) <= room:
        return math.inf

    def taken(age: float) -> float:
        return float(num_bytes @ -np.expm1(-use * age))

    low, high = 0.0, 1.0
    while taken(high) < room and high < 1e15:
        low, high = high, 2.0 * high
    for _ in range(STEPS):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if taken(middle) < room else (low, middle)
    return low


def missing_of(sizes: Sizes, plan: Plan, use: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(expected bytes to read when an expert is used, probability that any are missing then), both [X].

    Beside what the plan always holds, the spare bytes of the pool are a cache of what was used last.
    """
    needed = sizes.needs[plan.min_level] & (sizes.records >= 0)
    absent = needed & ~plan.base[np.maximum(sizes.records, 0)]
    lacking = np.where(absent, sizes.record_bytes[sizes.records], 0).sum(1).astype(float)
    if plan.away is not None:
        lacking[plan.away] = 0
    use = np.clip(use, 0.0, 1.0)
    missed = np.exp(-use * cache_age(lacking, use, plan.spare)) if lacking.any() else np.zeros(0)
    # An expert that is never used is missing for ever, at no cost.
    misses = (lacking > 0) * (missed if missed.size else 0.0) * (use > 0)
    return lacking * misses, misses
