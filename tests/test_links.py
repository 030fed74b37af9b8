"""Choosing among network sources: by what they have shown, on a clock of the test's own."""

from __future__ import annotations

import math
import random

import pytest

from comoe.policy import links as policy
from comoe.policy.links import Links


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Sim:
    """Two or more sources with true bandwidths and latencies; one transfer at a time."""

    def __init__(self, **true):
        self.clock, self.true = Clock(), true
        self.links = Links(true, clock=self.clock, rng=random.Random(1))

    def transfer(self, name, nbytes):
        wait, rate = self.true[name]
        expected = self.links.began(name, nbytes)
        begin = self.clock.now
        self.clock.now += wait
        self.links.answered(name, wait)
        for _ in range(4):
            self.clock.now += nbytes / 4 / rate
            self.links.received(name, nbytes // 4)
        seconds = self.clock.now - begin
        self.links.ended(name, 0, True, seconds / expected)
        return seconds

    def run(self, count, nbytes):
        chosen = []
        for _ in range(count):
            chosen.append(self.links.order(nbytes)[0])
            self.transfer(chosen[-1], nbytes)
        return chosen


def test_each_size_goes_where_it_arrives_first():
    sim = Sim(near=(0.005, 5e6), wide=(0.08, 1e8))
    sim.run(20, 1 << 20)
    for name in ("near", "wide"):
        for _ in range(10):
            sim.transfer(name, 1 << 20)
    near, wide = sim.links.link("near"), sim.links.link("wide")
    assert near.bandwidth.mean == pytest.approx(5e6, rel=0.05)
    assert wide.latency.mean == pytest.approx(0.08, rel=0.05)
    assert sim.links.order(10_000)[0] == "near" and sim.links.order(4 << 20)[0] == "wide"
    big = sim.run(200, 4 << 20)
    assert (
        big.count("wide") > 180 and "near" in big
    )  # now and then the other, in case it is better by now


def test_a_better_link_is_found_again():
    sim = Sim(one=(0.01, 1e7), two=(0.01, 5e7))
    sim.run(100, 1 << 20)
    sim.true["two"] = (0.01, 1e6)
    after = sim.run(60, 1 << 20)
    assert after[-30:].count("one") > 25
    sim.true["two"] = (0.01, 5e8)
    assert sim.run(600, 1 << 20)[-100:].count("two") > 90


def test_what_is_under_way_counts():
    sim = Sim(one=(0.01, 1e7), two=(0.01, 1e7))
    for name in ("one", "two"):
        for _ in range(5):
            sim.transfer(name, 1 << 20)
    sim.links.began("one", 8 << 20)
    assert sim.links.order(1 << 20)[0] == "two"
    assert sim.links.expected(1 << 20) < 0.2
    sim.links.ended("one", 8 << 20, False)
    assert sim.links.stats()["one"]["bytes"] == 5 << 20


def test_back_off_doubles_with_jitter_and_ends():
    clock = Clock()
    links = Links(["a", "b"], clock=clock, rng=random.Random(2))
    rests = [links.failed("a") for _ in range(12)]
    for i, rest in enumerate(rests):
        base = min(policy.BACK_OFF * 2**i, policy.MOST_BACK_OFF)
        assert 0.5 * base <= rest <= 1.5 * base
    assert (
        len({round(r / policy.MOST_BACK_OFF, 6) for r in rests[-3:]}) == 3
    )  # not all at one moment
    assert links.order(1) == ["b"] and links.retry_in(["b"]) == pytest.approx(rests[-1])
    assert links.retry_in() == 0 and links.retry_in(["a", "b"]) == math.inf
    clock.now += rests[-1]
    assert set(links.order(1)) == {"a", "b"}
    assert links.failed("b", retry_after=40.0) == 40.0
    assert links.failed("b", lasting=True) >= 0.5 * policy.LASTING_BACK_OFF
    # One that went well wipes it out.
    links.began("a", 10)
    links.ended("a", 0, False, 1.0)
    assert links.failed("a") <= 1.5 * policy.BACK_OFF


def test_hedging_follows_the_percentile_and_has_a_budget():
    sim = Sim(one=(0.02, 1e7), two=(0.02, 1e7))
    assert sim.links.hedge_after("one", 1000, 0.1) == pytest.approx(0.1 * policy.FIRST_RATIO)
    for i in range(100):  # one in twelve takes five times as long
        sim.true["one"] = (0.1, 2e6) if i % 12 == 0 else (0.02, 1e7)
        sim.transfer("one", 100_000)
    late = sim.links.hedge_after("one", 100_000, 0.03)
    assert 0.06 < late < 0.3
    asked = 0
    while sim.links.hedge_after("one", 100_000, 0.03) < math.inf:
        sim.links.began("two", 100_000, hedge=True)
        asked += 1
    assert 10 <= asked <= 0.35 * 100


def test_up_and_down():
    links = Links(["a", "b"], clock=Clock())
    links.failed("a", lasting=True)
    assert links.is_up() and links.order(1) == ["b"] and links.to_probe() == []
    links.stalled("b")
    assert not links.is_up() and links.order(1) == [] and links.expected(1) == math.inf
    assert links.to_probe() == ["b"] and links.retry_in() <= 60
    links.recovered("b")
    assert links.is_up() and links.order(1) == ["b"]
    for _ in range(policy.DOWN_FAILURES - 1):
        links.failed("b")
    assert links.is_up()  # a fault now and then is no outage
    links.failed("b")
    assert not links.is_up() and links.to_probe() == ["b"]
    assert links.silence("a") == policy.FIRST_SILENCE


def test_absurd_times_do_no_harm():
    clock = Clock()
    links = Links(["a"], clock=clock)
    links.began("a", 1 << 20)
    links.answered("a", 0.0)
    links.received("a", 1 << 20)  # at once
    clock.now -= 50.0  # the clock runs backwards
    links.received("a", 5)
    links.ended("a", 0, True, float("1e9"))
    assert links.expected(1000) > 0 and links.order(1) == ["a"]
