"""Costs shared by experts: all states of a group are tried, and searches for two limits at once hold them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comoe.policy import solver
from comoe.policy.shared_costs import Groups, LocalSearch, Sharing, priced_values
from comoe.policy.solver import Problem, solve


def random_case(seed: int, experts=6, options=4, bases=4, most=2):
    """(table [3, X, O], ids [X, O, most], shared_cost [2, S]); the last expert shares nothing."""
    rng = np.random.default_rng(seed)
    table = rng.integers(0, 20, (3, experts, options)).astype(float)
    table[0][rng.random(table[0].shape) < 0.15] = np.inf
    table[0][:, 0] = np.where(np.isfinite(table[0][:, 0]), table[0][:, 0], 9.0)
    ids = rng.integers(-1, bases, (experts, options, most))
    ids[rng.random(ids.shape) < 0.5] = -1
    ids[:, 0] = ids[-1] = -1
    ids[:, :, 1:][ids[:, :, 1:] == ids[:, :, :1]] = -1
    ids[0, 1] = -1
    ids[0, 1, 0] = 0
    return table, ids, rng.integers(0, 30, (2, bases)).astype(float)


def least(table, ids, shared_cost, multipliers) -> float:
    """Of loss + priced costs over all choices of all experts."""
    values = table[0] + np.tensordot(multipliers, table[1:], 1)
    rows = np.arange(len(values))
    choices = np.indices((values.shape[1],) * len(values)).reshape(len(values), -1).T
    total = values[rows, choices].sum(1)
    for s in range(shared_cost.shape[1]):
        total += (multipliers @ shared_cost[:, s]) * (ids[rows, choices] == s).any((1, 2))
    return float(total.min())


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), price=st.sampled_from([0.0, 0.3, 1.0, 5.0]))
@pytest.mark.usefixtures("four_together")
def test_groups_find_the_best_choice_of_all(seed, price):
    table, ids, shared_cost = random_case(seed)
    sharing, multipliers = Sharing(ids), np.array([price, 0.5])
    used_ids = np.unique(ids[ids >= 0])
    shared_cost = shared_cost[:, : sharing.count]
    layout = sharing.layout
    assert layout is not None
    chosen, totals = Groups.of(layout, table, shared_cost).choose(multipliers)
    choice = np.full(len(table[0]), -1)
    choice[layout.rows] = chosen
    free = np.flatnonzero(sharing.free)
    assert set(layout.rows) | set(free) == set(range(len(choice)))
    choice[free] = (table[0] + np.tensordot(multipliers, table[1:], 1))[free].argmin(1)
    # The totals are those of the choice, with each shared cost that it needs once.
    lines = layout.rows
    paid = sharing.open(choice)
    expected = table[:, lines, choice[lines]].sum(1)
    expected[1:] += shared_cost[:, paid].sum(1)
    assert totals == pytest.approx(expected)
    assert set(paid) <= set(used_ids)
    rest = table[:, free, choice[free]].sum(1)
    value = totals[0] + rest[0] + multipliers @ (totals[1:] + rest[1:])
    assert value == pytest.approx(least(table, ids, shared_cost, multipliers))


@pytest.fixture(scope="module")
def four_together():
    """Groups of up to four, so that the small random cases are all tried in full."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("comoe.policy.shared_costs.MOST_TOGETHER", 4)
        yield


def test_a_part_of_the_groups_chooses_as_all_do():
    table, ids, shared_cost = random_case(3, experts=8, bases=3, most=1)
    ids[:4][ids[:4] > 0] = 0
    ids[4:][ids[4:] == 0] = 2
    sharing, multipliers = Sharing(ids), np.array([0.4, 0.1])
    groups = Groups.of(sharing.layout, table, shared_cost[:, : sharing.count])
    chosen = dict(zip(groups.rows, groups.choose(multipliers)[0], strict=True))
    among = np.zeros(8, bool)
    among[0] = True
    part = groups.only(among)
    assert 0 in part.rows and part.rows.size < groups.rows.size
    assert {row: chosen[row] for row in part.rows} == dict(
        zip(part.rows, part.choose(multipliers)[0], strict=True)
    )
    assert groups.only(np.zeros(8, bool)) is None


def test_many_that_hang_together_are_left_to_a_local_search():
    # Each expert knows two bases, and five bases are known in a ring; three of them serve all.
    ids = np.full((10, 3, 1), -1)
    ids[:, 1, 0], ids[:, 2, 0] = np.arange(10) % 5, (np.arange(10) + 1) % 5
    sharing = Sharing(ids)
    assert sharing.layout is None
    loss = np.tile([10.0, 1.0, 1.5], (10, 1))
    cost = np.tile([1.0, 0.0, 0.0], (1, 10, 1))
    search, multipliers = LocalSearch(sharing, np.full((1, 5), 5.0)), np.array([1.0])
    table = np.stack([loss, cost[0]]).reshape(2, -1)
    values = priced_values(table, multipliers, np.empty((2, 30))).reshape(10, 3)
    choice = search.choose(values, values.argmin(1), multipliers)
    lines = np.arange(10)
    found = values[lines, choice].sum() + 5.0 * sharing.open(choice).size
    assert found < 10 * 11.0
    problem = Problem(loss, cost, np.array([15.0]), shared=ids, shared_cost=search.cost)
    solution = solve(problem)
    assert solution.used[0] <= 15.0 and np.isnan(solution.bound)


def large_problem(shared: bool, share: float = 1.0) -> Problem:
    """600 experts: finer is larger, and read less often. Pairs of neighbours share a base in two sizes."""
    rng = np.random.default_rng(5)
    bits = np.sort(rng.uniform(0.5, 16, (600, 8)), axis=1)
    use = rng.gamma(0.5, 1.0, (600, 1))
    loss = use * np.exp(-0.7 * bits)
    reads = use * bits[:, ::-1] * rng.uniform(0.8, 1.2, bits.shape)
    limits = share * np.array([2400.0, 0.95 * reads.mean(1).sum()])
    if not shared:
        return Problem(loss, np.stack([bits, reads]), limits)
    ids = np.full((600, 8, 1), -1)
    ids[:, 1, 0], ids[:, 2, 0] = 2 * (np.arange(600) // 2), 2 * (np.arange(600) // 2) + 1
    return Problem(
        loss, np.stack([bits, reads]), limits, shared=ids, shared_cost=np.full((2, 600), 0.7)
    )


@pytest.mark.parametrize("shared", [False, True])
def test_two_limits_of_many_experts_are_found_at_once(shared, monkeypatch):
    cold = solve(large_problem(shared))
    warm = solve(large_problem(shared, 0.97), cold.multipliers)
    assert cold.evaluations < 60 and warm.evaluations < 40
    monkeypatch.setattr(solver, "MANY", 10**9)  # one limit inside the other
    for found, problem in ((cold, large_problem(shared)), (warm, large_problem(shared, 0.97))):
        assert (found.used <= problem.limits).all()
        assert found.bound <= found.loss <= 1.01 * found.bound
        slow = solve(problem)
        assert found.loss <= 1.01 * slow.loss and slow.evaluations > found.evaluations


def test_one_sharing_serves_problems_with_other_losses():
    problem = large_problem(True)
    sharing = Sharing(problem.shared)
    for factor in (1.0, 3.0):
        loss = problem.loss * np.where(np.arange(600)[:, None] < 300, factor, 1.0)
        fields = {"shared_cost": problem.shared_cost}
        once = solve(Problem(loss, problem.cost, problem.limits, shared=sharing, **fields))
        again = solve(Problem(loss, problem.cost, problem.limits, shared=problem.shared, **fields))
        assert np.array_equal(once.choice, again.choice)
