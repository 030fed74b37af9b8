"""What comes next: guesses of the experts that a later layer will use, made before it routes."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np


class Predictor(Protocol):
    """Told what happens by begin_token, note and new_sequence, which do nothing where they are not needed.

    Order of the calls: begin_token, predict(-1), then for every layer note, predict, predict_next.
    """

    def new_sequence(self) -> None:
        """The next tokens belong to another sequence."""

    def begin_token(self, token: int) -> None:
        """The id of the token that is about to run; -1: not known, or there are several."""

    def note(self, layer_idx: int, experts: np.ndarray, weights: np.ndarray) -> None:
        """The router has chosen. experts: int64 [n], each once.  weights: float [n], gate weights."""

    def predict(self, layer_idx: int, hidden: Any) -> list[tuple[int, np.ndarray]]:
        """Seen from `layer_idx`, whose experts are about to run on `hidden` [T, H] (None in a replay), or
        from before the first layer (-1): pairs (later layer, int64 array of its likely experts, most likely
        first), nearest layer first; empty if it cannot tell."""
        ...

    def linear_gates(self, layer_idx: int) -> list[tuple[int, tuple[int, int, int, int]]]:
        """If predict(layer_idx) would give the k largest scores of linear gates: pairs of the later layer and
        its gate: (address of its weights [E, H], of its bias or 0, dtype as the kernels number it, k), valid
        for this call. Empty: ask predict."""
        return []

    def own_gate(self, layer_idx: int) -> tuple[int, int, int, int] | None:
        """The linear gate of a layer itself, as linear_gates gives them; None: not known."""
        return None

    def predict_next(self, layer_idx: int) -> np.ndarray | None:
        """After `layer_idx` ran: int64 array of what it will likely use at the next token, most likely
        first; None if it cannot tell."""
        return None


class NoPredictor(Predictor):
    def predict(self, layer_idx: int, hidden: Any) -> list[tuple[int, np.ndarray]]:
        return []


class RankChances:
    """How likely a prediction is right, learnt from those before: by the layer it is about, by how far
    ahead it was made, and by its rank among the experts predicted."""

    def __init__(self, num_layers: int, smoothing: float = 0.02, prior: float = 0.5):
        self._chances: dict[tuple[int, int], np.ndarray] = {}
        self._num_layers, self._smoothing, self._prior = num_layers, smoothing, prior

    def of(self, layer_idx: int, ahead: int, num_experts: int) -> np.ndarray:
        """float [num_experts]: the chance of each rank."""
        known = self._chances.get((layer_idx, ahead), np.empty(0))
        if known.size < num_experts:
            more = np.full(num_experts - known.size, self._prior)
            known = self._chances[layer_idx, ahead] = np.concatenate([known, more])
        return known[:num_experts]

    def note(self, layer_idx: int, ahead: int, predicted: np.ndarray, used: np.ndarray) -> None:
        """The layer used other experts, or the same."""
        if predicted.size:
            chances = self.of(layer_idx, ahead, predicted.size)
            chances += self._smoothing * (np.isin(predicted, used) - chances)


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

    def note_seconds(self, seconds: float) -> None:
        """What the step took, for gauges that go by it (prefetch_gauge.py)."""

    @property
    def useful(self) -> bool:
        return self.share >= self.least_share or self._steps % self.probe_every == 0

    def stats(self) -> dict:
        return {
            "recall": self.both / self.used if self.used else 0.0,
            "precision": self.both / self.predicted if self.predicted else 0.0,
            "share_of_reads_used": self.share,
        }
