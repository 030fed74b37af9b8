"""Losses again, now that a choice is known: what a layer loses depends on how coarse the others are.

Errors of experts do not simply add, so a sensitivity that was measured with everything else exact is only
the first guess:

    choose -> run the choice, and again with one layer exact, for each layer -> what each layer really adds to
    the KL, over what was predicted -> scales of the layers' losses -> choose again -> run

The new losses stay only if their choices measure no worse at any size tried, and better at one. On the bundled
model they do not (docs/aggregation.md), so this is an option.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from comoe.aggregate.allocate import Losses
from comoe.policy.solver import InfeasibleError

LEAST, MOST = 0.25, 4.0  # a scale beyond is noise, or a layer that hardly counts
WORTH = 0.01  # least gain of KL, as a share, for which other losses are taken
WORSE = 0.002  # and at no size more than this is lost

Measure = Callable[[np.ndarray], float]  # levels [X] -> KL in nats per token


@dataclass(frozen=True)
class Refinement:
    """kept: whether the new losses are better.  scale: float64 [layers].  before, after: KL by fraction, of
    the choice of the first losses and of the new ones."""

    kept: bool
    scale: np.ndarray
    before: dict[float, float]
    after: dict[float, float]


def refined(
    losses: Losses, measure: Measure, *, anchor: float, fractions: Sequence[float]
) -> tuple[Losses, Refinement]:
    """Losses scaled at the choice for `anchor`, judged at `fractions`; those that cannot be met are left out.

    Runs the model once per layer, and at most twice per fraction.
    """
    measured: dict[bytes, float] = {}

    def kl(choice: np.ndarray) -> float:
        key = choice.tobytes()
        if key not in measured:
            measured[key] = measure(choice)
        return measured[key]

    def kls(of: Losses) -> dict[float, float]:
        found = {}
        for fraction in fractions:
            try:
                found[fraction] = kl(of.solve(fraction).choice)
            except InfeasibleError:
                continue
        return found

    before = kls(losses)
    scale = np.ones(int(losses.layer.max()) + 1)
    if anchor not in before:
        return losses, Refinement(False, scale, before, {})
    choice = losses.solve(anchor).choice
    predicted = losses.loss[np.arange(len(choice)), choice]
    for layer in range(len(scale)):
        mine = losses.layer == layer
        added = kl(choice) - kl(np.where(mine, len(losses.levels) - 1, choice))
        if predicted[mine].sum() > 0:
            scale[layer] = np.clip(added / predicted[mine].sum(), LEAST, MOST)
    rescaled = replace(losses, loss=losses.loss * scale[losses.layer][:, None])
    after = kls(rescaled)
    gains = [1 - after[f] / max(before[f], 1e-12) for f in before]
    kept = min(gains) >= -WORSE and max(gains) >= WORTH
    return rescaled if kept else losses, Refinement(kept, scale, before, after)
