"""How often each expert of a layer is chosen, and router biases that make it so. numpy alone.

E experts, K of them per token. A share is of the choices: shares of a layer sum to 1, and none is above 1 / K.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

SAMPLES = 1 << 22  # random logits that the biases are fitted on
ROUNDS = 80
KINDS = "uniform, zipf, zipf:EXPONENT or the file of a routing trace (comoe trace)"


class PopularityError(ValueError):
    """A popularity that is not understood or cannot be; the message says what to do."""


def layer_shares(popularity: str, num_experts: Sequence[int], k: int) -> list[np.ndarray]:
    """float64 [E] per layer, the most popular expert first.

    popularity: "uniform"; "zipf": the i-th expert proportional to 1 / i; "zipf:S": to 1 / i^S; or a trace's file:
    layer l gets the curve of the trace's layer l mod L, stretched to E experts where it has other numbers.
    """
    kind, _, exponent = popularity.partition(":")
    if kind == "uniform" and not exponent:
        return [np.full(n, 1 / n) for n in num_experts]
    if kind == "zipf":
        try:
            power = float(exponent or 1)
        except ValueError:
            power = -1.0
        if not 0 <= power < 10:
            raise PopularityError(
                f"popularity: expected an exponent from 0 to 10 after 'zipf:', got {exponent!r}"
            )
        return [_possible(np.arange(1, n + 1) ** -power, k) for n in num_experts]
    if not Path(popularity).is_file():
        raise PopularityError(
            f"popularity: expected {KINDS}; got {popularity!r}, which is no file either"
        )
    curves = _traced(Path(popularity))
    return [_possible(_stretched(curves[i % len(curves)], n), k) for i, n in enumerate(num_experts)]


def _traced(path: Path) -> list[np.ndarray]:
    from comoe.trace import Trace

    trace = Trace.read(path)
    curves = []
    for layer, count in enumerate(trace.num_experts):
        chosen = trace.experts[:, layer].ravel()
        uses = np.bincount(chosen[chosen >= 0], minlength=count).astype(float)
        curves.append(np.sort(uses)[::-1])
    if not all(curve.sum() for curve in curves):
        raise PopularityError(f"popularity: {path}: a layer of this trace has no choices")
    return curves


def _stretched(curve: np.ndarray, count: int) -> np.ndarray:
    """The same share for the same part of the experts: [E'] -> [count]."""
    below = np.concatenate([[0], np.cumsum(curve)]) / curve.sum()
    at = np.linspace(0, 1, count + 1)
    return np.diff(np.interp(at, np.linspace(0, 1, len(curve) + 1), below))


def _possible(weights: np.ndarray, k: int) -> np.ndarray:
    """Shares in proportion to `weights`, but none above 1 / K (a token takes an expert once), and none zero."""
    if len(weights) <= k:
        return np.full(len(weights), 1 / len(weights))
    most, shares = 0.98 / k, np.maximum(weights / weights.sum(), 1e-6)
    shares /= shares.sum()
    for _ in range(len(shares)):
        over = shares > most
        if not over.any():
            break
        rest = shares[~over].sum()
        shares[~over] *= (1 - most * over.sum()) / rest
        shares[over] = most
    return shares


def biases(shares: np.ndarray, k: int, seed: int = 0) -> np.ndarray:
    """float64 [E], of zero mean: added to logits that are independent N(0, 1), they make the K largest fall on each
    expert as often as `shares` [E] says. Fitted on the same random logits in every round, to about 1 % of a share
    of 1 / E."""
    return _biases(tuple(shares), k, seed).copy()


@functools.cache
def _biases(shares: tuple[float, ...], k: int, seed: int) -> np.ndarray:
    wanted = np.array(shares)
    if np.ptp(wanted) < 1e-12 or len(wanted) <= k:
        return np.zeros(len(wanted))
    noise = np.random.default_rng(seed).standard_normal(
        (max(SAMPLES // len(wanted), 4096), len(wanted)), dtype=np.float32
    )
    bias = np.zeros(len(wanted))
    for turn in range(ROUNDS):
        got = np.maximum(chosen_shares(noise + bias.astype(np.float32), k), 0.1 / len(noise))
        # A share moves by about its own size per unit of 1 / sqrt(2 log E) of bias.
        bias += (0.4 if turn < ROUNDS // 2 else 0.15) * np.log(wanted / got)
        bias -= bias.mean()
    return bias


def chosen_shares(logits: np.ndarray, k: int) -> np.ndarray:
    """[N, E] -> float64 [E]: of the K largest of every row."""
    count = logits.shape[1]
    if k == 1:
        chosen = logits.argmax(1)
    else:
        chosen = np.argpartition(logits, count - k, axis=1)[:, count - k :].ravel()
    return np.bincount(chosen, minlength=count) / len(chosen)
