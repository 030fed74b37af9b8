"""The native half of the policy against its references in Python."""

import numpy as np
import pytest
import torch

from comoe import _C
from comoe.policy.misses import Chosen, LeastCost
from comoe.policy.next_use import NextUse
from comoe.runtime.missing import native_rule
from comoe_kernels.unpack import DTYPES


@pytest.mark.parametrize("num_experts", [[6], [7, 3, 64]])
def test_next_use(num_experts):
    rng = np.random.default_rng(0)
    reference, native = NextUse(num_experts), _C.NextUse(num_experts)
    for _ in range(150):
        for layer_idx, count in enumerate(num_experts):
            if rng.random() < 0.1:
                continue  # a layer may be left out, or run with nobody chosen
            used = rng.choice(count, rng.integers(0, min(count, 8) + 1), replace=False)
            guess = rng.choice(count, min(count, 4), replace=False)
            chances = rng.random(len(guess))
            later = (layer_idx + 1) % len(num_experts)
            if guess.max(initial=0) < num_experts[later]:
                reference.predicted(later, guess, chances)
                native.predicted(later, guess.astype(np.int32), chances)
            reference.note(layer_idx, used, np.ones(len(used)), np.zeros(len(used), np.int64))
            native.note(layer_idx, used.astype(np.int32))
            for other in range(len(num_experts)):
                np.testing.assert_allclose(
                    native.values(other), reference.values(other), rtol=1e-6, atol=1e-6
                )


def test_next_use_refuses_what_is_not_there():
    with pytest.raises(ValueError, match="at least one expert"):
        _C.NextUse([4, 0])
    native = _C.NextUse([4])
    with pytest.raises(IndexError):
        native.note(1, np.zeros(1, np.int32))
    with pytest.raises(IndexError):
        native.note(0, np.array([4], np.int32))
    with pytest.raises(ValueError, match="chance for each"):
        native.predicted(0, np.zeros(2, np.int32), np.zeros(1))


def random_rule(rng, price: float, num_experts=20, levels=4) -> LeastCost:
    loss = np.sort(rng.random((num_experts, levels)), axis=1)[:, ::-1].copy()
    loss[rng.random(loss.shape) < 0.15] = np.nan  # levels that an expert lacks
    bytes_at = np.sort(rng.integers(1, 1000, (num_experts, levels)), axis=1)
    steps = np.maximum(bytes_at[:, None, :] - bytes_at[:, :, None], 0)
    weight = rng.random(num_experts) + 0.1
    return LeastCost(
        loss, weight, bytes_at, steps, price=price, bandwidth=1e5, latency=rng.choice([0.0, 1e-3])
    )


@pytest.mark.parametrize("price", [0.0, 1.0, 30.0, 1e4, np.inf])
def test_least_cost(price):
    rng = np.random.default_rng(1)
    waited = coarser = 0
    for _ in range(300):
        rule, n = random_rule(rng, price), rng.integers(1, 9)
        experts = rng.choice(20, n, replace=False)
        resident, low = rng.integers(-1, 4, n), rng.integers(0, 4, n)
        weights = rng.random(n)
        chosen = Chosen(experts, weights, np.zeros(n), resident, low, np.full(n, 3))
        with np.errstate(invalid="ignore"):  # inf * 0 where no time is worth anything
            want = rule.decide(chosen)
        got = native_rule(rule).decide(experts, weights, resident, low)
        assert got.tolist() == want.tolist()
        waited += int((want > resident).sum())
        coarser += int((want < low).sum())
    assert (waited > 100) == (price < np.inf) and (coarser > 100) == (price > 0.0)


def test_least_cost_refuses_nonsense():
    one = np.ones((2, 3))
    with pytest.raises(ValueError, match=r"steps \[X, L, L\]"):
        _C.LeastCost(one, one, one, 1.0, 1.0, 0.0)
    with pytest.raises(ValueError, match="bandwidth above 0"):
        _C.LeastCost(one, one, np.ones((2, 3, 3)), 1.0, 0.0, 0.0)
    rule = _C.LeastCost(one, one, np.ones((2, 3, 3)), 1.0, 1.0, 0.0)
    with pytest.raises(ValueError, match="no such expert"):
        rule.decide(np.array([2]), np.ones(1), np.zeros(1, np.int64), np.zeros(1, np.int64))


@pytest.mark.parametrize("isa", _C.isa_names())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(8, 64), (7, 61), (64, 1024), (1, 1)], ids=str)
def test_router_logits(isa, dtype, shape):
    torch.manual_seed(0)
    weight, bias = torch.randn(shape).to(dtype), torch.randn(shape[0]).to(dtype)
    x = torch.randn(shape[1]).to(torch.bfloat16)
    _C.force_isa(isa)
    try:
        got = [
            _C.router_logits(
                weight.data_ptr(), b, DTYPES[dtype], *shape, x.data_ptr(), DTYPES[x.dtype]
            )
            for b in (0, bias.data_ptr())
        ]
    finally:
        _C.force_isa("auto")
    exact = weight.double() @ x.double()
    scale = 1e-6 * float(weight.double().abs().sum(1).max())
    np.testing.assert_allclose(got[0], exact.numpy(), atol=scale)
    np.testing.assert_allclose(got[1], (exact + bias.double()).numpy(), atol=scale)
