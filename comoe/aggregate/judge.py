"""Measures what a choice of approximations does to the whole model: perplexity and KL against exact.

The packed model runs under its budget with exact weights; the layers that are approximated are computed
here in torch instead. So one load serves any number of trials.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from comoe.aggregate.experts import Expert, ExpertWeights, expert_forward
from comoe.evaluate import Score, Window, score
from comoe.runtime.spec import ExpertsSpec

# What stands for an expert: other matrices, one vector [H] for every output, or None for itself.
Approximation = Expert | torch.Tensor | None
Layer = Callable[[int], Approximation]  # expert -> what stands for it


@dataclass(frozen=True)
class Verdict:
    """kl: mean over tokens of KL(exact || approximated), nats per token."""

    perplexity: float
    perplexity_exact: float
    kl: float


def layer_forward(
    spec: ExpertsSpec,
    approximation: Layer,
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """The weighted sum over chosen experts, [T, H] in float32; arguments as for `experts_forward`."""
    out = torch.zeros(hidden.shape, dtype=torch.float32)
    x, gates = hidden.float(), weights.float()
    for expert in index.unique().tolist():
        if not 0 <= expert < spec.num_experts:
            continue
        tokens, slot = (index == expert).nonzero(as_tuple=True)
        stand_in = approximation(expert)
        y = stand_in
        if isinstance(stand_in, Expert):
            y = expert_forward(x[tokens], stand_in, spec)
        out.index_add_(0, tokens, gates[tokens, slot, None] * y)
    return out


class Judge:
    """Trials of one model on one text.

    ids: token ids.  windows: what of them is fed and scored.  The exact model runs once, on
    construction; its last hidden states stay in a temporary file. Use as a context, or `close`.
    """

    def __init__(
        self,
        model: Any,
        weights: ExpertWeights,
        ids: Sequence[int],
        windows: Sequence[Window],
    ) -> None:
        self.model, self.weights = model, weights
        self.ids, self.windows = list(ids), list(windows)
        self._kept = tempfile.TemporaryFile(prefix="comoe-judge-")  # noqa: SIM115 (see close)
        self._exact = score(model, self.ids, self.windows, keep=self._kept)
        self.trials = 0

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def let_go(self) -> None:
        """Forgets the model, which may then be closed; `measure_model` still works."""
        self.model = None

    def close(self) -> None:
        self._kept.close()

    def measure(self, layers: Mapping[int, Layer]) -> Verdict:
        """layers: those that are approximated; all others are exact."""
        self._kept.seek(0)
        self.trials += 1
        with _replaced(self.model, self.weights, layers):
            found = score(self.model, self.ids, self.windows, against=self._kept)
        return self._verdict(found)

    def measure_model(self, model: Any) -> Verdict:
        """Another model of the same checkpoint, as it runs."""
        self._kept.seek(0)
        self.trials += 1
        return self._verdict(score(model, self.ids, self.windows, against=self._kept))

    def _verdict(self, found: Score) -> Verdict:
        return Verdict(found.perplexity, self._exact.perplexity, found.kl_back / found.tokens)


@contextmanager
def _replaced(model: Any, weights: ExpertWeights, layers: Mapping[int, Layer]) -> Iterator[None]:
    """While the block runs, the runtime computes `layers` from their approximations."""
    runtime = model.comoe
    own = runtime.experts_forward

    def forward(layer_idx, hidden, index, gates):
        if layer_idx not in layers:
            return own(layer_idx, hidden, index, gates)

        def stand_in(expert: int) -> Approximation:
            found = layers[layer_idx](expert)
            return weights.expert(layer_idx, expert) if found is None else found

        out = layer_forward(weights.specs[layer_idx], stand_in, hidden, index, gates)
        return out.to(hidden.dtype)

    runtime.experts_forward = forward
    try:
        yield
    finally:
        del runtime.experts_forward
