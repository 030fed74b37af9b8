"""What the user wants besides a memory limit: how much quality may be lost, how long a token may take."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Nats per token that a setting allows: about the relative rise of perplexity. What each costs in time
# is measured in docs/policy.md.
QUALITIES = {"high": 0.002, "balanced": 0.01, "fast": 0.04}


@dataclass(frozen=True)
class Goal:
    """loss: nats per token that may be lost; then the planner looks for the shortest time.
    latency: seconds that a token may take; then it looks for the least loss.  Both: for the least memory.
    Neither: for the least loss among the plans in which nothing is ever waited for."""

    loss: float | None = None
    latency: float | None = None

    def __post_init__(self) -> None:
        for name, unit in (("loss", "nats per token"), ("latency", "seconds per token")):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: expected {unit} above 0, got {value}")


def parse_quality(quality: str | float | None) -> float | None:
    """Nats per token that "high", "balanced", "fast" or a number allows; None and "resident": no bound.

    Raises ValueError for other words and numbers that are not above 0.
    """
    if quality is None or quality == "resident":
        return None
    if isinstance(quality, str) and quality in QUALITIES:
        return QUALITIES[quality]
    known = ", ".join(f"{name} ({loss:g})" for name, loss in QUALITIES.items())
    try:
        loss = float(quality)
    except (TypeError, ValueError):
        loss = math.nan
    if isinstance(quality, bool) or not (math.isfinite(loss) and loss > 0):
        raise ValueError(
            f"quality: expected resident, {known}, or nats per token above 0 that may be lost; got {quality!r}"
        )
    return loss
