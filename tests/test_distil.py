"""Distillation of coded experts: better on held-out text or not kept, resumable, plain payloads after it."""

from __future__ import annotations

import pytest
import tiny_lm
import torch

import comoe
from comoe.aggregate import distil
from comoe.aggregate.coded import from_payloads, to_payloads
from comoe.aggregate.coded_layer import CodedLayer, run_experts
from comoe.aggregate.errors import AggregateError
from comoe.aggregate.experts import Expert, ExpertWeights
from comoe.aggregate.rounding import round_matrices
from comoe.runtime.spec import ExpertsSpec
from comoe_kernels.ladder_codec import Shape, decode_ref

SPEC = ExpertsSpec("experts", num_experts=3, hidden=40, intermediate=24)


def make_layer(anchor: int = 2, bits=None, seed: int = 0):
    """(coded layer, exact experts, inputs, experts, weights, targets)"""
    generator = torch.Generator().manual_seed(seed)
    up, down = (SPEC.intermediate, SPEC.hidden), (SPEC.hidden, SPEC.intermediate)
    exact = [
        Expert(tuple(torch.randn(s, generator=generator) / s[1] ** 0.5 for s in (up, up, down)))
        for _ in range(SPEC.num_experts)
    ]
    coded = [round_matrices(e.matrices, [None] * 3, anchor=anchor) for e in exact]
    inputs = torch.randn(600, SPEC.hidden, generator=generator)
    experts = torch.randint(-1, SPEC.num_experts, (600, 2), generator=generator)
    weights = torch.rand(600, 2, generator=generator)
    targets = run_experts(exact, SPEC, inputs, experts, weights)
    layer = CodedLayer(SPEC, coded, exact, anchor=anchor, bits=bits)
    return layer, coded, (inputs, experts, weights, targets)


HELD_OUT = torch.arange(600) % 4 == 3


@pytest.mark.parametrize("anchor", [2, 3, 4])
def test_layer_starts_as_the_codes_it_was_made_of(anchor: int):
    layer, coded, _ = make_layer(anchor, bits=range(2, anchor + 1))
    for bits in layer.bits:
        for expert, want in zip(layer.experts(bits), coded, strict=True):
            for got, matrix in zip(expert.matrices, want, strict=True):
                torch.testing.assert_close(got, torch.from_numpy(matrix.decode(bits)))


def test_experts_run_as_one_by_one():
    _, _, (inputs, experts, weights, targets) = make_layer()
    layer, _, _ = make_layer()
    exact = layer.experts(2)
    want = torch.zeros_like(targets)
    for n in range(len(inputs)):
        for e, w in zip(experts[n].tolist(), weights[n].tolist(), strict=True):
            if e >= 0:
                gate, up, down = exact[e].matrices
                hidden = torch.nn.functional.silu(gate @ inputs[n]) * (up @ inputs[n])
                want[n] += w * (down @ hidden)
    torch.testing.assert_close(layer(inputs, experts, weights, 2), want, rtol=1e-4, atol=1e-5)
    beyond = torch.where(experts < 0, SPEC.num_experts, experts)
    torch.testing.assert_close(layer(inputs, beyond, weights, 2), want, rtol=1e-4, atol=1e-5)


def test_shared_slots():
    layer, coded, (inputs, experts, weights, _) = make_layer()
    shared = CodedLayer(
        SPEC, coded[:1], [Expert(layer.experts(2)[0].matrices)], anchor=2, slot=[0, 0, 0]
    )
    one = torch.where(experts >= 0, 0, -1)
    torch.testing.assert_close(shared(inputs, experts, weights, 2), layer(inputs, one, weights, 2))


def test_gradients_are_those_of_the_decoded_formula():
    layer, _, _ = make_layer()
    stack = layer.stacks[0]
    out = stack(2)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * weight).sum().backward()
    index = stack.codes().flatten(2)
    scale = torch.exp2(stack.low + stack.step * stack.scale_q.detach()).clone().requires_grad_()
    zero = stack.zero.detach().clone().requires_grad_()
    table = stack.tables["2"].detach().clone().requires_grad_()
    entries = torch.stack([t[i] for t, i in zip(table, index, strict=True)])
    (scale * (entries - zero) * weight).sum().backward()
    torch.testing.assert_close(stack.zero.grad, zero.grad)
    torch.testing.assert_close(stack.tables["2"].grad, table.grad)
    slope = torch.log(torch.tensor(2.0)) * stack.step * scale.detach()
    torch.testing.assert_close(stack.scale_q.grad, scale.grad * slope)


@pytest.mark.parametrize(("anchor", "bits"), [(2, None), (3, (2, 3))])
def test_layer_gets_better_and_stays_payloads(anchor: int, bits):
    layer, _, data = make_layer(anchor, bits)
    report = distil.distil_layer(layer, *data, HELD_OUT, steps=30, batch_tokens=200)
    assert report.kept and report.after < (0.97 if anchor == 2 else 1) * report.before, str(report)
    shape = Shape(SPEC.hidden, SPEC.intermediate)
    for expert, matrices in zip(layer.experts(anchor), layer.coded(), strict=True):
        payloads = to_payloads(shape, matrices, bits=anchor)
        assert len(from_payloads(shape, payloads, bits=anchor)) == 3
        for m, weight in enumerate(expert.matrices):
            decoded = torch.from_numpy(decode_ref(shape, payloads, anchor - 2, m))
            torch.testing.assert_close(decoded, weight.detach())


def test_what_is_not_better_is_not_kept():
    layer, coded, (inputs, experts, weights, targets) = make_layer()
    # The rows to fit on ask for far larger outputs than the held-out ones.
    wrong = torch.where(HELD_OUT[:, None], targets, 3 * targets)
    report = distil.distil_layer(layer, inputs, experts, weights, wrong, HELD_OUT, steps=12)
    assert not report.kept and report.after == report.before and "not kept" in str(report)
    for got, want in zip(layer.coded(), coded, strict=True):
        assert (got[0].decode(2) == want[0].decode(2)).all()


def test_interrupted_run_goes_on(tmp_path):
    layer, _, data = make_layer()
    whole = distil.distil_layer(layer, *data, HELD_OUT, steps=24, batch_tokens=200)
    again, _, _ = make_layer()
    seen = []

    def stop(step: int, steps: int, loss: float) -> None:
        seen.append(step)
        if step == 14:
            raise KeyboardInterrupt

    arguments = dict(steps=24, batch_tokens=200, checkpoint=tmp_path / "distil.pt")
    with pytest.raises(KeyboardInterrupt):
        distil.distil_layer(again, *data, HELD_OUT, **arguments, progress=stop)
    again, _, _ = make_layer()
    seen.clear()
    report = distil.distil_layer(
        again, *data, HELD_OUT, **arguments, progress=lambda step, *rest: seen.append(step)
    )
    assert seen[0] == 13  # measured, and saved, after step 12
    assert report.before == whole.before and report.after == pytest.approx(whole.after, rel=1e-3)
    (tmp_path / "distil.pt").write_bytes(b"damaged")
    with pytest.raises(AggregateError, match="remove it to start anew"):
        distil.distil_layer(again, *data, HELD_OUT, **arguments)


def test_without_rows():
    layer, _, data = make_layer()
    with pytest.raises(AggregateError, match="calibrate with more text"):
        distil.distil_layer(layer, *data, torch.zeros(600, dtype=torch.bool))


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_lm.qwen3_moe().to(torch.bfloat16).save_pretrained(folder / "plain")
    return comoe.pack(folder / "plain", folder / "packed")


def test_logits_get_nearer(packed):
    weights = ExpertWeights.open(packed)
    layers = []
    for number, spec in enumerate(weights.specs):
        exact = weights.layer(number)
        coded = [round_matrices(e.matrices, [None] * 3, anchor=2) for e in exact]
        layers.append(CodedLayer(spec, coded, exact, anchor=2))
    model = comoe.load(packed, exact=True, dtype=torch.float32)
    windows = torch.randint(1, 257, (72, 32), generator=torch.Generator().manual_seed(0))
    try:
        dense = {n: p.clone() for n, p in model.named_parameters()}
        inputs, experts, gates, targets = distil.coarse_inputs(model, layers, 1, 2, windows[:4])
        assert inputs.shape == targets.shape == (128, 64) and experts.shape == gates.shape
        first = distil.coarse_inputs(model, layers, 0, 2, windows[:4])
        want = run_experts(weights.layer(0), weights.specs[0], *first[:3])
        torch.testing.assert_close(first[3], want, rtol=1e-3, atol=1e-3)
        report = distil.distil_logits(
            model, layers, windows[:64], windows[64:], steps=32, batch_tokens=256, rate=0.5
        )
        assert report.kept and 0 < report.after < report.before, str(report)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, dense[name]), name
        with pytest.raises(AggregateError, match="give more text"):
            distil.distil_logits(model, layers, windows[:0], windows)
    finally:
        model.comoe.close()
