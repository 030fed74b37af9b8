"""Routing that prefers what is in memory: what it replaces, and when it does not."""

import pytest
import torch

import comoe
from comoe.policy.predictor import PrefetchGauge

TIGHT = 6_000_000  # a sixth of the experts' bytes
FAR = 1e4  # every resident expert is near enough


@pytest.fixture
def model(packed_demo):
    loaded = comoe.load(packed_demo, memory=TIGHT, quality="high")
    yield loaded
    loaded.comoe.close()


def generate(model, tokens=40):
    return model.generate(
        torch.arange(1, 9)[None], max_new_tokens=tokens, do_sample=False, pad_token_id=0
    )


def demand(runtime) -> int:
    return runtime.engine.stats()["demand_bytes"]


@torch.no_grad()
def test_what_is_near_enough_is_not_read(model):
    runtime, read = model.comoe, {}
    runtime.compute.gauge = type("Off", (PrefetchGauge,), {"useful": False})()
    for tolerance in (0.0, 0.5, FAR):
        runtime.set_routing_tolerance(tolerance)
        before, was = demand(runtime), runtime.stats()["decided"]["replaced"]
        generate(model)
        read[tolerance] = demand(runtime) - before
        replaced = runtime.stats()["decided"]["replaced"] - was
        assert (replaced > 0) == (tolerance > 0)
    assert read[FAR] < 0.5 * read[0.0]


def by_hand(logits, index, weights, here):
    """(index, weights): of each token the heaviest missing expert first takes the best that is here."""
    index, weights = index.clone(), weights.clone()
    for row, scores, gates in zip(index, logits, weights, strict=True):
        chosen, total = row.tolist(), float(gates.sum())
        for k in gates.argsort(descending=True, stable=True).tolist():
            free = [e for e in range(len(here)) if here[e] and e not in chosen and e not in row]
            if not here[chosen[k]] and free:
                best = max(free, key=lambda e: float(scores[e]))
                gates[k] *= min(float((scores[best] - scores[chosen[k]]).exp()), 1.0)
                row[k] = best
        gates *= total / float(gates.sum())
    return index, weights


@torch.no_grad()
def test_replacements_and_weights(model):
    runtime, layer = model.comoe, 1
    generate(model, 12)
    runtime.compute.gauge = type("Off", (PrefetchGauge,), {"useful": False})()
    runtime.engine.wait_idle(10)
    sizes, first = runtime.store_sizes, int(runtime.store_sizes.num_experts[0])
    resident = runtime.engine.resident() == 2
    here = []
    for x in range(first, first + int(sizes.num_experts[layer])):
        mask = sizes.levels.masks[int(runtime.plan.min_level[x])]
        ids = [i for r, i in enumerate(sizes.records[x]) if mask >> r & 1 and i >= 0]
        here.append(bool(resident[ids].all()))
    assert any(here) and not all(here)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, runtime.specs[layer].hidden, generator=generator).bfloat16()
    logits = runtime.predictor._own[layer].logits(hidden).float()
    weights, index = logits.softmax(-1).topk(4)
    want_index, want_weights = by_hand(logits, index, weights, here)
    assert not torch.equal(want_index, index)
    runtime.set_routing_tolerance(FAR)
    got = runtime.experts_forward(layer, hidden, index, weights)
    runtime.set_routing_tolerance(0.0)
    want = runtime.experts_forward(layer, hidden, want_index, want_weights)
    assert float((got - want).norm() / want.norm()) < 1e-2
    other = runtime.experts_forward(layer, hidden, want_index, weights)
    assert float((got - other).norm() / other.norm()) > 2e-2  # the weights matter


def test_many_tokens_and_other_routers_are_left_alone(model):
    runtime = model.comoe
    runtime.set_routing_tolerance(FAR)
    with torch.no_grad():
        model(torch.arange(1, 33)[None])
    assert runtime.stats()["decided"]["replaced"] == 0
    runtime.predictor.own_gate = lambda layer_idx: None
    generate(model, 4)
    assert runtime.stats()["decided"]["replaced"] == 0


def test_what_cannot_be_asked_for(model, packed_demo):
    for tolerance, error, message in (
        (-1.0, ValueError, "at least 0"),
        (float("nan"), ValueError, "at least 0"),
        ("much", TypeError, "expected a number"),
    ):
        with pytest.raises(error, match=message):
            model.comoe.set_routing_tolerance(tolerance)
    with pytest.raises(ValueError, match="changes the routing"):
        comoe.load(packed_demo, exact=True, routing_tolerance=0.5)
