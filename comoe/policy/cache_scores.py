"""Published cache scores: HOBBIT's four terms and HybriMoE's; and greedy-dual with layers as its clock."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from comoe.policy.cache import LRU, Clocked


class Hobbit(Clocked):
    """w1 R/T + w2 F/T + w3 H/T + w4 (1 - ((l_i - l_t + n) mod n) / n), of this sequence's T tokens.

    R: token of the last use, F: uses, H: uses at high precision, l_t: present layer, l_i: the expert's, n:
    layers; so what is needed soon is worth most. While layers pass, the last term rises for all alike but
    for the one that has just run, so it is kept as the tick of the layer's next run, which falls behind.
    HOBBIT (arXiv 2411.01433), section 3.4; it gives no weights that hold for all models: a quarter each.

    fine_level: from which level on a use counts as one of high precision.
    """

    def __init__(
        self,
        num_experts: Sequence[int],
        weights: tuple[float, float, float, float] = (0.25, 0.25, 0.25, 0.25),
        fine_level: int = 0,
    ):
        super().__init__(num_experts)
        self._weights, self._fine_level = weights, fine_level
        self.new_sequence()

    def new_sequence(self) -> None:
        self._last, self._uses, self._fine = (
            [np.zeros(v.size) for v in self._values] for _ in range(3)
        )
        self._tokens = np.zeros(self.num_layers)

    def note(
        self, layer_idx: int, experts: np.ndarray, weights: np.ndarray, used_levels: np.ndarray
    ) -> None:
        self._advance(layer_idx)
        self._tokens[layer_idx] += 1
        self._last[layer_idx][experts] = self._tokens[layer_idx]
        self._uses[layer_idx][experts] += 1
        self._fine[layer_idx][experts] += used_levels >= self._fine_level

    def values(self, layer_idx: int) -> np.ndarray:
        w1, w2, w3, w4 = self._weights
        score = w1 * self._last[layer_idx] + w2 * self._uses[layer_idx] + w3 * self._fine[layer_idx]
        distance = (self._tick(layer_idx) - self._base) / self.num_layers
        return (score / max(self._tokens[layer_idx], 1) - w4 * distance).astype(np.float32)


class HybriMoE(LRU):
    """S = a TopP(s) + (1 - a) S: the router's scores of the P best experts, smoothed over tokens.

    HybriMoE (arXiv 2504.05897), its MRS policy, with a = 0.5. The scores of experts that were not chosen
    are not known here, so P is the number of experts per token, where the paper takes twice that.
    """

    def __init__(self, num_experts: Sequence[int], share: float = 0.5):
        super().__init__(num_experts)
        self._share = share

    def note(
        self, layer_idx: int, experts: np.ndarray, weights: np.ndarray, used_levels: np.ndarray
    ) -> None:
        values = self._values[layer_idx]
        values *= 1 - self._share
        values[experts] += self._share * weights / max(float(weights.sum()), 1e-9)


class GreedyDual(Clocked):
    """Greedy-dual with frequency, on loss avoided per byte, aged by distance in layers.

    value = tick of the last run + horizon * L * frequency * worth, where the frequency fades by half in
    `half_life` tokens. GDSF (Cherkasova 1998) adds frequency * cost / size to a clock that rises with
    evictions; here it rises with layers, which pass whether something is evicted or not.

    worth: [X], what a hit of each expert saves per byte (loss or seconds); its mean becomes 1.
    """

    def __init__(
        self,
        num_experts: Sequence[int],
        worth: np.ndarray | None = None,
        half_life: float = 64.0,
        horizon: float = 32.0,
    ):
        super().__init__(num_experts)
        self._worth = worth_of_layers(num_experts, worth)
        self._fade, self._horizon = 0.5 ** (1 / half_life), horizon
        self._uses = [np.zeros(v.size) for v in self._values]

    def note(
        self, layer_idx: int, experts: np.ndarray, weights: np.ndarray, used_levels: np.ndarray
    ) -> None:
        now = self._advance(layer_idx)
        uses = self._uses[layer_idx]
        uses *= self._fade
        uses[experts] += 1 - self._fade
        gain = self._horizon * self.num_layers * uses * self._worth[layer_idx]
        # What was not used keeps its clock: it ages.
        self._values[layer_idx][experts] = now + gain[experts]

    def values(self, layer_idx: int) -> np.ndarray:
        return (self._values[layer_idx] - self._base).astype(np.float32)


def worth_of_layers(num_experts: Sequence[int], worth: np.ndarray | None) -> list[np.ndarray]:
    """worth [X] cut into layers, with mean 1; all ones for None."""
    total = int(np.sum(num_experts))
    if worth is None:
        worth = np.ones(total)
    worth = np.asarray(worth, float)
    if worth.shape != (total,) or not (np.isfinite(worth).all() and (worth > 0).all()):
        raise ValueError(
            f"cache policy: worth: expected {total} numbers above 0, one per expert, got shape "
            f"{worth.shape}; give loss or seconds saved per byte"
        )
    return np.split(worth / worth.mean(), np.cumsum(num_experts)[:-1])
