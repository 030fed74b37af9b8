"""The bundled model's traces in other shapes: a function of its choices, well formed, with the recall asked for."""

import sys
from pathlib import Path

import numpy as np
import pytest

from comoe.policy.plan import Levels, Sizes
from comoe.trace import Trace

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

from scaling import (
    SHAPES,
    losses_per_use,
    next_layer_recall,
    scaled_sizes,
    scaled_trace,
)

LAYERS, EXPERTS, K = 5, 16, 4


def base_trace(n=400, seed=0) -> Trace:
    rng = np.random.default_rng(seed)
    experts = np.argsort(rng.random((n, LAYERS, EXPERTS)), axis=2)[:, :, :K]
    weights = -np.sort(-rng.random((n, LAYERS, K)), axis=2)
    same = np.zeros(n)
    return Trace(
        "base",
        tuple("abcde"),
        np.full(LAYERS, EXPERTS),
        same.astype(int),
        np.arange(n),
        rng.integers(0, 50, n),
        experts.astype(np.int16),
        (weights / weights.sum(2, keepdims=True)).astype(np.float32),
        experts.astype(np.int16),
        1,
    )


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def test_a_scaled_trace_is_a_function_of_the_choices(shape):
    base = base_trace()
    found = scaled_trace(base, shape, 0, 0.7)
    assert found.experts.shape == (400, shape.layers, shape.top_k)
    # Each expert once per token, and most of them used.
    ordered = np.sort(found.experts, axis=2)
    assert (np.diff(ordered, axis=2) > 0).all()
    assert np.unique(found.experts[:, 0]).size > 0.8 * min(shape.experts, 400)
    # The same choices give the same choices, whatever the row.
    again = scaled_trace(base_trace(), shape, 1, 0.7)
    assert np.array_equal(again.experts, found.experts)
    assert next_layer_recall(found) == pytest.approx(0.7, abs=0.1)
    assert (found.predicted[:, 0] == -1).all()
    if shape.top_k > 1:
        assert found.weights.sum(2) == pytest.approx(1, abs=1e-5)
    # Layers made of one layer differ.
    assert (found.experts[:, 0] != found.experts[:, LAYERS]).any()


def test_sizes_and_losses_follow_the_sources():
    levels = Levels(("merge", "4", "exact"), (0b001, 0b010, 0b100))
    pairs = np.arange(LAYERS * EXPERTS) // 2
    own = LAYERS * EXPERTS // 2 + np.arange(2 * LAYERS * EXPERTS).reshape(-1, 2)
    records = np.concatenate([pairs[:, None], own], 1).astype(np.int32)
    nbytes = np.r_[np.full(len(pairs) // 2, 1000), np.tile([4000, 16000], len(pairs))]
    sizes = Sizes(levels, records, nbytes.astype(np.int64), np.full(LAYERS, EXPERTS))
    shape = SHAPES[1]
    found = scaled_sizes(sizes, 8000.0, shape)
    assert found.num_experts.tolist() == [64] * 16
    assert found.bytes_at[0, 2] == pytest.approx(2 * shape.weights, rel=1e-3)
    # A pair shares within its own block only.
    assert found.records[0, 0] == found.records[1, 0] != found.records[16, 0]
    assert found.total(0) == pytest.approx(0.5 * shape.weights * 64 * 16 / 8, rel=0.01)
    loss = np.random.default_rng(0).random((80, 3)) * np.array([3.0, 1.0, 0.0])
    use, new = np.full(80, 0.25), np.full(16 * 64, 0.125)
    per_use = losses_per_use(sizes, loss, use, shape, new)
    assert (per_use[:, 1] @ new) == pytest.approx(loss[:, 1].sum())
    assert per_use[16] == pytest.approx(per_use[0])
