"""Losses after a look at the whole choice: scaled where that chooses better, else left as they are."""

import numpy as np
import pytest

from comoe.aggregate.allocate import Losses
from comoe.aggregate.refine import LEAST, MOST, refined

EXPERTS, SIZES, LOSS = 6, np.array([2, 4, 16]), np.array([1.0, 0.25, 0.0])


def make_losses(layers: int = 3) -> Losses:
    """Experts of 2, 4 or 16 bytes, alike as far as anyone knows."""
    total = layers * EXPERTS
    rng = np.random.default_rng(0)
    return Losses(
        levels=("2", "4", "exact"),
        layer=np.repeat(np.arange(layers), EXPERTS),
        loss=0.01 * LOSS * rng.uniform(0.9, 1.1, (total, 1)),
        own=np.tile(SIZES, (total, 1)),
        shared=np.full((total, 3, 1), -1),
        shared_bytes=np.zeros(0, np.int64),
        error=np.zeros((total, 3)),
        energy=np.ones(total),
        use=np.ones(total),
        floor=np.zeros(total, int),
        full_bytes=16 * total,
    )


def truth(losses: Losses, scale, curvature: float = 0.0):
    """A KL in which layers count `scale` times as much as predicted; counts how often it is asked."""

    def measure(choice: np.ndarray) -> float:
        measure.runs += 1
        each = losses.loss[np.arange(len(choice)), choice] * np.asarray(scale)[losses.layer]
        return float(each.sum() + curvature * each.sum() ** 2)

    measure.runs = 0
    return measure


def test_true_scales_are_found_and_kept():
    losses = make_losses()
    measure = truth(losses, [3.0, 1.0, 0.5])
    found, report = refined(losses, measure, anchor=0.2, fractions=(0.3, 0.2))
    assert report.kept
    assert report.scale == pytest.approx([3.0, 1.0, 0.5])
    assert found.loss == pytest.approx(losses.loss * np.repeat([3.0, 1.0, 0.5], EXPERTS)[:, None])
    assert report.after[0.2] < 0.99 * report.before[0.2]
    assert report.after[0.3] <= report.before[0.3]
    # What is predicted now is what is measured.
    assert found.solve(0.2).loss == pytest.approx(report.after[0.2])
    assert measure.runs <= 2 * 2 + 3


def test_losses_that_are_right_stay():
    losses = make_losses()
    found, report = refined(losses, truth(losses, np.ones(3)), anchor=0.2, fractions=(0.3, 0.2))
    assert found is losses and not report.kept
    assert report.scale == pytest.approx(np.ones(3)) and report.after == report.before


def test_what_measures_worse_is_not_kept():
    """Layers look important only while one is exact: the scales mislead."""
    losses = make_losses()
    good = losses.solve(0.2).choice

    def measure(choice):
        each = losses.loss[np.arange(len(choice)), choice]
        one_exact = (np.bincount(losses.layer, choice == 2) == EXPERTS).any()
        if one_exact:
            return float(each[losses.layer > 0].sum())
        return float(each.sum()) + (0.0 if np.array_equal(choice, good) else 0.1)

    found, report = refined(losses, measure, anchor=0.2, fractions=(0.2,))
    assert found is losses and not report.kept
    assert report.before[0.2] <= report.after[0.2]


def test_scales_are_bounded():
    losses = make_losses()
    _, report = refined(losses, truth(losses, [50.0, 1.0, 0.0]), anchor=0.2, fractions=(0.2,))
    assert report.scale.tolist() == pytest.approx([MOST, 1.0, LEAST])


def test_sizes_that_cannot_be_met_are_left_out():
    losses = make_losses()
    measure = truth(losses, [3.0, 1.0, 0.5])
    found, report = refined(losses, measure, anchor=0.01, fractions=(0.2, 0.01))
    assert found is losses and set(report.before) == {0.2} and measure.runs == 1
