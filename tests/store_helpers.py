"""A tiny store for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from ladder_numpy import random_codes

from comoe.store import LayerSpec, StoreWriter

SPEC = LayerSpec(num_experts=3, hidden=40, intermediate=24, activation="gelu")


def tiny_expert(spec: LayerSpec, seed: int) -> tuple[list[np.ndarray], ...]:
    """(matrices, biases), and scales where the matrices are codes."""
    rng = np.random.default_rng(seed)
    up, down = (spec.intermediate, spec.hidden), (spec.hidden, spec.intermediate)
    shapes = [up, up, down] if spec.gated else [up, down]

    if spec.exact_dtype in ("float8_e4m3fn", "mxfp4"):
        kind = torch.float8_e4m3fn if spec.exact_dtype == "float8_e4m3fn" else spec.exact_dtype
        codes, scales, _ = zip(*(random_codes(rng, *s, kind) for s in shapes), strict=True)
        biases = (
            [rng.standard_normal(s[0]).astype(np.float32) for s in shapes] if spec.biased else []
        )
        return list(codes), biases, list(scales)

    def draw(size):
        values = rng.standard_normal(size).astype(np.float32)
        if spec.exact_dtype == "float32":
            return values
        if spec.exact_dtype == "float16":
            return values.astype(np.float16).view(np.uint16)
        return (values.view(np.uint32) >> 16).astype(np.uint16)

    return [draw(s) for s in shapes], [draw(s[0]) for s in shapes] if spec.biased else []


def tiny_experts(spec: LayerSpec, layer_idx: int):
    return (tiny_expert(spec, 100 * layer_idx + e) for e in range(spec.num_experts))


def write_tiny_store(folder: Path, specs=(SPEC, SPEC)) -> StoreWriter:
    writer = StoreWriter(folder)
    for layer_idx, spec in enumerate(specs):
        writer.add_layer(
            f"model.layers.{layer_idx}.mlp.experts",
            spec,
            tiny_experts(spec, layer_idx),
            fingerprint="source",
        )
    writer.finish(model_type="tiny", source="nowhere", dense_bytes=1234)
    return writer
