"""One model's experts at work: binds the store, the engine, the kernels and the policy together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from comoe import _C, memory
from comoe.config import CoMoEConfig, format_bytes, parse_bytes
from comoe.policy.assumed import assumed_losses
from comoe.policy.cache import CachePolicy
from comoe.policy.controller import Controller, Decision
from comoe.policy.curve import Curve, CurvePlanner
from comoe.policy.goal import parse_quality
from comoe.policy.joint import GoalError, JointPlanner, Situation
from comoe.policy.misses import MissRule
from comoe.policy.plan import EvenPlanner, Plan, Planner, Sizes
from comoe.policy.predictor import NoPredictor, Predictor, PrefetchGauge
from comoe.policy.prefetch_gauge import TimedGauge
from comoe.policy.snapshot import Snapshot
from comoe.policy.upgrades import RecentUse, UpgradePolicy
from comoe.runtime.budget import EXPERT_ROWS, LONG_STEP, Budget, ModelSizes, Step
from comoe.runtime.elsewhere import ExpertsElsewhere
from comoe.runtime.engine import (
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
from comoe.runtime.missing import MissHandler, native_rule
from comoe.runtime.network import Network, best_link
from comoe.runtime.prefill import forward_unpacked
from comoe.runtime.reader_core import ReaderCore
from comoe.runtime.remote import Remote, fetch_bytes
from comoe.runtime.spec import ExpertsSpec
from comoe.store import Store
from comoe.store.identity import store_id
from comoe.tiers.expert_client import ExpertClient
from comoe.tiers.expert_token import read_token
from comoe.tiers.remote_store import RemoteStore
from comoe_kernels.expert_ffn import prefill_rows
from comoe_kernels.threads import use_own_threads
from comoe_kernels.unpack import DTYPES

PREFETCH, UPGRADE = 1, 2  # classes of transfers
ABSENT, RESIDENT = 0, 2  # states of a record
SCRATCH_BYTES = 1_000_000  # of the kernels; disk reads go straight into the pool's pages
RECORD_BYTES = 400  # the engine's tables, per record
UPGRADE_EVERY = 16  # steps between choices of experts that climb; one takes 0.6 ms
FOLLOW_EVERY = 64  # steps between plans for what the text uses
PLANNING_SHARE = 0.01  # of the time that planning for the text may take
KEPT_FREE = 0.01  # share of the machine's memory that is left to others
NATIVE_GATE_TOKENS = 8  # more are a product for torch
GIVING_UP = 5  # times that a layer is computed anew because what it waited for did not come
_NONE = np.empty(0, np.int64)
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
        self.predictor = predictor or NoPredictor()
        self.upgrades = upgrades or RecentUse([spec.num_experts for spec in specs])
        self.gauge: PrefetchGauge = TimedGauge()
        self._step_began: float | None = None  # of a step whose time the gauge is told
        self._rule: MissRule | None = None
        self._experts_per_token = experts_per_token
        self._rising: np.ndarray | None = (
            None  # levels in force while a better plan is being loaded
        )
        self._snapshot: Snapshot | None = None
        self._follow_at = 0.0  # seconds of perf_counter; not before
        self._reader_core = ReaderCore()
        self._on_close = on_close
        self._lock = threading.RLock()  # one step, or one change of budget, at a time
        self._closed = False
        self._calm = 0
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
        total = memory.available() if config.memory is None else config.memory
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
        self.controller = self._controller()
        self.plan = self.controller.plan
        self.engine, first = open_engine(
            store,
            table,
            self.plan.pool_bytes,
            self._slab_bytes,
            io_threads=config.io_threads,
            direct=config.direct_io,
            verify=config.verify or remote is not None,
            remote=remote is not None,
        )
        self.network = None
        if network and not config.exact:
            sources = None if remote is None else remote.sources
            self.network = Network(self.engine, self.store_sizes, sources, self._elsewhere())
        self._complete = False  # all that the plan holds is here, so that nothing can be missing
        # In force beside the plan; None: nothing is missing.
        self._network_rule: MissRule | None = None
        self.records = Records(store, table)
        self.missing = MissHandler(self.engine, self.store_sizes)
        self.remote = remote and Remote(
            self.engine, remote, table, self.store_sizes, self.missing, least, config.exact
        )
        self._op = _C.MoeOp(self.engine, list(store.levels.masks))
        for layer_idx, (spec, layer) in enumerate(zip(specs, store.layers, strict=True)):
            activation = spec.activation or "silu"
            ids = table.ids[layer_idx]
            add_layer(self._op, layer, ids, first[layer_idx], activation, spec.alpha, spec.limit)
        self._policy = _C.MoePolicy(self.engine, self._op, cache is None, self.live.profile.decay)
        self.kept = Kept(self.engine, cache or self._policy, table.ids)
        self._policy.set_tolerance(config.routing_tolerance)
        self._routes = config.routing_tolerance > 0  # by what is resident
        for layer_idx, bits in enumerate(self.records.bits):
            self._policy.set_bits(layer_idx, bits)
        ends = np.cumsum([spec.num_experts for spec in specs])
        self._used = np.split(self._policy.used(), ends[:-1])  # views: level used + 1 in this step
        self._kernel_levels = kernel_levels(store.levels)
        self._install(self.plan)
        if self.network is not None and not self._rule:
            least = self.planner.least(self.store_sizes, exact=False)
            # Of the coarsest rungs those that the plan asks for: where it holds `exact`, they are not.
            asked = self._base | self.store_sizes.chosen(self.plan.min_level)
            self.network.wait_for(self.store_sizes.chosen(least) & asked, self.plan.pool_bytes)

    def _elsewhere(self) -> ExpertsElsewhere | None:
        """The machine of config.expert_server."""
        if self.config.expert_server is None:
            return None
        client = ExpertClient(self.config.expert_server, read_token(self.config.expert_token_file))
        return ExpertsElsewhere(client, store_id(self.store), self.specs, self.store.levels)

    # ---- computing ------------------------------------------------------------------------------

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
        tokens = len(top_k_index)
        # An encoder runs before its model's own pass begins.
        per_layer = max(self._per_layer, tokens * self.budget.sizes.activations_per_token)
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
        local, low, sent = self._face_misses(layer_idx, index, top_k_weights)
        call = None
        if sent.size:
            call = self.network.away.send(layer_idx, hidden, index, top_k_weights, sent)
        if self.remote is None or self.config.exact or self._complete:
            out = self._compute(layer_idx, hidden, local, top_k_weights, low)
        else:
            out = self._compute_from_afar(layer_idx, hidden, local, top_k_weights, low)
        if call is not None:
            other = self.network.away.result(call, tokens)
            if other is None:
                out += self._compute_here(layer_idx, hidden, index, top_k_weights, sent)
            else:
                out = (out.float() + other).to(out.dtype)
        return out

    def _compute_from_afar(
        self,
        layer_idx: int,
        hidden: torch.Tensor,
        index: torch.Tensor,
        top_k_weights: torch.Tensor,
        low: np.ndarray | None,
    ) -> torch.Tensor:
        """As `_compute`, without waiting for what cannot come in time."""
        want = self._want_level[layer_idx]
        rule = low is not None
        low = self._low[layer_idx] if low is None else low
        for left in reversed(range(GIVING_UP)):
            faced = self.remote.face(layer_idx, index.numpy(), low, want, rule=rule)
            if faced is None:
                return self._compute(layer_idx, hidden, index, top_k_weights, low)
            try:
                with self.remote.waiting(faced[2]):
                    chosen = torch.from_numpy(faced[0])
                    return self._compute(layer_idx, hidden, chosen, top_k_weights, faced[1])
            except OSError as error:
                if not left or not self.remote.gave_up(error):
                    raise
                self.network.late()
                rule = False

    def _compute_here(
        self,
        layer_idx: int,
        hidden: torch.Tensor,
        index: torch.Tensor,
        top_k_weights: torch.Tensor,
        only: np.ndarray,
    ) -> torch.Tensor:
        """Of experts `only` int64 [n], with nothing but what is here."""
        want = self._want_level[layer_idx]
        found, low = self.missing.without_waiting(layer_idx, index.numpy(), only, want)
        index = torch.from_numpy(found)
        if self.remote is None:
            return self._compute(layer_idx, hidden, index, top_k_weights, low)
        return self._compute_from_afar(layer_idx, hidden, index, top_k_weights, low)

    def _compute(
        self,
        layer_idx: int,
        hidden: torch.Tensor,
        index: torch.Tensor,
        top_k_weights: torch.Tensor,
        low: np.ndarray | None,
    ) -> torch.Tensor:
        """On this machine. low: uint8 [E] where compute may start; None: as the plan's rule decides."""
        spec = self.specs[layer_idx]
        tokens, k = index.shape
        weights = top_k_weights.to(torch.float32).contiguous()
        routing = (index.data_ptr(), weights.data_ptr(), tokens, k)
        guesses = self._guess(layer_idx, hidden)
        rows = tokens * k / min(spec.num_experts, max(tokens * k, 1))
        part = max(EXPERT_ROWS // (4 * k * (spec.hidden + spec.intermediate)), 1)
        # Parts would read missing experts again, so there all tokens go through one expert at a time.
        at_once = tokens <= part or self.plan.resident
        if spec.runs_in_torch or rows >= self._prefill_rows[layer_idx] or not at_once:
            self._policy.note_routing(layer_idx, *routing)
            if low is None:
                decided = self._policy.decide(layer_idx, *routing)
                index, low = (
                    (torch.from_numpy(decided[0]), decided[1]) if decided else (index, None)
                )
            if any(gate for _, _, gate in guesses):
                guesses = self._predict(layer_idx, hidden)
            ahead = self._policy.read_ahead(layer_idx, guesses)
            used = np.zeros(spec.num_experts, np.uint8)
            out = forward_unpacked(
                self._op, layer_idx, spec, hidden, index, top_k_weights, used, ahead, low
            )
            self._policy.ran(layer_idx, used)
        else:
            out = torch.empty((tokens, spec.hidden), dtype=hidden.dtype)
            self._policy.step(
                self._op,
                layer_idx,
                hidden.data_ptr(),
                DTYPES[hidden.dtype],
                hidden.stride(0),
                index.data_ptr(),
                weights.data_ptr(),
                tokens,
                k,
                out.data_ptr(),
                hidden.dtype != torch.float32 and top_k_weights.dtype == hidden.dtype,
                part,
                low,
                guesses,
                self._own_gate(layer_idx, tokens),
            )
        if self.kept.watches and not self.plan.resident:
            self.kept.note(layer_idx, self._used[layer_idx])
        return out

    def _face_misses(
        self, layer_idx: int, index: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, np.ndarray | None, np.ndarray]:
        """The indices to compute here, the levels to start at, and the experts that another machine computes, if
        a rule in Python decides what not to wait for; else all of them, None and none."""
        rule = self._network_rule
        if self._rule is not None:
            rule = None if self.plan.resident else self._rule
        if rule is None:
            return index, None, _NONE
        low, want = self._min_level[layer_idx], self._want_level[layer_idx]
        gates = weights.detach().to(torch.float32).numpy()
        decided = self.missing.decide(rule, layer_idx, index.numpy(), gates, low, want)
        if decided is None:
            return index, low, _NONE
        return torch.from_numpy(decided[0]), decided[1], decided[2]

    def _own_gate(self, layer_idx: int, tokens: int) -> tuple | None:
        """The layer's router for the native half, if routing goes by what is resident."""
        if not self._routes or tokens > NATIVE_GATE_TOKENS:
            return None
        return self.predictor.own_gate(layer_idx)

    def _guess(self, layer_idx: int, hidden: torch.Tensor) -> list[tuple]:
        """What to read ahead while this layer computes: (later layer, its likely experts, None), or its
        gate for the native half to ask: (later layer, None, gate)."""
        last = layer_idx + 1 == len(self.specs)
        if last or self.plan.resident or not self.gauge.useful:
            return []
        if len(hidden) <= NATIVE_GATE_TOKENS and not self.kept.watches:
            gates = self.predictor.linear_gates(layer_idx)
            if gates:
                return [(later, None, gate) for later, gate in gates]
        return self._predict(layer_idx, hidden)

    def _predict(self, layer_idx: int, hidden: torch.Tensor) -> list[tuple]:
        guesses = []
        for later, experts in self.predictor.predict(layer_idx, hidden):
            if self.kept.watches:
                self.kept.predicted(layer_idx, later, experts)
            guesses.append((later, np.asarray(experts, np.int64), None))
        return guesses

    @property
    def _follows(self) -> bool:
        """Whether plans are made for the text at hand."""
        return isinstance(self.planner, JointPlanner)

    # ---- budget ---------------------------------------------------------------------------------

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
            self.gauge.note_step(
                engine["prefetch_bytes"],
                engine["prefetch_used_bytes"] + engine["prefetch_joined_bytes"],
            )
            self._step += 1
            self.upgrades.note(self._used)
            if self.config.upgrade and self._step % UPGRADE_EVERY == 0:
                self._upgrade()
            for used in self._used:
                used[:] = 0
            if self._rising is not None and self._has(self._base):
                self._rising = None
                self._set_levels()
            if self.remote is not None and self.remote.begin_step():
                self._ask_for_plan()
            if not self.plan.resident:
                self._reader_core.begin(step.batch * step.tokens, engine["wait_seconds"])
            alike = step.tokens == 1 and not self.plan.resident
            self._step_began = time.perf_counter() if alike else None

    def end_step(self) -> None:
        """Called after every forward pass, also one that failed."""
        self._reader_core.end()
        if self._step_began is not None:
            self.gauge.note_seconds(time.perf_counter() - self._step_began)
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
            self._install(self.controller.plan)
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
            self._install(self.controller.plan, rising=False)

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
            self._rule = rule
            self._set_rule()

    def set_routing_tolerance(self, tolerance: float) -> None:
        """Cache-aware routing from now on; see CoMoEConfig.routing_tolerance."""
        replace(self.config, routing_tolerance=tolerance)  # checks it
        self._policy.set_tolerance(tolerance)
        self._routes = tolerance > 0

    def _set_goal(self, change: Callable[[], object]) -> str:
        if self.config.exact:
            raise ValueError(
                "exact weights are always waited for, so quality and latency cannot be chosen; load the "
                "model without exact"
            )
        with self._lock:
            if not isinstance(self.planner, JointPlanner):
                planner = joint_planner(self.store, self.store_sizes, self._experts_per_token)
                self.set_planner(planner)
            change()
            self._install(self.controller.plan)
            return self.describe()

    def _controller(self) -> Controller:
        joint = isinstance(self.planner, JointPlanner)
        if joint:
            self.planner.situation = Situation(self.config.goal(), self.live.costs())
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
        pool_bytes = pool_bytes // self._slab_bytes * self._slab_bytes
        if pool_bytes >= self.controller.plan.pool_bytes:
            return self.controller.plan
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
        if self._follows and self._step:
            if self._step % FOLLOW_EVERY == 0:
                decision = self._follow_text() or decision
            elif self._step < FOLLOW_EVERY and self._step & (self._step - 1) == 0:
                self._know_losses()  # gate weights are not known before the first pass
        if decision is not None:
            lent = decision.before is not None and self.plan.pool_bytes < decision.before.pool_bytes
            most = self.plan.pool_bytes if lent else decision.after.pool_bytes
            self._install(self._plan_for(min(most, decision.after.pool_bytes)))

    def _watch_path(self, snapshot: Snapshot) -> Decision | None:
        """Follows the network: another path asks for another plan, and for the most valuable first."""
        reason = self.network.look()
        self._complete = complete = self.plan.resident and self._has(self._base)
        self._network_rule = None if complete or self._rule is not None else self.network.rule
        if reason is None:
            return None
        if not complete and self._follows:
            self.engine.cancel(UPGRADE)
            self._ask_for_plan()
        return self.controller.path_changed(snapshot, reason)

    def _ask_for_plan(self) -> None:
        """Asks for what the plan holds and what it aims at: from afar the most valuable increments first."""
        if self.network is None or not self._follows:
            aimed = self.store_sizes.chosen(self.plan.min_level)
            self.engine.request(self.records.in_order(self._base), UPGRADE)
            self.engine.request(self.records.in_order(aimed & ~self._base), UPGRADE)
            return
        before = np.maximum(self.planner.use, 1e-9)
        scale = np.clip(self.live.profile.use() / before, 0.1, 10.0)
        levels = self.plan.min_level.astype(np.int64)
        ids = self.network.order(self.planner.loss, scale, levels)
        held = self._base[ids]
        self.engine.request(ids[held], UPGRADE)
        self.engine.request(ids[~held], UPGRADE)

    def _know_text(self) -> None:
        self.live.profile.know(*self._policy.profile())

    def _know_losses(self) -> None:
        """What uses lose, by the gate weights of the text at hand."""
        self._know_text()
        self._policy.set_losses(*self.live.losses(self.planner.loss, self.planner.use))

    def _follow_text(self) -> Decision | None:
        begin = time.perf_counter()
        if begin < self._follow_at:
            return None
        self._know_losses()
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
            self._calm = 0
            # Room for the next steps as well, since each change stops what is read ahead.
            target = max(target - LONG_STEP, least)
            self._install(self._plan_for(target))
        elif target > self.plan.pool_bytes and not within:
            self._calm += 1
            if self._calm >= CALM_STEPS:
                self._calm = 0
                self._install(self._plan_for(target))

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

    def _install(self, plan: Plan, *, rising: bool = True) -> None:
        """Makes `plan` true: levels at once, then memory given back or taken, then what to load. rising:
        experts that rise are computed as before until all has come, so that nothing waits for an upgrade.
        """
        before, self.plan = self.plan, plan
        self._complete = False
        self._min_level = self.store_sizes.of_layer(plan.min_level)
        self._want_level = self.store_sizes.of_layer(plan.want_level)
        rises = rising and plan.resident and before is not plan and before.resident
        self._rising = np.minimum(before.min_level, plan.min_level) if rises else None
        self._set_levels()
        base = plan.base
        aimed = kept = base | self.store_sizes.chosen(plan.min_level)
        # What is above the plan stays only while nothing of the plan is missing: it could stand in the
        # way, since speculation spares what has just come.
        if plan.resident and self._has(base):
            kept = aimed | self.store_sizes.chosen(plan.want_level)
        for kind in (PREFETCH, UPGRADE):
            self.engine.cancel(kind)
        self.engine.evict(np.flatnonzero(~kept).astype(np.int32))
        self._set_values(base)
        self._base = base
        self.engine.forget_largest_need()
        self.engine.set_budget(plan.pool_bytes)
        # Then, until the cache knows better, whatever fits of what the plan aims at.
        self._ask_for_plan()
        if self.remote is not None:
            self.remote.note_plan(base, aimed, self.live.profile.use())
        self._set_rule()

    def _set_rule(self) -> None:
        """What the plan in force says about misses, unless somebody else's rule decides."""
        rule = None
        if self._follows and self._rule is None:
            self._know_text()
            tables = (self.plan, self.planner.loss, self.planner.use)
            if self.network is None:
                rule = self.live.rule(*tables)
            else:
                self._network_rule = self.network.new_rule(self.live, *tables)
        reads = not self.plan.resident
        self._policy.set_plan(reads, rule and native_rule(rule), self._follows)
        if self._follows:
            self._know_losses()
        limit = self.controller.loss_limit or 0.0
        self._policy.set_loss_limit(limit, 1.0 / self.controller.caution)

    def _set_values(self, base: np.ndarray) -> None:
        """Where all is held, what is above the plan gets its value from `upgrades`; else from the cache."""
        if self.plan.resident:
            everything = np.arange(self.records.count, dtype=np.int32)
            self.engine.set_value(everything, base.astype(np.float32))
        else:
            self.kept.hold(base)

    def _set_levels(self) -> None:
        rising = None if self._rising is None else self.store_sizes.of_layer(self._rising)
        rows = []
        self._low = list(self._min_level if rising is None else rising)  # that compute may start at
        for layer_idx, low in enumerate(self._min_level):
            least = self._low[layer_idx]
            self._op.set_levels(layer_idx, least, self._want_level[layer_idx])
            most = int(np.bincount(self._kernel_levels[low]).argmax())
            rows.append(prefill_rows(most))
        self._prefill_rows = rows  # at once: a pass may be running

    def _has(self, records: np.ndarray) -> bool:
        """Whether all records where bool [ids] is true are resident."""
        return bool((self.engine.resident()[records] == RESIDENT).all())

    def _upgrade(self) -> None:
        """Values the records above the plan's levels by use, and asks for those of the best experts:
        one is read only if it is worth more than what it pushes out. What the plan itself lacks, because
        there was no room when it was asked for, goes first."""
        if not self.plan.resident:
            return
        missing = self._base & (self.engine.resident() == ABSENT)
        if missing.any():
            if self.network is None:
                self.engine.request(self.records.in_order(missing), UPGRADE)
            else:
                self._ask_for_plan()
        for layer_idx, experts, values in self.upgrades.choose():
            low, high = (level[layer_idx][experts] for level in (self._min_level, self._want_level))
            ids, which = self.records.above(layer_idx, experts, low, high)
            # What is another expert's least is worth more; of what several climb to, the best counts.
            which, ids = which[~self._base[ids]], ids[~self._base[ids]]
            if ids.size == 0:
                continue
            ids, first, group = np.unique(ids, return_index=True, return_inverse=True)
            best = np.zeros(ids.size)
            np.maximum.at(best, group.ravel(), values[which])
            order = np.argsort(first)  # best experts first
            ids = ids[order]
            self.engine.set_value(ids, best[order].astype(np.float32))
            self.engine.request(ids, UPGRADE)

    # ---- reporting ------------------------------------------------------------------------------

    def describe(self) -> str:
        """What was decided, in one line."""
        stats = self.store_sizes
        held = min(self.plan.pool_bytes, stats.total(self.plan.want_level))
        return (
            f"memory {format_bytes(self.budget.memory)}: dense {format_bytes(self.budget.sizes.dense)}, "
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
                **self.gauge.stats(),
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
