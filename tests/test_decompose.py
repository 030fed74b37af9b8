"""Decomposition: what the parts are, that they add up, and how near they come."""

import numpy as np
import pytest
import torch

from comoe.aggregate import decompose
from comoe.aggregate.errors import AggregateError
from comoe.aggregate.experts import Expert

H, I = 48, 32  # noqa: E741


def expert(seed, gated=True, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(I, H)] * (2 if gated else 1) + [(H, I)]
    return Expert(tuple(scale * torch.randn(s, generator=generator) for s in shapes))


def moments(seed=0):
    """Inputs that lie mostly in a few directions."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for n in (H, I):
        x = torch.randn(400, n, generator=generator) * torch.logspace(0, -3, n)
        x = x @ torch.linalg.qr(torch.randn(n, n, generator=generator))[0]
        found.append(x.T @ x / 400 + 1e-8 * torch.eye(n))
    return tuple(found)


def error(delta, approximation, moment):
    """Sum over matrices of E ||(W - W') x||^2."""
    gaps = [w - a for w, a in zip(delta.matrices, approximation.matrices, strict=True)]
    which = [moment[0]] * (len(gaps) - 1) + [moment[1]]
    return sum(float((g @ m @ g.T).trace()) for g, m in zip(gaps, which, strict=True))


class FakeStatistics:
    """As much of LayerStatistics as `base_of` asks for."""

    layer_idx = 0

    def __init__(self, experts):
        self.weights = self
        self._experts = experts

    def expert(self, layer, number):
        return self._experts[number]


@pytest.mark.parametrize("gated", [True, False])
def test_base_and_residual_add_up(gated):
    from comoe.aggregate.merging import permuted

    one = expert(0, gated)
    noise = expert(1, gated, 0.01)
    other = permuted(decompose.added(one, noise), np.random.default_rng(0).permutation(I))
    base = decompose.base_of(FakeStatistics([one, other]), [0, 1], [1.0, 3.0])
    assert sorted(base.members) == [0, 1]
    for e, member in base.members.items():
        delta = decompose.residual(member, base.expert)
        whole = decompose.added(base.expert, delta)
        for got, want in zip(whole.matrices, member.matrices, strict=True):
            torch.testing.assert_close(got, want)
        # The share of 3 pulls the base towards expert 1: its delta is a third of the other's.
        size = sum(float(m.square().sum()) for m in delta.matrices) ** 0.5
        noise_size = sum(float(m.square().sum()) for m in noise.matrices) ** 0.5
        assert size == pytest.approx(noise_size * (0.25 if e == 1 else 0.75), rel=1e-3)


def test_residual_planes_beat_plain_ones_of_like_experts():
    base = expert(0)
    member = decompose.added(base, expert(1, scale=0.1))
    plain = decompose.coded(member, 0)
    shared = decompose.added(base, decompose.coded(decompose.residual(member, base), 0))
    white = torch.eye(H), torch.eye(I)
    assert error(member, shared, white) < 0.02 * error(member, plain, white)


def test_coded_is_the_ladder():
    member = expert(0)
    errors = [
        error(member, decompose.coded(member, level), (torch.eye(H), torch.eye(I)))
        for level in range(4)
    ]
    assert errors == sorted(errors, reverse=True) and errors[3] < 1e-3 * errors[0]
    with pytest.raises(AggregateError, match="expected 0 to 3, got 4"):
        decompose.coded(member, 4)


@pytest.mark.parametrize("gated", [True, False])
def test_whitening_beats_plain_svd_and_prefixes_nest(gated):
    delta, moment = expert(0, gated), moments()
    found = decompose.low_rank(delta, moment, 32)
    plain = decompose.low_rank(delta, (torch.eye(H), torch.eye(I)), 32)
    energy = error(delta, Expert(tuple(0 * m for m in delta.matrices)), moment)
    errors = [error(delta, found.delta(rank), moment) / energy for rank in (8, 16, 32)]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.5 * error(delta, plain.delta(16), moment) / energy
    # The prefix is the best of its rank, up to the rounding of factors.
    alone = decompose.low_rank(delta, moment, 16)
    for got, want in zip(found.delta(16).matrices, alone.delta(16).matrices, strict=True):
        assert (got - want).norm() < 1e-5 * want.norm()
    exact = decompose.low_rank(delta, moment, 16, rounds=False)
    assert (
        error(delta, exact.delta(16), moment) / energy
        <= errors[1]
        <= 1.05 * (error(delta, exact.delta(16), moment) / energy) + 1e-4
    )


def test_a_delta_of_low_rank_is_found():
    generator = torch.Generator().manual_seed(0)
    delta = Expert(
        tuple(
            torch.randn(s[0], 16, generator=generator) @ torch.randn(16, s[1], generator=generator)
            for s in ((I, H), (I, H), (H, I))
        )
    )
    found = decompose.low_rank(delta, moments(), 16).delta(16)
    for got, want in zip(found.matrices, delta.matrices, strict=True):
        assert (got - want).norm() < 0.02 * want.norm()


@pytest.mark.parametrize("rank", [0, 8, 24, 48])
def test_ranks_that_do_not_fit(rank):
    with pytest.raises(AggregateError, match=rf"multiple of 16 up to 32.*got {rank}"):
        decompose.low_rank(expert(0), moments(), rank)


def test_prefix_longer_than_the_factors():
    with pytest.raises(AggregateError, match="expected 1 to 16, got 17"):
        decompose.low_rank(expert(0), moments(), 16).delta(17)


def test_round8_has_256_steps_and_keeps_zero():
    x = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    x[0, :128] = 0
    x[1, 5] = 0
    got = decompose.round8(x)
    step = (x[1, :128].max() - x[1, :128].min()) / 255
    assert (got - x).abs()[1, :128].max() <= 1.001 * step
    assert (got[0, :128] == 0).all() and got[1, 5] == 0
    assert len(got[1, :128].unique()) <= 256


def test_bytes():
    from comoe import _C
    from comoe.hf.convert import to_numpy

    matrices = [to_numpy(m) for m in expert(0).matrices]
    records = _C.encode_expert(matrices, [], 0, True)
    payload = sum(len(r) for r in records[:4])
    planes = 2 * decompose.coded_bytes(I, H, 8) + decompose.coded_bytes(H, I, 8)
    assert planes <= payload <= planes + 1024, "headers and alignment of blocks alone are beside it"
    assert decompose.low_rank_bytes(2048, 768, 3, 64) / (3 * 2048 * 768) * 8 == pytest.approx(
        64 * (2048 + 768) / (2048 * 768) * 8, rel=0.05
    )
    assert decompose.pruned_bytes(1000, 0.1) == 100 * 2 + 125


def test_pruned_keeps_the_largest_tenth():
    delta = expert(0)
    found = decompose.pruned(delta, 0.1)
    kept = sum(int((m != 0).sum()) for m in found.matrices)
    assert kept == pytest.approx(0.1 * 3 * H * I, abs=2)
    least = min(float(m[m != 0].abs().min()) for m in found.matrices)
    dropped = max(
        float(w[f == 0].abs().max()) for w, f in zip(delta.matrices, found.matrices, strict=True)
    )
    assert least >= dropped
    for kept in (0, 1.5):
        with pytest.raises(AggregateError, match="more than 0 and at most 1"):
            decompose.pruned(delta, kept)
