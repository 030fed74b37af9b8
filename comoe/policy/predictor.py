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
    """Recall of the predictions: the share of the experts used that had been predicted. `useful` says whether speculation pays: it stops below `least_recall`."""

    def __init__(self, least_recall: float = 0.25, smoothing: float = 0.05):
        self.least_recall = least_recall
        self.smoothing = smoothing
        self.recall = 1.0
        self.predicted = 0
        self.used = 0
        self.both = 0

    def note(self, predicted: np.ndarray, used: np.ndarray) -> None:
        """predicted, used: expert indices of one layer."""
        if used.size == 0:
            return
        both = int(np.isin(used, predicted).sum())
        self.predicted += predicted.size
        self.used += used.size
        self.both += both
        self.recall += self.smoothing * (both / used.size - self.recall)

    @property
    def useful(self) -> bool:
        return self.recall >= self.least_recall

    def stats(self) -> dict:
        return {
            "recall": self.both / self.used if self.used else 0.0,
            "precision": self.both / self.predicted if self.predicted else 0.0,
        }
