"""Distillation as a stage of `comoe aggregate`: codes of all layers, tuned on the calibration text.

    round -> distil_logits against the exact model -> the same records, better filled

All layers are in memory at once (BYTES_PER_WEIGHT), which suits models that fit several times over. The
run leaves checkpoints in the packed folder, named after all it depends on. Which state stays is decided on a
part of the held-out text that measures no losses (comoe/aggregate/calibration.py).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from comoe.aggregate.calibration import CHOSEN, FITTED, Calibration
from comoe.aggregate.candidates import Tuned, rounded_matrices, set_of
from comoe.aggregate.coded_layer import CodedLayer
from comoe.aggregate.distil import distil_logits
from comoe.aggregate.errors import AggregateError
from comoe.aggregate.experts import ExpertWeights
from comoe.aggregate.statistics import LayerStatistics
from comoe.memory import available

CHECKPOINTS = "distil.partial"  # folder in the packed one
RATE = 0.7  # the best of those measured (docs/codec.md)
WINDOW = 256  # tokens
# Exact and latent weights, gradient, two moments of Adam, best state (float32), indices of codes (int64), and
# decoded values: what a step holds at its peak.
BYTES_PER_WEIGHT = 48

Progress = Callable[[str, int, int], None]


def tuned(
    dst: Path, bits: int, steps: int, *, memory: str | int | None = None, progress: Progress
) -> tuple[Tuned, dict[str, Any]]:
    """Codes of `bits` for all experts of `dst` after `steps` of distillation, and the report on it: level, kept,
    before, after (KL in nats per token on the text that chose the state), steps, seconds."""
    import comoe

    model = comoe.load(dst, memory=memory, exact=True, dtype=torch.float32)
    try:
        weights = ExpertWeights.open(dst, model.comoe.specs)
        calibration = Calibration.open(dst, fingerprint=weights.fingerprint)
        fitted, chosen_on = (windows(calibration, part) for part in (FITTED, CHOSEN))
        _check_memory(weights)
        layers = _rounded_layers(weights, calibration, bits, progress)
        folder = dst / CHECKPOINTS
        folder.mkdir(exist_ok=True)
        report = distil_logits(
            model, layers, fitted, chosen_on,
            steps=steps,
            rate=RATE,
            checkpoint=folder / f"{_key(layers, fitted, chosen_on)}.pt",
            progress=lambda step, total, loss: progress("distilling", step, total),
        )  # fmt: skip
        known = [
            [
                set_of(weights.expert(number, e), coded, bits)
                for e, coded in enumerate(layer.coded())
            ]
            for number, layer in enumerate(layers)
        ]
    finally:
        model.comoe.close()
    source = Tuned(bits, known)
    return source, {
        "level": source.name,
        "kept": report.kept,
        "before": report.before,
        "after": report.after,
        "steps": report.steps,
        "seconds": round(report.seconds, 2),
    }


def windows(calibration: Calibration, part: int) -> torch.Tensor:
    """int64 [B, T]: the sequences of a part in windows of one length, at most WINDOW; what is left over is not used."""
    sequence, ids = calibration.sequence, calibration.ids
    bounds = np.flatnonzero(np.r_[True, np.diff(sequence) != 0, True])
    length = min(WINDOW, int(np.diff(bounds).min()))
    found = [
        ids[begin : begin + length]
        for first, last in itertools.pairwise(bounds.tolist())
        if calibration.part[first] == part
        for begin in range(first, last - length + 1, length)
    ]
    if not found:
        what = "text to fit on" if part == FITTED else "held-out text to choose a state on"
        raise AggregateError(
            f"distil: the calibration has no {what}; calibrate again on a longer text"
        )
    return torch.from_numpy(np.stack(found).astype(np.int64))


def _check_memory(weights: ExpertWeights) -> None:
    layers = weights.store.layers
    needed = BYTES_PER_WEIGHT * sum(x.num_experts * x.geometry.num_weights for x in layers)
    free = available()
    if needed > free:
        raise AggregateError(
            f"distil: all experts are tuned at once, which takes about {needed / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free; leave distillation out (0 steps)"
        )


def _rounded_layers(
    weights: ExpertWeights, calibration: Calibration, bits: int, progress: Progress
) -> list[CodedLayer]:
    layers: list[CodedLayer] = []
    for number, spec in enumerate(weights.specs):
        progress("rounding", number, weights.num_layers)
        statistics = LayerStatistics(weights, calibration, number)
        exact = weights.layer(number)
        coded = [
            rounded_matrices(expert, statistics.second_moments(e), bits)
            for e, expert in enumerate(exact)
        ]
        layers.append(CodedLayer(spec, coded, exact, anchor=bits))
    progress("rounding", weights.num_layers, weights.num_layers)
    return layers


def _key(layers: list[CodedLayer], *texts: torch.Tensor) -> str:
    """Of everything a run starts from, so that it never goes on from a checkpoint of another."""
    digest = hashlib.sha256()
    for layer in layers:
        for tensor in layer.state_dict().values():
            digest.update(tensor.numpy().tobytes())
    for text in texts:
        digest.update(text.numpy().tobytes())
    return digest.hexdigest()[:16]
