"""Published predictors that need only the routing so far, a trace's recorded ones, and the best of several."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from comoe.policy.predictor import Predictor

Prediction = list[tuple[int, np.ndarray]]


def most_likely(scores: np.ndarray, k: int) -> np.ndarray:
    """int64 [<= k]: the largest scores above 0, largest first."""
    order = np.argsort(-scores, kind="stable")[:k]
    return order[scores[order] > 0]


class TransitionTable(Predictor):
    """EdgeMoE's path table (arXiv 2308.14352): how often expert j of the next layer was used together
    with expert i of this one; the scores of all experts just chosen add up, by gate weight.

    span: layers looked at, 2 as in the paper: the transition between the last chosen layer and the next
    is joined by the one from the layer before that.
    """

    def __init__(self, num_experts: Sequence[int], k: int, span: int = 2):
        self._k, self._span = k, span
        self._num_layers = len(num_experts)
        self._counts = [
            [
                np.full((num_experts[later - back], num_experts[later]), 1e-3)
                for back in range(1, min(span, later) + 1)
            ]
            for later in range(self._num_layers)
        ]
        self._chosen: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def note(self, layer_idx: int, experts: np.ndarray, weights: np.ndarray) -> None:
        if layer_idx == 0:
            self._chosen.clear()
        for back, counts in enumerate(self._counts[layer_idx], 1):
            before = self._chosen.get(layer_idx - back)
            if before is not None:
                counts[before[0][:, None], experts] += 1
        self._chosen[layer_idx] = experts, weights

    def predict(self, layer_idx: int, hidden: Any) -> Prediction:
        later = layer_idx + 1
        if layer_idx < 0 or later == self._num_layers:
            return []
        scores = np.ones(self._counts[later][0].shape[1])
        for back, counts in enumerate(self._counts[later], 1):
            if later - back in self._chosen:
                experts, weights = self._chosen[later - back]
                rows = counts[experts]
                scores *= weights @ (rows / rows.sum(1, keepdims=True))
        return [(later, most_likely(scores, self._k))]


class SequenceMatrix(Predictor):
    """MoE-Infinity (arXiv 2401.14361): the stored activation matrix nearest to this sequence's so far
    (cosine) says what each later layer uses; layer l seen from l0 counts times 1 - (l - l0) / (L + 1).

    capacity: matrices kept, one for each past sequence, oldest out first.  depth: layers ahead.
    """

    def __init__(self, num_experts: Sequence[int], k: int, capacity: int = 120, depth: int = 1):
        self._k, self._depth = k, depth
        self._first = np.concatenate([[0], np.cumsum(num_experts)])
        self._now = np.zeros(self._first[-1])
        self._stored: deque[np.ndarray] = deque(maxlen=capacity)
        self._best: np.ndarray | None = None

    def new_sequence(self) -> None:
        if self._now.any():
            self._stored.append(self._now)
        self._now = np.zeros_like(self._now)
        self._best = None

    def begin_token(self, token: int) -> None:
        """Once per token is often enough for a matrix that one token hardly moves."""
        self._best = self._nearest()

    def note(self, layer_idx: int, experts: np.ndarray, weights: np.ndarray) -> None:
        self._now[self._first[layer_idx] + experts] += 1

    def _nearest(self) -> np.ndarray | None:
        """The stored matrix most like this sequence's own, which stands in while none is stored; None:
        nothing is known."""
        if not self._now.any():
            return None
        own = self._now / np.linalg.norm(self._now)
        if not self._stored:
            return own
        matrices = [stored / np.linalg.norm(stored) for stored in self._stored]
        return matrices[int(np.argmax([own @ matrix for matrix in matrices]))]

    def predict(self, layer_idx: int, hidden: Any) -> Prediction:
        if self._best is None:
            return []
        layers = len(self._first) - 1
        ahead = []
        for later in range(layer_idx + 1, min(layer_idx + 1 + self._depth, layers)):
            scores = self._best[self._first[later] : self._first[later + 1]]
            distance = 1 - (later - layer_idx) / (layers + 1)
            # The discount leaves fewer experts of farther layers, as in one list ordered by score.
            ahead.append((later, most_likely(scores, max(round(self._k * distance), 1))))
        return ahead


class Recorded(Predictor):
    """What a trace has recorded: the routers of the next `depth` layers on each layer's hidden state.

    predicted: int16 [N, L, P] in `recorded_depth` blocks, as in comoe.trace.
    """

    def __init__(self, predicted: np.ndarray, recorded_depth: int = 1, depth: int = 1):
        if not 1 <= depth <= recorded_depth:
            raise ValueError(
                f"Recorded: depth: expected 1 to the trace's {recorded_depth}, got {depth}; record more "
                "with comoe trace --depth"
            )
        n, layers, p = predicted.shape
        self._blocks = predicted.reshape(n, layers, recorded_depth, p // recorded_depth)
        self._depth, self._row = depth, -1

    def begin_token(self, token: int) -> None:
        self._row += 1

    def predict(self, layer_idx: int, hidden: Any) -> Prediction:
        if layer_idx < 0:
            return []
        ahead = []
        for later in range(layer_idx + 1, min(layer_idx + 1 + self._depth, self._blocks.shape[1])):
            experts = self._blocks[self._row, later, later - layer_idx - 1]
            experts = experts[experts >= 0].astype(np.int64)
            if not experts.size:
                break
            ahead.append((later, experts))
        return ahead


class BestOf(Predictor):
    """Of several predictors the one with the best recall about each layer from each distance; what was
    said earlier about a layer stands if it is more often right."""

    def __init__(self, predictors: Sequence[Predictor], smoothing: float = 0.05):
        self._predictors, self._smoothing = predictors, smoothing
        self._recall: dict[tuple[int, int, int], float] = {}
        self._open: dict[int, list[tuple[tuple[int, int, int], np.ndarray]]] = {}

    def new_sequence(self) -> None:
        for predictor in self._predictors:
            predictor.new_sequence()

    def begin_token(self, token: int) -> None:
        self._open.clear()
        for predictor in self._predictors:
            predictor.begin_token(token)

    def note(self, layer_idx: int, experts: np.ndarray, weights: np.ndarray) -> None:
        for predictor in self._predictors:
            predictor.note(layer_idx, experts, weights)
        for key, predicted in self._open.pop(layer_idx, []):
            recall = np.isin(experts, predicted).mean() if experts.size else 0.0
            before = self._recall.get(key, 0.5)
            self._recall[key] = before + self._smoothing * (recall - before)

    def predict(self, layer_idx: int, hidden: Any) -> Prediction:
        news: dict[int, np.ndarray] = {}
        for i, predictor in enumerate(self._predictors):
            for later, experts in predictor.predict(layer_idx, hidden):
                key = (i, later, later - layer_idx)
                known = self._open.setdefault(later, [])
                best = max((self._recall.get(k, 0.5) for k, _ in known), default=-1.0)
                known.append((key, experts))
                if self._recall.get(key, 0.5) >= best:
                    news[later] = experts
        return sorted(news.items())

    def predict_next(self, layer_idx: int) -> np.ndarray | None:
        told = (predictor.predict_next(layer_idx) for predictor in self._predictors)
        return next((experts for experts in told if experts is not None), None)
