"""Estimates follow steps at once, let noise and outliers pass, and learn both unknowns of a link."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comoe.policy.smoothing import FEW, PATIENCE, LinkEstimate, Smoothed
from comoe.policy.snapshot import Estimate, Link

PRIOR = Link(Estimate(1e9), Estimate(1e-4))


def noisy(rng, mean, count, spread=0.1):
    return mean * np.exp(rng.normal(0, spread, count))


def test_mean_and_spread_of_noise():
    rng = np.random.default_rng(0)
    smoothed = Smoothed()
    for sample in noisy(rng, 5.0, 2000):
        smoothed.add(sample)
    estimate = smoothed.estimate
    assert estimate.mean == pytest.approx(5.0, rel=0.1)
    assert estimate.std == pytest.approx(0.5, rel=0.5)
    assert estimate.samples == 2000
    assert smoothed.steps == 0


@pytest.mark.parametrize("factor", [0.3, 3.0])
def test_a_step_is_followed_at_once(factor):
    rng = np.random.default_rng(1)
    smoothed = Smoothed()
    for sample in noisy(rng, 1.0, 100):
        smoothed.add(sample)
    steps = [smoothed.add(sample) for sample in noisy(rng, factor, PATIENCE, 0.05)]
    assert steps == [False] * (PATIENCE - 1) + [True]
    assert smoothed.estimate.mean == pytest.approx(factor, rel=0.3)


def test_a_single_outlier_moves_little_and_is_no_step():
    rng = np.random.default_rng(2)
    smoothed = Smoothed()
    for sample in noisy(rng, 1.0, 100):
        smoothed.add(sample)
    before = smoothed.estimate
    smoothed.add(1000.0)
    assert smoothed.steps == 0
    assert smoothed.estimate.mean < before.mean + before.std
    for sample in (1.0, 1000.0, 1.0, 0.001, 1000.0):  # alternating: no step either
        smoothed.add(sample)
    assert smoothed.steps == 0


def test_a_sensor_that_repeats_itself_may_change_a_little():
    smoothed = Smoothed()
    for _ in range(50):
        smoothed.add(1.0)
    assert smoothed.estimate == Estimate(1.0, 0.0, 50)
    for _ in range(50):
        smoothed.add(1.05)
    assert smoothed.steps == 0
    assert smoothed.estimate.mean == pytest.approx(1.05, rel=0.01)


def feed(link, rng, bandwidth, latency, count, sizes=(1e4, 1e5, 1e6, 1e7), spread=0.1):
    for size in rng.choice(sizes, count):
        seconds = size / bandwidth + latency
        link.add(size, float(noisy(rng, seconds, 1, spread)[0]), 1)


@pytest.mark.parametrize(("bandwidth", "latency"), [(5e8, 1e-3), (3e9, 2e-5), (2e7, 2e-2)])
def test_both_unknowns_of_a_link_are_learnt(bandwidth, latency):
    link = LinkEstimate(PRIOR)
    feed(link, np.random.default_rng(3), bandwidth, latency, 400)
    found = link.link
    assert found.bandwidth.mean == pytest.approx(bandwidth, rel=0.15)
    assert found.latency.mean == pytest.approx(latency, rel=0.3)
    assert 0.03 < found.bandwidth.std / found.bandwidth.mean < 0.3
    assert found.bandwidth.samples == 400


def test_with_one_size_the_duration_is_learnt_and_nothing_runs_away():
    link = LinkEstimate(PRIOR)
    feed(link, np.random.default_rng(4), 2e8, 1e-4, 5000, sizes=(1e6,))
    assert link.expected(1e6, 1) == pytest.approx(5.1e-3, rel=0.1)
    assert 1e8 < link.link.bandwidth.mean < 4e8
    assert 1e-6 < link.link.latency.mean < 1e-3


@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_a_link_that_changes_is_followed_within_a_few_transfers(factor):
    rng = np.random.default_rng(5)
    link = LinkEstimate(PRIOR)
    feed(link, rng, 1e9, 1e-4, 100)
    assert link.steps == 0
    feed(link, rng, factor * 1e9, 1e-4 / factor, 2 * PATIENCE)
    assert link.steps >= 1
    assert link.link.bandwidth.mean == pytest.approx(factor * 1e9, rel=0.35)


def test_one_stalled_transfer_changes_little():
    rng = np.random.default_rng(6)
    link = LinkEstimate(PRIOR)
    feed(link, rng, 1e9, 1e-4, 200)
    before = link.link.bandwidth.mean
    link.add(1e6, 10.0, 1)  # should take about a millisecond
    assert link.steps == 0
    assert link.link.bandwidth.mean > 0.5 * before


positive = st.floats(1e-3, 1e12)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(positive, st.floats(1e-9, 1e6), st.integers(1, 1000)), max_size=40))
def test_any_samples_leave_finite_positive_estimates(samples):
    link, smoothed = LinkEstimate(PRIOR), Smoothed()
    for num_bytes, seconds, requests in samples:
        link.add(num_bytes, seconds, requests)
        smoothed.add(seconds)
    found = link.link
    for value in (found.bandwidth, found.latency):
        assert 0 < value.mean < float("inf")
        assert 0 <= value.std < float("inf")
    assert 0 <= smoothed.estimate.mean < float("inf")
    assert 0 <= smoothed.estimate.std < float("inf")


def test_too_few_samples_are_no_step():
    smoothed, link = Smoothed(), LinkEstimate(PRIOR)
    for sample in (1.0, 100.0, 1.0, 100.0)[:FEW]:
        assert not smoothed.add(sample)
        assert not link.add(1e6, sample, 1)
