"""Which experts are held, at which levels, and what is asked for next: makes a plan true."""

from __future__ import annotations

import numpy as np

from comoe.policy.joint import JointPlanner
from comoe.policy.misses import MissRule
from comoe.policy.plan import Plan, Planner
from comoe.policy.upgrades import UpgradePolicy
from comoe.runtime.engine import ABSENT, PREFETCH, RESIDENT, UPGRADE
from comoe.runtime.missing import native_rule
from comoe.runtime.parts import Parts
from comoe_kernels.expert_ffn import prefill_rows


class Placement:
    """The plan in force, and what follows from it for each layer.

    `planner` is the one that made the plan: its losses order what is asked for and decide about misses.
    kernel_levels: int [levels], the rung whose kernels a level needs.
    """

    def __init__(self, parts: Parts, planner: Planner, kernel_levels: np.ndarray, plan: Plan):
        self.parts, self.planner = parts, planner
        self._kernel_levels = kernel_levels
        # Levels in force while a better plan is being loaded.
        self._rising: np.ndarray | None = None
        self.own_rule: MissRule | None = None  # somebody's, instead of the plan's
        self.network_rule: MissRule | None = None  # beside the plan's; None: nothing is missing
        self.complete = False  # all that the plan holds is here, so that nothing can be missing
        self.plan = plan
        self.install(plan)

    @property
    def follows(self) -> bool:
        """Whether plans are made for the text at hand."""
        return isinstance(self.planner, JointPlanner)

    def install(self, plan: Plan, *, rising: bool = True) -> None:
        """Makes `plan` true: levels at once, then memory given back or taken, then what to load. rising:
        experts that rise are computed as before until all has come, so that nothing waits for an upgrade.
        """
        parts = self.parts
        before, self.plan = self.plan, plan
        self.complete = False
        self.min_level = parts.sizes.of_layer(plan.min_level)
        self.want_level = parts.sizes.of_layer(plan.want_level)
        rises = rising and plan.resident and before is not plan and before.resident
        self._rising = np.minimum(before.min_level, plan.min_level) if rises else None
        self._set_levels()
        base = plan.base
        aimed = kept = base | parts.sizes.chosen(plan.aimed)
        # What is above the plan stays only while nothing of the plan is missing: it could stand in the
        # way, since speculation spares what has just come.
        if plan.resident and self.has(base):
            kept = aimed | parts.sizes.chosen(plan.want_level)
        for kind in (PREFETCH, UPGRADE):
            parts.engine.cancel(kind)
        parts.engine.evict(np.flatnonzero(~kept).astype(np.int32))
        self._set_values(base)
        self.base = base
        parts.engine.forget_largest_need()
        parts.engine.set_budget(plan.pool_bytes)
        # Then, until the cache knows better, whatever fits of what the plan aims at.
        self.ask_for_plan()
        if parts.remote is not None:
            parts.remote.note_plan(base, aimed, parts.live.profile.use())
        self.set_rule()

    def begin_step(self) -> None:
        """Before a pass: what rose is used once all of it has come."""
        if self._rising is not None and self.has(self.base):
            self._rising = None
            self._set_levels()

    def watch_network(self) -> str | None:
        """What has changed on the path to the other machines, or None; what is missing then has its rule."""
        network = self.parts.network
        reason = network.look()
        self.complete = self.plan.resident and self.has(self.base)
        ruled = self.complete or self.own_rule is not None
        self.network_rule = None if ruled else network.rule
        return reason

    def ask_for_plan(self) -> None:
        """Asks for what the plan holds and what it aims at: from afar the most valuable increments first."""
        parts = self.parts
        if parts.network is None or not self.follows:
            aimed = parts.sizes.chosen(self.plan.aimed)
            parts.engine.request(parts.records.in_order(self.base), UPGRADE)
            parts.engine.request(parts.records.in_order(aimed & ~self.base), UPGRADE)
            return
        before = np.maximum(self.planner.use, 1e-9)
        scale = np.clip(parts.live.profile.use() / before, 0.1, 10.0)
        ids = parts.network.order(self.planner.loss, scale, self.plan.aimed)
        held = self.base[ids]
        parts.engine.request(ids[held], UPGRADE)
        parts.engine.request(ids[~held], UPGRADE)

    def ask_again(self) -> None:
        """As ask_for_plan, after dropping what was asked for in another order."""
        self.parts.engine.cancel(UPGRADE)
        self.ask_for_plan()

    def know_text(self) -> None:
        self.parts.live.profile.know(*self.parts.policy.profile())

    def know_losses(self) -> None:
        """What uses lose, by the gate weights of the text at hand."""
        self.know_text()
        tables = self.parts.live.losses(self.planner.loss, self.planner.use)
        self.parts.policy.set_losses(*tables)

    def set_rule(self) -> None:
        """What the plan in force says about misses, unless somebody else's rule decides."""
        rule = None
        parts = self.parts
        if self.follows and self.own_rule is None:
            self.know_text()
            tables = (self.plan, self.planner.loss, self.planner.use)
            if parts.network is None:
                rule = parts.live.rule(*tables)
            else:
                self.network_rule = parts.network.new_rule(parts.live, *tables)
        parts.policy.set_plan(not self.plan.resident, rule and native_rule(rule), self.follows)
        if self.follows:
            self.know_losses()
        parts.policy.set_loss_limit(self.plan.loss_limit, 1.0 / self.plan.caution)

    def has(self, records: np.ndarray) -> bool:
        """Whether all records where bool [ids] is true are resident."""
        return bool((self.parts.engine.resident()[records] == RESIDENT).all())

    def upgrade(self, upgrades: UpgradePolicy) -> None:
        """Values the records above the plan's levels by use, and asks for those of the best experts:
        one is read only if it is worth more than what it pushes out. What the plan itself lacks, because
        there was no room when it was asked for, goes first."""
        if not self.plan.resident:
            return
        engine, records = self.parts.engine, self.parts.records
        missing = self.base & (engine.resident() == ABSENT)
        if missing.any():
            if self.parts.network is None:
                engine.request(records.in_order(missing), UPGRADE)
            else:
                self.ask_for_plan()
        for layer_idx, experts, values in upgrades.choose():
            low, high = (level[layer_idx][experts] for level in (self.min_level, self.want_level))
            ids, which = records.above(layer_idx, experts, low, high)
            # What is another expert's least is worth more; of what several climb to, the best counts.
            which, ids = which[~self.base[ids]], ids[~self.base[ids]]
            if ids.size == 0:
                continue
            ids, first, group = np.unique(ids, return_index=True, return_inverse=True)
            best = np.zeros(ids.size)
            np.maximum.at(best, group.ravel(), values[which])
            order = np.argsort(first)  # best experts first
            ids = ids[order]
            engine.set_value(ids, best[order].astype(np.float32))
            engine.request(ids, UPGRADE)

    def _set_values(self, base: np.ndarray) -> None:
        """Where all is held, what is above the plan gets its value from `upgrade`; else from the cache."""
        if self.plan.resident:
            everything = np.arange(self.parts.records.count, dtype=np.int32)
            self.parts.engine.set_value(everything, base.astype(np.float32))
        else:
            self.parts.kept.hold(base)

    def _set_levels(self) -> None:
        rising = None if self._rising is None else self.parts.sizes.of_layer(self._rising)
        rows = []
        self.low = list(self.min_level if rising is None else rising)  # that compute may start at
        for layer_idx, low in enumerate(self.min_level):
            self.parts.op.set_levels(layer_idx, self.low[layer_idx], self.want_level[layer_idx])
            most = int(np.bincount(self._kernel_levels[low]).argmax())
            rows.append(prefill_rows(most))
        self.prefill_rows = rows  # at once: a pass may be running
