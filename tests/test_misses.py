"""What rules decide about experts of which something is missing."""

import numpy as np
import pytest

from comoe.policy.goal import QUALITIES, Goal, parse_quality
from comoe.policy.misses import (
    SENT,
    SKIP,
    AdapMoE,
    Chosen,
    Hobbit,
    LeastCost,
    SkipLight,
    UseResident,
    Wait,
)


def chosen(resident, weights=None, mass=None, low=3, want=3) -> Chosen:
    n = len(resident)
    return Chosen(
        np.arange(n),
        np.full(n, 0.5) if weights is None else np.array(weights),
        np.linspace(0, 0.95, n) if mass is None else np.array(mass),
        np.array(resident),
        np.full(n, low),
        np.full(n, want),
    )


def test_named_rules():
    here = chosen([-1, 1, 3], mass=[0.0, 0.7, 0.95])
    assert Wait().decide(here).tolist() == [3, 3, 3]
    assert UseResident().decide(here).tolist() == [3, 1, 3]
    assert UseResident().decide(chosen([2], low=1)).tolist() == [1]
    # What is before it weighs up to 0.6: as planned; up to 0.9: what is here; beyond: left out.
    assert Hobbit().decide(chosen([-1, 1, -1, -1], mass=[0.0, 0.7, 0.7, 0.95])).tolist() == [
        3,
        1,
        3,
        SKIP,
    ]
    assert Hobbit().decide(chosen([3], mass=[0.95])).tolist() == [3]
    light = chosen([-1, -1, 3], weights=[0.1, 0.9, 0.1], mass=[0.0, 0.5, 0.9])
    assert SkipLight(4).decide(light).tolist() == [SKIP, 3, 3]
    sensitive = AdapMoE(np.array([1.0, 1.0, 1e-4]), threshold=0.04)
    assert sensitive.decide(light).tolist() == [
        3,
        3,
        SKIP,
    ]  # the first of a token is never left out


def least_cost(price, latency=0.0, skip=None, loss=(0.4, 0.1, 0.02, 0.0)):
    """Four experts, levels that take 100, 200, 300 and 400 bytes, at 1,000 bytes per second."""
    bytes_at = np.tile(np.arange(1, 5) * 100, (4, 1))
    steps = np.maximum(bytes_at[:, None, :] - bytes_at[:, :, None], 0)
    return LeastCost(
        np.tile(loss, (4, 1)),
        np.ones(4),
        bytes_at,
        steps,
        price=price,
        bandwidth=1000.0,
        latency=latency,
        skip_loss=skip,
    )


@pytest.mark.parametrize("weight", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("price", [0.0, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("resident", [-1, 0, 1, 2])
def test_least_cost_is_the_least_of_all_choices(price, weight, resident):
    rule = least_cost(price)
    got = int(rule.decide(chosen([resident], weights=[weight]))[0])
    loss, base = np.array([0.4, 0.1, 0.02, 0.0]), 100 * (resident + 1)
    costs = {
        level: weight**2 * loss[level] + price * max(100 * (level + 1) - base, 0) / 1000
        for level in range(max(resident, 0), 4)
    }
    assert costs[got] == pytest.approx(min(costs.values()))


def test_a_dear_wait_needs_company():
    """One expert alone does not pay for the latency; four together do."""
    rule = least_cost(0.1, latency=2.0)
    one = chosen([1, 3, 3, 3], weights=[1.0, 1.0, 1.0, 1.0])
    assert rule.decide(one).tolist() == [1, 3, 3, 3]
    rule = least_cost(0.1, latency=2.0, loss=(4, 1, 0.2, 0.0))
    assert rule.decide(chosen([1, 1, 1, 1], weights=[1.0] * 4)).min() > 1


def test_nothing_here_is_read_or_left_out():
    never = least_cost(1e12, latency=1.0).decide(chosen([-1, 0]))
    assert never.tolist() == [0, 0]  # the coarsest level, since something must be computed
    out = least_cost(1e12, skip=np.full(4, 1.0)).decide(chosen([-1, 0]))
    assert out.tolist() == [SKIP, 0]
    cheap = least_cost(1e-9, skip=np.full(4, 1.0)).decide(chosen([-1, 0]))
    assert cheap.tolist() == [3, 3]


def with_more(rule, **changes):
    for name, value in changes.items():
        setattr(rule, name, value)
    return rule


class There:
    """A machine that computes every expert at a level, in so many seconds a call."""

    def __init__(self, seconds, level=3, available=True):
        self.level, self.available = np.full(4, level), available
        self.seconds = lambda tokens: seconds


@pytest.mark.parametrize("price", [0.01, 0.3, 1.0, 10.0])
@pytest.mark.parametrize("call", [0.01, 0.2, 3.0])
@pytest.mark.parametrize("latency", [0.0, 0.1, 2.0])
def test_with_another_machine_it_is_still_the_least_of_all_choices(price, call, latency):
    """Against every combination of the three ways for four experts."""
    import itertools

    weights, resident = np.array([0.9, 0.5, 0.3, 0.1]), np.array([-1, 0, 0, 1])
    loss, skip = np.array([0.4, 0.1, 0.02, 0.0]), np.full(4, 1.5)
    rule = with_more(least_cost(price, latency, skip), elsewhere=There(call, level=2))
    got = rule.decide(chosen(resident, weights=weights))

    def cost(choice):
        total = price * (latency * any(c > r for c, r in zip(choice, resident, strict=True)))
        total += price * call * any(c == SENT for c in choice)
        for c, r, w in zip(choice, resident, weights, strict=True):
            if c == SENT:
                total += w * w * loss[2]
            elif c == SKIP:
                total += w * w * 1.5
            else:
                total += w * w * loss[c] + price * max(100 * (c - r), 0) / 1000
        return total

    ways = [[SENT, SKIP, *range(max(r, 0), 4)] for r in resident]
    best = min(cost(choice) for choice in itertools.product(*ways))
    assert cost(got) <= best * 1.1 + 1e-9
    if latency == 0 or call == 0.01:
        assert cost(got) == pytest.approx(best)


def test_who_is_not_there_is_not_asked():
    away = with_more(least_cost(1.0), elsewhere=There(0.0, available=False))
    assert SENT not in away.decide(chosen([-1, 0, 0, 0])).tolist()
    here = with_more(least_cost(1.0), elsewhere=There(0.0))
    assert here.decide(chosen([-1, 0, 0, 3])).tolist() == [SENT, SENT, SENT, 3]
    lacks = with_more(least_cost(1.0), elsewhere=There(0.0, level=-1))
    assert SENT not in lacks.decide(chosen([-1, 0, 0, 3])).tolist()


def test_what_comes_too_late_is_not_waited_for():
    """0.25 s at 1,000 bytes/s: 250 bytes for all together, to the expert with the largest weight first."""
    free = least_cost(1e-9)
    assert free.decide(chosen([0, 0])).tolist() == [3, 3]
    short = with_more(least_cost(1e-9), deadline=0.25)
    assert short.decide(chosen([0, 0], weights=[0.2, 0.9])).tolist() == [0, 2]
    assert short.decide(chosen([0, 1], weights=[0.2, 0.9])).tolist() == [0, 3]
    assert with_more(short, latency=0.2).decide(chosen([0, 0])).tolist() == [0, 0]
    # Nothing is here and nothing may be left out: the least that computes, however late.
    assert with_more(short, latency=0.0, deadline=0.05).decide(chosen([-1, 0])).tolist() == [0, 0]
    out = with_more(least_cost(1e-9, skip=np.full(4, 2.0)), deadline=0.05)
    assert out.decide(chosen([-1, 0])).tolist() == [SKIP, 0]


def test_levels_that_do_not_exist_are_not_chosen():
    rule = least_cost(1e-9, loss=(0.4, np.nan, np.inf, 0.0))
    assert rule.decide(chosen([0, -1], low=3)).tolist() == [3, 3]
    assert rule.decide(chosen([0], low=2)).tolist() == [0]


def test_quality_is_read_in_one_place():
    assert parse_quality(None) is None and parse_quality("resident") is None
    assert parse_quality("balanced") == QUALITIES["balanced"] and parse_quality("0.5") == 0.5
    for bad in ("best", 0, -1, float("nan"), True, "", []):
        with pytest.raises(ValueError, match="quality: expected"):
            parse_quality(bad)
    for bad in (0.0, -1.0, float("inf")):
        with pytest.raises(ValueError, match="latency: expected"):
            Goal(latency=bad)
