"""Aggregates a packed folder: calibration, candidates, measured losses, and a store that has them all.

    calibrate [-> distil] -> for each layer: rungs, their gated errors -> losses, curve
              -> layer files with the records of the levels that the curve uses
              -> the choice measured in the engine -> swap

The packed folder stays as it was until everything is written beside it; then its experts folder is
replaced by a rename. Memory: the model under its budget, and the rungs of one layer in float32 (of all
layers where they are distilled); records wait on disk until the curve is known.
"""

from __future__ import annotations

import itertools
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from comoe.aggregate.allocate import (
    Losses,
    losses_of,
    measure_errors,
    measure_sensitivity,
)
from comoe.aggregate.based import Based
from comoe.aggregate.calibrate import Text, calibrate
from comoe.aggregate.calibration import Calibration
from comoe.aggregate.candidates import (
    LayerMenu,
    Mean,
    Merged,
    Packed,
    Rounded,
    Source,
    Truncated,
    layer_menu,
)
from comoe.aggregate.errors import AggregateError
from comoe.aggregate.experts import ExpertWeights
from comoe.aggregate.judge import Judge
from comoe.aggregate.refine import refined
from comoe.aggregate.spill import Spill
from comoe.aggregate.statistics import LayerStatistics, super_experts
from comoe.aggregate.trial import Trial, link_model
from comoe.aggregate.tuning import CHECKPOINTS, tuned
from comoe.evaluate import Window
from comoe.policy.plan import Levels
from comoe.policy.solver import InfeasibleError, Solution
from comoe.store import Store, StoreWriter, copied_experts, write_losses
from comoe.store import format as fmt

SOURCES: tuple[Source, ...] = (
    Packed(),
    Rounded(2),
    Rounded(3),
    Rounded(4),
    Merged(2, 2),
    Merged(2, 3),
    Based(),
    Mean(),
)
# 3 and 4 bits are planes of one set: a change between them reads a plane, and it loses little.
NESTED = (*(s for s in SOURCES if s not in (Rounded(3), Rounded(4))), Truncated())
DISTILLED = 2  # bits of the set that distillation tunes: the coarsest, where it gains most
CURVE = tuple(np.round(np.geomspace(0.02, 1.0, 48), 4).tolist())
VALIDATED = (0.3, 0.2, 0.14)  # fractions at which the prediction is compared with a measurement
ANCHOR = 0.14  # the one at whose choice layers are measured again (comoe/aggregate/refine.py)

Progress = Callable[[str, int, int], None]  # stage, steps done, steps in all


@dataclass
class Report:
    """What aggregation found; seconds per stage.

    predicted: rows of fraction, predicted KL and KL as measured in the engine (nats per token) on held-out
    calibration text, perplexity and that of the exact model.
    distilled: level, kept, before and after (KL of all experts at that level on the held-out text that chose,
    which measures nothing afterwards), steps and seconds; empty without distillation.  unused: levels that no
    point of the curve uses, which are not in the store.  refined: kept, scale of each layer's losses, KL by fraction before and after
    (comoe/aggregate/refine.py); empty without.
    """

    levels: tuple[str, ...] = ()
    tokens: int = 0
    super_experts: list[tuple[int, int]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    predicted: list[dict[str, float]] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)
    distilled: dict[str, Any] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    refined: dict[str, Any] = field(default_factory=dict)


class Workshop:
    """A packed folder opened for aggregation: its model under the budget, its weights and calibration."""

    def __init__(
        self, dst: Path, *, memory: str | int | None = None, after_choice: bool = False
    ) -> None:
        """after_choice: distillation has chosen on its part of the text, which then measures nothing."""
        import comoe

        self.folder = dst
        self.model = comoe.load(dst, memory=memory, exact=True)
        self.weights = ExpertWeights.open(dst, self.model.comoe.specs)
        self.calibration = Calibration.open(dst, fingerprint=self.weights.fingerprint)
        if after_choice:
            self.calibration = self.calibration.after_choice()
        self.statistics = [
            LayerStatistics(self.weights, self.calibration, layer)
            for layer in range(self.weights.num_layers)
        ]
        self.full_bytes = sum(
            2 * layer.num_experts * layer.geometry.num_weights
            for layer in self.weights.store.layers
        )

    def __enter__(self) -> Workshop:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the model's memory back; files and statistics stay usable."""
        if self.model is not None:
            self.model.comoe.close()
        self.model = None

    def judge(self) -> Judge:
        """Of the held-out part of the calibration text."""
        calibration = self.calibration
        ids = calibration.ids[calibration.held_out]
        sequence = calibration.sequence[calibration.held_out]
        if not len(ids):
            raise AggregateError(
                "aggregate: the calibration has no held-out text; calibrate again on a longer text"
            )
        bounds = np.flatnonzero(np.r_[True, np.diff(sequence) != 0, True]).tolist()
        windows = [Window(a, a + 1, b) for a, b in itertools.pairwise(bounds)]
        return Judge(self.model, self.weights, ids.tolist(), windows)


def aggregate(
    dst: str | os.PathLike,
    texts: Mapping[str, Text] | None = None,
    *,
    memory: str | int | None = None,
    tokens: int = 49_152,
    sources: Sequence[Source] = SOURCES,
    validate: bool = True,
    refine: bool = False,
    distil: int = 0,
    progress: Progress = lambda stage, done, total: None,
) -> Report:
    """Gives the packed folder `dst` the rungs of `sources` that are worth it, their losses and the curve.

    texts: domain -> text to calibrate on; None: the calibration that is in `dst`.  memory, tokens: as for
    `calibrate`.  validate: measure the choices for VALIDATED in the engine.  refine: measure layers again at
    the whole choice, and take the new losses where they choose better.  distil: steps of distillation of the
    2-bit codes (0: none); if interrupted, the same call goes on where its last checkpoint was.  Raises AggregateError, CalibrationError and StoreError; `dst` is
    then as it was, but for a new calibration and for such checkpoints.
    """
    dst = Path(dst)
    _check_distil(distil, sources)
    report, clock = Report(), _Clock()
    if texts is not None:
        calibrate(
            dst,
            texts,
            memory=memory,
            tokens=tokens,
            progress=lambda done, total: progress("calibrating", done, total),
        )
        clock.note(report, "calibrate")
    if distil:
        source, report.distilled = tuned(dst, DISTILLED, distil, memory=memory, progress=progress)
        sources = [source if x == Rounded(DISTILLED) else x for x in sources]
        clock.note(report, "distil")
    with Workshop(dst, memory=memory, after_choice=bool(distil)) as shop:
        report.tokens = shop.calibration.num_tokens
        with shop.judge() as judge:
            partial = dst / "experts.partial"
            shutil.rmtree(partial, ignore_errors=True)
            try:
                writer, spill = StoreWriter(partial), Spill(partial / "added.bin")
                menus, errors, sensitivities = _layers(shop, judge, spill, sources, progress)
                clock.note(report, "layers")
                losses = losses_of(
                    menus,
                    shop.statistics,
                    errors,
                    sensitivities,
                    super_experts([s.peaks for s in shop.statistics]),
                    shop.full_bytes,
                )
                losses, points = _pruned(losses, menus, report)
                _write_store(shop.weights.store, writer, menus, losses, progress)
                _write_curve(partial, losses, points, report)
                clock.note(report, "curve")
                if validate or refine:
                    # One model at a time: the exact one has done its part.
                    judge.let_go()
                    shop.close()
                    link_model(dst, partial)
                    with Trial(partial, judge, memory=memory) as trial:
                        if refine:
                            losses = _refined(trial, losses, partial, report, progress)
                            clock.note(report, "refine")
                        if validate:
                            _validate(trial, losses, report, progress)
                            clock.note(report, "validate")
                _swap(dst, partial)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(dst / CHECKPOINTS, ignore_errors=True)
    report.levels = losses.levels
    floors = np.flatnonzero(losses.floor)
    first = np.searchsorted(losses.layer, losses.layer[floors])
    report.super_experts = [
        (int(losses.layer[x]), int(x - at)) for x, at in zip(floors, first, strict=True)
    ]
    return report


def _check_distil(steps: int, sources: Sequence[Source]) -> None:
    if steps < 0:
        raise AggregateError(f"aggregate: distil: expected steps >= 0 (0: none), got {steps}")
    if steps and Rounded(DISTILLED) not in sources:
        raise AggregateError(
            f"aggregate: distil tunes the codes of Rounded({DISTILLED}), which is not among sources; add it, "
            "or leave distil at 0"
        )


class _Clock:
    def __init__(self) -> None:
        self.last = time.perf_counter()

    def note(self, report: Report, stage: str) -> None:
        now = time.perf_counter()
        report.seconds[stage] = round(now - self.last, 2)
        self.last = now


def _layers(
    shop: Workshop,
    judge: Judge,
    spill: Spill,
    sources: Sequence[Source],
    progress: Progress,
) -> tuple[list[LayerMenu], list[tuple[np.ndarray, np.ndarray]], list[np.ndarray]]:
    """Makes and measures the rungs of one layer after the other."""
    total = len(shop.statistics)
    menus, errors, sensitivities = [], [], []
    for statistics in shop.statistics:
        progress("layers", statistics.layer_idx, total)
        menu = layer_menu(statistics, sources)
        errors.append(measure_errors(statistics, menu))
        sensitivities.append(measure_sensitivity(judge, menu, *errors[-1]))
        menu.records = spill.put(menu.records)
        for rung in menu.rungs:
            rung.stand_in = _gone
        menus.append(menu)
    progress("layers", total, total)
    return menus, errors, sensitivities


def _gone(expert: int) -> Any:
    raise RuntimeError(
        "the rungs of a layer are not kept once they are measured; read them from the store"
    )


def _pruned(
    losses: Losses, menus: Sequence[LayerMenu], report: Report
) -> tuple[Losses, list[Solution]]:
    """The levels that some point of the curve uses, and those of packing, whose records are there anyway;
    and the points. A level stays for all experts, since planes and bases are worth more in common."""
    points = [solution for _, solution in losses.curve(CURVE)]
    kept = np.array([menus[0].rung(n).mask < 1 << fmt.NUM_RECORDS for n in losses.levels])
    kept[np.unique([point.choice for point in points])] = True
    report.unused = [n for n, k in zip(losses.levels, kept, strict=True) if not k]
    number = np.cumsum(kept) - 1
    return losses.restricted(kept), [replace(p, choice=number[p.choice]) for p in points]


def _write_store(
    store: Store,
    writer: StoreWriter,
    menus: Sequence[LayerMenu],
    losses: Losses,
    progress: Progress,
) -> None:
    masks = {rung.name: rung.mask for rung in menus[0].rungs}
    levels = Levels(losses.levels, tuple(masks[name] for name in losses.levels))
    used = np.bitwise_or.reduce(levels.masks)
    for menu, info in zip(menus, store.layers, strict=True):
        progress("writing", menu.layer, len(menus))
        added = [
            [r if used >> i & 1 else None for i, r in enumerate(own, fmt.NUM_RECORDS)]
            for own in menu.records
        ]
        writer.add_layer(
            info.name,
            fmt.LayerSpec(**{f: getattr(info, f) for f in fmt.LayerSpec.__dataclass_fields__}),
            copied_experts(store, menu.layer),
            added=added,
            # Always another one: payloads may differ where tables do not.
            fingerprint=os.urandom(16),
        )
    progress("writing", len(menus), len(menus))
    manifest = store.manifest
    writer.finish(
        model_type=manifest.model_type,
        source=manifest.source,
        dense_bytes=manifest.dense_bytes,
        levels=levels,
        **manifest.extra,
    )


def _write_curve(partial: Path, losses: Losses, points: Sequence[Solution], report: Report) -> None:
    level = np.stack([solution.choice for solution in points]).astype(np.uint8)
    nbytes = np.array([losses.bytes_of(solution.choice) for solution in points], np.int64)
    order = np.argsort(nbytes, kind="stable")
    expert = np.concatenate([np.arange(n) for n in np.bincount(losses.layer)])
    predicted = np.array([solution.loss for solution in points], np.float32)
    write_losses(
        partial,
        {
            "levels": np.array(losses.levels),
            "layer": losses.layer.astype(np.int32),
            "expert": expert.astype(np.int32),
            "loss": losses.loss.astype(np.float32),
            "use": losses.use.astype(np.float32),
            "floor": losses.floor.astype(np.uint8),
            "curve_fraction": (nbytes[order] / losses.full_bytes).astype(np.float32),
            "curve_level": level[order],
            "curve_loss": predicted[order],
            "curve_bytes": nbytes[order],
        },
    )
    report.curve = [
        {"fraction": float(nbytes[i] / losses.full_bytes), "loss": float(predicted[i])}
        for i in order
    ]


def _refined(
    trial: Trial, losses: Losses, partial: Path, report: Report, progress: Progress
) -> Losses:
    """The losses after a look at the whole choice, and their curve in the store, where they are better."""
    runs = itertools.count(1)
    most = int(losses.layer.max()) + 1 + 2 * len(VALIDATED)

    def kl(choice: np.ndarray) -> float:
        progress("refining", min(next(runs), most), most)
        return trial.measure(choice).kl

    losses, found = refined(losses, kl, anchor=ANCHOR, fractions=VALIDATED)
    progress("refining", most, most)
    report.refined = {
        "kept": found.kept,
        "scale": np.round(found.scale, 4).tolist(),
        "before": {str(f): kl for f, kl in found.before.items()},
        "after": {str(f): kl for f, kl in found.after.items()},
    }
    if found.kept:
        _write_curve(partial, losses, [s for _, s in losses.curve(CURVE)], report)
    return losses


def _validate(trial: Trial, losses: Losses, report: Report, progress: Progress) -> None:
    for number, fraction in enumerate(VALIDATED):
        progress("validating", number, len(VALIDATED))
        try:
            solution = losses.solve(fraction)
        except InfeasibleError:
            continue
        verdict = trial.measure(solution.choice)
        report.predicted.append(
            {
                "fraction": losses.bytes_of(solution.choice) / losses.full_bytes,
                "predicted": solution.loss,
                "measured": verdict.kl,
                "perplexity": verdict.perplexity,
                "perplexity_exact": verdict.perplexity_exact,
            }
        )
    progress("validating", len(VALIDATED), len(VALIDATED))


def _swap(dst: Path, partial: Path) -> None:
    """Puts the new experts folder in the place of the old one."""
    old, now = dst / "experts.old", dst / fmt.EXPERTS_FOLDER
    shutil.rmtree(old, ignore_errors=True)
    now.rename(old)
    (partial / fmt.EXPERTS_FOLDER).rename(now)
    shutil.rmtree(old, ignore_errors=True)
