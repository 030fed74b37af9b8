"""One model's experts at work: binds the store, the engine, the kernels and the policy together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from comoe import _C, memory
from comoe.config import DENSE_BITS, CoMoEConfig, format_bytes, parse_bytes
from comoe.policy.assumed import assumed_losses
from comoe.policy.cache import CachePolicy
from comoe.policy.controller import Controller, Decision
from comoe.policy.curve import Curve, CurvePlanner
from comoe.policy.goal import parse_quality
from comoe.policy.joint import GoalError, JointPlanner, Situation
from comoe.policy.misses import MissRule
from comoe.policy.plan import EvenPlanner, Plan, Planner, Sizes
from comoe.policy.predictor import NoPredictor, Predictor
from comoe.policy.prefetch_gauge import TimedGauge
from comoe.policy.snapshot import Snapshot
from comoe.policy.upgrades import RecentUse, UpgradePolicy
from comoe.runtime.budget import LONG_STEP, Budget, ModelSizes, Step, memory_within
from comoe.runtime.compute import Compute
from comoe.runtime.elsewhere import ExpertsElsewhere
from comoe.runtime.engine import (
    RESIDENT,
    Records,
    RecordTable,
    add_layer,
    kernel_levels,
    open_engine,
    pool_floor,
    slab_bytes,
    store_sizes,
)
from comoe.runtime.kept import Kept
from comoe.runtime.live import Live
from comoe.runtime.missing import MissHandler
from comoe.runtime.network import Network, best_link
from comoe.runtime.parts import Parts
from comoe.runtime.placement import Placement
from comoe.runtime.reader_core import ReaderCore
from comoe.runtime.remote import Remote, fetch_bytes
from comoe.runtime.spec import ExpertsSpec
from comoe.store import Store
from comoe.store.identity import store_id
from comoe.tiers.expert_client import ExpertClient
from comoe.tiers.expert_token import read_token
from comoe.tiers.remote_store import RemoteStore
from comoe_kernels.threads import use_own_threads
from comoe_kernels.unpack import DTYPES

SCRATCH_BYTES = 1_000_000  # of the kernels; disk reads go straight into the pool's pages
RECORD_BYTES = 400  # the engine's tables, per record
UPGRADE_EVERY = 16  # steps between choices of experts that climb; one takes 0.6 ms
FOLLOW_EVERY = 64  # steps between plans for what the text uses
PLANNING_SHARE = 0.01  # of the time that planning for the text may take
KEPT_FREE = 0.01  # share of the machine's memory that is left to others
MOST_PATIENCE = 512  # steps, of the number below
LENT_STEPS = 16  # sizes of the pool between nothing and the plan's for which plans are made while some is lent
CALM_STEPS = 8  # steps without pressure before the pool takes back what it lent


def joint_planner(store: Store, sizes: Sizes, experts_per_token: int) -> JointPlanner:
    """With measured losses if the store was aggregated, else with what its rungs usually cost."""
    losses = store.losses()
    if losses is None:
        return JointPlanner(*assumed_losses(sizes, experts_per_token))
    return JointPlanner(losses["loss"], losses["use"], losses["floor"])


def planner_of(
    store: Store,
    sizes: Sizes,
    config: CoMoEConfig,
    experts_per_token: int,
    *,
    network: bool = False,
) -> Planner:
    """For a goal, and where misses are decided by their cost (network), the joint planner; else by the
    measured curve of an aggregated store, or all alike."""
    by_cost = network and not config.exact
    if by_cost or config.quality is not None or config.latency is not None:
        return joint_planner(store, sizes, experts_per_token)
    losses = store.losses()
    if losses is None:
        return EvenPlanner()
    return CurvePlanner(Curve(losses["curve_level"], losses["curve_loss"]))


class Runtime:
    """The experts of one model: computes them, and keeps what they need within the budget.

    `predictor`, `planner`, `upgrades` and `cache` are the seams for better policies.
    """

    def __init__(
        self,
        store: Store,
        specs: list[ExpertsSpec],
        config: CoMoEConfig,
        sizes: ModelSizes,
        *,
        baseline: int,
        experts_per_token: int = 2,
        predictor: Predictor | None = None,
        planner: Planner | None = None,
        upgrades: UpgradePolicy | None = None,
        cache: CachePolicy | None = None,
        remote: RemoteStore | None = None,
        on_close: Callable[[], None] | None = None,
    ):
        self.store, self.specs, self.config = store, specs, config
        self.upgrades = upgrades or RecentUse([spec.num_experts for spec in specs])
        self._step_began: float | None = None  # of a step whose time the gauge is told
        self._experts_per_token = experts_per_token
        self._snapshot: Snapshot | None = None
        self._follow_at = 0.0  # seconds of perf_counter; not before
        self._reader_core = ReaderCore()
        self._on_close = on_close
        self._lock = threading.RLock()  # one step, or one change of budget, at a time
        self._closed = False
        self._calm, self._patience, self._took_back = 0, CALM_STEPS, False
        self._lent_from: Plan | None = None  # the plan from whose memory some is lent
        self._lent_plans: dict[int, Plan] = {}  # by bytes of pool that are left
        self._step = 0
        self._keeps_freed = True
        self._per_layer = (
            0  # bytes that the pass that runs may take from one layer's experts to the next
        )
        self._kv_held: Callable[[], int] = int  # bytes of the KV cache last seen
        use_own_threads()
        if config.threads:
            _C.set_num_threads(config.threads)

        table = RecordTable(store)
        self.store_sizes = store_sizes(store, table)
        network = remote is not None or config.expert_server is not None
        self.planner = planner or planner_of(
            store, self.store_sizes, config, experts_per_token, network=network
        )
        least = self.planner.least(self.store_sizes, exact=config.exact)
        largest = self.store_sizes.largest(least)
        in_full = self.store_sizes.total(store.levels.exact)
        floor = pool_floor(largest, in_full, store.page_bytes)
        total = config.memory or memory_within(memory.available())
        fixed = SCRATCH_BYTES + RECORD_BYTES * sum(layer.records.size for layer in store.layers)
        fixed += fetch_bytes(table.nbytes) if remote is not None else 0
        self.budget = Budget(total, baseline, sizes, floor, fixed)
        planned = self.budget.planned_pool(config.max_context)
        self._slab_bytes = slab_bytes(
            min(planned, in_full + floor), largest, floor, store.page_bytes
        )
        self.live = Live(
            self.store_sizes, specs, sizes.dense, self._budget_pool(), experts_per_token
        )
        if remote is not None:
            self.live.network = lambda: best_link(remote.sources.links)
        self._away = self._elsewhere() if network and not config.exact else None
        self.controller = self._controller()
        plan = self.controller.plan
        self.engine, first = open_engine(
            store,
            table,
            plan.pool_bytes,
            self._slab_bytes,
            io_threads=config.io_threads,
            direct=config.direct_io,
            verify=config.verify or remote is not None,
            remote=remote is not None,
        )
        self.network = None
        if network and not config.exact:
            sources = None if remote is None else remote.sources
            self.network = Network(self.engine, self.store_sizes, sources, self._away)
        self.records = Records(store, table)
        self.missing = MissHandler(self.engine, self.store_sizes)
        self.remote = remote and Remote(
            self.engine, remote, table, self.store_sizes, self.missing, least, config.exact
        )
        op = _C.MoeOp(self.engine, list(store.levels.masks))
        for layer_idx, (spec, layer) in enumerate(zip(specs, store.layers, strict=True)):
            activation = spec.activation or "silu"
            ids = table.ids[layer_idx]
            add_layer(op, layer, ids, first[layer_idx], activation, spec.alpha, spec.limit)
        self._policy = _C.MoePolicy(self.engine, op, cache is None, self.live.profile.decay)
        self.kept = Kept(self.engine, cache or self._policy, table.ids)
        self._policy.set_tolerance(config.routing_tolerance)
        for layer_idx, bits in enumerate(self.records.bits):
            self._policy.set_bits(layer_idx, bits)
        ends = np.cumsum([spec.num_experts for spec in specs])
        self._used = np.split(self._policy.used(), ends[:-1])  # views: level used + 1 in this step
        parts = Parts(
            config,
            specs,
            self.store_sizes,
            self.engine,
            op,
            self._policy,
            self.records,
            self.kept,
            self.live,
            self.missing,
            self.remote,
            self.network,
        )
        self.placement = Placement(
            parts, self.planner, kernel_levels(store.levels), self.controller.plan
        )
        self.predictor = predictor or NoPredictor()
        self.compute = Compute(parts, self.placement, self.predictor, TimedGauge(), self._used)
        if self.network is not None:
            least = self.planner.least(self.store_sizes, exact=False)
            # Of the coarsest rungs those that the plan asks for: where it holds `exact`, they are not.
            asked = self.placement.base | self.store_sizes.chosen(self.plan.min_level)
            self.network.wait_for(self.store_sizes.chosen(least) & asked, self.plan.pool_bytes)

    @property
    def plan(self) -> Plan:
        """In force now."""
        return self.placement.plan

    def _elsewhere(self) -> ExpertsElsewhere | None:
        """The machine of config.expert_server."""
        if self.config.expert_server is None:
            return None
        client = ExpertClient(self.config.expert_server, read_token(self.config.expert_token_file))
        return ExpertsElsewhere(client, store_id(self.store), self.specs, self.store.levels)

    def experts_forward(
        self,
        layer_idx: int,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Weighted sum of the chosen experts.

        hidden: [T, H] fp32, bf16 or fp16 on the CPU.  top_k_index: int64 [T, K]; an index outside
        [0, E) counts as no expert.  top_k_weights: [T, K] float.  Returns [T, H] like `hidden`.
        Raises RuntimeError once the runtime is closed, and OSError when an expert cannot be read.
        """
        if self._closed:
            raise RuntimeError(
                "experts_forward: this model's experts were closed; load the model again to use it"
            )
        # An encoder runs before its model's own pass begins.
        coming = len(top_k_index) * self.budget.sizes.activations_per_token
        per_layer = max(self._per_layer, coming)
        if per_layer >= LONG_STEP:
            with self._lock:
                self._govern(per_layer, self.engine.stats(), within=True)
        if hidden.device.type != "cpu" or hidden.dtype not in DTYPES:
            raise ValueError(
                "experts_forward: expected hidden states in float32, bfloat16 or float16 on the CPU, "
                f"got {hidden.dtype} on {hidden.device}; load the model with a supported dtype"
            )
        if hidden.stride(-1) != 1:
            hidden = hidden.contiguous()
        index = top_k_index.to(torch.int64).contiguous()
        return self.compute.forward(layer_idx, hidden, index, top_k_weights)

    def begin_step(self, step: Step, kv_held: Callable[[], int] = int) -> None:
        """Called before every forward pass: keeps the promise of memory, and lets experts used last
        climb. kv_held: tells, now and later, the bytes of the KV cache that the pass extends.

        Raises BudgetError, and leaves the model usable, when the pass cannot be kept within `memory`.
        """
        if self._closed:
            return
        with self._lock:
            self._kv_held = kv_held
            self.budget.check(step, kv_held())
            workspace = self.budget.sizes.workspace(step)
            long = step.tokens > 1 and workspace >= LONG_STEP
            self._per_layer = workspace - self.budget.sizes.new_kv(step) if long else 0
            engine = self.engine.stats()
            self.live.note_step(step.tokens, self._used, engine)
            self._observe()
            self._govern(workspace, engine)
            self._keep_freed(not (long and self._lent()))
            self.compute.gauge.note_step(
                engine["prefetch_bytes"],
                engine["prefetch_used_bytes"] + engine["prefetch_joined_bytes"],
            )
            self._step += 1
            self.upgrades.note(self._used)
            if self.config.upgrade and self._step % UPGRADE_EVERY == 0:
                self.placement.upgrade(self.upgrades)
            for used in self._used:
                used[:] = 0
            self.placement.begin_step()
            if self.remote is not None and self.remote.begin_step():
                self.placement.ask_for_plan()
            if not self.plan.resident:
                self._reader_core.begin(step.batch * step.tokens, engine["wait_seconds"])
            alike = step.tokens == 1 and not self.plan.resident
            self._step_began = time.perf_counter() if alike else None

    def end_step(self) -> None:
        """Called after every forward pass, also one that failed."""
        self._reader_core.end()
        if self._step_began is not None:
            self.compute.gauge.note_seconds(time.perf_counter() - self._step_began)
            self._step_began = None

    def set_memory(self, size: str | int) -> str:
        """Changes the budget of a running model; returns the new plan in one line.

        Raises BudgetError (and changes nothing) when the model cannot run in `size`.
        """
        with self._lock:
            before = self.budget.memory
            self.budget.memory = parse_bytes(size)
            try:
                self.budget.require(self.config.max_context, self._kv_held())
                self.controller.set_memory(self._budget_pool())
            except ValueError:
                self.budget.memory = before
                raise
            self.placement.install(self.controller.plan)
            self._govern(0, self.engine.stats(), within=True)
            return self.describe()

    def set_planner(self, planner: Planner) -> None:
        """Another way of planning, from now on. Unlike after other changes, what its first plan lacks is
        waited for. Raises as the planner does, and changes nothing."""
        with self._lock:
            before = self.planner
            self.planner = planner
            try:
                self.controller = self._controller()
            except ValueError:
                self.planner = before
                raise
            self.placement.planner = planner
            self.placement.install(self.controller.plan, rising=False)

    def set_quality(self, quality: str | float | None) -> str:
        """Changes what may be lost: "high", "balanced", "fast", nats per token, or None: nothing is waited
        for. Returns the new plan in one line; raises GoalError, and changes nothing, if it cannot be met."""
        return self._set_goal(lambda: self.controller.set_quality(parse_quality(quality)))

    def set_latency_target(self, seconds: float | None) -> str:
        """Changes how long a token should take at most; None: no target. As set_quality."""
        return self._set_goal(lambda: self.controller.set_latency_target(seconds))

    def set_miss_rule(self, rule: MissRule | None) -> None:
        """Who decides what not to wait for, from now on: a rule of comoe.policy.misses; None: the plan."""
        if self.config.exact and rule is not None:
            raise ValueError("exact weights are always waited for; load the model without exact")
        with self._lock:
            self.placement.own_rule = rule
            self.placement.set_rule()

    def set_routing_tolerance(self, tolerance: float) -> None:
        """Cache-aware routing from now on; see CoMoEConfig.routing_tolerance."""
        replace(self.config, routing_tolerance=tolerance)  # checks it
        self._policy.set_tolerance(tolerance)
        self.compute.routes = tolerance > 0

    def _set_goal(self, change: Callable[[], object]) -> str:
        if self.config.exact:
            raise ValueError(
                "exact weights are always waited for, so quality and latency cannot be chosen; load the "
                "model without exact"
            )
        with self._lock:
            if not self.placement.follows:
                planner = joint_planner(self.store, self.store_sizes, self._experts_per_token)
                self.set_planner(planner)
            change()
            self.placement.install(self.controller.plan)
            return self.describe()

    def _controller(self) -> Controller:
        joint = isinstance(self.planner, JointPlanner)
        if joint:
            away = self._away and self._away.policy
            self.planner.situation = Situation(
                self.config.goal(), self.live.costs(), elsewhere=away
            )
        return Controller(
            self.planner,
            self.store_sizes,
            self._budget_pool(),
            exact=self.config.exact,
            costs=self.live.costs if joint else None,
            goal=self.config.goal() if joint else None,
            reserve=int(KEPT_FREE * memory.total()),
            grain=self._slab_bytes,
        )

    def _budget_pool(self) -> int:
        """Bytes of pool that the budget allows, in whole slabs."""
        pool_bytes = self.budget.planned_pool(self.config.max_context)
        # More than all experts in full, and room to move, is never of use.
        most = (
            self.store_sizes.total(self.store.levels.exact)
            + self.budget.pool_floor
            + self._slab_bytes
        )
        return min(pool_bytes, most) // self._slab_bytes * self._slab_bytes

    def _plan_for(self, pool_bytes: int) -> Plan:
        """The controller's plan, or with less memory for a while what comes nearest to its goal."""
        full = self.controller.plan
        pool_bytes = pool_bytes // self._slab_bytes * self._slab_bytes
        if pool_bytes >= full.pool_bytes:
            return full
        if not self.placement.follows:
            return self._new_plan(pool_bytes)
        # Plans for a goal take long, and much the same is lent again and again.
        if self._lent_from is not full:
            self._lent_from, self._lent_plans = full, {}
        grain = max(full.pool_bytes // LENT_STEPS // self._slab_bytes, 1) * self._slab_bytes
        coarse = pool_bytes // grain * grain
        pool_bytes = coarse if coarse >= self._least_pool() else pool_bytes
        if pool_bytes not in self._lent_plans:
            self._lent_plans[pool_bytes] = self._new_plan(pool_bytes)
        return self._lent_plans[pool_bytes]

    def _new_plan(self, pool_bytes: int) -> Plan:
        try:
            return self.planner.plan(self.store_sizes, pool_bytes, exact=self.config.exact)
        except GoalError as error:
            return error.nearest

    def _observe(self) -> None:
        """Follows what the monitor sees, and the text."""
        snapshot = self.live.monitor.poll()
        decision = None
        if snapshot is not self._snapshot:
            self._snapshot = snapshot
            decision = self.controller.observe(snapshot, self.engine.stats()["mapped_bytes"])
        if self.network is not None:
            decision = self._watch_path(snapshot) or decision
        if self.placement.follows and self._step:
            if self._step % FOLLOW_EVERY == 0:
                decision = self._follow_text() or decision
            elif self._step < FOLLOW_EVERY and self._step & (self._step - 1) == 0:
                self.placement.know_losses()  # gate weights are not known before the first pass
        if decision is not None:
            lent = decision.before is not None and self.plan.pool_bytes < decision.before.pool_bytes
            most = self.plan.pool_bytes if lent else decision.after.pool_bytes
            self.placement.install(self._plan_for(min(most, decision.after.pool_bytes)))

    def _watch_path(self, snapshot: Snapshot) -> Decision | None:
        """Follows the network: another path asks for another plan, and for the most valuable first."""
        reason = self.placement.watch_network()
        if reason is None:
            return None
        if not self.placement.complete and self.placement.follows:
            self.placement.ask_again()
        return self.controller.path_changed(snapshot, reason)

    def _follow_text(self) -> Decision | None:
        begin = time.perf_counter()
        if begin < self._follow_at:
            return None
        self.placement.know_losses()
        decision = self.controller.follow(self.live.profile.use())
        decision = self.controller.heed(self._policy.account()["caution"]) or decision
        end = time.perf_counter()
        self._follow_at = end + (end - begin) / PLANNING_SHARE
        return decision

    def _govern(self, coming: int, stats: dict, *, within: bool = False) -> None:
        """Lends pool memory to the rest of the process, of which `coming` bytes are about to be taken,
        and takes it back once some passes were calm (not `within` one)."""
        planned = self.controller.plan.pool_bytes
        allowed = self._allowed_pool(coming, stats)
        if allowed < self.plan.pool_bytes or (self._lent() and self._step % CALM_STEPS == 0):
            memory.give_back_free()
            allowed = self._allowed_pool(coming, stats)
        least = self._least_pool()
        target = max(min(planned, allowed), least)
        if target < self.plan.pool_bytes:
            # What is lent again and again is not asked back each time: a plan for a goal takes 0.3 s.
            self._patience = (
                min(2 * self._patience, MOST_PATIENCE) if self._took_back else self._patience
            )
            self._calm, self._took_back = 0, False
            # Room for the next steps as well, since each change stops what is read ahead.
            target = max(target - LONG_STEP, least)
            self.placement.install(self._plan_for(target))
        elif target > self.plan.pool_bytes and not within:
            self._calm += 1
            if self._calm >= self._patience:
                self._calm, self._took_back = 0, True
                plan = self._plan_for(target)
                if plan is not self.plan:
                    self.placement.install(plan)

    def _least_pool(self) -> int:
        """Bytes of pool, in whole slabs, that the present plan can work with."""
        slabs = -(-self.store_sizes.largest(self.plan.min_level) // self._slab_bytes)
        return max(slabs * self._slab_bytes, self.engine.minimum_budget())

    def _lent(self) -> bool:
        return self.plan.pool_bytes < self.controller.plan.pool_bytes

    def _keep_freed(self, keep: bool) -> None:
        if keep != self._keeps_freed:
            self._keeps_freed = keep
            memory.keep_freed(keep)

    def _allowed_pool(self, coming: int, stats: dict) -> int:
        return self.budget.allowed_pool(memory.rss(), stats["resident_bytes"], coming)

    def describe(self) -> str:
        """What was decided, in one line."""
        stats = self.store_sizes
        held = min(self.plan.pool_bytes, stats.total(self.plan.want_level))
        bits = DENSE_BITS[self.config.dense]
        return (
            f"memory {format_bytes(self.budget.memory)}: dense {format_bytes(self.budget.sizes.dense)}"
            f"{f' in {bits} bits' if bits else ''}, "
            f"experts {format_bytes(held)} of {format_bytes(stats.total(self.store.levels.exact))}; {self.plan.describe()}; "
            f"store in {self.store.folder if self.remote is None else self.remote.describe()}"
        )

    def stats(self) -> dict:
        """Figures so far; sizes in bytes, times in seconds."""
        engine, policy = self.engine.stats(), self._policy.counters()
        return {
            "memory": self.budget.memory,
            "baseline": self.budget.baseline,
            "peak": memory.peak_rss(),
            "dense_bytes": self.budget.sizes.dense,
            "expert_bytes": int(self.records.payload_bytes(self.engine.resident() == RESIDENT)),
            "expert_bytes_exact": self.records.exact_bytes(),
            "bits_per_weight": policy["bits"] / max(policy["uses"], 1),
            "bytes_read": self._bytes_read(engine),
            # Computed without waiting, at the level wanted or a coarser one that the plan allows.
            "hits": engine["hits"] + engine["partial_hits"],
            "misses": engine["misses"],
            "prefetch": {
                **self.compute.gauge.stats(),
                "recall": policy["guessed_used"] / max(policy["used"], 1),
                "precision": policy["guessed_used"] / max(policy["guessed"], 1),
            },
            # Experts of which something was missing, by what was decided about them.
            "decided": {
                name: policy[name] + getattr(self.missing, name)
                for name in ("waited", "coarser", "skipped")
            }
            | {"replaced": policy["replaced"]}
            | {"sent": self.missing.sent},
            # Nats per token, as calibration expects of what was really used.
            "loss": {"planned": self.plan.loss, **self._policy.account()},
            "plan": self.plan.describe(),
            "engine": engine,
        } | {
            name: part.stats()
            for name, part in (("remote", self.remote), ("network", self.network))
            if part is not None
        }

    def _bytes_read(self, engine: dict) -> dict[str, int]:
        if self.remote is None:
            return {"disk": engine["bytes_read"]}
        network = engine["remote_bytes"]
        return {"network": network, "disk": engine["bytes_read"] - network}

    def wait_ready(self, timeout: float = 600.0) -> None:
        """Returns when everything that the plan wants resident has been read."""
        self.engine.wait_idle(timeout)

    def close(self) -> None:
        """Gives all memory back; the model cannot compute afterwards. May be called twice."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._keep_freed(True)
                self.engine.close()
                if self.network is not None:
                    self.network.close()
                if self.remote is not None:
                    self.remote.close()
                if self._on_close:
                    self._on_close()
