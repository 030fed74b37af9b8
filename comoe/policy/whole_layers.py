"""Layers in which nothing is ever missing.

A layer that waits pays the latency of waiting once, whatever number of its experts is missing. So where most
tokens miss something in a layer, holding one more of its experts saves no latency, and only a layer that is held whole
saves it. A knapsack with a latency per expert does not see that; here some layers are held whole, the latency of
the others is spent beforehand, and the number of the former is tried.
"""

from __future__ import annotations

import numpy as np

TRIED = 7  # numbers of whole layers, where there are many layers


def numbers(layers: int) -> list[int]:
    """How many layers to hold whole: 0 to all of them."""
    return np.unique(np.linspace(0, layers, min(TRIED, layers + 1)).round().astype(int)).tolist()


def ranked(value: np.ndarray, missing: np.ndarray, layer: np.ndarray) -> np.ndarray:
    """int [layers]: those that cost least to hold whole first.

    value: float [X, O], what an option costs at the present prices of memory, time and loss; inf: not offered.
    missing: [X, O] bytes to be read.  layer: int [X].
    """
    whole = np.where(missing == 0, value, np.inf).min(1)
    dearer = np.minimum(whole - value.min(1), 1e300)  # an expert that cannot be held at all: last
    return np.argsort(np.bincount(layer, dearer), kind="stable")
