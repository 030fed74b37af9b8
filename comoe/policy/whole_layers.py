"""Layers in which nothing is ever missing.

A layer that waits pays the latency of waiting once, whatever number of its experts is missing. So where most
tokens miss something in a layer, holding one more of its experts saves no latency, and only a layer that is held whole
saves it. A knapsack with a latency per expert does not see that; here some layers are held whole, the latency of
the others is spent beforehand, and the number of the former is searched for.
"""

from __future__ import annotations

import numpy as np

TRIED = 4  # numbers of whole layers, in halves


def dearer(
    value: np.ndarray, waits: np.ndarray, layer: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(int [layers], those that cost least to hold whole first; float [layers], what each costs more then).

    value: float [X, O], what an option costs at the present prices of memory, time and loss, without latency; inf: not
    offered.  waits: bool [X, O], not all of it is here.  layer: int [X].
    """
    whole = np.where(waits, np.inf, value).min(1)
    # An expert that cannot be held at all makes its layer the last.
    more = np.bincount(layer, np.minimum(whole - value.min(1), 1e300))
    return np.argsort(more, kind="stable"), more


def next_pays(number: int, order: np.ndarray, more: np.ndarray, latency: float) -> bool:
    """Whether more than `number` layers should be whole, of `order` the first: the next costs less than a latency."""
    return number < len(order) and bool(more[order[number]] < latency)
