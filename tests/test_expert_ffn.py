from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from ladder_numpy import coded_expert, random_expert

from comoe import _C
from comoe_kernels import threads
from comoe_kernels.expert_ffn import (
    ACTIVATIONS,
    Workspace,
    activate_ref,
    combine_pairs,
    combine_pairs_ref,
    expert_ffn,
    expert_ffn_bytes,
    expert_ffn_prefill,
    expert_ffn_ref,
    prefill_rows,
    rounding,
    rounding_of_results,
    use_isa,
)

ISAS = _C.isa_names()
LEVELS = range(5)
GPT_OSS = {"alpha": 1.702, "limit": 7.0}


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread():
    """The references are tiny: libgomp's barriers would take most of the time on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@lru_cache
def cached_expert(hidden, intermediate, gated, biased, exact_dtype):
    rng = np.random.default_rng(hidden)
    return random_expert(
        rng, hidden, intermediate, gated=gated, biased=biased, exact_dtype=exact_dtype
    )


def parameters(activation):
    return GPT_OSS if activation == "swigluoai" else {}


def error(got, want):
    return (got.double() - want.double()).norm() / want.double().norm()


def reference(
    expert, level, x, activation, round_activations=lambda v: v, round_results=lambda v: v
):
    return expert_ffn_ref(
        x,
        expert.dense[level],
        expert.biases[level],
        activation=activation,
        round_activations=round_activations,
        round_results=round_results,
        **parameters(activation),
    )


def check(got, expert, level, x, activation):
    """The kernel may be twice as far from float32 as its own rounding of activations explains."""
    want = reference(expert, level, x, activation)
    bf16 = x.dtype == torch.bfloat16 and expert.exact_dtype == torch.bfloat16
    rounded = reference(
        expert, level, x, activation, rounding(level, bf16), rounding_of_results(level, x.dtype)
    )
    assert error(got, want) <= 2 * error(rounded, want) + 1e-6
    # and with that rounding granted, what is left is the order of float32 sums (or, where a value of the
    # intermediate lands on the other side of a rounding step, one step of it)
    step = {0: 4e-3, 1: 4e-3, 2: 4e-3, 3: 3e-5, 4: 1e-6 if x.dtype == torch.float32 else 4e-3}[
        level
    ]
    assert error(got, rounded) <= step


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("exact_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_matches_reference(isa, level, x_dtype, exact_dtype):
    """Primes for every tail, 1 to 11 rows for every register block, pages shuffled."""
    rng = np.random.default_rng(0)
    for shape in ((37, 53, True, False), (288, 160, False, True), (131, 263, True, True)):
        expert = cached_expert(*shape, exact_dtype)
        hidden = expert.hidden
        paged = expert.paged(level, order=rng)
        for rows in (1, 2, 3, 4, 5, 6, 7, 8, 11):
            x = torch.from_numpy(rng.standard_normal((rows, hidden)).astype(np.float32)).to(x_dtype)
            every = np.arange(rows)
            got = expert_ffn(x, [paged], [every], [every], rows, isa=isa)
            check(got, expert, level, x, "silu")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, "mxfp4"], ids=str)
def test_codes_are_used_as_weights_of_the_type_of_x(isa, x_dtype, kind):
    rng = np.random.default_rng(0)
    for hidden, intermediate, gated, biased in ((38, 54, True, True), (288, 160, False, False)):
        expert = coded_expert(
            rng, hidden, intermediate, kind, gated=gated, biased=biased, extremes=0
        )
        dense = [w.to(x_dtype).float() for w in expert.dense[4]]
        rounded = replace(expert, exact_dtype=x_dtype, dense=[[]] * 4 + [dense])
        paged = expert.paged(4, order=rng)
        for rows in (1, 3, 11):
            x = torch.from_numpy(rng.standard_normal((rows, hidden)).astype(np.float32)).to(x_dtype)
            every = np.arange(rows)
            got = expert_ffn(x, [paged], [every], [every], rows, isa=isa)
            check(got, rounded, 4, x, "silu")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(isa, activation):
    rng = np.random.default_rng(1)
    for gated in (True, False):
        if activation == "swigluoai" and not gated:
            continue
        expert = random_expert(rng, 64, 48, gated=gated, biased=True, exact_dtype=torch.float32)
        # large enough that clamps, saturation and the tails of erf are reached
        x = torch.from_numpy(rng.standard_normal((7, 64)).astype(np.float32)) * 12
        every = np.arange(7)
        got = expert_ffn(
            x,
            [expert.paged(4)],
            [every],
            [every],
            7,
            activation=activation,
            isa=isa,
            **parameters(activation),
        )
        want = reference(expert, 4, x, activation)
        assert error(got, want) <= 1e-6
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6 * want.abs().max().item())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("level", LEVELS)
def test_rows_stand_alone(isa, level):
    """Bitwise: other rows, their number, the order of tasks, page order and threads change nothing."""
    rng = np.random.default_rng(2)
    experts = [random_expert(rng, 160, 144, biased=True) for _ in range(3)]
    x = torch.from_numpy(rng.standard_normal((70, 160)).astype(np.float32)).bfloat16()
    every = np.arange(70)
    paged = [e.paged(level, order=rng) for e in experts]
    all_pairs = [every, every + 70, every + 140]
    want = expert_ffn(x, paged, [every] * 3, all_pairs, 210, isa=isa)
    try:
        for num_threads in (1, 2, 3):
            _C.use_gomp(0)
            _C.set_num_threads(num_threads)
            got = expert_ffn(x, paged[::-1], [every] * 3, all_pairs[::-1], 210, isa=isa)
            assert torch.equal(got, want)
        threads.share_torch_threads()
        _C.set_num_threads(2)
        got = expert_ffn(x, paged, [every] * 3, all_pairs, 210, isa=isa)
        assert torch.equal(got, want)
    finally:
        threads.share_torch_threads()
    for t in (0, 8, 69):
        alone = expert_ffn(x[t : t + 1], [experts[1].paged(level)], [[0]], [[0]], 1, isa=isa)
        assert torch.equal(alone[0], want[70 + t])


@pytest.mark.parametrize("isa", ISAS)
def test_mixed_levels_and_routing(isa):
    """Each expert at its own level; empty experts, all rows on one, repeated tokens, gaps in pairs."""
    rng = np.random.default_rng(3)
    experts = [random_expert(rng, 96, 80) for _ in range(7)]
    x = torch.from_numpy(rng.standard_normal((13, 96)).astype(np.float32))
    tokens = [[0, 12, 5], [], np.arange(13), [7], [], [3, 3], [1]]
    pairs, start = [], 0
    for t in tokens:
        pairs.append(start + 2 * np.arange(len(t)))
        start += 2 * len(t)
    out = torch.full((start, 96), 123.0)
    levels = [0, 1, 2, 3, 4, 4, 2]
    paged = [e.paged(level, order=rng) for e, level in zip(experts, levels, strict=True)]
    got = expert_ffn(x, paged, tokens, pairs, start, out=out, isa=isa)
    assert got is out
    assert (out[1::2] == 123).all(), "rows of pairs that no task owns were written"
    for e, level, t, p in zip(experts, levels, tokens, pairs, strict=True):
        if len(t):
            check(out[torch.as_tensor(p)], e, level, x[torch.as_tensor(t)], "silu")


def test_empty_calls():
    rng = np.random.default_rng(4)
    paged = random_expert(rng, 64, 32).paged(1)
    assert expert_ffn(torch.empty(0, 64), [paged], [[]], [[]], 0).shape == (0, 64)
    assert expert_ffn(torch.empty(0, 64), [], [], [], 0).shape == (0, 64)
    out = torch.full((2, 64), 5.0)
    expert_ffn(torch.randn(3, 64), [paged, paged], [[], []], [[], []], 2, out=out)
    assert (out == 5).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("level", LEVELS)
def test_touches_no_other_memory(isa, level):
    """x is a view into NaN; out lies inside sentinels; pages lie among 0xFF, NaN in every type."""
    rng = np.random.default_rng(5)
    expert = random_expert(rng, 37, 53, biased=True)
    wide = torch.full((9, 37 + 8), float("nan"))
    x = wide[2:7, 4 : 4 + 37]
    x.copy_(torch.from_numpy(rng.standard_normal((5, 37)).astype(np.float32)))
    big = torch.full((7, 37), 123.0)
    every = np.arange(5)
    for page_bytes in (4096, 8192):
        paged = expert.paged(level, page_bytes=page_bytes, order=rng)
        expert_ffn(x, [paged], [every], [every], 5, out=big[1:6], isa=isa)
        check(big[1:6], expert, level, x, "silu")
        assert (big[0] == 123).all() and (big[6] == 123).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("level", LEVELS)
def test_faults_in_x_show(isa, level):
    """NaN or infinity in a row makes that row's result not finite, as in float arithmetic, and no other's;
    rows of zeros or of tiny values are fine."""
    rng = np.random.default_rng(6)
    expert = random_expert(rng, 160, 64)
    x = torch.from_numpy(rng.standard_normal((5, 160)).astype(np.float32))
    x[1, 7], x[2, 150], x[3], x[4] = float("nan"), float("inf"), 0.0, 1e-38
    every = np.arange(5)
    out = expert_ffn(x, [expert.paged(level)], [every], [every], 5, isa=isa)
    assert out[0].isfinite().all()
    assert out[1].isnan().all() and not out[2].isfinite().any()
    assert (out[3:].abs() < 1e-30).all()


@pytest.mark.parametrize("isa", ISAS)
def test_combine_pairs(isa):
    rng = np.random.default_rng(7)
    for T, K, H, E in ((0, 2, 37, 4), (1, 1, 37, 4), (37, 8, 1031, 5)):
        pair_out = torch.from_numpy(rng.standard_normal((T * K, H)).astype(np.float32))
        weights = torch.from_numpy(rng.random((T, K)).astype(np.float32))
        # E and -1 stand for "no expert"; their rows may hold anything
        idx = torch.from_numpy(rng.integers(-1, E + 1, (T, K)))
        pair_out[((idx < 0) | (idx >= E)).flatten()] = float("nan")
        want = combine_pairs_ref(pair_out, weights, idx, E)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            with use_isa(isa):
                got = combine_pairs(pair_out, weights, idx, E, dtype)
            torch.testing.assert_close(
                got, want.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6
            )


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_prefill(level, activation):
    rng = np.random.default_rng(8)
    for gated in (True, False):
        if activation == "swigluoai" and not gated:
            continue
        expert = random_expert(rng, 96, 53, gated=gated, biased=True)
        x = torch.from_numpy(rng.standard_normal((21, 96)).astype(np.float32))
        workspace = Workspace()
        got = expert_ffn_prefill(
            x,
            expert.paged(level),
            activation=activation,
            workspace=workspace,
            **parameters(activation),
        )
        want = reference(expert, level, x, activation)
        assert error(got, want) <= 1e-6
        assert workspace.nbytes == 96 * 53 * 4

        def apply_gate(gate_up, gated=gated):
            gate, up = gate_up.chunk(2, dim=-1) if gated else (None, gate_up)
            return activate_ref(gate, up, activation, **parameters(activation))

        same = expert_ffn_prefill(
            x, expert.paged(level), apply_gate=apply_gate, post_norm=lambda v: 2 * v
        )
        torch.testing.assert_close(same, 2 * got)
        low = expert_ffn_prefill(
            x.bfloat16(), expert.paged(level), activation=activation, **parameters(activation)
        )
        assert low.dtype == torch.bfloat16 and error(low, want) <= 0.02


def test_prefill_rows_for_every_isa():
    for isa in ISAS:
        with use_isa(isa):
            assert all(prefill_rows(level) >= 1 for level in LEVELS)


def test_bytes():
    kwargs = {"gated": True, "num_experts": 8, "num_rows": 8}
    weights = 8 * 3 * 2048 * 768
    rows = 8 * 2048 * (2 + 4)
    assert expert_ffn_bytes(2048, 768, level=4, **kwargs) == weights * 2 + rows
    assert expert_ffn_bytes(2048, 768, level=2, **kwargs) == weights * 4 // 8 + weights // 64 + rows


def test_bad_arguments():
    rng = np.random.default_rng(9)
    expert = random_expert(rng, 64, 32).paged(2)
    other = random_expert(rng, 64, 48).paged(2)
    x = torch.randn(4, 64)

    def call(x=x, experts=(expert,), tokens=([0],), pairs=([0],), num_pairs=1, **kwargs):
        return expert_ffn(x, experts, tokens, pairs, num_pairs, **kwargs)

    call()
    with pytest.raises(TypeError, match=r"expert_ffn: x: expected a torch\.Tensor, got ndarray"):
        call(x=x.numpy())
    with pytest.raises(TypeError, match="expert_ffn: x: expected dtype"):
        call(x=x.double())
    with pytest.raises(
        ValueError, match=r"expert_ffn: x: expected shape \[None, 64\], got \[4, 63\]"
    ):
        call(x=x[:, :63])
    with pytest.raises(ValueError, match="expert_ffn: x: expected a contiguous last dimension"):
        call(x=torch.randn(64, 4).T)
    with pytest.raises(ValueError, match="expert_ffn: x: expected a CPU tensor, got one on meta"):
        call(x=x.to("meta"))
    with pytest.raises(TypeError, match="expert_ffn: out: expected dtype"):
        call(out=torch.empty(1, 64, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"expert_ffn: out: expected shape \[1, 64\]"):
        call(out=torch.empty(2, 64))
    with pytest.raises(ValueError, match="expert_ffn: out: expected a contiguous tensor"):
        call(out=torch.empty(2, 128)[:, :64], num_pairs=2)
    with pytest.raises(ValueError, match="token index 4 is outside x with T = 4"):
        call(tokens=([4],))
    with pytest.raises(ValueError, match="pair index -1 is outside out with 1 rows"):
        call(pairs=([-1],))
    with pytest.raises(ValueError, match="1 tokens but 0 pairs"):
        call(pairs=([],))
    with pytest.raises(ValueError, match="expert 1 has another geometry"):
        call(experts=(expert, other), tokens=([0], [0]), pairs=([0], [0]))
    with pytest.raises(ValueError, match="activation: expected one of"):
        call(activation="swish")
    with pytest.raises(ValueError, match="swigluoai needs gated experts"):
        ungated = random_expert(rng, 64, 32, gated=False).paged(2)
        call(experts=(ungated,), activation="swigluoai", **GPT_OSS)
    with pytest.raises(ValueError, match=r"cannot run 'neon'; use one of auto.*portable"):
        call(isa="neon")
    assert _C.isa_name() == ISAS[0], "force_isa must not outlive the call"
    with pytest.raises(ValueError, match=r"combine_pairs: pair_out: expected shape \[8, None\]"):
        combine_pairs(
            torch.empty(7, 3),
            torch.empty(4, 2),
            torch.zeros(4, 2, dtype=torch.int64),
            4,
            torch.float32,
        )
