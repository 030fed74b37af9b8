"""A model on a store that aggregation has rewritten: levels by the curve, per expert, while it runs."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch

import comoe
from comoe import _C
from comoe.policy.plan import Levels
from comoe.store import AddedRecord, LayerSpec, Store, StoreWriter, copied_experts, write_losses
from comoe.store import format as fmt
from comoe.store.writer import manifest_text
from comoe_kernels import ladder_codec as codec

LEVELS = Levels(
    ("base+lr", "2", "base+lr+2", "4", "8", "exact"),
    (0b011 << 5, 1, 0b111 << 5, 0b111, 0b1111, 0b10000),
)
BASE_LR, TWO, BASE_LR_2, FOUR, EIGHT, EXACT = range(6)
SMALL = "8MB"  # slabs are a part of the pool that a model is loaded with
PROMPT = "import os\n\ndef read_lines(path):\n    "


def add_base(store, layer_idx):
    """Base: the mean of all experts at 2 bits, shared; a low-rank delta of the gate and 2 bits of the rest."""
    layer = store.layers[layer_idx]
    shape = codec.Shape(
        layer.hidden, layer.intermediate, layer.gated, layer.biased, layer.exact_dtype_code
    )
    matrices = []
    for expert in range(layer.num_experts):
        whole = {4: np.frombuffer(store.payload(layer_idx, expert, 4), np.uint8)}
        raw = [codec.decode_ref(shape, whole, 4, m) for m in range(len(shape.matrices))]
        matrices.append([(w.astype(np.uint32) << 16).view(np.float32) for w in raw])
    mean = [np.mean([own[m] for own in matrices], axis=0) for m in range(len(shape.matrices))]
    base = _C.encode_coded(mean, [], 2)
    known = [
        codec.decode_coded_ref(shape.coded, codec.chain_planes([(base, 2)]), m)
        for m in range(len(mean))
    ]
    added = []
    for own in matrices:
        factors, rest = [], []
        for m, (w, k) in enumerate(zip(own, known, strict=True)):
            u, s, v = np.linalg.svd(w - k, full_matrices=False)
            r = 16 if m == 0 else 0
            factors.append((u[:, :r] * s[:r] ** 0.5, s[:r, None] ** 0.5 * v[:r]))
            rest.append((w - k - factors[-1][0] @ factors[-1][1]).astype(np.float32))
        payload, ranks = codec.encode_low_rank(factors)
        added.append(
            [
                AddedRecord(fmt.SHARED_BASE, 2, shared_id=0, payload=base),
                AddedRecord(fmt.LOW_RANK, 8, 5, ranks=ranks, payload=payload),
                AddedRecord(fmt.PLANE, 2, payload=_C.encode_coded(rest, [], 2)),
            ]
        )
    return added


@pytest.fixture(scope="module")
def aggregated(packed_demo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("aggregated")
    for path in packed_demo.iterdir():
        if path.name != fmt.EXPERTS_FOLDER:
            os.symlink(path, folder / path.name)
    source, writer = Store.open(packed_demo), StoreWriter(folder)
    fields = LayerSpec.__dataclass_fields__
    for i, layer in enumerate(source.layers):
        spec = LayerSpec(**{field: getattr(layer, field) for field in fields})
        writer.add_layer(layer.name, spec, copied_experts(source, i), added=add_base(source, i))
    writer.finish(
        model_type=source.manifest.model_type,
        source=source.manifest.source,
        dense_bytes=source.manifest.dense_bytes,
        levels=LEVELS,
    )
    return folder


@pytest.fixture(scope="module")
def measured(aggregated):
    """The same with losses.npz: every second expert is finer than the others."""
    store = Store.open(aggregated)
    experts = [layer.num_experts for layer in store.layers]
    count = sum(experts)
    odd = np.arange(count) % 2 == 1
    points = [
        (BASE_LR, BASE_LR),
        (BASE_LR, TWO),
        (TWO, BASE_LR_2),
        (BASE_LR_2, FOUR),
        (FOUR, EIGHT),
    ]
    levels = [np.where(odd, fine, coarse) for coarse, fine in points]
    bits = np.array([1.0, 1.6, 2.7, 3.8, 6.0], np.float32)
    write_losses(
        aggregated,
        {
            "levels": np.array(LEVELS.names),
            "layer": np.repeat(np.arange(len(experts)), experts).astype(np.int32),
            "expert": np.concatenate([np.arange(n) for n in experts]).astype(np.int32),
            "loss": np.tile(np.array([0.5, 0.4, 0.2, 0.1, 0.01, 0], np.float32), (count, 1)),
            "use": np.full(count, 0.1, np.float32),
            "floor": np.zeros(count, np.uint8),
            "curve_fraction": bits / 16,
            "curve_level": np.stack(levels).astype(np.uint8),
            "curve_loss": np.array([0.5, 0.35, 0.2, 0.1, 0.05], np.float32),
            "curve_bytes": (bits * 1e5).astype(np.int64),
        },
    )
    return aggregated


@pytest.fixture
def load():
    models = []

    def load_model(folder, memory, **options):
        models.append(comoe.load(folder, memory=memory, **options))
        return models[-1]

    yield load_model
    for model in models:
        model.comoe.close()


@pytest.fixture(scope="module")
def ids(demo_folder):
    return comoe.load_tokenizer(demo_folder)(PROMPT, return_tensors="pt").input_ids


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits.float()


def memory_for(model, levels, spare=0):
    """Memory at which the pool just holds every expert at `levels`."""
    runtime = model.comoe
    pool = runtime.store_sizes.total(levels) + runtime.budget.pool_floor
    fixed = runtime.budget.sizes.dense + runtime.budget.reserve(runtime.config.max_context)
    return fixed + pool + runtime._slab_bytes + spare


def test_the_plan_follows_the_curve_while_the_model_runs(load, measured, packed_demo, ids):
    model = load(measured, SMALL)
    exact = logits(load(packed_demo, "60MB", exact=True), ids)
    curve = model.comoe.store.losses()["curve_level"]
    errors = []
    for point in (4, 2, 1, 0):
        model.comoe.set_memory(memory_for(model, curve[point]))
        model.comoe.wait_ready()
        plan = model.comoe.plan
        assert plan.resident and plan.min_level.tolist() == curve[point].tolist()
        assert "mixed levels" in plan.describe() or point == 0
        assert model.comoe.engine.stats()["mapped_bytes"] <= plan.pool_bytes
        before = model.comoe.stats()["engine"]["misses"]
        errors.append(float((logits(model, ids) - exact).norm() / exact.norm()))
        assert model.comoe.stats()["engine"]["misses"] == before
    assert errors[0] < 0.1 and errors[0] < errors[1] < errors[3]
    model.comoe.set_memory("60MB")
    assert set(model.comoe.plan.min_level.tolist()) == {EXACT}
    torch.testing.assert_close(logits(model, ids), exact)


def test_bits_per_weight_are_those_used(load, measured, ids):
    """What the last plan left behind may still be used up to the level wanted, and then counts."""
    model = load(measured, SMALL)
    model.comoe.set_memory(memory_for(model, model.comoe.store.losses()["curve_level"][0]))
    model.comoe.wait_ready()
    runtime = model.comoe
    before = runtime._policy.counters()
    logits(model, ids)
    layer = runtime.store.layers[0]
    own = layer.records["nbytes"][0, 6] + layer.records["nbytes"][0, 5] / layer.num_experts
    least, most = 8 * own, 8 * layer.records["nbytes"][0, 0]
    after = runtime._policy.counters()
    bits = (after["bits"] - before["bits"]) / (after["uses"] - before["uses"])
    got = bits * layer.geometry.num_weights
    assert 0.999 * least <= got < 0.5 * (least + most)


def test_below_the_curve_experts_come_from_disk(load, measured, ids):
    model = load(measured, SMALL)
    runtime = model.comoe
    coarsest = runtime.store.losses()["curve_level"][0]
    wanted = logits(load(measured, memory_for(model, coarsest)), ids)
    model.comoe.set_memory(
        runtime.budget.least(runtime.config.max_context) + 2 * runtime._slab_bytes
    )
    assert not model.comoe.plan.resident
    assert set(model.comoe.plan.min_level.tolist()) == {BASE_LR}
    misses = model.comoe.stats()["misses"]
    got = logits(model, ids)
    assert float((got - wanted).norm() / wanted.norm()) < 0.1
    assert model.comoe.stats()["misses"] > misses


def test_exact_mode_ignores_the_curve(load, measured, packed_demo, ids):
    plain = load(packed_demo, "12MB", exact=True)
    model = load(measured, "12MB", exact=True)
    assert set(model.comoe.plan.min_level.tolist()) == {EXACT}
    assert torch.equal(logits(model, ids), logits(plain, ids))


def test_upgrades_climb_to_the_next_point(load, measured, ids):
    model = load(measured, SMALL, upgrade=True)
    curve = model.comoe.store.losses()["curve_level"]
    model.comoe.set_memory(memory_for(model, curve[2], 200_000))
    assert model.comoe.plan.want_level.tolist() == np.maximum(curve[2], curve[3]).tolist()
    model.comoe.wait_ready()
    before = model.comoe.engine.stats()["upgrade_reads"]
    with torch.no_grad():
        model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)
    model.comoe.wait_ready()
    assert model.comoe.engine.stats()["upgrade_reads"] > before
    assert model.comoe.plan.min_level.tolist() == curve[2].tolist()
    resident = model.comoe.engine.resident() == 2
    assert resident[model.comoe.store_sizes.chosen(curve[2])].mean() > 0.99  # the base stays
    assert resident[~model.comoe.store_sizes.chosen(curve[2])].any()


def test_without_losses_the_ladder_is_used(load, packed_demo, tmp_path, aggregated):
    """Levels 2, 4 and 8 of this store are the ladder's; no plan uses the others."""
    folder = tmp_path / "unmeasured"
    folder.mkdir()
    for path in aggregated.iterdir():
        if path.name != fmt.EXPERTS_FOLDER:
            os.symlink(path.resolve(), folder / path.name)
    (folder / "experts").mkdir()
    for path in (aggregated / "experts").iterdir():
        if path.name.startswith("layer"):
            os.link(path, folder / "experts" / path.name)
    found = json.loads((aggregated / "experts" / "manifest.json").read_text())
    found.pop("losses", None)
    (folder / "experts" / "manifest.json").write_bytes(manifest_text(found))
    model = load(folder, SMALL)
    for level in (EIGHT, FOUR, TWO):
        model.comoe.set_memory(memory_for(model, level))
        assert set(model.comoe.plan.min_level.tolist()) == {level}
