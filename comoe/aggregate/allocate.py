"""From rungs to a plan: the loss of every rung of every expert in nats, and the best choice for a size.

    loss[e, level] = gated error of the expert at the level * sensitivity of its layer to that level

The gated error is the mean over held-out tokens of g^2 ||f(x) - f'(x)||^2. The sensitivity is KL per unit
of it, measured on the same tokens with all experts of the layer at the level and everything else exact.
Kinds of rungs differ: what merging does to an output is not noise, and costs more per unit. Levels that
are not tried (finer ones, whose KL drowns in rounding, and the packer's own codes) take the sensitivity
of those of their kind, interpolated in the logarithm of the error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from comoe.aggregate.candidates import LayerMenu
from comoe.aggregate.judge import Judge
from comoe.aggregate.statistics import LayerStatistics
from comoe.policy.solver import InfeasibleError, Problem, Solution, solve

FALLBACK = ("2", "4")  # tried where no coded rung asks to be
LEAST_PROBED = 3e-3  # relative error; below it the KL is that of float32 against bfloat16
FLOOR = "8"  # super experts never go below


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

    def restricted(self, kept: np.ndarray) -> Losses:
        """The same with the levels of `kept` bool [L] alone, which has those that are floors."""
        number = np.cumsum(kept) - 1
        return replace(
            self,
            levels=tuple(np.array(self.levels)[kept].tolist()),
            floor=number[self.floor] * (self.floor > 0),
            **{name: getattr(self, name)[:, kept] for name in ("loss", "own", "shared", "error")},
        )

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
            if rung.own[expert] < 0:
                continue
            stand_in = rung.stand_in(expert)
            error[expert, number] = (
                0.0 if stand_in is None else statistics.gated_error(expert, stand_in)
            )
    return error, energy


def probed(menu: LayerMenu, relative: np.ndarray) -> list[int]:
    """Rungs to try in the whole model; relative: error / energy of each, over all experts."""
    wanted = [rung.probe for rung in menu.rungs]
    if not any(w for w, rung in zip(wanted, menu.rungs, strict=True) if rung.kind == "coded"):
        wanted = [rung.probe or rung.name in FALLBACK for rung in menu.rungs]
    return [i for i, want in enumerate(wanted) if want and relative[i] >= LEAST_PROBED]


def measure_sensitivity(
    judge: Judge,
    menu: LayerMenu,
    error: np.ndarray,
    energy: np.ndarray,
    on_trial: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """KL per unit of gated error of each rung of a layer, float64 [L]."""
    total = np.nansum(error, axis=0)
    relative = total / max(float(energy.sum()), 1e-30)
    tried = probed(menu, relative)
    slope = np.full(len(menu.rungs), np.nan)
    for i in tried:
        rung = menu.rungs[i]
        # An expert that lacks the rung stays exact; its error is not in the sum either.
        stand_ins = [rung.stand_in(e) if own >= 0 else None for e, own in enumerate(rung.own)]
        verdict = judge.measure({menu.layer: stand_ins.__getitem__})
        slope[i] = max(verdict.kl, 1e-12) / max(total[i], 1e-30)
        on_trial()
    return interpolated(slope, relative, [rung.kind for rung in menu.rungs])


def interpolated(slope: np.ndarray, relative: np.ndarray, kinds: Sequence[str]) -> np.ndarray:
    """slope [L] with its nans filled: from the rungs of the same kind, or from all where none was tried.

    Where none at all could be, which is a layer that does nothing, 1: its errors are 0 anyway.
    """
    known, filled = np.isfinite(slope), slope.copy()
    if not known.any():
        return np.ones_like(slope)
    for i in np.flatnonzero(~known):
        same = known & np.array([kind == kinds[i] for kind in kinds])
        points = np.flatnonzero(same if same.any() else known)
        points = points[np.argsort(relative[points])]
        at = np.log(max(relative[i], 1e-12))
        filled[i] = np.exp(np.interp(at, np.log(relative[points]), np.log(slope[points])))
    return filled


def losses_of(
    menus: Sequence[LayerMenu],
    statistics: Sequence[LayerStatistics],
    errors: Sequence[tuple[np.ndarray, np.ndarray]],
    sensitivities: Sequence[np.ndarray],
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
    for menu, (error, _), sensitivity in zip(menus, errors, sensitivities, strict=True):
        error = error[:, order]
        parts["layer"].append(np.full(len(error), menu.layer))
        parts["error"].append(error)
        parts["loss"].append(error * sensitivity[order])
        parts["own"].append(np.stack([menu.rungs[i].own for i in order], 1))
        shared = np.full((*error.shape, 1), -1)
        places: dict[int, int] = {}  # of shared_bytes that were seen: rungs may stand on one base
        for column, i in enumerate(order):
            rung = menu.rungs[i]
            if rung.shared is not None:
                if id(rung.shared_bytes) not in places:
                    places[id(rung.shared_bytes)] = base
                    shared_bytes.append(rung.shared_bytes)
                    base += len(rung.shared_bytes)
                at = places[id(rung.shared_bytes)]
                shared[:, column, 0] = np.where(rung.shared >= 0, at + rung.shared, -1)
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
