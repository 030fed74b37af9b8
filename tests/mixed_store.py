"""A store with every kind of record that aggregation may add, for tests, and what its levels mean.

Weights are random: what is tested is that bytes come out as they went in, and that parts add up.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from store_helpers import tiny_expert

from comoe import _C
from comoe.policy.plan import Levels
from comoe.store import AddedRecord, LayerSpec, Store, StoreWriter
from comoe.store import format as fmt
from comoe.store.parts import parts_of
from comoe_kernels import ladder_codec as codec

LEVELS = Levels(
    ("mean", "base", "base3", "base+lr", "base+lr2", "other", "2", "base+2", "4g", "8", "8g", "exact"),
    (
        1 << 10,
        1 << 5,
        0b11 << 5,
        1 << 5 | 1 << 8,
        1 << 5 | 0b11 << 8,
        1 << 13,
        1,
        1 << 5 | 1 << 7,
        1 << 11,
        15,
        1 << 12 | 1 << 10,
        16,
    ),
)  # fmt: skip


def shape_of(spec: LayerSpec) -> codec.Shape:
    return codec.Shape(
        spec.hidden, spec.intermediate, spec.gated, spec.biased, spec.exact_dtype_code
    )


def ranks_of(spec: LayerSpec) -> tuple[int, ...]:
    """A different rank for each matrix, none where three are to spare."""
    count = 3 if spec.gated else 2
    return tuple(
        min(r, -(-min(spec.hidden, spec.intermediate) // 32) * 32) for r in (16, 0, 40)[-count:]
    )


def mixed_records(spec: LayerSpec, seed: int = 0) -> list[list[AddedRecord | None]]:
    """Records 5 to 13 of each of at least four experts; which of them have what is uneven on purpose."""
    rng = np.random.default_rng(seed)
    shape = shape_of(spec)

    def code_set(bits: int, scale: float = 1.0) -> np.ndarray:
        matrices = [
            (scale * rng.standard_normal(size) / size[1] ** 0.5).astype(np.float32)
            for size in shape.matrices
        ]
        biases = [rng.standard_normal(rows).astype(np.float32) for rows, _ in shape.matrices]
        return _C.encode_coded(matrices, biases if spec.biased else [], bits)

    def low_rank() -> AddedRecord:
        factors = [
            (rng.standard_normal((rows, r)) / r**0.5, rng.standard_normal((r, cols)) / cols**0.5)
            if r
            else (np.zeros((rows, 0)), np.zeros((0, cols)))
            for r, (rows, cols) in zip(ranks_of(spec), shape.matrices, strict=True)
        ]
        payload, ranks = codec.encode_low_rank(factors)
        return AddedRecord(fmt.LOW_RANK, 8, 5, ranks=ranks, payload=payload)

    extra = shape.coded.record_bytes(1, 2)  # the 1-bit plane of a base
    bases = [(code_set(2), rng.integers(0, 256, extra, dtype=np.uint8)) for _ in range(2)]
    added: list[list[AddedRecord | None]] = []
    for e in range(spec.num_experts):
        group = int(e >= 2)
        base, more = bases[group]
        own: list[AddedRecord | None] = [None] * 9
        own[0] = AddedRecord(fmt.SHARED_BASE, 2, shared_id=7 + 2 * group, payload=base)
        if not group:
            own[1] = AddedRecord(fmt.SHARED_BASE, 1, 5, shared_id=3, payload=lambda more=more: more)
        own[2] = AddedRecord(fmt.PLANE, 2, payload=code_set(2, 0.1))
        own[3] = low_rank()
        if e % 2 == 0:
            second = low_rank()
            own[4] = AddedRecord(fmt.LOW_RANK, 8, 8, ranks=second.ranks, payload=second.payload)
        if e != 3:
            mean = rng.standard_normal(spec.hidden)
            own[5] = AddedRecord(fmt.MEAN, payload=codec.encode_mean(mean))
        if e in (1, 2):
            own[6] = AddedRecord(fmt.PLANE, 4, payload=code_set(4))
        if e == 0:
            own[7] = AddedRecord(fmt.REPLACEMENT, 8, replaces=15, payload=code_set(8))
            own[8] = AddedRecord(fmt.ALIAS, 2, alias_of=(1, 0))  # comes before its original
        if e == 3:
            own[8] = AddedRecord(fmt.ALIAS, 4, alias_of=(2, 11))
        added.append(own)
    return added


def write_mixed_store(folder: Path, specs: list[LayerSpec]) -> Store:
    writer = StoreWriter(folder)
    for layer_idx, spec in enumerate(specs):
        experts = (tiny_expert(spec, 100 * layer_idx + e) for e in range(spec.num_experts))
        writer.add_layer(f"layers.{layer_idx}", spec, experts, added=mixed_records(spec, layer_idx))
    writer.finish(model_type="tiny", source="nowhere", dense_bytes=0, levels=LEVELS)
    return Store.open(folder)


def reference_expert(store: Store, layer_idx: int, expert: int, level: int):
    """Matrices [rows, cols], biases [rows] (or none) and mean [H] of an expert at a level, float32."""
    layer = store.layers[layer_idx]
    shape, rows = shape_of(layer), layer.records[expert]
    payload = lambda r: np.frombuffer(store.payload(layer_idx, expert, r), np.uint8)  # noqa: E731
    matrices = [np.zeros(size, np.float32) for size in shape.matrices]
    biases = [np.zeros(size[0], np.float32) for size in shape.matrices] if layer.biased else []
    mean = np.zeros(layer.hidden, np.float32)
    for part in parts_of(rows, store.levels.masks[level]):
        if part.kind == "mean":
            mean += payload(part.records[0])[: 4 * layer.hidden].view(np.float32)
            continue
        if part.kind == "exact":
            whole = {4: payload(4)}
            from_bits = _to_float(layer.exact_dtype)
            exact = [codec.decode_ref(shape, whole, 4, m) for m in range(len(matrices))]
            exact_bias = [codec.bias_ref(shape, whole, 4, m) for m in range(len(biases))]
            return [from_bits(w) for w in exact], [from_bits(b) for b in exact_bias], mean
        if part.kind == "coded":
            chain = [(payload(r), int(rows[r]["bits"])) for r in part.records]
            planes = codec.chain_planes(chain)
            for m in range(len(matrices)):
                matrices[m] += codec.decode_coded_ref(shape.coded, planes, m)
                if biases:
                    at = shape.bias_offset(m)
                    biases[m] += chain[0][0][at : at + 4 * len(biases[m])].view(np.float32)
        else:
            (r,) = part.records
            ranks = rows[r]["ranks"][: len(matrices)].tolist()
            for m in range(len(matrices)):
                matrices[m] += codec.low_rank_ref(shape, payload(r), ranks, m, int(rows[r]["bits"]))
    return matrices, biases, mean


def _to_float(exact_dtype: str):
    if exact_dtype == "bfloat16":
        return lambda bits: (bits.astype(np.uint32) << 16).view(np.float32)
    return lambda bits: bits.view(np.float16 if exact_dtype == "float16" else np.float32).astype(
        np.float32
    )
