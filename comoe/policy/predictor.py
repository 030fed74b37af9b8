"""What comes next: guesses of the experts that a later layer will use, made before it routes."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np


class Predictor(Protocol):
    def predict(self, layer_idx: int, hidden: Any) -> list[tuple[int, np.ndarray]]:
        """Seen from `layer_idx`, whose experts are about to run on `hidden` [T, H]: pairs (later
        layer, int64 array of its likely experts), nearest layer first; empty if it cannot tell."""
        ...


class NoPredictor:
    def predict(self, layer_idx: int, hidden: Any) -> list[tuple[int, np.ndarray]]:
        return []


class PrefetchGauge:
    """What predictions are worth. `recall` and `precision` count all experts, also resident ones. Reading
    ahead pays by another figure: the share of the bytes read ahead that were used. A cache holds what
    predictors predict best, so that share may be a third of the precision; where it is below
    `least_share`, `useful` is false but for one step in `probe_every`."""

    def __init__(
        self, least_share: float = 0.5, smoothing: float = 0.1, probe_every: int = 64
    ) -> None:
        self.least_share = least_share
        self.smoothing = smoothing
        self.probe_every = probe_every
        self.share = 1.0
        self.predicted = 0
        self.used = 0
        self.both = 0
        self._steps = 0
        self._read_bytes = 0
        self._used_bytes = 0

    def note(self, predicted: np.ndarray, used: np.ndarray) -> None:
        """predicted, used: expert indices of one layer."""
        self.predicted += predicted.size
        self.used += used.size
        self.both += int(np.isin(used, predicted).sum())

    def note_step(self, read_bytes: int, used_bytes: int) -> None:
        """One step is over. read_bytes, used_bytes: read ahead, and used of it, since the beginning."""
        self._steps += 1
        read, used = read_bytes - self._read_bytes, used_bytes - self._used_bytes
        self._read_bytes, self._used_bytes = read_bytes, used_bytes
        if read > 0:
            self.share += self.smoothing * (min(used / read, 1.0) - self.share)

    @property
    def useful(self) -> bool:
        return self.share >= self.least_share or self._steps % self.probe_every == 0

    def stats(self) -> dict:
        return {
            "recall": self.both / self.used if self.used else 0.0,
            "precision": self.both / self.predicted if self.predicted else 0.0,
            "share_of_reads_used": self.share,
        }
