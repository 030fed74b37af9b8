"""The bundled model's trace and losses in the shape of a larger model: for simulation only.

Each choice of the larger model is a function of what the bundled model chose for the same token, so nothing is
drawn at random that a token's text decided. For layer t, made from the bundled model's layer l = t mod L:

    expert = block * E + e        e, the rank-j choice of layer l; E, the bundled model's experts
    block  = (7 e + 3 a + 5 b + t) mod blocks     a, b: first choices of two other layers for that token

Where the larger model has fewer experts than E, e counts modulo that many. Choices that fall together move to
the next free expert; more choices than the bundled model makes come from layer l + 1. So are kept: that a
token, and what is like it, chooses alike; what follows from what within a text; popularity of experts within a block.
Lost: which blocks are popular (they become nearly even), and the larger models' own statistics, which nobody here has.

An expert has the losses per use of expert e of layer l, and what e shares with its partner it shares with the partner of
its own block. All losses are scaled alike, so that 4 bits for all lose what they lose in the bundled model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from comoe.policy.plan import Sizes
from comoe.trace import Trace


@dataclass(frozen=True)
class Shape:
    """A model. layers: with experts.  weights: of one expert.  dense_bytes: that every token reads.
    decoder_layers: all layers, each with its overhead.  device: a profile of comoe/data/devices.json."""

    name: str
    layers: int
    experts: int
    top_k: int
    weights: int
    dense_bytes: float
    decoder_layers: int
    device: str


SHAPES = (
    # 7.4 B parameters; 12 sparse layers (6 of the encoder, 6 of the decoder) pass as one model here.
    Shape("Switch-Base-128", 12, 128, 1, 2 * 768 * 3072, 0.34e9, 24, "jetson-orin-nano"),
    # 6.9 B parameters, 16 layers of 64 experts of 3 x 2048 x 1024.
    Shape("OLMoE-1B-7B", 16, 64, 8, 3 * 2048 * 1024, 0.95e9, 16, "jetson-orin-nano"),
    # 46.7 B parameters, 32 layers of 8 experts of 3 x 4096 x 14336.
    Shape("Mixtral-8x7B", 32, 8, 2, 3 * 4096 * 14336, 3.2e9, 32, "desktop-4090"),
)


def scaled_trace(trace: Trace, shape: Shape, seed: int, recall: float) -> Trace:
    """The trace in another shape, with a prediction for every layer, made one layer before.

    recall: of the predictions, as measured for the next layer's router on the bundled model; what it misses
    is drawn (`seed`) from experts by their share of the uses.
    """
    rng = np.random.default_rng(seed)
    n, num_layers, k = trace.experts.shape
    base = int(trace.num_experts[0])
    inside = min(base, shape.experts)
    blocks = -(-shape.experts // base)
    first = trace.experts[:, :, 0].astype(np.int64)
    experts = np.empty((n, shape.layers, shape.top_k), np.int64)
    weights = np.empty(experts.shape, np.float32)
    for t in range(shape.layers):
        sources = [(t + i) % num_layers for i in range(-(-shape.top_k // k))]
        others = (t + 2) % num_layers, (t + 1 + t // num_layers) % num_layers
        raw = np.concatenate([trace.experts[:, layer] for layer in sources], 1).astype(np.int64)
        gates = np.concatenate([trace.weights[:, layer] for layer in sources], 1)
        raw, gates = raw[:, : max(shape.top_k, 1)], gates[:, : shape.top_k]
        if shape.experts < base:
            # Copies of one layer differ, as with more blocks.
            raw = raw + (first[:, others[1], None] * (t // num_layers))
        block = (
            7 * raw + 3 * first[:, others[0], None] + 5 * first[:, others[1], None] + t
        ) % blocks
        chosen = (block * base + raw % inside) % shape.experts
        experts[:, t] = _distinct(chosen, shape.experts)
        weights[:, t] = gates / np.maximum(gates.sum(1, keepdims=True), 1e-9)
    if shape.top_k == 1:  # a router's probability, not renormalised
        weights[:, :, 0] = trace.weights[:, np.arange(shape.layers) % num_layers, 0]
    predicted = _predictions(experts, shape.experts, recall, rng)
    return Trace(
        f"{trace.model} as {shape.name}",
        tuple(f"layer {t}" for t in range(shape.layers)),
        np.full(shape.layers, shape.experts, np.int32),
        trace.sequence,
        trace.position,
        trace.token,
        experts.astype(np.int16),
        weights,
        predicted.astype(np.int16),
        1,
    )


def _distinct(chosen: np.ndarray, count: int) -> np.ndarray:
    """[N, K] with each expert once per row: later ones move to the next free expert."""
    chosen = chosen.copy()
    for j in range(1, chosen.shape[1]):
        while True:
            taken = (chosen[:, :j] == chosen[:, j : j + 1]).any(1)
            if not taken.any():
                break
            chosen[taken, j] = (chosen[taken, j] + 1) % count
    return chosen


def _predictions(
    experts: np.ndarray, count: int, recall: float, rng: np.random.Generator
) -> np.ndarray:
    predicted = experts.copy()
    n, layers, k = experts.shape
    for t in range(layers):
        wrong = rng.random((n, k)) >= recall
        share = np.bincount(experts[:, t].ravel(), minlength=count) / experts[:, t].size
        predicted[:, t][wrong] = rng.choice(count, int(wrong.sum()), p=share)
    predicted[:, 0] = -1  # nobody is before the first layer
    return predicted


def next_layer_recall(trace: Trace) -> float:
    """Of the trace's predictions from one layer before."""
    width = trace.predicted.shape[2] // trace.depth
    guess = trace.predicted[:, 1:, :width]
    used = trace.experts[:, 1:]
    return float((used[..., None] == guess[:, :, None]).any(-1).mean())


def scaled_sizes(sizes: Sizes, weights: float, shape: Shape) -> Sizes:
    """Records as in `sizes` of the bundled model, whose experts have `weights` weights, at equal bits."""
    base, places = int(sizes.num_experts[0]), sizes.records.shape[1]
    records = np.full((shape.layers * shape.experts, places), -1, np.int32)
    known: dict[tuple[int, int], int] = {}
    nbytes: list[int] = []
    layers = len(sizes.num_experts)
    for x in range(len(records)):
        t, expert = divmod(x, shape.experts)
        block, e = divmod(expert, base)
        for place in range(places):
            record = int(sizes.records[(t % layers) * base + e, place])
            if record < 0:
                continue
            key = (t * 1000 + block, record)
            if key not in known:
                known[key] = len(nbytes)
                bits = sizes.record_bytes[record] / weights
                nbytes.append(int(np.ceil(bits * shape.weights / 4096)) * 4096)
            records[x, place] = known[key]
    counts = np.full(shape.layers, shape.experts, np.int64)
    return Sizes(sizes.levels, records, np.array(nbytes, np.int64), counts)


def losses_per_use(
    sizes: Sizes, loss: np.ndarray, use: np.ndarray, shape: Shape, new_use: np.ndarray
) -> np.ndarray:
    """float [X, levels]: nats that one use of each expert loses; loss, use: of the bundled model."""
    base, layers = int(sizes.num_experts[0]), len(sizes.num_experts)
    t, expert = np.divmod(np.arange(shape.layers * shape.experts), shape.experts)
    source = (t % layers) * base + expert % base
    per_use = loss[source] / np.maximum(use[source], 1e-3)[:, None]
    level = sizes.levels.names.index("4")
    return per_use * (loss[:, level].sum() / (per_use[:, level] @ new_use))
