"""Experts that are sums (a shared 2-bit base with low-rank deltas, or with 2 more bits) and experts that are their
mean, through the decode kernel, cold, against the float32 matrices that their parts add up to.

Bytes: each expert's own parts, and a base once for the four that share it.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bench_expert_ffn import decode
from kernel import Kernel, memory_read

from comoe import _C
from comoe.policy.plan import Levels
from comoe.runtime.engine import Records, RecordTable, add_layer, open_engine
from comoe.store import AddedRecord, LayerSpec, Store, StoreWriter
from comoe.store import format as fmt
from comoe_kernels import ladder_codec as codec
from comoe_kernels import threads
from comoe_kernels.expert_ffn import expert_ffn, expert_ffn_ref, rounding
from comoe_kernels.unpack import unpack, unpack_mean

HIDDEN, INTERMEDIATE, EXPERTS, SHARERS, RANK = 1024, 512, 32, 4, 64
LEVELS = Levels(
    ("mean", "base+lr", "base+2", "2", "exact"), (1 << 9, 1 << 5 | 1 << 7, 1 << 5 | 1 << 6, 1, 16)
)


class Experts:
    """All experts of one layer, held by an engine, at one level each time."""

    def __init__(self, folder):
        spec = LayerSpec(EXPERTS, HIDDEN, INTERMEDIATE)
        rng = np.random.default_rng(0)
        shapes = codec.Shape(HIDDEN, INTERMEDIATE).matrices
        weights = [(rng.standard_normal(s) / s[1] ** 0.5).astype(np.float32) for s in shapes]
        halves = [(w.view(np.uint32) >> 16).astype(np.uint16) for w in weights]
        two, rest = _C.encode_coded(weights, [], 2), _C.encode_coded(weights, [], 2)
        factors = [
            (rng.standard_normal((rows, RANK)) / RANK**0.5, rng.standard_normal((RANK, cols)) / 32)
            for rows, cols in shapes
        ]
        low_rank, ranks = codec.encode_low_rank(factors)
        mean = codec.encode_mean(rng.standard_normal(HIDDEN))
        added = [
            [
                AddedRecord(fmt.SHARED_BASE, 2, shared_id=e // SHARERS, payload=two),
                AddedRecord(fmt.PLANE, 2, payload=rest),
                AddedRecord(fmt.LOW_RANK, 8, 5, ranks=ranks, payload=low_rank),
                None,
                AddedRecord(fmt.MEAN, payload=mean),
            ]
            for e in range(EXPERTS)
        ]
        writer = StoreWriter(folder)
        writer.add_layer("layer", spec, ((halves, []) for _ in range(EXPERTS)), added=added)
        writer.finish(model_type="bench", source="-", dense_bytes=0, levels=LEVELS)
        store = Store.open(folder)
        table = RecordTable(store)
        slab = 64 * store.page_bytes
        budget = 4 * int(table.nbytes.sum()) // slab * slab
        options = {"io_threads": 2, "direct": True, "verify": True}
        self.engine, first = open_engine(store, table, budget, slab, **options)
        self.op = _C.MoeOp(self.engine, list(store.levels.masks))
        layer = store.layers[0]
        add_layer(self.op, layer, table.ids[0], first[0], layer.activation, 0.0, 0.0)
        bits = Records(store, table).bits[0].sum(0)
        self.nbytes = bits * layer.geometry.num_weights / 8

    def at(self, level: int):
        """(views of all experts, the session that holds them)."""
        self.op.set_levels(0, *[np.full(EXPERTS, level, np.uint8)] * 2)
        every = np.arange(EXPERTS, dtype=np.int32)
        session = self.op.session(0, every, _C.AheadList())
        left = EXPERTS
        while left:
            left -= len(session.next())
        return [self.op.expert(0, e, level) for e in range(EXPERTS)], session


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    made = Experts(tmp_path_factory.mktemp("composite"))
    yield made
    made.engine.close()


def reference(view, x, rounds=lambda v: v):
    mean = unpack_mean(view)
    if not view.has_matrices:
        return mean.expand(x.shape)
    matrices = [unpack(view, m, torch.float32) for m in range(3)]
    return expert_ffn_ref(x, matrices, round_activations=rounds) + mean


@pytest.mark.parametrize("name", LEVELS.names)
def test_composite(bench, experts, name):
    threads.use_own_threads()
    level = LEVELS.names.index(name)
    views, session = experts.at(level)
    x = torch.randn(1, HIDDEN)
    got = expert_ffn(x, views[:1], [np.zeros(1, np.int32)], [np.zeros(1, np.int32)], 1)
    want, rounded = reference(views[0], x), reference(views[0], x, rounding(0))
    allowed = float((rounded - want).norm() / want.norm()) if name not in ("mean", "exact") else 0
    error = float((got - want).norm() / want.norm())
    assert error <= 2 * allowed + 3e-5
    # The same sums unpacked before, in bf16, as a library without such kernels must keep them.
    dense = [torch.randn(s).bfloat16() for s in codec.Shape(HIDDEN, INTERMEDIATE).matrices]
    dense = [[w.clone() for w in dense] for _ in range(EXPERTS)]
    half = x.bfloat16()

    def torch_loop():
        for gate, up, down in dense:
            (torch.nn.functional.silu(half @ gate.T) * (half @ up.T)) @ down.T

    bench(
        Kernel(
            "expert_ffn, sums",
            f"T=1 K={EXPERTS} H={HIDDEN} I={INTERMEDIATE} {name}",
            decode(views, x, EXPERTS, 1),
            experts.nbytes[level],
            ceiling=memory_read(),
            rival_name="torch, unpacked bf16",
            rival=torch_loop,
            error=error,
            error_of="relative",
        )
    )
    session.close()
