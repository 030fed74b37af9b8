"""What rungs cost where nobody has measured it: the error of their weights, the same for all experts."""

from __future__ import annotations

import numpy as np

from comoe.policy.plan import LADDER, Sizes

# Mean squared error of packing's own rungs over the variance of the weights (docs/codec.md), and nats per
# token for a unit of it: on the bundled model 0.92, 0.69 and 0.71 with all experts at 2, 3 and 4 bits.
RELATIVE_ERROR = (0.125, 0.036, 0.0095, 2.4e-5, 0.0)
NATS = 0.75


def assumed_losses(sizes: Sizes, experts_per_token: int) -> tuple[np.ndarray, np.ndarray]:
    """(loss float64 [X, L] nats per token, nan for levels that packing does not make; use float64 [X]):
    every expert of a layer used alike, and all layers alike sensitive."""
    experts = len(sizes.records)
    loss = np.full((experts, len(sizes.levels)), np.nan)
    for error, mask in zip(RELATIVE_ERROR, LADDER.masks, strict=True):
        for level, its_mask in enumerate(sizes.levels.masks):
            if its_mask == mask:
                loss[sizes.has[:, level], level] = NATS * error / experts
    counts = np.repeat(sizes.num_experts, sizes.num_experts)
    return loss, np.minimum(experts_per_token / counts, 1.0)
