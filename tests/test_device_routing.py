"""The routing that gate_prefetch runs on a GPU, here with one lane, against transformers' own routers."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from comoe import _C

H = 48


def router(family: str, name: str, dtype: torch.dtype, **config):
    try:
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        cls = getattr(module, name)
    except (ImportError, AttributeError):
        pytest.skip(f"this transformers has no {name}")
    made = cls(SimpleNamespace(hidden_size=H, **config)).to(dtype)
    generator = torch.Generator().manual_seed(1)
    for p in made.parameters():
        p.data = (torch.randn(p.shape, generator=generator) / 2).to(dtype)
    return made


def agree(logits, scores, chosen, want_chosen, weights, want_weights, rtol):
    """The same experts, but where the k-th score and the next are neighbours; then the same weights."""
    same = 0
    for t in range(len(logits)):
        got, want = set(chosen[t].tolist()), set(want_chosen[t].tolist())
        assert len(got) == len(chosen[t])
        for a, b in zip(sorted(got - want), sorted(want - got), strict=True):
            np.testing.assert_allclose(scores[t, a], scores[t, b], rtol=2e-7, atol=1e-30)
        if got == want:
            same += 1
            order, want_order = chosen[t].argsort(), want_chosen[t].argsort()
            np.testing.assert_allclose(
                weights[t][order], want_weights[t][want_order], rtol=rtol, atol=1e-12
            )
    assert same >= 0.9 * len(logits)


SOFTMAX = {
    "qwen3_moe": "Qwen3MoeTopKRouter",
    "qwen2_moe": "Qwen2MoeTopKRouter",
    "olmoe": "OlmoeTopKRouter",
    "mixtral": "MixtralTopKRouter",
}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("experts, k", [(8, 2), (60, 4), (13, 13), (128, 8), (1, 1)])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("family", sorted(SOFTMAX))
def test_softmax(family, norm, experts, k, dtype):
    if family == "mixtral" and not norm:
        pytest.skip("Mixtral always normalises")
    sizes = {"num_experts": experts, "num_local_experts": experts, "num_experts_per_tok": k}
    made = router(
        family, SOFTMAX[family], dtype, norm_topk_prob=norm, router_jitter_noise=0.0, **sizes
    )
    x = torch.randn(33, H, generator=torch.Generator().manual_seed(2)).to(dtype)
    logits, want_weights, want = made(x)
    name = str(dtype).removeprefix("torch.")
    chosen, weights = _C.route(
        logits.float().numpy(),
        "softmax",
        k,
        normalise=norm,
        round_weights="float32" if family == "mixtral" else name,
    )
    scores = logits.float().softmax(-1).numpy()
    rtol = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    agree(logits, scores, chosen, want.numpy(), weights, want_weights.float().numpy(), rtol)
    assert (np.diff(np.take_along_axis(scores, chosen.astype(np.int64), 1)) <= 1e-6).all()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("experts, k", [(32, 4), (7, 7), (128, 4)])
def test_softmax_over_the_chosen(experts, k, dtype):
    made = router(
        "gpt_oss", "GptOssTopKRouter", dtype, num_local_experts=experts, num_experts_per_tok=k
    )
    x = torch.randn(33, H, generator=torch.Generator().manual_seed(3)).to(dtype)
    logits, want_weights, want = made(x)
    name = str(dtype).removeprefix("torch.")
    chosen, weights = _C.route(logits.float().numpy(), "top_softmax", k, round_weights=name)
    rtol = 1e-5 if dtype == torch.float32 else 1e-2
    agree(
        logits,
        logits.float().numpy(),
        chosen,
        want.numpy(),
        weights,
        want_weights.float().numpy(),
        rtol,
    )


@torch.no_grad()
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    "experts, k, groups, top", [(64, 8, 8, 4), (32, 4, 1, 1), (24, 6, 6, 2), (16, 16, 4, 4)]
)
@pytest.mark.parametrize(
    "family, name",
    [
        ("deepseek_v3", "DeepseekV3TopkRouter"),
        ("glm4_moe", "Glm4MoeTopkRouter"),
        ("dots1", "Dots1TopkRouter"),
    ],
)
def test_sigmoid_in_groups(family, name, experts, k, groups, top, norm):
    made = router(
        family,
        name,
        torch.float32,
        num_local_experts=experts,
        num_experts_per_tok=k,
        routed_scaling_factor=2.5,
        n_group=groups,
        topk_group=top,
        norm_topk_prob=norm,
    )
    generator = torch.Generator().manual_seed(4)
    made.e_score_correction_bias.copy_(torch.randn(experts, generator=generator) / 4)
    x = torch.randn(33, H, generator=generator)
    logits, want_weights, want = made(x)
    bias = made.e_score_correction_bias.numpy()
    chosen, weights = _C.route(
        logits.numpy(),
        "sigmoid",
        k,
        normalise=norm,
        num_groups=groups,
        top_groups=top,
        scale=2.5,
        choice_bias=bias,
    )
    scores = logits.sigmoid().numpy() + bias
    agree(logits, scores, chosen, want.numpy(), weights, want_weights.numpy(), 1e-5)


def test_switch_takes_the_best_with_its_probability():
    logits = np.random.default_rng(0).standard_normal((50, 11)).astype(np.float32)
    chosen, weights = _C.route(logits, "softmax", 1)
    probabilities = torch.from_numpy(logits).softmax(-1)
    want, index = probabilities.max(-1)
    assert (chosen[:, 0] == index.numpy()).all()
    np.testing.assert_allclose(weights[:, 0], want.numpy(), rtol=1e-6)


@pytest.mark.parametrize("kind", ["softmax", "top_softmax", "sigmoid"])
def test_of_equal_scores_the_lower_index_goes_first(kind):
    logits = np.zeros((1, 9), np.float32)
    logits[0, [2, 5]] = 1.0
    logits[0, 7] = -0.0  # equal to 0
    chosen, weights = _C.route(logits, kind, 6)
    assert chosen.tolist() == [[2, 5, 0, 1, 3, 4]]
    assert (weights[0, 2:] == weights[0, 2]).all()


@pytest.mark.parametrize("kind", ["softmax", "top_softmax", "sigmoid"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_still_chooses_experts_that_exist(kind, bad):
    logits = np.random.default_rng(1).standard_normal((4, 10)).astype(np.float32)
    logits[0] = bad
    logits[1, 3] = bad
    chosen, weights = _C.route(logits, kind, 4, num_groups=5, top_groups=2)
    assert ((chosen >= 0) & (chosen < 10)).all()
    assert all(len(set(row)) == 4 for row in chosen.tolist())
    assert np.isfinite(weights[2:]).all()  # other tokens are not touched
    if np.isnan(bad) and kind != "sigmoid":
        assert chosen[1, 0] == 3 and np.isnan(weights[1]).all()


def test_rounding_is_that_of_torch():
    rng = np.random.default_rng(2)
    values = (rng.standard_normal(4000) * 10.0 ** rng.integers(-9, 6, 4000)).astype(np.float32)
    values[:6] = [0.0, 65519.9, 65520.0, 1e-8, 6.1e-5, -7e-8]
    for dtype in (torch.bfloat16, torch.float16):
        want = torch.from_numpy(values).to(dtype).float().numpy()
        name = str(dtype).removeprefix("torch.")
        got = _C.round_values(values, name)
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"kind": "best"}, "kind: expected"),
        ({"k": 9}, "k from 1"),
        ({"k": 0}, "k from 1"),
        ({"num_groups": 3}, "a divisor of 8"),
        ({"top_groups": 2}, "top_groups from 1"),
        ({"choice_bias": np.zeros(7, np.float32)}, "choice_bias: expected"),
        ({"round_logits": "int8"}, "round_logits: expected"),
        ({"logits": np.zeros(8, np.float32)}, "logits: expected"),
    ],
)
def test_arguments_that_do_not_fit(change, text):
    given = {"logits": np.zeros((2, 8), np.float32), "kind": "softmax", "k": 2, **change}
    with pytest.raises(ValueError, match=text):
        _C.route(**given)
