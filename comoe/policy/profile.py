"""Which experts the text at hand uses: what was stored about texts before it, corrected by what is seen."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

HALF_LIFE = 512.0  # tokens after which what was seen counts half
PRIOR_TOKENS = 64.0  # what is stored weighs like this many tokens seen
PRIOR_USES = 4.0  # and the usual gate weight like this many uses of an expert


class InputProfile:
    """Probability that a token uses an expert, and the square of its gate weight, over X experts.

    What is stored is one or several profiles, for instance one for each domain of the calibration text.
    They are mixed by how likely each makes the routing seen so far (a multinomial per layer), so that
    the nearest one soon counts alone; then what was seen itself joins, as in a Dirichlet prior. The idea
    of matching a sequence's activations with stored ones: MoE-Infinity (arXiv 2401.14361), FineMoE
    (arXiv 2502.05370).
    """

    def __init__(
        self,
        num_experts: Sequence[int],
        stored: np.ndarray | None = None,
        squares: np.ndarray | None = None,
        *,
        half_life: float = HALF_LIFE,
        prior_tokens: float = PRIOR_TOKENS,
        square: float = 1.0,
    ):
        """num_experts: of each layer.  stored: float [D, X] or [X], uses per token; None: nothing is
        known, all alike.  squares: float [X], gate weight squared per use; None: not known.
        square: of all, where neither is known and nothing was seen."""
        counts = np.asarray(num_experts, np.int64)
        self._first = np.concatenate([[0], np.cumsum(counts)])
        total = int(self._first[-1])
        if stored is None:
            stored = np.repeat(1.0 / counts, counts)
        stored = np.atleast_2d(np.asarray(stored, np.float64))
        if stored.shape[1] != total or not np.isfinite(stored).all() or (stored < 0).any():
            raise ValueError(
                f"input profile: expected finite numbers >= 0 of {total} experts, got shape {stored.shape}"
            )
        layer = np.repeat(np.arange(len(counts)), counts)
        # Uses of experts never seen are rare, not impossible.
        sums = np.stack([np.bincount(layer, row, len(counts)) for row in stored])
        self._stored = stored + 0.01 * sums[:, layer] / counts[layer] + 1e-12
        self._log_share = np.log(
            self._stored
            / np.stack([np.bincount(layer, r, len(counts)) for r in self._stored])[:, layer]
        )
        self._squares = None if squares is None else np.asarray(squares, np.float64)
        self.decay = 0.5 ** (1.0 / half_life)  # per token
        self._prior_tokens, self._square = prior_tokens, square
        self._seen = np.zeros(total)
        self._seen_squares = np.zeros(total)
        self._tokens = np.zeros(len(counts))
        self._layer = layer

    def note(self, layer_idx: int, experts: np.ndarray, weights: np.ndarray) -> None:
        """One call of a layer. experts, weights: [T, K]; an expert outside the layer counts as none."""
        begin, end = self._first[layer_idx], self._first[layer_idx + 1]
        chosen = (experts >= 0) & (experts < end - begin)
        tokens = experts.shape[0]
        fade = self.decay**tokens
        seen = np.bincount(experts[chosen], minlength=end - begin)
        squares = np.bincount(experts[chosen], weights[chosen] ** 2.0, minlength=end - begin)
        self._seen[begin:end] = self._seen[begin:end] * fade + seen
        self._seen_squares[begin:end] = self._seen_squares[begin:end] * fade + squares
        self._tokens[layer_idx] = self._tokens[layer_idx] * fade + tokens

    def know(self, seen: np.ndarray, squares: np.ndarray, tokens: np.ndarray) -> None:
        """What somebody else noted: uses and squared gate weights float [X], and tokens [layers], fading."""
        self._seen, self._seen_squares, self._tokens = seen, squares, tokens

    def new_sequence(self) -> None:
        """A new text: what was seen is forgotten, what is stored stays."""
        self._seen[:], self._seen_squares[:], self._tokens[:] = 0, 0, 0

    def mixture(self) -> np.ndarray:
        """float [D]: how much each stored profile counts now."""
        likelihood = self._log_share @ self._seen
        odds = np.exp(likelihood - likelihood.max())
        return odds / odds.sum()

    def use(self) -> np.ndarray:
        """float [X]: expected uses of each expert per token."""
        prior = self.mixture() @ self._stored
        tokens = self._tokens[self._layer]
        return (self._seen + self._prior_tokens * prior) / (tokens + self._prior_tokens)

    @property
    def seen(self) -> bool:
        """Whether anything of the text was seen."""
        return bool(self._tokens.any())

    def mean_square(self) -> np.ndarray:
        """float [X]: mean square of an expert's gate weight when it is used."""
        uses = self._seen.sum()
        mean = self._seen_squares.sum() / uses if uses > 0 else self._square
        prior = np.full(len(self._seen), mean) if self._squares is None else self._squares
        return (self._seen_squares + PRIOR_USES * prior) / (self._seen + PRIOR_USES)
