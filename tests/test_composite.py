"""Experts that are sums: code sets, shared bases, low-rank deltas and means, from the store to the result."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from mixed_store import LEVELS, reference_expert, write_mixed_store
from store_helpers import SPEC

from comoe import _C
from comoe.policy.plan import LADDER
from comoe.runtime.engine import Records, RecordTable, add_layer, open_engine, store_sizes
from comoe.runtime.prefill import forward_unpacked
from comoe.runtime.spec import ExpertsSpec
from comoe.store.parts import parts_of
from comoe_kernels.expert_ffn import expert_ffn_ref, rounding, use_isa
from comoe_kernels.unpack import DTYPES, unpack, unpack_bias, unpack_mean

SPECS = [
    replace(SPEC, num_experts=4),  # less than a group
    replace(SPEC, num_experts=5, hidden=163, intermediate=131, biased=True),  # primes over one
    replace(
        SPEC,
        num_experts=4,
        hidden=128,
        intermediate=272,
        gated=False,
        activation="relu2",
        exact_dtype="float32",
    ),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_mixed_store(tmp_path_factory.mktemp("mixed"), SPECS)


class Op:
    """Engine and operator over a store, with room for `slabs` slabs of eight pages."""

    def __init__(self, store, slabs=4000):
        self.table = RecordTable(store)
        slab = 8 * store.page_bytes
        self.engine, first = open_engine(
            store, self.table, slabs * slab, slab, io_threads=2, direct=False, verify=True
        )
        self.op = _C.MoeOp(self.engine, list(store.levels.masks))
        for i, layer in enumerate(store.layers):
            add_layer(self.op, layer, self.table.ids[i], first[i], layer.activation, 0.0, 0.0)
        self.policy = _C.MoePolicy(self.engine, self.op, False, 1.0)
        self.ends = np.cumsum([layer.num_experts for layer in store.layers])

    def forward(self, store, layer_idx, x, experts, level):
        """Row i of x through experts[i], weight 1; [T, H] like x."""
        self.set_level(store, layer_idx, level)
        index = torch.as_tensor(experts, dtype=torch.int64)[:, None].contiguous()
        weights, out = torch.ones(index.shape), torch.empty_like(x)
        self.policy.used()[:] = 0
        self.policy.step(
            self.op, layer_idx, x.data_ptr(), DTYPES[x.dtype], x.stride(0), index.data_ptr(),
            weights.data_ptr(), len(x), 1, out.data_ptr(), False, max(len(x), 1), None, [],
        )  # fmt: skip
        used = np.split(self.policy.used(), self.ends[:-1])[layer_idx]
        assert (used[np.unique(experts)] == level + 1).all()
        return out

    def set_level(self, store, layer_idx, level):
        """`level` for those who have it, exact for the others."""
        has = store.layers[layer_idx].has_levels(store.levels)[:, level]
        levels = np.where(has, level, store.levels.exact).astype(np.uint8)
        self.op.set_levels(layer_idx, levels, levels)
        return np.flatnonzero(has)


@pytest.fixture(scope="module")
def op(store):
    return Op(store)


def reference(store, layer_idx, expert, level, x, round_activations=lambda v: v):
    """[S, H] float32."""
    matrices, biases, mean = reference_expert(store, layer_idx, expert, level)
    (parts,) = [parts_of(store.layers[layer_idx].records[expert], store.levels.masks[level])]
    if all(part.kind == "mean" for part in parts):
        return torch.from_numpy(mean).expand(x.shape)
    out = expert_ffn_ref(
        x,
        [torch.from_numpy(w) for w in matrices],
        [torch.from_numpy(b) for b in biases],
        activation=store.layers[layer_idx].activation,
        round_activations=round_activations,
    )
    return out + torch.from_numpy(mean)


def coarsest(store, layer_idx, expert, level):
    """Kernel level 0..4 of the part whose activations are rounded most."""
    rows = store.layers[layer_idx].records[expert]
    levels = []
    for part in parts_of(rows, store.levels.masks[level]):
        if part.kind == "coded":
            bits = sum(int(rows[r]["bits"]) for r in part.records)
            levels.append((2, 3, 4, 8).index(bits))
        elif part.kind == "low_rank":
            levels.append(3)
        else:
            levels.append(4)
    return min(levels)


def relative(got, want):
    return float((got.float() - want).norm() / want.norm())


@pytest.mark.parametrize("isa", _C.isa_names())
@pytest.mark.parametrize("level", range(len(LEVELS)), ids=LEVELS.names)
def test_every_level_of_every_expert(store, op, level, isa):
    """One row (decode) and more than a kernel takes at once."""
    generator = torch.Generator().manual_seed(level)
    for layer_idx, spec in enumerate(SPECS):
        has = op.set_level(store, layer_idx, level)
        for rows in (1, 11):
            experts = np.repeat(has, rows)
            x = torch.randn(len(experts), spec.hidden, generator=generator)
            with use_isa(isa):
                out = op.forward(store, layer_idx, x, experts, level)
            for i, expert in enumerate(has):
                own = slice(i * rows, (i + 1) * rows)
                want = reference(store, layer_idx, expert, level, x[own])
                rounds = rounding(coarsest(store, layer_idx, expert, level))
                low = reference(store, layer_idx, expert, level, x[own], rounds)
                assert relative(out[own], want) <= 2 * relative(low, want) + 3e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inputs_of_16_bits(store, op, dtype):
    level = LEVELS.names.index("base+lr")
    x = torch.randn(4, SPECS[1].hidden, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = op.forward(store, 1, x, [0, 1, 2, 3], level)
    for e in range(4):
        want = reference(store, 1, e, level, x[e : e + 1].float())
        assert relative(out[e : e + 1], want) <= 0.05


def test_a_row_does_not_depend_on_the_others_or_on_threads(store, op):
    level, before = LEVELS.names.index("base+lr"), _C.num_threads()
    x = torch.randn(9, SPECS[1].hidden, generator=torch.Generator().manual_seed(1))
    experts = np.array([0, 3, 0, 1, 2, 0, 0, 4, 1])
    try:
        _C.set_num_threads(3)
        together = op.forward(store, 1, x, experts, level)
    finally:
        _C.set_num_threads(before)
    for i, expert in enumerate(experts):
        alone = op.forward(store, 1, x[i : i + 1], [expert], level)
        assert torch.equal(alone[0], together[i])


@pytest.mark.parametrize("isa", _C.isa_names())
@pytest.mark.parametrize("level", range(len(LEVELS)), ids=LEVELS.names)
def test_unpacking_gives_the_sum(store, op, level, isa):
    for layer_idx in range(len(SPECS)):
        has = op.set_level(store, layer_idx, level).astype(np.int32)
        session = op.op.session(layer_idx, has, _C.AheadList())
        while (ready := session.next()) is not None:
            for need, got_level in ready:
                expert = int(has[need])
                view = op.op.expert(layer_idx, expert, got_level)
                matrices, biases, mean = reference_expert(store, layer_idx, expert, level)
                with use_isa(isa):
                    if view.has_matrices:
                        for m, want in enumerate(matrices):
                            got = unpack(view, m, torch.float32).numpy()
                            assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
                    np.testing.assert_array_equal(unpack_mean(view).numpy(), mean)
                    for m, want in enumerate(biases if view.has_matrices else []):
                        np.testing.assert_allclose(unpack_bias(view, m).numpy(), want, rtol=1e-6)
                session.done(need)
        session.close()


@pytest.mark.parametrize("in_torch", [False, True])
def test_prefill_of_every_level(store, op, in_torch):
    generator = torch.Generator().manual_seed(2)
    for layer_idx, spec in enumerate(SPECS):
        layer = ExpertsSpec(
            "x", spec.num_experts, spec.hidden, spec.intermediate, spec.gated, spec.biased,
            None if in_torch else spec.activation,
            apply_gate=torch.nn.functional.relu if spec.activation == "relu2" else
            lambda v: v.chunk(2, -1)[0] * v.chunk(2, -1)[1],
        )  # fmt: skip
        for level in range(len(LEVELS)):
            has = op.set_level(store, layer_idx, level)
            x = torch.randn(len(has) * 3, spec.hidden, generator=generator)
            index = torch.from_numpy(np.repeat(has, 3))[:, None]
            used = np.zeros(spec.num_experts, np.uint8)
            out = forward_unpacked(
                op.op, layer_idx, layer, x, index, torch.ones(index.shape), used,
                _C.AheadList(),
            )  # fmt: skip
            assert (used[has] == level + 1).all()
            if in_torch:
                assert torch.isfinite(out).all()
                continue
            for i, expert in enumerate(has):
                want = reference(store, layer_idx, expert, level, x[3 * i : 3 * i + 3])
                assert relative(out[3 * i : 3 * i + 3], want) <= 1e-5


def test_a_shared_base_is_read_once_and_held_once(store):
    op = Op(store)
    x = torch.randn(4, SPECS[0].hidden)
    op.forward(store, 0, x, [0, 1, 2, 3], LEVELS.names.index("base"))
    size = store.layers[0].geometry.coded_bytes(0, 2)
    stats = op.engine.stats()
    assert stats["bytes_read"] == stats["resident_bytes"] == 2 * size
    op.forward(store, 0, x[:2], [3, 0], LEVELS.names.index("other"))  # aliases of 1 and 2
    assert op.engine.stats()["bytes_read"] == 2 * size + sum(
        store.layers[0].geometry.coded_bytes(0, bits) for bits in (2, 4)
    )
    op.forward(store, 0, x[:1], [1], LADDER.names.index("2") + 6)  # the original is here already
    assert op.engine.stats()["reads"] == 4


def test_sizes_and_bits_count_shares(store):
    table = RecordTable(store)
    sizes, records = store_sizes(store, table), Records(store, table)
    base, two = LEVELS.names.index("base"), LEVELS.names.index("2")
    geometry = [layer.geometry for layer in store.layers]
    paged = lambda n: -(-n // store.page_bytes) * store.page_bytes  # noqa: E731
    assert sizes.total(base) == 2 * sum(paged(g.coded_bytes(0, 2)) for g in geometry)
    assert sizes.total(two) == sum(
        layer.num_experts * paged(g.record_bytes(0))
        for layer, g in zip(store.layers, geometry, strict=True)
    )
    assert sizes.has[3].tolist() == store.layers[0].has_levels(LEVELS)[3].tolist()
    bits = records.bits[0][:4, base]
    alone = 8 * geometry[0].coded_bytes(0, 2) / geometry[0].num_weights
    np.testing.assert_allclose(bits, alone / 2)
    ids = records.in_order(sizes.chosen(sizes.all_at(base)))
    assert len(ids) == 6 and len(set(ids.tolist())) == 6
    own, which = records.above(0, np.arange(2), np.array([base] * 2), np.array([base + 2] * 2))
    assert which.tolist() == [0, 1] and len(own) == 2


def test_tables_that_do_not_fit_are_refused(store):
    layer, op = store.layers[0], Op(store)
    broken = {
        "parent": (6, 12, "its parent must be an earlier coded record"),
        "bits": (5, 3, r"expected \d+ bytes, got"),
        "ranks": (8, 4097, "a rank is out of range"),
        "kind": (5, 9, "kind 9 is unknown"),
    }
    for field, (record, value, message) in broken.items():
        records = layer.records.copy()
        records[field][:, record] = value
        with pytest.raises(ValueError, match=message):
            add_layer(op.op, replace(layer, records=records), op.table.ids[0], 0, "silu", 0.0, 0.0)
    with pytest.raises(ValueError, match=r"one level per expert \(4\)"):
        op.op.set_levels(0, np.zeros(3, np.uint8), np.zeros(3, np.uint8))
    with pytest.raises(ValueError, match="expert 2: expected min <= want < 12"):
        op.op.set_levels(0, np.zeros(4, np.uint8), np.array([0, 0, 12, 0], np.uint8))
    with pytest.raises(ValueError, match="has no level from 0 to 0; plan a level that it has"):
        op.op.set_levels(0, np.zeros(4, np.uint8), np.zeros(4, np.uint8))
        op.op.session(0, np.array([3], np.int32), _C.AheadList())
