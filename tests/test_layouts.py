"""Activations found by evaluation, and the conventions by which experts modules are called."""

from __future__ import annotations

import moe_families
import pytest
import torch
import torch.nn.functional as F
import transformers
from reference_runtime import ReferenceRuntime
from test_families import FAMILIES, VERSION, eager_results, few_threads, supported  # noqa: F401
from torch import nn
from transformers.activations import ACT2FN

import comoe
from comoe.hf.activations import match_activation, named_gate
from comoe.hf.attach import attach, detach
from comoe.hf.blocks import UnsupportedModelError, discover


def gated(act):
    def apply(x):
        gate, up = x.chunk(2, dim=-1)
        return act(gate) * up

    return apply


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("silu", "silu"),
        ("swish", "silu"),
        ("gelu", "gelu"),
        ("gelu_python", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_fast", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("relu", "relu"),
        ("relu2", "relu2"),
        ("quick_gelu", "quick_gelu"),
        # These are close to a known one, or equal to it on a part of the line.
        ("relu6", None),
        ("gelu_10", None),
        ("hard_swish", None) if "hard_swish" in ACT2FN else ("mish", None),
        ("mish", None),
        ("tanh", None),
        ("leaky_relu", None),
        ("linear", None),
    ],
)
def test_every_name_of_transformers(name, kind):
    act = ACT2FN[name]
    assert match_activation(act, gated=False) == (kind, 0.0, 0.0)
    assert match_activation(gated(act), gated=True) == (kind, 0.0, 0.0)


def test_swigluoai_needs_its_constants():
    apply = named_gate("swigluoai", gated=True, alpha=1.5, limit=6.0)
    assert match_activation(apply, gated=True, numbers=(3.0, 6.0, 1.5)) == ("swigluoai", 1.5, 6.0)
    assert match_activation(apply, gated=True, numbers=(3.0, 7.0, 1.5)) == (None, 0.0, 0.0)


@pytest.mark.parametrize("limit", [0.5, 10.0, 1e4])
def test_a_clamp_is_seen(limit):
    assert match_activation(gated(lambda g: F.silu(g).clamp(max=limit)), gated=True)[0] is None


def test_swapped_halves_are_seen():
    def apply(x):
        up, gate = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    assert match_activation(apply, gated=True)[0] is None


def test_what_cannot_be_evaluated_stays_in_torch():
    meta = nn.Parameter(torch.ones(3, device="meta"))
    assert match_activation(gated(lambda g: g * meta.sum()), gated=True)[0] is None
    assert match_activation(lambda x: x.foo(), gated=False)[0] is None
    with torch.device("meta"):  # as inside from_pretrained
        assert match_activation(gated(F.silu), gated=True)[0] == "silu"
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert match_activation(gated(F.gelu), gated=True)[0] == "gelu"
    finally:
        torch.set_default_dtype(before)


# ---- calling ------------------------------------------------------------------------------------

CONVENTION = [
    family
    for family in (
        "mixtral",
        "aria",
        "gpt_oss",
        "nemotron_h",
        "muse_spark",
        "step3p7",
        "openai_privacy_filter",
    )
    if family in FAMILIES and supported(family)
]


def first_block(family, dtype=torch.float32):
    model = moe_families.build(family, dtype)
    return model, discover(model)


@pytest.mark.parametrize("runtime", ["reference", "comoe"])
@pytest.mark.parametrize("family", CONVENTION)
def test_index_beyond_the_experts_counts_as_zero(family, runtime):
    """transformers marks a slot as empty by the index E."""
    model, blocks = first_block(family)
    spec, module = blocks[0].spec, blocks[0].module
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, spec.hidden, generator=generator)
    index = torch.stack(
        [torch.randperm(spec.num_experts, generator=generator)[:3] for _ in range(5)]
    )
    weights = torch.rand(5, 3, generator=generator)
    empty = torch.rand(5, 3, generator=generator) < 0.5
    empty[2] = True
    with torch.no_grad():
        want = eager_results(model, lambda: module(hidden, index, weights.masked_fill(empty, 0.0)))
        if runtime == "comoe":
            comoe.offload(model, memory="1GB", exact=True)
        else:
            attach(blocks, ReferenceRuntime.of_blocks(blocks))
        # The weight of an empty slot is of no account, not even NaN.
        got = module(
            hidden,
            index.masked_fill(empty, spec.num_experts),
            weights.masked_fill(empty, float("nan")),
        )
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert got[2].eq(0).all()


@pytest.mark.parametrize("runtime", ["reference", "comoe"])
@pytest.mark.parametrize("tokens", [0, 1, 2, 67])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h"])
def test_shapes_of_calls(family, tokens, runtime):
    model, blocks = first_block(family)
    spec, module = blocks[0].spec, blocks[0].module
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 2 * spec.hidden, generator=generator)[:, : spec.hidden]  # strided
    index = torch.zeros(tokens, 1, dtype=torch.int64)  # all to one expert
    weights = torch.rand(tokens, 1, generator=generator)
    every = torch.arange(spec.num_experts).expand(tokens, -1)  # K == E
    shares = torch.rand(tokens, spec.num_experts, generator=generator)
    with torch.no_grad():
        want = module(hidden, index, weights), module(hidden, every, shares)
        if runtime == "comoe":
            comoe.offload(model, memory="1GB", exact=True)
        else:
            attach(blocks, ReferenceRuntime.of_blocks(blocks))
        got = module(hidden, index, weights), module(hidden, every, shares)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


def test_switch_drops_tokens_over_capacity():
    """A token over its expert's capacity has an empty mask: its output is zero."""
    model, blocks = first_block("switch_transformers")
    block = model.get_submodule(blocks[0].name.rpartition(".")[0])
    block.router.expert_capacity = 1
    hidden = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = block(hidden)
        if transformers.__version__ == VERSION:  # older ones count capacity over the batch
            assert want.eq(0).all(-1).any()
        attach(blocks, ReferenceRuntime.of_blocks(blocks))
        torch.testing.assert_close(block(hidden), want, rtol=0, atol=1e-5)


def test_identity_experts_return_their_input():
    _, blocks = first_block("longcat_flash")
    spec, module = blocks[0].spec, blocks[0].module
    assert module.total_experts > spec.num_experts
    hidden = torch.randn(4, spec.hidden, generator=torch.Generator().manual_seed(0))
    index = torch.tensor(
        [[0, spec.num_experts], [spec.num_experts, 1], [2, 3], [module.total_experts - 1, 1]]
    )
    weights = torch.rand(4, 2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = module(hidden, index, weights)
        attach(blocks, ReferenceRuntime.of_blocks(blocks))
        torch.testing.assert_close(module(hidden, index, weights), want, rtol=0, atol=1e-5)


def test_detached_model_says_so():
    model, blocks = first_block("switch_transformers")
    attach(blocks, ReferenceRuntime.of_blocks(blocks))
    detach(blocks)
    with pytest.raises(RuntimeError, match=r"comoe runtime was closed.*comoe\.load"):
        model(input_ids=torch.tensor([[5, 6]]), decoder_input_ids=torch.tensor([[0]]))


def test_unknown_parameters_are_an_error():
    model, blocks = first_block("mixtral")
    blocks[0].module.scale = nn.Parameter(torch.ones(8))
    with pytest.raises(ValueError, match=r"MixtralExperts.*unknown \['scale'\]"):
        discover(model)


def test_no_model_of_experts():
    with pytest.raises(UnsupportedModelError, match="Linear is not a Mixture-of-Experts model"):
        discover(nn.Linear(2, 2))
