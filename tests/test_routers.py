"""The gates found for prefetching choose what the model's own routers choose."""

from __future__ import annotations

import moe_families
import numpy as np
import pytest
import torch
import transformers
from reference_runtime import ReferenceRuntime
from test_families import VERSION, eager_results, few_threads, logits, supported  # noqa: F401

from comoe.hf.attach import attach
from comoe.hf.blocks import discover
from comoe.hf.routers import NextGate, find_gate
from comoe.hf.sizes import experts_per_token

# Their routers take more than the hidden state that the experts are given.
NOT_UNDERSTOOD = {"muse_spark", "zaya"}
# A gate tells part of it: AFMoE keeps the bias that chooses outside its router, DeepSeek-V4 chooses by
# token ids in its first layers.
PARTLY = {"afmoe": 0.6, "deepseek_v4": 0.5}
# Transformers 5.23 runs NLLB's experts 0 and 1 whatever its router says (it encodes the router's mask of
# zeros and ones as if these were expert numbers), so there is nothing to predict.
ROUTER_UNHEARD = {"nllb_moe"}


class Spy(ReferenceRuntime):
    def experts_forward(self, layer_idx, hidden, top_k_index, top_k_weights):
        self.seen.append((layer_idx, hidden, top_k_index, top_k_weights))
        return super().experts_forward(layer_idx, hidden, top_k_index, top_k_weights)


def recall(family: str) -> float | None:
    """Share of the experts really used (with weight) that the found gates name, over all blocks."""
    model = moe_families.build(family)
    blocks = discover(model)
    k = experts_per_token(model)
    gates = [find_gate(model, block, k) for block in blocks]
    if not all(gates):
        return None
    runtime = Spy.of_blocks(blocks)
    runtime.seen = []
    attach(blocks, runtime)
    logits(model)
    hits = total = 0
    for layer_idx, hidden, index, weights in runtime.seen:
        index = index.masked_fill(weights == 0, blocks[layer_idx].spec.num_experts)
        guess = gates[layer_idx].choose(hidden)
        real = index < blocks[layer_idx].spec.num_experts
        found = (index[:, :, None] == guess[:, None, :]).any(-1)
        hits, total = hits + int((found & real).sum()), total + int(real.sum())
    return hits / total


@pytest.mark.parametrize("family", moe_families.families())
def test_gate_chooses_as_the_router(family):
    if not supported(family):
        pytest.skip("listed in docs/families.md")
    share = eager_results(moe_families.model_class(family), lambda: recall(family))
    if transformers.__version__ != VERSION:
        pytest.skip(f"routers are described for transformers {VERSION}")
    assert (share is None) == (family in NOT_UNDERSTOOD)
    if share is not None and family not in ROUTER_UNHEARD:
        assert share >= PARTLY.get(family, 0.95), f"{share:.2f}"


@pytest.fixture
def gates():
    model = moe_families.build("switch_transformers")
    return NextGate(model, discover(model), 1)


def test_predicts_the_next_block_of_the_same_stack(gates):
    hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    layers = [[layer for layer, _ in gates.predict(i, hidden)] for i in range(8)]
    # Four blocks of the encoder, four of the decoder; nothing follows the last of each.
    assert layers == [[1], [2], [3], [], [5], [6], [7], []]


def test_most_wanted_first(gates):
    hidden = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    other = torch.randn(1, 64, generator=torch.Generator().manual_seed(4))
    ((_, one),) = gates.predict(0, hidden)
    ((_, two),) = gates.predict(0, other)
    assert one.dtype == np.int64 and one.size == two.size == 1 and one[0] != two[0]
    ((_, both),) = gates.predict(0, torch.cat([other, hidden, hidden]))
    assert both.tolist() == [one[0], two[0]]


def test_no_tokens(gates):
    assert gates.predict(0, torch.empty(0, 64)) == []


def test_hooks_of_the_router_do_not_see_guesses():
    model = moe_families.build("deepseek_v3")
    blocks = discover(model)
    calls = []
    for block in blocks:
        parent = model.get_submodule(block.name.rpartition(".")[0])
        parent.gate.register_forward_hook(lambda *args: calls.append(1))
    NextGate(model, blocks, 3).predict(0, torch.randn(2, 64))
    assert calls == []


def test_deeper_predictions_are_those_of_the_later_routers():
    model = moe_families.build("switch_transformers")
    near, far = (NextGate(model, discover(model), 1, depth) for depth in (1, 2))
    hidden = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    layers = [[layer for layer, _ in far.predict(i, hidden)] for i in range(8)]
    assert layers == [[1, 2], [2, 3], [3], [], [5, 6], [6, 7], [7], []]
    (_, one), (_, two) = far.predict(0, hidden)
    assert one.tolist() == near.predict(0, hidden)[0][1].tolist()
    assert two.tolist() == near.predict(1, hidden)[0][1].tolist()
    with pytest.raises(ValueError, match="depth: expected at least 1 layer, got 0"):
        NextGate(model, discover(model), 1, depth=0)
