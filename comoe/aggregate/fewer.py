"""`comoe aggregate --method`: a packed model with fewer experts as a plain transformers checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from comoe.aggregate import merging
from comoe.aggregate.build import Progress, Workshop
from comoe.aggregate.calibrate import Text, calibrate
from comoe.aggregate.errors import AggregateError
from comoe.aggregate.export import export

METHODS = ("hc-smoe", "m-smoe", "ream", "gated")


def write_fewer(
    dst: Path,
    texts: Mapping[str, Text] | None,
    method: str,
    experts: int,
    out: Path,
    *,
    memory: str | int | None = None,
    tokens: int = 49_152,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Merges every layer of `dst` to `experts` experts and writes `out`. M-SMoE takes the most used experts of
    each layer as centres here, since a plain checkpoint has as many experts in one layer as in another.

    Raises AggregateError for a method or a number that cannot be, and for what `export` refuses.
    """
    if method not in METHODS:
        raise AggregateError(f"aggregate: method: expected one of {METHODS}, got {method!r}")
    if texts is not None:
        calibrate(
            dst,
            texts,
            memory=memory,
            tokens=tokens,
            progress=lambda done, total: progress("calibrating", done, total),
        )
    with Workshop(dst, memory=memory) as shop:
        most = min(s.spec.num_experts for s in shop.statistics)
        if not 1 <= experts <= most:
            raise AggregateError(f"aggregate: experts: expected 1 to {most}, got {experts}")
        merges = []
        for number, statistics in enumerate(shop.statistics):
            progress("merging", number, len(shop.statistics))
            if method == "m-smoe":
                centres = (-statistics.use).argsort(kind="stable")[:experts]
                merges.append(merging.m_smoe(statistics, centres))
            else:
                make = {"hc-smoe": merging.hc_smoe, "ream": merging.ream, "gated": merging.gated}
                merges.append(make[method](statistics, experts))
        progress("merging", len(shop.statistics), len(shop.statistics))
        records = [shop.calibration.layer(i) for i in range(len(shop.statistics))]
    folder = export(dst, merges, records, out, memory=memory)
    return {"folder": str(folder), "method": method, "experts": experts}
