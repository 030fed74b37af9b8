"""What it takes to have experts computed elsewhere, as calls have shown it."""

import math
import random

import numpy as np
import pytest

from comoe.policy.elsewhere import BACK_OFF, MOST_BACK_OFF, Elsewhere
from comoe.policy.snapshot import Estimate, Link


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def there(clock):
    return Elsewhere(np.full(8, 4), 1000, clock=clock, rng=random.Random(0))


def test_it_learns_link_and_server(there):
    """20 ms and 1 MB/s, 2 ms of experts."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        tokens = int(rng.choice([1, 8, 64]))
        way = (0.02 + 2 * tokens * 1000 / 1e6) * rng.lognormal(0, 0.05)
        there.succeeded(tokens, way + 0.002, 0.002)
    assert there.seconds(1) == pytest.approx(0.024, rel=0.2)
    assert there.seconds(64) == pytest.approx(0.15, rel=0.2)
    assert there.seconds(1) < there.timeout(1) <= there.seconds(1) + 0.2


def test_a_failure_puts_it_aside_for_longer_and_longer(there, clock):
    rests = []
    for _ in range(12):
        assert there.available
        rests.append(there.failed_call())
        assert not there.available and math.isinf(there.seconds(1))
        clock.now += rests[-1]
    assert 0.75 * BACK_OFF <= rests[0] <= 1.25 * BACK_OFF
    assert rests[3] > 2 * rests[0]
    assert max(rests) <= 1.25 * MOST_BACK_OFF
    assert there.failed == 12


def test_a_success_or_another_path_forgives(there, clock):
    for _ in range(5):
        clock.now += there.failed_call()
    there.succeeded(1, 0.1, 0.01)
    assert there.available and there.failed_call() <= 1.25 * BACK_OFF
    there.path_changed()
    assert there.available


def test_the_server_may_ask_for_more_time(there, clock):
    assert there.failed_call(retry_after=60.0) == 60.0
    clock.now += 59
    assert not there.available


def test_another_path_starts_from_the_prior(clock):
    prior = Link(Estimate(5e6), Estimate(0.01))
    there = Elsewhere(np.zeros(1, int), 100, prior=prior, clock=clock)
    first = there.seconds(1)
    for _ in range(20):
        there.succeeded(1, 2.0, 0.001)
    assert there.seconds(1) > 1
    there.path_changed()
    assert there.seconds(1) == pytest.approx(first, abs=0.002)
