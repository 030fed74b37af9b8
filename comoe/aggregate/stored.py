"""Experts of an aggregated store at any of its levels, as float32 matrices: what the engine computes, in torch."""

from __future__ import annotations

import functools

import numpy as np
import torch

from comoe.aggregate.experts import Expert, ExpertWeights
from comoe.aggregate.judge import Approximation
from comoe.store.parts import CODED_PART, EXACT_PART, LOW_RANK_PART, parts_of
from comoe_kernels.ladder_codec import (
    Shape,
    bias_ref,
    chain_planes,
    decode_coded_ref,
    low_rank_ref,
)

KEPT_BYTES = 1_000_000_000  # of decoded experts


class StoredRungs:
    """Decodes experts of a store; those used last are kept."""

    def __init__(self, weights: ExpertWeights) -> None:
        self.weights, self.store = weights, weights.store
        self.levels = self.store.levels
        largest = max(layer.geometry.num_weights for layer in self.store.layers)
        kept = functools.lru_cache(max(KEPT_BYTES // (4 * largest), 1))
        self.expert = kept(self._expert)

    def _expert(self, layer: int, expert: int, level: int) -> Approximation:
        """What stands for the expert at a level; None for the exact one."""
        info = self.store.layers[layer]
        rows = info.records[expert]
        parts = parts_of(rows, self.levels.masks[level])
        if parts[0].kind == EXACT_PART:
            return None
        shape = Shape(info.hidden, info.intermediate, info.gated, info.biased)
        matrices = [np.zeros(s, np.float32) for s in shape.matrices]
        biases: list[np.ndarray] = []
        coded = False
        for part in parts:
            payloads = [
                np.frombuffer(self.store.payload(layer, expert, r), np.uint8) for r in part.records
            ]
            if part.kind == CODED_PART:
                planes = chain_planes(
                    [(p, int(rows[r]["bits"])) for p, r in zip(payloads, part.records, strict=True)]
                )
                for m, matrix in enumerate(matrices):
                    matrix += decode_coded_ref(shape.coded, planes, m)
                if info.biased:
                    own = [bias_ref(shape, payloads, 0, m) for m in range(len(matrices))]
                    biases = (
                        own if not biases else [a + b for a, b in zip(biases, own, strict=True)]
                    )
                coded = True
            elif part.kind == LOW_RANK_PART:
                row = rows[part.records[0]]
                ranks = [int(r) for r in row["ranks"][: len(matrices)]]
                for m, matrix in enumerate(matrices):
                    if ranks[m]:
                        matrix += low_rank_ref(shape, payloads[0], ranks, m, int(row["bits"]))
                coded = True
            else:
                vector = torch.from_numpy(payloads[0].view("<f4")[: info.hidden].copy())
        if not coded:
            return vector
        return Expert(
            tuple(torch.from_numpy(np.ascontiguousarray(m)) for m in matrices),
            tuple(torch.from_numpy(np.array(b)) for b in biases),
        )


def level_sizes(weights: ExpertWeights) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(own int64 [X, L], shared int64 [X, L, M], shared_bytes int64 [S]) of a store's levels.

    own: bytes of records of the expert alone, -1 where it has no such level.  shared: which entries of
    shared_bytes a level needs beside them, -1 for none; an extent named by several experts is one entry.
    """
    store = weights.store
    own, ids, shared_bytes = [], [], []
    for layer in store.layers:
        records = layer.records
        base = len(shared_bytes)
        known, first, inverse = np.unique(
            records["shared_id"], return_index=True, return_inverse=True
        )
        inverse = inverse.reshape(records.shape)
        sizes = records["nbytes"].astype(np.int64)
        shared_bytes += sizes.reshape(-1)[first][known >= 0].tolist()
        numbers = np.where(known >= 0, base + np.cumsum(known >= 0) - 1, -1)[inverse]
        has = layer.has_levels(store.levels)
        needs = store.levels.needs(records.shape[1])
        for expert in range(layer.num_experts):
            row = []
            for level in range(len(store.levels)):
                used = np.flatnonzero(needs[level])
                row.append([int(n) for n in numbers[expert, used] if n >= 0])
            ids.append(row)
            private = np.where(numbers[expert] < 0, sizes[expert], 0)
            own.append(np.where(has[expert], needs @ private, -1))
    width = max((len(n) for row in ids for n in row), default=0) or 1
    shared = np.full((len(ids), len(store.levels), width), -1)
    for x, row in enumerate(ids):
        for level, numbers in enumerate(row):
            shared[x, level, : len(numbers)] = numbers
    return np.stack(own), shared, np.array(shared_bytes, np.int64)
