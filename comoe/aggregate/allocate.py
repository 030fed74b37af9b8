"""From rungs to a plan: the loss of every rung of every expert in nats, and the best choice for a size.

    loss[e, level] = gated error of the level * sensitivity of the layer at an error of that size

The gated error is the mean over held-out tokens of g^2 ||f(x) - f'(x)||^2. The sensitivity, KL per unit of
it, is measured with all experts of one layer at 2 and at 4 bits and everything else exact, and is
interpolated in the logarithm of the relative error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from comoe.aggregate.candidates import LayerMenu, Packed, layer_menu
from comoe.aggregate.judge import Judge, Verdict
from comoe.aggregate.statistics import LayerStatistics
from comoe.policy.solver import InfeasibleError, Problem, Solution, solve

PROBES = ("2", "4")  # rungs whose damage is measured for each layer
FLOOR = "8"  # super experts never go below


@dataclass(frozen=True)
class Sensitivity:
    """KL per unit of a layer's gated error, at some relative errors (ascending)."""

    relative: np.ndarray  # [n]
    kl_per_error: np.ndarray  # [n]

    def at(self, relative: np.ndarray) -> np.ndarray:
        x = np.log(np.maximum(relative, 1e-12))
        return np.exp(np.interp(x, np.log(self.relative), np.log(self.kl_per_error)))


@dataclass(frozen=True)
class Losses:
    """Tables over all experts of all layers in order, X of them, and L levels from coarse to fine.

    loss: float64 [X, L] nats per token, nan where there is no such level.  own: int64 [X, L] bytes of its
    own; shared: int64 [X, L, M] indices into shared_bytes, or -1.  error: float64 [X, L] gated error.
    energy, use: float64 [X].  floor: int64 [X].  full_bytes: bf16 bytes of all routed experts.
    """

    levels: tuple[str, ...]
    layer: np.ndarray
    loss: np.ndarray
    own: np.ndarray
    shared: np.ndarray
    shared_bytes: np.ndarray
    error: np.ndarray
    energy: np.ndarray
    use: np.ndarray
    floor: np.ndarray
    full_bytes: int

    def bytes_of(self, choice: np.ndarray) -> int:
        """Bytes of a level for every expert, shared ones once."""
        rows = np.arange(len(choice))
        ids = np.unique(self.shared[rows, choice])
        return int(self.own[rows, choice].sum() + self.shared_bytes[ids[ids >= 0]].sum())

    def only(self, names: Sequence[str]) -> np.ndarray:
        """bool [L]: the named levels."""
        return np.isin(self.levels, names)

    def solve(
        self,
        fraction: float,
        *,
        levels: Sequence[str] | None = None,
        start: np.ndarray | None = None,
    ) -> Solution:
        """The best levels within `fraction` of full_bytes; of the named levels only, if given."""
        loss = self.loss.copy()
        loss[np.arange(loss.shape[1])[None] < self.floor[:, None]] = np.nan
        if levels is not None:
            loss[:, ~self.only(levels)] = np.nan
        problem = Problem(
            loss,
            self.own[None].astype(float),
            np.array([fraction * self.full_bytes]),
            ("expert bytes",),
            shared=self.shared,
            shared_cost=self.shared_bytes[None].astype(float),
        )
        return solve(problem, start)

    def curve(self, fractions: Sequence[float]) -> list[tuple[float, Solution]]:
        """Solutions for the fractions that can be met, ascending, none with more loss than one below."""
        found: list[tuple[float, Solution]] = []
        for fraction in sorted(fractions):
            try:
                solution = self.solve(fraction)
            except InfeasibleError:
                continue
            if found and solution.loss > found[-1][1].loss:
                solution = found[-1][1]
            found.append((fraction, solution))
        return found


def measure_errors(statistics: LayerStatistics, menu: LayerMenu) -> tuple[np.ndarray, np.ndarray]:
    """Gated error of every rung, float64 [E, L] (nan: no such rung), and the energy [E]."""
    num_experts = statistics.spec.num_experts
    error = np.full((num_experts, len(menu.rungs)), np.nan)
    energy = np.zeros(num_experts)
    for expert in range(num_experts):
        energy[expert] = statistics.gated_energy(expert)
        for number, rung in enumerate(menu.rungs):
            stand_in = rung.stand_in(expert)
            if rung.own[expert] < 0:
                continue
            error[expert, number] = (
                0.0 if stand_in is None else statistics.gated_error(expert, stand_in)
            )
    return error, energy


def measure_sensitivities(
    judge: Judge, layers: Sequence[LayerStatistics], on_trial: Callable[[], None] = lambda: None
) -> list[Sensitivity]:
    """KL per unit of gated error of every layer, from PROBES of what packing wrote."""
    found = []
    for statistics in layers:
        menu = layer_menu(statistics, [Packed()])
        points = []
        energy = sum(statistics.gated_energy(e) for e in range(statistics.spec.num_experts))
        for name in PROBES:
            stand_in = menu.rung(name).stand_in
            experts = [stand_in(e) for e in range(statistics.spec.num_experts)]
            error = sum(statistics.gated_error(e, x) for e, x in enumerate(experts))
            verdict = judge.measure({statistics.layer_idx: experts.__getitem__})
            points.append((error / max(energy, 1e-30), max(verdict.kl, 1e-12) / max(error, 1e-30)))
            on_trial()
        points.sort()
        relative, slope = np.array(points).T
        found.append(Sensitivity(relative, slope))
    return found


def losses_of(
    menus: Sequence[LayerMenu],
    statistics: Sequence[LayerStatistics],
    errors: Sequence[tuple[np.ndarray, np.ndarray]],
    sensitivities: Sequence[Sensitivity],
    super_experts: Sequence[np.ndarray],
    full_bytes: int,
) -> Losses:
    """The tables; levels ordered by their mean bytes, which is what coarse and fine mean."""
    names = [rung.name for rung in menus[0].rungs]
    mean_bytes = [
        np.mean([_mean_bytes(menu.rungs[i]) for menu in menus]) for i in range(len(names))
    ]
    order = np.argsort(mean_bytes, kind="stable")
    parts: dict[str, list] = {k: [] for k in ("layer", "loss", "own", "shared", "error")}
    shared_bytes: list[np.ndarray] = []
    base = 0
    for menu, (error, energy), sensitivity in zip(menus, errors, sensitivities, strict=True):
        error = error[:, order]
        relative = error / np.maximum(energy, 1e-30)[:, None]
        parts["layer"].append(np.full(len(error), menu.layer))
        parts["error"].append(error)
        parts["loss"].append(np.where(error == 0, 0.0, error * sensitivity.at(relative)))
        parts["own"].append(np.stack([menu.rungs[i].own for i in order], 1))
        shared = np.full((*error.shape, 1), -1)
        for column, i in enumerate(order):
            rung = menu.rungs[i]
            if rung.shared is not None:
                shared[:, column, 0] = np.where(rung.shared >= 0, base + rung.shared, -1)
                shared_bytes.append(rung.shared_bytes)
                base += len(rung.shared_bytes)
        parts["shared"].append(shared)
    tables = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    tables["loss"] = np.maximum(tables["loss"], 0.0)
    levels = tuple(names[i] for i in order)
    is_super = np.concatenate(list(super_experts))
    return Losses(
        levels=levels,
        shared_bytes=np.concatenate(shared_bytes) if shared_bytes else np.zeros(0, np.int64),
        energy=np.concatenate([energy for _, energy in errors]),
        use=np.concatenate([s.use for s in statistics]),
        floor=np.where(is_super, levels.index(FLOOR), 0),
        full_bytes=full_bytes,
        **tables,
    )


def _mean_bytes(rung) -> float:
    shared = 0 if rung.shared_bytes is None else int(rung.shared_bytes.sum())
    return (float(np.maximum(rung.own, 0).sum()) + shared) / len(rung.own)


def judge_choice(
    judge: Judge, menus: Sequence[LayerMenu], losses: Losses, choice: np.ndarray
) -> Verdict:
    """Measures a choice of levels for all experts in the whole model."""
    layers = {}
    for menu in menus:
        mine = choice[losses.layer == menu.layer]
        experts = [
            menu.rung(losses.levels[level]).stand_in(e) for e, level in enumerate(mine.tolist())
        ]
        layers[menu.layer] = experts.__getitem__
    return judge.measure(layers)
