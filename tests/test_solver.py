"""The solver against brute force: never over a limit, never under the optimum, at most a step above it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comoe.policy.solver import InfeasibleError, Problem, solve


def brute(problem: Problem) -> float:
    """Least loss + penalty of all choices that meet the limits; infinite if there is none."""
    loss = problem.loss + (0 if problem.penalty is None else problem.penalty)
    loss = np.where(np.isfinite(loss), loss, np.inf)
    rows = np.arange(len(loss))
    choices = np.indices((loss.shape[1],) * len(loss)).reshape(len(loss), -1).T
    used = problem.cost[:, rows, choices].sum(2)
    if problem.shared is not None:
        ids = problem.shared[rows, choices]  # [choices, X, M]
        for s in range(problem.shared_cost.shape[1]):
            used = used + problem.shared_cost[:, s, None] * (ids == s).any((1, 2))
    good = (used <= problem.limits[:, None]).all(0)
    return float(np.where(good, loss[rows, choices].sum(1), np.inf).min())


def random_problem(seed: int, experts=5, options=4, limits=1, tightness=0.5) -> Problem:
    """Random losses and whole costs; some options are not offered, some experts are alike."""
    rng = np.random.default_rng(seed)
    cost = rng.integers(0, 20, (limits, experts, options)).astype(float)
    loss = rng.choice([0.0, 0.5, 1.0, 2.0, 7.0, 30.0], (experts, options)) * rng.random(
        (experts, 1)
    )
    loss[rng.random(loss.shape) < 0.15] = rng.choice([np.inf, np.nan])
    loss[:, 0] = np.where(np.isfinite(loss[:, 0]), loss[:, 0], 9.0)
    if seed % 3 == 0:
        loss[1:], cost[:, 1:] = loss[:1], cost[:, :1]
    offered = np.where(np.isfinite(loss), cost, np.inf)
    least, most = offered.min(2).sum(1), np.where(np.isfinite(loss), cost, 0).max(2).sum(1)
    return Problem(loss, cost, least + tightness * (most - least))


def largest_step(problem: Problem) -> float:
    """The most that one expert can lose by one change of option."""
    loss = problem.loss + (0 if problem.penalty is None else problem.penalty)
    finite = np.where(np.isfinite(loss), loss, np.nan)
    return float((np.nanmax(finite, 1) - np.nanmin(finite, 1)).max())


def check(problem: Problem, solution) -> None:
    rows = np.arange(len(problem.loss))
    assert np.isfinite(problem.loss[rows, solution.choice]).all()
    assert (solution.used <= problem.limits).all()
    assert solution.loss == pytest.approx(problem.loss[rows, solution.choice].sum())


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10**6), tightness=st.floats(0, 1))
def test_one_limit_is_met_within_one_step_of_the_optimum(seed, tightness):
    problem = random_problem(seed, tightness=tightness)
    solution = solve(problem)
    check(problem, solution)
    best = brute(problem)
    assert best - 1e-9 <= solution.loss <= best + largest_step(problem) + 1e-9
    assert solution.bound <= best + 1e-9


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), tightness=st.floats(0.2, 1))
def test_two_limits_are_met_within_two_steps_of_the_optimum(seed, tightness):
    problem = random_problem(seed, limits=2, tightness=tightness)
    best = brute(problem)
    try:
        solution = solve(problem)
    except InfeasibleError as error:
        # The search knows hulls only, so next to the edge it may miss the last feasible point.
        near = problem.limits[error.limit] + problem.cost[error.limit].max()
        assert best == np.inf or error.least <= near
        return
    check(problem, solution)
    assert best - 1e-9 <= solution.loss <= best + 2 * largest_step(problem) + 1e-9
    assert solution.bound <= best + 1e-9


def test_the_gap_is_small_where_there_are_many_experts():
    rng = np.random.default_rng(1)
    cost = np.sort(rng.random((2, 300, 8)) * 100)
    cost[1] = cost[1][:, ::-1]
    loss = rng.gamma(0.5, 1, (300, 1)) * np.exp(-cost[0] / 20) + 0.1 * np.exp(-cost[1] / 20)
    for share in (0.45, 0.6, 0.8):
        problem = Problem(loss, cost, np.array([100.0, 100.0]) * 300 * share)
        solution = solve(problem)
        check(problem, solution)
        assert solution.loss <= solution.bound * 1.01 + 1e-6


def test_limits_that_do_not_bind_give_the_least_loss():
    problem = random_problem(4, limits=2, tightness=1.0)
    solution = solve(problem)
    finite = np.where(np.isfinite(problem.loss), problem.loss, np.inf)
    assert solution.loss == pytest.approx(finite.min(1).sum())


def test_experts_that_are_all_alike_share_what_there_is():
    # Every multiplier moves all of them at once: only the fill can divide the budget.
    loss = np.tile([4.0, 1.0, 0.0], (1000, 1))
    cost = np.tile([1.0, 2.0, 4.0], (1, 1000, 1))
    solution = solve(Problem(loss, cost, np.array([1500.0])))
    assert np.bincount(solution.choice).tolist() == [500, 500]


def test_a_warm_start_changes_nothing_but_the_work():
    rng = np.random.default_rng(3)
    cost = np.sort(rng.random((1, 2000, 10)), axis=2)
    loss = rng.gamma(0.5, 1, (2000, 1)) * np.exp(-5 * cost[0])
    cold = solve(Problem(loss, cost, np.array([800.0])))
    warm = solve(Problem(loss, cost, np.array([790.0])), cold.multipliers)
    again = solve(Problem(loss, cost, np.array([790.0])))
    assert warm.loss == pytest.approx(again.loss, rel=1e-3)
    assert warm.evaluations < 40
    far = solve(Problem(loss, cost, np.array([790.0])), cold.multipliers * 1e9)
    assert far.loss == pytest.approx(again.loss, rel=1e-3)
    assert solve(Problem(loss, cost, np.array([790.0])), np.zeros(1)).loss == pytest.approx(
        again.loss, rel=1e-3
    )


def test_moving_is_paid_for():
    # Two experts that could swap places for a gain smaller than the price of moving.
    loss = np.array([[1.0, 0.0], [1.01, 0.0]])
    cost = np.array([[[1.0, 2.0], [1.0, 2.0]]])
    present = np.array([1, 0])
    moved = (np.arange(2)[None] != present[:, None]) * 1.0
    free = solve(Problem(loss, cost, np.array([3.0])))
    priced = solve(Problem(loss, cost, np.array([3.0]), penalty=0.1 * moved))
    assert free.choice.tolist() == [0, 1]
    assert priced.choice.tolist() == [1, 0]
    assert priced.penalty == 0.0


def shared_problem(seed: int) -> Problem:
    """Six experts: alone coarse, alone fine, or fine on one of two bases."""
    rng = np.random.default_rng(seed)
    loss = np.stack([rng.uniform(2, 4, 6), rng.uniform(0.4, 1, 6), rng.uniform(0, 0.5, 6)], 1)
    cost = np.array([[[2.0, 9.0, 3.0]] * 6])
    shared = np.full((6, 3, 1), -1)
    shared[:, 2, 0] = [0, 0, 0, 1, 1, 1]
    price = rng.integers(3, 14, (1, 2)).astype(float)
    return Problem(loss, cost, np.array([rng.integers(14, 45)]), shared=shared, shared_cost=price)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_shared_base_is_charged_once(seed):
    problem = shared_problem(seed)
    solution = solve(problem)
    check(problem, solution)
    best = brute(problem)
    # A base opens all at once, so here a step is that of all its members.
    assert best - 1e-9 <= solution.loss <= best + 3 * largest_step(problem)


def test_a_base_pays_only_with_enough_members():
    loss, cost = np.tile([5.0, 0.0, 0.1], (4, 1)), np.tile([1.0, 10.0, 2.0], (1, 4, 1))
    shared = np.full((4, 3, 1), -1)
    shared[:, 2] = 0
    base = np.array([[12.0]])
    many = solve(Problem(loss, cost, np.array([21.0]), shared=shared, shared_cost=base))
    assert many.choice.tolist() == [2, 2, 2, 2]
    assert many.used[0] == 20.0
    one = solve(
        Problem(loss[:1], cost[:, :1], np.array([13.0]), shared=shared[:1], shared_cost=base)
    )
    assert one.choice.tolist() == [1]


def test_bases_that_nest_are_charged_record_by_record():
    # Option 1 needs record 0 of the base, option 2 records 0 and 1.
    loss, cost = np.tile([5.0, 1.0, 0.0], (3, 1)), np.tile([3.0, 1.0, 1.0], (1, 3, 1))
    shared = np.full((3, 3, 2), -1)
    shared[:, 1, 0] = shared[:, 2, 0] = 0
    shared[:, 2, 1] = 1
    price = np.array([[4.0, 2.0]])
    for limit, expected in ((9.0, 2), (8.0, 1)):
        problem = Problem(loss, cost, np.array([limit]), shared=shared, shared_cost=price)
        solution = solve(problem)
        check(problem, solution)
        assert solution.choice.tolist() == [expected] * 3


def test_an_infeasible_limit_is_named_with_the_nearest_point():
    problem = random_problem(5, limits=2)
    tight = Problem(
        problem.loss, problem.cost, problem.limits * [1e-3, 1], names=("resident bytes", "time")
    )
    with pytest.raises(
        InfeasibleError, match="resident bytes: at least .* is needed, the limit is"
    ) as info:
        solve(tight)
    least = np.where(np.isfinite(problem.loss), problem.cost[0], np.inf).min(1).sum()
    assert info.value.limit == 0
    assert info.value.least == least
    assert info.value.nearest.used[0] == least
    assert np.isfinite(info.value.nearest.loss)


def test_limits_that_exclude_each_other_are_named():
    # Either few bytes or little time, never both.
    loss = np.zeros((4, 2))
    cost = np.array([[[1.0, 9.0]] * 4, [[9.0, 1.0]] * 4])
    problem = Problem(loss, cost, np.array([20.0, 12.0]), names=("memory", "time"))
    with pytest.raises(InfeasibleError, match="time: at least 20 is needed beside memory") as info:
        solve(problem)
    assert info.value.limit == 1
    assert (info.value.nearest.used <= [20, 20]).all()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"loss": np.full((5, 4), np.nan)}, "expert 0 has no option"),
        ({"cost": np.zeros((1, 5, 3))}, "expected loss"),
        ({"cost": -np.ones((1, 5, 4))}, "cost: expected finite values >= 0"),
        ({"loss": np.zeros((5, 0)), "cost": np.zeros((1, 5, 0))}, "expected loss"),
        (
            {"shared": np.full((5, 4, 1), 3), "shared_cost": np.zeros((1, 2))},
            "ids below S",
        ),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change, match):
    problem = random_problem(7)
    fields = {"loss": problem.loss, "cost": problem.cost, "limits": problem.limits} | change
    with pytest.raises(ValueError, match=match):
        solve(Problem(**fields))


def test_a_start_of_another_problem_is_refused():
    problem = random_problem(7)
    for start in (np.zeros(3), np.array([-1.0]), np.array([np.nan])):
        with pytest.raises(ValueError, match="start: expected 1 finite multipliers"):
            solve(problem, start)


def test_no_limits_and_one_expert():
    problem = Problem(np.array([[3.0, 1.0]]), np.zeros((0, 1, 2)), np.zeros(0))
    assert solve(problem).choice.tolist() == [1]
