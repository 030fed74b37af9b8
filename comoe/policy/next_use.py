"""The default cache policy: evict what is expected to be used last; and Belady's, which knows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from comoe.policy.cache import LRU, Clocked
from comoe.policy.cache_scores import worth_of_layers

NEVER = 2.0**24  # ticks: later than every use


class NextUse(Clocked):
    """value = -(expected tick of the next use).

    An expert of layer l can be used when l runs next, L ticks after its last run, and every L ticks from
    then on. With chance q at the next run and p at each later one,

        expected tick = tick of the next run of l + (1 - q) L / p

    so what has just been passed by goes before what is near, all else equal (Belady's rule on a cycle of
    layers). p mixes the expert's share of this sequence's tokens, which fades by half in `half_life`
    tokens, with the one of the last few (`recent_half_life`). q is p where nothing was predicted. The
    constants were chosen on Python text (docs/policy.md).

    worth: [X], what a hit of each expert saves per byte (loss or seconds); its mean becomes 1.
    """

    LEAST = 0.25  # of the layer's mean p: an expert not seen for long comes back some time

    def __init__(
        self,
        num_experts: Sequence[int],
        worth: np.ndarray | None = None,
        *,
        half_life: float = 96.0,
        recent_half_life: float = 3.0,
        recent_share: float = 0.4,
        prior_tokens: float = 8.0,
    ):
        super().__init__(num_experts)
        self._worth = worth_of_layers(num_experts, worth)
        self._fade, self._recent_fade = 0.5 ** (1 / half_life), 0.5 ** (1 / recent_half_life)
        self._share, self._prior = recent_share, prior_tokens
        self._uses = [np.zeros(v.size) for v in self._values]
        self._recent = [np.zeros(v.size) for v in self._values]
        self._chance = [np.full(v.size, 1.0 / v.size) for v in self._values]
        self._tokens = np.zeros(self.num_layers)

    def new_sequence(self) -> None:
        """What was frequent before becomes the prior."""
        for layer_idx, uses in enumerate(self._uses):
            tokens = self._tokens[layer_idx]
            if tokens > self._prior:
                uses *= self._prior / tokens
                self._tokens[layer_idx] = self._prior

    def note(
        self, layer_idx: int, experts: np.ndarray, weights: np.ndarray, used_levels: np.ndarray
    ) -> None:
        now = self._advance(layer_idx)
        uses, recent = self._uses[layer_idx], self._recent[layer_idx]
        uses *= self._fade
        uses[experts] += 1
        recent *= self._recent_fade
        recent[experts] += 1 - self._recent_fade
        tokens = self._tokens[layer_idx] = self._tokens[layer_idx] * self._fade + 1
        chance = ((1 - self._share) / tokens) * uses + self._share * recent
        np.maximum(chance, self.LEAST * max(float(chance.mean()), 1e-6), out=chance)
        self._chance[layer_idx] = chance
        self._values[layer_idx] = self._expected(layer_idx, now + self.num_layers, chance)

    def predicted(self, layer_idx: int, experts: np.ndarray, chances: np.ndarray) -> None:
        """What is not among `experts` shares the uses that their chances leave, by its own share."""
        base = self._chance[layer_idx]
        uses = float(base.sum())
        named = np.full(base.size, 0.0)
        others = base.copy()
        named[experts], others[experts] = chances, 0.0
        left = max(uses - float(named.sum()), 0.0)
        named += others * (left / max(float(others.sum()), 1e-9))
        np.minimum(named, 1.0, out=named)
        self._values[layer_idx] = self._expected(layer_idx, self._tick(layer_idx), named)

    def _expected(self, layer_idx: int, run: int, chance: np.ndarray) -> np.ndarray:
        later = self._chance[layer_idx] * self._worth[layer_idx]
        after = (1 - chance) * self.num_layers / later
        return -(run + after)

    def values(self, layer_idx: int) -> np.ndarray:
        return (self._values[layer_idx] + self._base).astype(np.float32)


class Belady(LRU):
    """Evicts what is used last of all, known from the trace: the least misses that any policy can have
    that reads on demand, for experts of equal size (Belady 1966). Offline: a bound, not a policy.

    experts: int [N, L, K], -1 for none, the routing that will be noted, token by token.
    """

    def __init__(self, num_experts: Sequence[int], experts: np.ndarray):
        super().__init__(num_experts)
        num_layers = len(self._values)
        self._runs = np.zeros(num_layers, np.int64)
        self._after = []  # per layer [runs, E]
        for layer_idx, coming in enumerate(self._values):
            ran = np.flatnonzero((experts[:, layer_idx] >= 0).any(-1))
            after = np.empty((len(ran), coming.size), np.float32)
            coming[:] = -NEVER
            for run in range(len(ran) - 1, -1, -1):
                after[run] = coming
                used = experts[ran[run], layer_idx]
                coming[used[used >= 0]] = -(float(ran[run]) * num_layers + layer_idx)
            self._after.append(after)

    def note(
        self, layer_idx: int, experts: np.ndarray, weights: np.ndarray, used_levels: np.ndarray
    ) -> None:
        run = self._runs[layer_idx]
        if run >= len(self._after[layer_idx]):
            raise ValueError(
                f"Belady: layer {layer_idx} runs {run} times in its trace; replay the trace it was made of"
            )
        self._values[layer_idx] = self._after[layer_idx][run]
        self._runs[layer_idx] += 1
