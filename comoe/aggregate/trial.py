"""A written store in the engine: what a choice of levels costs as the model will run it, in bounded memory."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from comoe.aggregate.judge import Judge, Verdict
from comoe.policy.plan import Plan, Sizes, all_cached, require_room
from comoe.store import format as fmt


class Chosen:
    """A planner that was told: levels uint8 [X], in memory if they fit, else read as they are needed."""

    def __init__(self, levels: np.ndarray) -> None:
        self._levels = np.asarray(levels, np.uint8)

    def least(self, sizes: Sizes, *, exact: bool) -> np.ndarray:
        return self._levels

    def plan(self, sizes: Sizes, pool_bytes: int, *, exact: bool) -> Plan:
        levels, total = self._levels, sizes.total(self._levels)
        if total > pool_bytes:
            require_room(sizes, levels, pool_bytes)
            return all_cached(sizes, levels, pool_bytes)
        held, spare = levels.astype(np.int8), pool_bytes - total
        return Plan(sizes.levels, held, levels, levels, spare, pool_bytes, sizes.chosen(held))


class Trial:
    """A store's model under the budget, to be measured at one choice of levels after another.

    folder: a packed folder whose store has the levels.  judge: of the exact model of the same checkpoint.
    """

    def __init__(self, folder: Path, judge: Judge, *, memory: str | int | None = None) -> None:
        import comoe

        self._judge = judge
        # Nothing may climb: the choice is what is measured.
        self._model = comoe.load(folder, memory=memory, upgrade=False)

    def __enter__(self) -> Trial:
        return self

    def __exit__(self, *error: object) -> None:
        self._model.comoe.close()

    def measure(self, levels: np.ndarray) -> Verdict:
        """levels [X], one of the store's for every expert."""
        self._model.comoe.set_planner(Chosen(levels))
        return self._judge.measure_model(self._model)


def link_model(packed: Path, into: Path) -> None:
    """Makes `into`, which has a store, a packed folder: all other files are those of `packed`."""
    for path in packed.iterdir():
        if path.is_file() and not (into / path.name).exists():
            os.symlink(path.resolve(), into / path.name)
    if not (into / fmt.EXPERTS_FOLDER).is_dir():
        raise FileNotFoundError(f"{into}: no folder {fmt.EXPERTS_FOLDER!r}")
