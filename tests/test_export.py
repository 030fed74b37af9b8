"""A merged model as a plain checkpoint: plain transformers loads it, and it computes what it should."""

import numpy as np
import pytest
import tiny_lm
import torch
import transformers
from test_families import why_not
from transformers import AutoModelForCausalLM

import comoe
from comoe.aggregate import merging
from comoe.aggregate.calibrate import calibrate
from comoe.aggregate.calibration import Calibration
from comoe.aggregate.errors import AggregateError
from comoe.aggregate.experts import ExpertWeights
from comoe.aggregate.export import export, router_rows
from comoe.aggregate.statistics import LayerStatistics

IDS = np.random.default_rng(0).integers(1, 257, 2048)


def prepared(folder, model):
    model.save_pretrained(folder / "model")
    tiny_lm.byte_tokenizer().save_pretrained(folder / "model")
    packed = comoe.pack(folder / "model", folder / "packed")
    calibrate(packed, {"a": IDS}, tokens=2048, window=64, memory="200MB")
    return packed


def statistics_of(packed):
    weights, found = ExpertWeights.open(packed), Calibration.open(packed)
    return [LayerStatistics(weights, found, layer) for layer in range(weights.num_layers)]


def logits(model, ids=IDS[:40]):
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0].float()


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """8 experts of which e and e + 4 are the same, also for the router."""
    folder = tmp_path_factory.mktemp("twins")
    model = tiny_lm.qwen3_moe(seed=2, num_experts=8, num_experts_per_tok=4, norm_topk_prob=True)
    with torch.no_grad():
        for layer in model.model.layers:
            for tensor in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
                tensor[4:] = tensor[:4]
            layer.mlp.gate.weight[4:] = layer.mlp.gate.weight[:4]
    return prepared(folder, model), model


def test_twins_merge_into_an_equal_model(twins, tmp_path):
    """A token's 4 experts are 2 pairs of twins, so with 2 of 4 experts per token nothing changes."""
    packed, model = twins
    stats = statistics_of(packed)
    merges = [merging.gated(s, 4) for s in stats]
    assert all((m.groups == [0, 1, 2, 3, 0, 1, 2, 3]).all() for m in merges)
    out = export(packed, merges, [s.record for s in stats], tmp_path / "out", memory="200MB")
    smaller = AutoModelForCausalLM.from_pretrained(out)
    assert smaller.config.num_experts == 4 and type(smaller) is type(model)
    assert getattr(smaller.config, "quantization_config", None) is None
    assert smaller.num_parameters() < model.num_parameters()
    for layer in smaller.model.layers:
        layer.mlp.gate.top_k = 2
    torch.testing.assert_close(logits(smaller), logits(model), rtol=0.02, atol=0.02)
    assert (
        comoe.load_tokenizer(out)("a")["input_ids"]
        == comoe.load_tokenizer(packed)("a")["input_ids"]
    )
    again = comoe.pack(out, tmp_path / "again")
    with pytest.raises(AggregateError, match="exists; choose another folder"):
        export(packed, merges, [s.record for s in stats], out)
    assert Calibration.open(packed).num_layers == 2 and again.is_dir()


def test_other_layouts_load(tmp_path):
    """Granite: interleaved names, logits scaled, router a linear layer in a module of its own."""
    reason = why_not("granitemoe")
    if reason is not None:
        pytest.skip(f"transformers {transformers.__version__}: {reason}")
    packed = prepared(tmp_path, tiny_lm.granite_moe())
    stats = statistics_of(packed)
    merges = [merging.hc_smoe(s, 3) for s in stats]
    out = export(packed, merges, [s.record for s in stats], tmp_path / "out", memory="200MB")
    smaller, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert torch.isfinite(logits(smaller)).all() and smaller.config.num_local_experts == 3


def test_router_rows_come_near_the_sum_of_probabilities():
    generator = torch.Generator().manual_seed(0)
    router = 0.3 * torch.randn(6, 16, generator=generator)
    # Hidden states have a mean, which lets a row give a group of three more than a single expert.
    x = torch.randn(500, 16, generator=generator) + torch.randn(16, generator=generator)
    groups = [np.array([0, 1, 2]), np.array([3]), np.array([4, 5])]
    mean = torch.stack([router[torch.from_numpy(g)].mean(0) for g in groups])
    p = (x @ router.T).softmax(-1)
    want = torch.stack([p[:, torch.from_numpy(g)].sum(1) for g in groups], 1)

    def gap(rows):
        return float(((x @ rows.T).softmax(-1) - want).abs().mean())

    assert gap(router_rows(router, mean, groups, x)) < 0.5 * gap(mean)
    alone = [np.array([e]) for e in range(6)]
    torch.testing.assert_close(router_rows(router, router.clone(), alone, x), router)


def test_what_a_plain_checkpoint_cannot_say(twins, tmp_path):
    packed, _ = twins
    stats = statistics_of(packed)
    records = [s.record for s in stats]
    with pytest.raises(AggregateError, match=r"layers keep \[4, 5\] experts"):
        export(
            packed,
            [merging.hc_smoe(stats[0], 4), merging.hc_smoe(stats[1], 5)],
            records,
            tmp_path / "a",
        )
    with pytest.raises(AggregateError, match="uses 4 experts, but only 3 would be left"):
        export(packed, [merging.hc_smoe(s, 3) for s in stats], records, tmp_path / "b")
    assert not list(tmp_path.iterdir())
