"""What is inside a store, as plain data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comoe.store.reader import Store


def inspect(folder: str | Path) -> dict[str, Any]:
    """Sizes in bytes. Per rung: how many experts have it, payload that all of them need at it (shared
    records once), and bits per weight of these experts, parameters and padding of blocks included."""
    store = Store.open(folder)
    manifest = store.manifest
    weights = sum(layer.num_experts * layer.geometry.num_weights for layer in store.layers)
    rungs = []
    for level, name in enumerate(store.levels.names):
        total = covered = experts = 0
        for i, layer in enumerate(store.layers):
            nbytes, count = store.level_bytes(i, level)
            total += nbytes
            experts += count
            covered += count * layer.geometry.num_weights
        rungs.append(
            {
                "name": name,
                "bits": 8 * total / covered,
                "bytes": total,
                "experts": experts,
                "exact": level == store.levels.exact,
            }
        )
    return {
        "version": manifest.version,
        "comoe_version": manifest.comoe_version,
        "model_type": manifest.model_type,
        "source": manifest.source,
        "layers": len(store.layers),
        "experts": sum(layer.num_experts for layer in store.layers),
        "expert_weights": weights,
        "page_bytes": store.page_bytes,
        "rungs": rungs,
        "dense_bytes": manifest.dense_bytes,
        "store_bytes": sum(layer.file_bytes for layer in store.layers),
        "layer_table": [
            {
                "name": layer.name,
                "file": layer.file,
                "bytes": layer.file_bytes,
                "experts": layer.num_experts,
                "hidden": layer.hidden,
                "intermediate": layer.intermediate,
                "gated": layer.gated,
                "biased": layer.biased,
                "activation": layer.activation,
                "exact_dtype": layer.exact_dtype,
            }
            for layer in store.layers
        ],
    }
