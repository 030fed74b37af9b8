"""What a model would do in a memory on a device, before it runs: speed, loss, and where each byte lies.

The same store, budget, planners and costs as at run time, with a device profile in place of measurements. What
it cannot know is what the text will use: uses are those of the calibration text, or all experts alike.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from comoe.config import DENSE_BITS, CoMoEConfig, format_bytes
from comoe.hf.checkpoint import read_config
from comoe.hf.dense import coded_dense_bytes
from comoe.hf.sizes import experts_per_token, model_sizes
from comoe.policy.assumed import assumed_losses
from comoe.policy.controller import Controller
from comoe.policy.costs import Costs
from comoe.policy.devices import Device
from comoe.policy.elsewhere import FIRST_LINK, Elsewhere, calls_per_token
from comoe.policy.goal import QUALITIES
from comoe.policy.joint import GoalError, JointPlanner, Situation
from comoe.policy.plan import BudgetError, Plan, Planner, Sizes
from comoe.policy.residency import missing_of
from comoe.policy.snapshot import Estimate, Link, Snapshot
from comoe.runtime.budget import Budget, ModelSizes
from comoe.runtime.engine import RecordTable, pool_floor, slab_bytes, store_sizes
from comoe.runtime.runtime import RECORD_BYTES, SCRATCH_BYTES, planner_of
from comoe.store import Store
from comoe.store.identity import store_id
from comoe_kernels.coded_linear import coded_linear_bytes

if TYPE_CHECKING:
    from comoe.overheads import Overheads

PINGS, PING_SECONDS = 5, 5.0
POINTS = 12  # of the frontier, from the least memory to enough for all


@dataclass(frozen=True)
class Outlook:
    """What to expect of one plan. seconds, joules: per token.  loss: nats per token, None: not known.
    seconds is dense + compute + stall; read: bytes per token that come from the tier below."""

    memory: int
    plan: Plan
    seconds: float
    dense: float
    compute: float
    stall: float
    read: float
    joules: float
    loss: float | None


@dataclass(frozen=True)
class Model:
    """A packed folder, as far as a plan needs it."""

    folder: Path
    store: Store
    sizes: Sizes
    needs: ModelSizes
    experts_per_token: int
    num_layers: int
    dense_read: int  # bytes of dense weights that every token reads

    @classmethod
    def open(cls, folder: str | Path, dense: str = "source") -> Model:
        """dense: as in CoMoEConfig."""
        folder = Path(folder)
        store = Store.open(folder)
        config = read_config(folder)
        shell = nn.Module()
        shell.config = config
        element = torch.bfloat16
        # As large as the dense weights, and without memory.
        held = store.manifest.dense_bytes
        if DENSE_BITS[dense]:
            held = coded_dense_bytes(config, DENSE_BITS[dense])
        size = (held + 1) // element.itemsize
        shell.weight = nn.Parameter(torch.empty(size, dtype=element, device="meta"))
        k = experts_per_token(shell)
        intermediate = max(layer.intermediate for layer in store.layers)
        text = config.get_text_config()
        read = held
        if not getattr(config, "tie_word_embeddings", True):
            # Of an embedding that is not the head too, a token reads one row.
            rows, cols, bits = text.vocab_size, text.hidden_size, DENSE_BITS[dense]
            one = element.itemsize * rows * cols
            read -= coded_linear_bytes(rows, cols, bits) if bits else one
        layers = getattr(text, "num_hidden_layers", None) or getattr(text, "num_layers", 0)
        return cls(
            folder,
            store,
            store_sizes(store, RecordTable(store)),
            model_sizes(shell, k, intermediate),
            k,
            max(int(layers), len(store.layers)),
            max(read, 0),
        )

    @cached_property
    def weights(self) -> np.ndarray:
        """[X], weights of each expert."""
        counts = [layer.num_experts for layer in self.store.layers]
        return np.repeat([float(layer.geometry.num_weights) for layer in self.store.layers], counts)

    @cached_property
    def measured(self) -> bool:
        """Whether the losses of this store were measured (comoe aggregate)."""
        return self.store.losses() is not None

    @cached_property
    def losses(self) -> tuple[np.ndarray, np.ndarray]:
        """(loss [X, levels], use [X]): measured ones, or assumed ones."""
        found = self.store.losses()
        if found is None:
            return assumed_losses(self.sizes, self.experts_per_token)
        return found["loss"], found["use"]

    @property
    def store_bytes(self) -> int:
        return sum(layer.file_bytes for layer in self.store.layers)


@dataclass
class Forecaster:
    """Outlooks of one model on one device, for what a CoMoEConfig asks (its memory apart). elsewhere: another machine
    that computes experts, see server_of."""

    model: Model
    device: Device
    elsewhere: Elsewhere | None = None
    _planners: dict[bool, Planner] = field(default_factory=dict, repr=False)

    @cached_property
    def tier(self) -> str:
        return self.device.tier_of(self.model.store_bytes)

    @cached_property
    def costs(self) -> Costs:
        return Costs.from_profile(
            self.device,
            self.model.sizes,
            self.model.weights,
            self.model.dense_read,
            tier=self.tier,
            num_layers=self.model.num_layers,
        )

    def planner(self, config: CoMoEConfig) -> Planner:
        """The one that the runtime would take, told of the goal and of this device."""
        key = config.quality is not None or config.latency is not None
        if key not in self._planners:
            model = self.model
            self._planners[key] = planner_of(
                model.store, model.sizes, config, model.experts_per_token
            )
        planner = self._planners[key]
        if isinstance(planner, JointPlanner):
            planner.situation = Situation(config.goal(), self.costs, elsewhere=self.elsewhere)
        return planner

    def _budget(self, memory: int, least: np.ndarray) -> Budget:
        model, sizes = self.model, self.model.sizes
        total = sizes.total(sizes.levels.exact)
        floor = pool_floor(sizes.largest(least), total, model.store.page_bytes)
        records = sum(layer.records.size for layer in model.store.layers)
        return Budget(memory, 0, model.needs, floor, SCRATCH_BYTES + RECORD_BYTES * records)

    def least_memory(self, config: CoMoEConfig) -> int:
        """The least `memory` that computes at all, in bytes."""
        least = self.planner(config).least(self.model.sizes, exact=config.exact)
        return self._budget(1, least).least(config.max_context)

    def pool(self, memory: int, config: CoMoEConfig) -> int:
        """Bytes of the pool in `memory`, in whole slabs as the runtime takes them. Raises BudgetError."""
        sizes = self.model.sizes
        least = self.planner(config).least(sizes, exact=config.exact)
        budget = self._budget(memory, least)
        planned, floor = budget.planned_pool(config.max_context), budget.pool_floor
        total = sizes.total(sizes.levels.exact)
        page_bytes = self.model.store.page_bytes
        slab = slab_bytes(min(planned, total + floor), sizes.largest(least), floor, page_bytes)
        return min(planned, total + floor + slab) // slab * slab

    def outlook(self, memory: int, config: CoMoEConfig) -> Outlook:
        """Raises BudgetError where the model does not fit, GoalError where the goal cannot be met."""
        if memory > self.device.compute_memory:
            raise BudgetError(
                f"memory={format_bytes(memory)} is more than {self.device.name} has "
                f"({format_bytes(self.device.compute_memory)}); give less, or another --device"
            )
        pool = self.pool(memory, config)
        plan = self.planner(config).plan(self.model.sizes, pool, exact=config.exact)
        return self.of_plan(memory, plan)

    def of_plan(self, memory: int, plan: Plan) -> Outlook:
        sizes, (loss, use) = self.model.sizes, self.model.losses
        read, misses = missing_of(sizes, plan, use)
        away = np.zeros(len(use), bool) if plan.away is None else plan.away
        here = np.where(away, -1, plan.min_level.astype(np.int64))
        compute, stall = self.costs.layer_times(sizes, here, use, read, misses=misses)
        waited = float(stall.sum())
        if away.any():
            waited += self.elsewhere.seconds(1) * calls_per_token(away, use, sizes.num_experts)
        outside = self.costs.outside(sizes, resident=plan.resident)
        seconds = float(outside + compute.sum() + waited)
        num_bytes = float(use @ read)
        chosen = loss[np.arange(len(loss)), plan.min_level]
        return Outlook(
            memory,
            plan,
            seconds,
            outside,
            float(compute.sum()),
            waited,
            num_bytes,
            self.costs.token_joules(seconds, num_bytes),
            float(chosen.sum()) if np.isfinite(chosen).all() else None,
        )

    def where(self, outlook: Outlook, config: CoMoEConfig) -> list[dict[str, Any]]:
        """Where each byte lies: rows {tier, what, level, experts, bytes}; a record that several need counts
        at the coarsest level."""
        needs = self.model.needs
        plan, sizes = outlook.plan, self.model.sizes
        here = "memory" if self.device.accelerator_memory is None else "accelerator"
        reserve = self._budget(1, plan.min_level).reserve(config.max_context)
        rows = [
            {"tier": here, "what": "dense weights", "bytes": needs.dense},
            {"tier": here, "what": "workspace and KV cache", "bytes": reserve},
        ]
        held = self._by_level(plan.held.astype(np.int64), plan.base)
        rows += [{"tier": here, "what": "experts, always", **row} for row in held]
        bases = plan.base & ~sizes.chosen(plan.held)
        if bases.any():
            shared = int(sizes.record_bytes[bases].sum())
            rows.append({"tier": here, "what": "what experts share, always", "bytes": shared})
        cached = max(plan.spare, 0)
        if cached:
            what = (
                "upgrades of experts used last" if plan.resident else "cache of experts used last"
            )
            rows.append({"tier": here, "what": what, "bytes": cached})
        short = np.where(plan.held >= plan.min_level, -1, plan.min_level.astype(np.int64))
        missing = self._by_level(short, ~plan.base)
        rows += [{"tier": self.tier, "what": "experts, read when used", **row} for row in missing]
        rows.append({"tier": "disk", "what": "the whole store", "bytes": self.model.store_bytes})
        return [{"level": None, "experts": None} | row for row in rows if row["bytes"]]

    def _by_level(self, levels: np.ndarray, among: np.ndarray) -> Iterator[dict[str, Any]]:
        """Experts at each level (-1: none) and the bytes of their records `among` bool [ids]."""
        sizes, left = self.model.sizes, among.copy()
        for level in np.unique(levels[levels >= 0]):
            chosen = sizes.chosen(np.where(levels == level, level, -1)) & left
            left &= ~chosen
            yield {
                "level": sizes.levels.describe(int(level)),
                "experts": int((levels == level).sum()),
                "bytes": int(sizes.record_bytes[chosen].sum()),
            }

    def frontier(self, configs: dict[str, CoMoEConfig]) -> list[dict[str, Any]]:
        """Rows {name, memory, seconds, loss}: each at memories from the least to enough for all. What
        cannot be met is left out."""
        sizes = self.model.sizes
        least = self.least_memory(CoMoEConfig())
        enough = self.model.needs.dense + int(1.05 * sizes.total(sizes.levels.exact))
        most = min(enough + least, self.device.compute_memory)
        memories = np.linspace(1.001 * least, max(most, 1.01 * least), POINTS).astype(int).tolist()
        rows = []
        for name, config in configs.items():
            for memory in memories:
                try:
                    found = self.outlook(memory, config)
                except (BudgetError, GoalError):
                    continue
                row = {"memory": memory, "seconds": found.seconds, "loss": found.loss}
                rows.append({"name": name, **row})
        return rows

    def rehearse(self, memory: int, config: CoMoEConfig) -> list[str]:
        """What the controller would do, line by line: memory halved and given back, the disk slowed to a
        quarter and fast again."""
        sizes, pool = self.model.sizes, self.pool(memory, config)
        planner = self.planner(config)
        link = self.device.link(self.tier)

        def costs(snapshot: Snapshot) -> Costs:
            return self.costs.measured(snapshot, sizes, self.model.weights, self.tier)

        controller = Controller(
            planner, sizes, pool, exact=config.exact, costs=costs, goal=config.goal()
        )
        least = sizes.largest(planner.least(sizes, exact=config.exact))
        halves = (pool, max(pool // 2, least))
        script = [(0.0, 0, 1.0), (10.0, 1, 1.0), (20.0, 0, 1.0), (23.0, 0, 1.0)]
        script += [(30.0, 0, 0.25), (40.0, 0, 1.0), (43.0, 0, 1.0)]
        for time, half, speed in script:
            held = min(controller.plan.pool_bytes, halves[half])
            now = Link(Estimate(speed * link.bandwidth.mean, 0.0, 9), link.latency)
            snapshot = Snapshot(time, halves[half] - held, pool, tiers={self.tier: now})
            controller.observe(snapshot, held)
        return controller.explain().splitlines()


def choices(max_context: int = 0) -> dict[str, CoMoEConfig]:
    """What the frontier shows."""
    settings: dict[str, dict[str, Any]] = {"default": {}, "resident": {"quality": "resident"}}
    settings |= {name: {"quality": name} for name in QUALITIES}
    settings["exact"] = {"exact": True}
    return {
        name: CoMoEConfig(max_context=max_context, **setting) for name, setting in settings.items()
    }


def notes_of(model: Model, device: Device) -> list[str]:
    """What the reader must know to believe the figures no more than they deserve."""
    found = []
    if not model.measured:
        found.append(
            "losses and uses are assumed, not measured: run comoe aggregate to have this model's own"
        )
    if device.accelerator_memory is not None:
        found.append(
            "comoe computes on the CPU now; figures are for the accelerator's memory and bandwidth"
        )
    if device.name != "measured":
        found.append(f"{device.title}: a profile, not a measurement (comoe/data/devices.json)")
    return found


def plot(rows: list[dict[str, Any]], outlooks: list[Outlook], path: Path, title: str) -> Path:
    """Saves ms per token and loss over memory, a line for each goal; returns the path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    largest = max(row["memory"] for row in rows)
    unit, scale = ("GB", 1e9) if largest >= 1e9 else ("MB", 1e6)
    figure, (speed, quality) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = [row for row in rows if row["name"] == name]
        memory = [row["memory"] / scale for row in mine]
        speed.plot(memory, [row["seconds"] * 1e3 for row in mine], "o-", ms=3, label=name)
        loss = [np.nan if row["loss"] is None else row["loss"] for row in mine]
        quality.plot(memory, loss, "o-", ms=3, label=name)
    for outlook in outlooks:
        speed.plot(outlook.memory / scale, outlook.seconds * 1e3, "k*", ms=11)
        if outlook.loss is not None:
            quality.plot(outlook.memory / scale, outlook.loss, "k*", ms=11)
    speed.set(ylabel="expected ms per token", ylim=(0, None))
    quality.set(ylabel="expected loss, nats per token")
    for axes in (speed, quality):
        axes.set(xlabel=f"memory, {unit}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def server_of(model: Model, url: str, token_file: str | None) -> Elsewhere:
    """The machine at `url` as a plan sees it: what it has, and the round trip to it; bandwidth and computing are
    assumed until calls are made. Raises Refused if it serves another store, ExpertServerError if it does not answer.
    """
    from comoe.tiers.expert_client import ExpertClient, Refused
    from comoe.tiers.expert_token import read_token
    from comoe.tiers.expert_wire import row_bytes

    store = model.store
    client = ExpertClient(url, read_token(token_file))
    try:
        trips = []
        for _ in range(PINGS):
            begin = perf_counter()
            info = client.info(PING_SECONDS)
            trips.append(perf_counter() - begin)
        counts = [layer.num_experts for layer in store.layers]
        same = info.store_id == store_id(store) and info.level_names == store.levels.names
        if not same or [len(layer) for layer in info.levels] != counts:
            raise Refused(
                f"{url}: it serves another store than {model.folder}; start `comoe serve-experts` on the same one"
            )
        width = row_bytes(max(layer.geometry.hidden for layer in store.layers), client.wire)
    finally:
        client.close()
    level = np.concatenate(info.levels).astype(np.int64)
    prior = Link(FIRST_LINK.bandwidth, Estimate(min(trips)))
    return Elsewhere(level, width, prior=prior)


def device_of(
    name: str,
    folder: Path,
    examine: Callable[..., dict] | None = None,
    overheads: Callable[[Path, float], Overheads] | None = None,
) -> Device:
    """The profile of that name; "measured": this machine, with the disk under `folder`: what `comoe doctor` measures,
    and what tokens take beside bytes, by small models that are written beside the folder and run for some seconds.
    """
    from comoe.doctor import examine as measure
    from comoe.overheads import measure_overheads
    from comoe.policy.devices import MEASURED, load_device, measured_device

    if name != MEASURED:
        return load_device(name)
    report = (examine or measure)(folder, disk_bytes=64 << 20)
    beside = next((p for p in (folder.resolve().parent, folder) if os.access(p, os.W_OK)), None)
    if beside is None:
        beside = Path(tempfile.gettempdir())  # another disk, perhaps; most of it is not the disk
    bandwidth = report["bandwidth"]["disk"]["bytes_per_second"]
    return measured_device(report, asdict((overheads or measure_overheads)(beside, bandwidth)))


def summary(
    forecaster: Forecaster, outlook: Outlook, config: CoMoEConfig, *, explain: bool = False
) -> dict[str, Any]:
    """What `comoe plan` shows of one memory, as plain data."""
    costs, model = forecaster.costs, forecaster.model
    found = {
        "folder": str(model.folder),
        "device": forecaster.device.name,
        "memory": outlook.memory,
        "pool": outlook.plan.pool_bytes,
        "tokens_per_second": 1.0 / outlook.seconds,
        "ms": {
            "token": outlook.seconds * 1e3,
            "dense": outlook.dense * 1e3,
            "compute": outlook.compute * 1e3,
            "stall": outlook.stall * 1e3,
        },
        "read_per_token": outlook.read,
        "joules_per_token": outlook.joules,
        "loss": outlook.loss,
        "loss_measured": model.measured,
        "plan": outlook.plan.describe(),
        "where": forecaster.where(outlook, config),
        "notes": notes_of(model, forecaster.device),
    }
    if explain:
        found["inputs"] = {
            "tier": forecaster.tier,
            "bandwidth": costs.bandwidth,
            "latency_seconds": costs.latency,
            "dense_ms": costs.dense * 1e3,
            "expert_us": {
                name: float(costs.compute[np.isfinite(costs.compute[:, level]), level].mean()) * 1e6
                for level, name in enumerate(model.sizes.levels.names)
                if np.isfinite(costs.compute[:, level]).any()
            },
        }
        found["rehearsal"] = forecaster.rehearse(outlook.memory, config)
    return found
