from __future__ import annotations

import numpy as np
import pytest
from cache_worlds import costs_of, random_trace, sizes_of

from comoe.policy.next_use import NextUse
from comoe.policy.plan import all_cached
from comoe.policy.predictor import NoPredictor, Predictor, RankChances
from comoe.policy.predictors import BestOf, Recorded, SequenceMatrix, TransitionTable
from comoe.policy.scoring import score_predictors
from comoe.policy.token_table import RoutingMemory, TokenTable

ONES = np.ones(2)


def run_token(predictor, token, layers):
    """Feeds one token; returns what was predicted, by (from, about)."""
    told = {}
    predictor.begin_token(token)
    for later, experts in predictor.predict(-1, None):
        told[-1, later] = experts.tolist()
    for layer_idx, experts in enumerate(layers):
        experts = np.array(experts, np.int64)
        predictor.note(layer_idx, experts, np.ones(experts.size))
        for later, ahead in predictor.predict(layer_idx, None):
            told[layer_idx, later] = ahead.tolist()
        predictor.predict_next(layer_idx)
    return told


def test_transitions_learn_the_path():
    predictor = TransitionTable([5, 5, 5], k=2)
    for _ in range(3):
        run_token(predictor, -1, [[0, 1], [2, 3], [4, 0]])
        run_token(predictor, -1, [[2, 3], [0, 1], [1, 2]])
    told = run_token(predictor, -1, [[0, 1], [2, 3], [4, 0]])
    assert {k: set(v) for k, v in told.items()} == {(0, 1): {2, 3}, (1, 2): {0, 4}}


def test_two_layers_back_decide_where_one_does_not():
    # Layer 1 always uses expert 0, layer 2 what layer 0 used.
    predictor = TransitionTable([3, 3, 3], k=1)
    for expert in (1, 2, 1, 2):
        run_token(predictor, -1, [[expert], [0], [expert]])
    for expert in (1, 2):
        assert run_token(predictor, -1, [[expert], [0], [expert]])[1, 2] == [expert]


def test_sequence_matrix_takes_the_nearest_stored_sequence():
    predictor = SequenceMatrix([4, 4], k=1)
    for experts in ([[0], [1]], [[2], [3]]):
        predictor.new_sequence()
        for _ in range(5):
            run_token(predictor, -1, experts)
    predictor.new_sequence()
    assert run_token(predictor, -1, [[2], [0]]) == {}  # nothing seen yet tells which
    # Only layer 0 was like the second sequence so far.
    assert run_token(predictor, -1, [[2], [0]])[0, 1] == [3]


def test_sequence_matrix_predicts_fewer_experts_of_farther_layers():
    predictor = SequenceMatrix([8] * 5, k=4, depth=4)
    run_token(predictor, -1, [list(range(6))] * 5)
    told = run_token(predictor, -1, [list(range(6))] * 5)
    assert [len(told[0, later]) for later in (1, 2, 3, 4)] == [3, 3, 2, 1]


def test_a_token_seen_before_is_predicted_in_all_layers_and_others_are_not():
    predictor = TokenTable([6, 6], k=2)
    run_token(predictor, 7, [[0, 1], [2, 3]])
    run_token(predictor, 8, [[4, 5], [0, 5]])
    told = run_token(predictor, 7, [[0, 1], [2, 3]])
    assert {k: set(v) for k, v in told.items()} == {(-1, 0): {0, 1}, (-1, 1): {2, 3}}
    assert run_token(predictor, 9, [[0, 1], [2, 3]]) == {}
    assert run_token(predictor, -1, [[0, 1], [2, 3]]) == {}


def test_what_followed_a_token_and_a_pair_of_tokens():
    predictor = TokenTable([6], k=1)
    for _ in range(3):
        for token, experts in ((1, [0]), (2, [1]), (3, [2]), (4, [3]), (2, [1]), (5, [4])):
            run_token(predictor, token, [experts])
    predictor.new_sequence()
    run_token(predictor, 1, [[0]])
    predictor.begin_token(2)
    assert predictor.predict_next(0)[0] == 2  # after 1, 2 came 3
    predictor.new_sequence()
    run_token(predictor, 4, [[3]])
    predictor.begin_token(2)
    assert predictor.predict_next(0)[0] == 4  # after 4, 2 came 5
    predictor.begin_token(99)
    assert predictor.predict_next(0) is None


def test_memory_of_tokens_is_bounded_and_drops_the_oldest():
    memory = RoutingMemory(num_layers=1, width=2, capacity=3)
    for key in (1, 2, 3, 1, 4):
        memory.note(key, 0, np.array([key]))
    scores = np.zeros(6, np.float32)
    assert not memory.add(2, 0, scores)
    assert all(memory.add(key, 0, scores) for key in (1, 3, 4))
    assert np.flatnonzero(scores).tolist() == [1, 3, 4]


def test_memory_of_tokens_prefers_what_was_used_last():
    memory = RoutingMemory(num_layers=1, width=2, capacity=4)
    for experts in ([0, 1], [0, 2], [0, 2, 3, 4]):  # more than it has room for
        memory.note("a", 0, np.array(experts))
    scores = np.zeros(6, np.float32)
    memory.add("a", 0, scores)
    assert (scores > 0).sum() == 2
    assert scores[0] > 0


def test_recorded_predictions_stop_at_what_was_recorded():
    predicted = np.full((2, 3, 4), -1, np.int16)
    predicted[0, 1, :2], predicted[0, 2, 2:], predicted[1, 2, :2] = [3, 1], [0, 2], [5, -1]
    predictor = Recorded(predicted, recorded_depth=2, depth=2)
    predictor.begin_token(-1)
    told = [(later, e.tolist()) for later, e in predictor.predict(0, None)]
    assert told == [(1, [3, 1]), (2, [0, 2])]
    assert predictor.predict(1, None) == []
    predictor.begin_token(-1)
    assert [(later, e.tolist()) for later, e in predictor.predict(1, None)] == [(2, [5])]
    with pytest.raises(ValueError, match="expected 1 to the trace's 2, got 3"):
        Recorded(predicted, 2, 3)


class Says(Predictor):
    def __init__(self, *experts):
        self.experts = np.array(experts)

    def predict(self, layer_idx, hidden):
        return [(layer_idx + 1, self.experts)] if layer_idx == 0 else []


def test_best_of_learns_who_is_right():
    wrong, right = Says(0, 1), Says(2, 3)
    predictor = BestOf([wrong, right])
    for _ in range(20):
        told = run_token(predictor, -1, [[0], [2, 3]])
    assert told[0, 1] == [2, 3]
    for _ in range(60):
        told = run_token(predictor, -1, [[0], [0, 1]])
    assert told[0, 1] == [0, 1]


def test_chances_are_learnt_by_rank_and_distance():
    chances = RankChances(3, smoothing=0.1)
    for _ in range(60):
        chances.note(1, 1, np.array([4, 5]), np.array([4, 0]))
    first, second, third = chances.of(1, 1, 3)
    assert first > 0.9
    assert second < 0.1
    assert third == 0.5  # never seen
    assert chances.of(1, 2, 1)[0] == 0.5


def test_time_saved_is_what_counts():
    """Right, wrong, and none: on a disk that has time to spare, and on one that has none."""
    trace = random_trace(n=80, num_layers=3)
    sizes = sizes_of()

    class Known(Predictor):
        def __init__(self, shift):
            self.row, self.shift = -1, shift

        def begin_token(self, token):
            self.row += 1

        def predict(self, layer_idx, hidden):
            later = layer_idx + 1
            if layer_idx < 0 or later == 3:
                return []
            return [(later, (trace.experts[self.row, later].astype(np.int64) + self.shift) % 6)]

    costs = costs_of(sizes, compute=1e-3, dense=3e-3, bandwidth=1e6)
    plan = all_cached(sizes, sizes.all_at(0), 8 * 1000)
    scores = score_predictors(
        {"right": lambda: Known(0), "wrong": lambda: Known(3), "none": NoPredictor},
        sizes,
        costs,
        plan,
        trace,
        lambda: NextUse(trace.num_experts),
    )
    assert scores["right"].recall > 0.99
    assert scores["right"].saved > 0
    assert scores["right"].wasted_bytes == 0
    assert scores["wrong"].saved < scores["right"].saved
    assert scores["wrong"].wasted_bytes > 0
    assert scores["wrong"].gated_wasted_bytes < scores["wrong"].wasted_bytes
    assert scores["none"].saved == scores["none"].recall == 0
