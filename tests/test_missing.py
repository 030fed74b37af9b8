"""What the handler of misses hands to the rule, and what it makes of the answer."""

import numpy as np
import pytest

from comoe.policy.misses import SKIP
from comoe.policy.plan import LADDER, Sizes
from comoe.runtime.missing import MissHandler

E = 8
SIZES = Sizes(
    LADDER,
    np.arange(2 * E * 5, dtype=np.int32).reshape(-1, 5),
    np.array([200, 100, 100, 400, 1600] * 2 * E, np.int64),
    np.array([E, E]),
)


class Engine:
    """Records of experts of layer 1: expert e has its e first planes."""

    def resident(self):
        states = np.zeros((2, E, 5), np.int64)
        for expert in range(E):
            states[1, expert, : min(expert, 4)] = 2
            states[1, expert, min(expert, 4) :] = 1  # on its way is not here
        return states.reshape(-1)


class Rule:
    def __init__(self, answer):
        self.answer = answer

    def decide(self, chosen):
        self.chosen = chosen
        return np.array(self.answer(chosen))


def decide(index, weights, answer, low=3, want=3):
    handler, rule = MissHandler(Engine(), SIZES), Rule(answer)
    low, want = np.full(E, low, np.uint8), np.full(E, want, np.uint8)
    decided = handler.decide(rule, 1, np.array(index), np.array(weights, np.float32), low, want)
    return handler, rule, decided


def test_one_token():
    index, weights = [[5, 1, 0, 3]], [[0.4, 0.3, 0.2, 0.1]]
    handler, rule, decided = decide(index, weights, lambda c: [3, 0, SKIP, 3])
    assert rule.chosen.experts.tolist() == [13, 9, 8, 11]
    assert rule.chosen.resident.tolist() == [3, 0, -1, 2]
    assert rule.chosen.rank_mass == pytest.approx([0, 0.4, 0.7, 0.9])
    assert rule.chosen.weights == pytest.approx([0.4, 0.3, 0.2, 0.1])
    new_index, levels, sent = decided
    assert not sent.size
    assert new_index.tolist() == [[5, 1, E, 3]]
    assert levels[[5, 1, 3]].tolist() == [3, 0, 3] and levels[7] == 3
    assert (handler.waited, handler.coarser, handler.skipped) == (1, 1, 1)


def test_order_of_weights_does_not_matter():
    _, rule, _ = decide([[0, 1, 2]], [[0.2, 0.5, 0.2]], lambda c: [0, 0, 0])
    assert rule.chosen.rank_mass == pytest.approx(np.array([0.5, 0.0, 0.7]) / 0.9)


def test_several_tokens_and_choices_outside():
    index = [[0, 1], [1, E], [-1, 0]]
    weights = [[0.6, 0.4], [1.0, 9.0], [9.0, 0.8]]
    _, rule, decided = decide(index, weights, lambda c: [SKIP, 0])
    assert rule.chosen.experts.tolist() == [8, 9] and rule.chosen.tokens == 3
    assert rule.chosen.weights == pytest.approx(np.sqrt([0.36 + 0.64, 0.16 + 1.0]))
    assert rule.chosen.rank_mass == pytest.approx([0, 0])
    assert decided[0].tolist() == [[E, 1], [1, E], [-1, E]]


def test_nothing_to_decide():
    for index in ([[5, 6, 7]], [[E, -1]], np.zeros((0, 2), int)):
        _, _, decided = decide(index, np.ones(np.shape(index)), lambda c: pytest.fail("asked"))
        assert decided is None
    # All that is missing is waited for: as without a rule.
    assert decide([[0, 5]], [[0.5, 0.5]], lambda c: [3, 3])[2] is None


def test_finer_than_planned_counts_only_up_to_want():
    _, rule, _ = decide([[7, 0]], [[0.5, 0.5]], lambda c: [1, 1], low=1, want=2)
    assert rule.chosen.resident.tolist() == [2, -1]
