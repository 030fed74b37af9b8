from __future__ import annotations

import itertools

import numpy as np
import pytest
from cache_worlds import random_trace
from hypothesis import given, settings
from hypothesis import strategies as st

from comoe.policy.cache import LFU, LRU, Clocked
from comoe.policy.cache_scores import GreedyDual, Hobbit, HybriMoE, worth_of_layers
from comoe.policy.next_use import NEVER, Belady, NextUse

ALL = {"lru": LRU, "lfu": LFU, "hobbit": Hobbit, "hybrimoe": HybriMoE, "gd": GreedyDual}
ALL["next-use"] = NextUse


def feed(policy, steps, num_layers=2):
    """steps: per token and layer the experts used."""
    for token in steps:
        for layer_idx, experts in enumerate(token[:num_layers]):
            experts = np.array(experts, np.int64)
            policy.note(layer_idx, experts, np.ones(len(experts)), np.zeros(len(experts), int))


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_values_are_finite_float32_of_the_right_size(make, data):
    counts = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    policy = make(counts)
    for _ in range(data.draw(st.integers(0, 12))):
        if data.draw(st.booleans()):
            policy.new_sequence()
        for layer_idx, count in enumerate(counts):
            used = np.array(sorted(data.draw(st.sets(st.integers(0, count - 1)))), np.int64)
            policy.note(layer_idx, used, np.full(used.size, 0.5), np.zeros(used.size, int))
            if used.size:
                policy.predicted(layer_idx, used, np.full(used.size, 0.9))
    for layer_idx, count in enumerate(counts):
        values = policy.values(layer_idx)
        assert values.dtype == np.float32
        assert values.shape == (count,)
        assert np.isfinite(values).all()


def test_lru_leaves_the_order_to_the_engine():
    policy = LRU([4])
    feed(policy, [[[0]], [[3]]], 1)
    assert (policy.values(0) == policy.values(0)[0]).all()


def test_lfu_counts_uses():
    policy = LFU([4])
    feed(policy, [[[0, 1]], [[0]]], 1)
    assert policy.values(0).tolist() == [2, 1, 0, 0]


def test_hobbit_weighs_its_four_terms():
    uses = [[[0], [0]], [[1], [0]], [[1], [0]], [[0], [0]]]

    def order(*weights):
        policy = Hobbit([3, 3], weights)
        feed(policy, uses)
        return policy.values(0)

    recent, frequent = order(1, 0, 0, 0), order(0, 1, 0, 0)
    assert recent[0] > recent[1] > recent[2]
    assert frequent[0] == frequent[1] == pytest.approx(2 / 4)
    policy = Hobbit([3, 3], (0, 0, 1, 0), fine_level=2)
    policy.note(0, np.array([0, 1]), np.ones(2), np.array([2, 1]))
    assert policy.values(0).tolist() == [1, 0, 0]


@pytest.mark.parametrize("make", [Hobbit, NextUse])
def test_the_layer_just_passed_goes_first_all_else_equal(make):
    policy = make([4, 4, 4])
    feed(policy, [[[0], [0], [0]]] * 40, 3)
    policy.note(0, np.array([0]), np.ones(1), np.zeros(1, int))
    # Layer 0 has run just now and layer 1 is next, then layer 2.
    by_layer = [policy.values(layer)[3] for layer in range(3)]
    assert by_layer[1] > by_layer[2] > by_layer[0]


def test_hybrimoe_follows_gate_weights():
    policy = HybriMoE([3], share=0.5)
    policy.note(0, np.array([0, 2]), np.array([0.3, 0.1]), np.zeros(2, int))
    np.testing.assert_allclose(policy.values(0), [0.375, 0, 0.125], rtol=1e-6)
    policy.note(0, np.array([1]), np.array([2.0]), np.zeros(1, int))
    np.testing.assert_allclose(policy.values(0), [0.1875, 0.5, 0.0625], rtol=1e-6)


@pytest.mark.parametrize("make", [GreedyDual, NextUse])
def test_what_saves_more_per_byte_is_kept(make):
    policy = make([4], np.array([1.0, 4.0, 1.0, 1.0]))
    feed(policy, [[[0, 1]], [[2, 3]], [[0, 1]], [[2, 3]]], 1)
    values = policy.values(0)
    assert values[1] > values[0]


@pytest.mark.parametrize("worth", [np.ones(3), np.array([1, 0, 1, 1.0]), np.full(4, np.nan)])
def test_bad_worth_is_refused(worth):
    with pytest.raises(ValueError, match="worth: expected 4 numbers above 0"):
        worth_of_layers([2, 2], worth)


def test_greedy_dual_forgets_what_is_long_past():
    policy = GreedyDual([3], half_life=4, horizon=8)
    feed(policy, [[[0]]] * 5 + [[[1]]] * 40, 1)
    assert policy.values(0)[1] > policy.values(0)[0]


def test_next_use_prefers_frequent_then_predicted():
    policy = NextUse([4])
    feed(policy, [[[0, 1]], [[0, 2]]] * 8, 1)
    values = policy.values(0)
    assert values[0] > max(values[1], values[2]) > values[3]
    policy.predicted(0, np.array([3]), np.array([0.95]))
    values = policy.values(0)
    assert values.argmax() == 3
    # A prediction holds for one run only.
    feed(policy, [[[0, 1]]], 1)
    assert policy.values(0).argmax() == 0


def test_next_use_takes_the_past_as_a_prior_of_a_new_sequence():
    policy = NextUse([3], prior_tokens=2.0)
    feed(policy, [[[0]]] * 50, 1)
    policy.new_sequence()
    assert policy.values(0).argmax() == 0
    feed(policy, [[[1]]] * 8, 1)
    assert policy.values(0).argmax() == 1


@pytest.mark.parametrize("make", [Hobbit, GreedyDual, NextUse])
def test_ticks_stay_apart_after_very_long_sequences(make):
    """At 2^24 float32 would no longer tell two layers apart."""
    policy = make([3, 3])
    policy.now = (1 << 26) - 1  # as after 33 million tokens
    feed(policy, [[[0], [1]], [[1], [0]], [[0], [2]]])
    values = np.concatenate([policy.values(0), policy.values(1)])
    assert abs(values.max()) < 1 << 22
    policy.note(0, np.array([2]), np.ones(1), np.zeros(1, int))
    one, other = policy.values(0), policy.values(1)
    assert one.max() != other.max()


def test_clock_follows_layers_that_are_left_out():
    clock = Clocked([2, 2, 2])
    assert [clock._advance(layer) for layer in (0, 2, 0, 1)] == [0, 2, 3, 4]


def test_belady_values_are_the_next_uses():
    trace = random_trace(n=30)
    policy = Belady(trace.num_experts, trace.experts)
    layers = trace.experts.shape[1]
    for row in range(30):
        for layer_idx in range(layers):
            experts = trace.experts[row, layer_idx]
            policy.note(layer_idx, experts, np.ones(2), np.zeros(2, int))
            for e in range(6):
                later = np.flatnonzero((trace.experts[row + 1 :, layer_idx] == e).any(1))
                expected = -((row + 1 + later[0]) * layers + layer_idx) if later.size else -NEVER
                assert policy.values(layer_idx)[e] == expected
    with pytest.raises(ValueError, match="runs 30 times in its trace"):
        policy.note(0, trace.experts[0, 0], np.ones(2), np.zeros(2, int))


def test_rankings_are_strict_enough_to_tell_policies_apart():
    """Two policies that always agreed would be one."""
    trace = random_trace(n=40, skew=3.0)
    orders = {}
    for name, make in ALL.items():
        policy = make(trace.num_experts)
        for row in range(40):
            for layer_idx in range(3):
                experts = np.unique(trace.experts[row, layer_idx]).astype(np.int64)
                policy.note(layer_idx, experts, np.ones(experts.size), np.zeros(experts.size, int))
        values = np.concatenate([policy.values(layer) for layer in range(3)])
        orders[name] = tuple(np.argsort(values, kind="stable"))
    for one, other in itertools.combinations(orders, 2):
        assert orders[one] != orders[other], (one, other)
