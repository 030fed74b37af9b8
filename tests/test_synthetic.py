"""Made models: true shapes, loadable checkpoints, routing as uneven as asked, errors that say what to do."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import comoe
from comoe import synthetic
from comoe.hf.blocks import discover
from comoe.hf.checkpoint import meta_model
from comoe.popularity import PopularityError, biases, chosen_shares, layer_shares
from comoe.synthetic import MakeModelError, config_of, make_model
from comoe.trace import Trace

VOCAB = 2000
SMALL = {"layers": 4, "hidden": 128, "intermediate": 48, "vocab": VOCAB}


@pytest.mark.parametrize(
    ("like", "billions"),
    [
        ("qwen3-30b-a3b", 30.5),
        ("qwen1.5-moe-a2.7b", 14.3),
        ("olmoe-1b-7b", 6.9),
        ("mixtral-8x7b", 46.7),
        ("switch-base-8", 0.62),
        ("switch-base-128", 7.42),
    ],
)
def test_shapes_are_the_published_ones(like, billions):
    layers = {} if like != "switch-base-128" else {"layers": 4}  # 3,000 modules take their time
    model = meta_model(config_of(like, **layers))
    count = sum(p.numel() for p in model.parameters())
    if layers:
        blocks = sum(p.numel() for n, p in model.named_parameters() if ".block." in n)
        count += 2 * blocks
    assert count / 1e9 == pytest.approx(billions, rel=0.01)


def routed(folder) -> dict[str, np.ndarray]:
    """Experts that transformers' own model chooses for random tokens, by layer."""
    encodes = "switch" in json.loads((folder / "config.json").read_text())["model_type"]
    auto = AutoModelForSeq2SeqLM if encodes else AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    found: dict[str, list] = {}

    def note(name):
        def hook(module, args):
            chosen = args[1]
            if chosen.dim() == 3:  # Switch: one-hot; nothing where the capacity is exceeded
                chosen = chosen.flatten(0, 1)
                chosen = chosen.argmax(-1)[chosen.any(-1)]
            found.setdefault(name, []).append(chosen.flatten().numpy().copy())

        return hook

    for block in discover(model):
        block.module.register_forward_pre_hook(note(block.name))
    ids = torch.randint(VOCAB, (40, 32), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        model(input_ids=ids, **({"decoder_input_ids": ids} if encodes else {}))
    return {name: np.concatenate(parts) for name, parts in found.items()}


@pytest.mark.parametrize(
    ("like", "popularity"),
    [
        ("switch-base-8", "zipf"),
        ("qwen3-30b-a3b", "zipf:0.7"),
        ("mixtral-8x7b", "zipf"),
        ("olmoe-1b-7b", "uniform"),
    ],
)
def test_routing_follows_the_popularity(tmp_path, like, popularity):
    experts = {} if like == "mixtral-8x7b" else {"experts": 32}
    folder = make_model(tmp_path / "m", config_of(like, **SMALL, **experts), popularity=popularity)
    asked = json.loads((folder / "synthetic.json").read_text())["shares"]
    chosen = routed(folder)
    assert set(chosen) == set(asked) and len(chosen) == 4
    orders = set()
    for name, experts in chosen.items():
        want = np.array(asked[name])
        got = np.bincount(experts, minlength=len(want)) / len(experts)
        assert abs(got - want).sum() / 2 < 0.12  # total variation
        popular = np.argsort(-want)[: max(len(want) // 8, 1)]
        assert got[popular].sum() == pytest.approx(want[popular].sum(), rel=0.2)
        orders.add(tuple(popular))
    if popularity != "uniform":
        even = np.full(len(want), 1 / len(want))
        assert abs(want - even).sum() / 2 > 0.2  # so that the bound above says something
        assert len(orders) > 1


def test_a_traces_curve_is_replayed(tmp_path):
    rng = np.random.default_rng(0)
    chosen = rng.choice(4, (400, 2, 1), p=[0.1, 0.6, 0.1, 0.2]).astype(np.int16)
    chosen[:, 1] = rng.choice(4, (400, 1), p=[0.25] * 4)
    index = np.arange(400, dtype=np.int32)
    trace = Trace(
        "t", ("a", "b"), np.full(2, 4, np.int32), index * 0, index, index, chosen,
        np.ones(chosen.shape, np.float32),
    )  # fmt: skip
    trace.write(tmp_path / "t.npz")
    first, second, third = layer_shares(str(tmp_path / "t.npz"), [4, 4, 8], 1)
    assert first == pytest.approx([0.6, 0.2, 0.1, 0.1], abs=0.06)
    assert second == pytest.approx([0.25] * 4, abs=0.06)
    assert third[:2].sum() == pytest.approx(first[0])  # layer 2 is layer 0 again, over 8 experts


@pytest.mark.parametrize(("num", "k"), [(128, 1), (60, 4), (8, 2), (2, 2)])
def test_biases_give_the_shares(num, k):
    (share,) = layer_shares("zipf", [num], k)
    assert share.sum() == pytest.approx(1) and share.max() <= 1 / k + 1e-12
    logits = np.random.default_rng(7).standard_normal((100_000, num)) + biases(share, k)
    got = chosen_shares(logits, k)
    common = share > 0.01
    assert got[common] == pytest.approx(share[common], rel=1 / 6)


def test_a_made_model_packs_and_runs_exactly(tmp_path):
    config = config_of("qwen3-30b-a3b", **SMALL, experts=16, top_k=4)
    source = make_model(tmp_path / "m", config)
    plain = AutoModelForCausalLM.from_pretrained(source, experts_implementation="eager")
    with pytest.warns(UserWarning, match="no tokenizer"):
        comoe.pack(source, tmp_path / "p")
    model = comoe.load(tmp_path / "p", memory="200MB", exact=True)
    ids = torch.arange(24)[None]
    with torch.inference_mode():
        want, got = plain(ids).logits.float(), model(ids).logits.float()
    model.comoe.close()
    assert (got - want).norm() / want.norm() < 0.02


def test_same_seed_same_tensors_whatever_else_there_is(tmp_path):
    small = {**SMALL, "layers": 1, "experts": 8}
    one = make_model(tmp_path / "1", config_of("olmoe-1b-7b", **small))
    two = make_model(tmp_path / "2", config_of("olmoe-1b-7b", **{**small, "layers": 2}))
    from safetensors.torch import load_file

    first, second = (load_file(f / "model.safetensors") for f in (one, two))
    assert set(first) < set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["model.layers.0.mlp.experts.0.down_proj.weight"].std() > 0


def test_many_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "SHARD_BYTES", 200_000)
    seen = []
    folder = make_model(
        tmp_path / "m",
        config_of("switch-base-8", **SMALL),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    assert seen[-1][0] == seen[-1][1] and len(seen) > 10
    assert len(routed(folder)) == 4


def test_a_failing_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(synthetic, "write_file", full)
    with pytest.raises(MakeModelError, match="No space left on device; make room"):
        make_model(tmp_path / "m", config_of("olmoe-1b-7b", **SMALL))
    assert list(tmp_path.iterdir()) == []


def test_a_small_disk_is_refused_beforehand(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic.shutil, "disk_usage", lambda path: type("U", (), {"free": 1000}))
    with pytest.raises(MakeModelError, match="1.00 KB free, the model needs"):
        make_model(tmp_path / "m", config_of("olmoe-1b-7b", **SMALL))
    assert list(tmp_path.iterdir()) == []


def test_errors(tmp_path):
    with pytest.raises(MakeModelError, match="like: expected one of .*got 'gpt'"):
        config_of("gpt")
    with pytest.raises(MakeModelError, match="layers: expected at least 1, got 0"):
        config_of("olmoe-1b-7b", layers=0)
    with pytest.raises(MakeModelError, match="a token uses 8 experts, but there are only 4"):
        config_of("olmoe-1b-7b", experts=4)
    with pytest.raises(MakeModelError, match="one expert per token"):
        config_of("switch-base-8", top_k=2)
    with pytest.raises(MakeModelError, match="exists; choose another"):
        make_model(tmp_path, config_of("olmoe-1b-7b", **SMALL))
    with pytest.raises(MakeModelError, match="popularity: expected uniform, zipf.*'skew'"):
        make_model(tmp_path / "m", config_of("olmoe-1b-7b", **SMALL), popularity="skew")
    with pytest.raises(PopularityError, match="exponent from 0 to 10"):
        layer_shares("zipf:x", [4], 1)


def test_command(cli, tmp_path):
    from cli_helpers import ok_json

    arguments = ["--like", "mixtral-8x7b", "--layers", "1", "--hidden", "128", "--intermediate"]
    arguments += ["32", "--vocab", "64", "--popularity", "zipf:0.5"]
    result = ok_json(cli("bench", "make-model", tmp_path / "m", *arguments, "--json"))
    assert result["bytes"] > 100_000 and (tmp_path / "m" / "config.json").exists()
    status, _, err = cli("bench", "make-model", tmp_path / "m", *arguments)
    assert status == 1 and "exists; choose another folder" in err
