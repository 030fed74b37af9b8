"""Quality against bytes, for every way of making experts smaller: one row per method and fraction.

Every method gets the same bytes: codes, scales, tables, headers, bases and indices count, padding of disk
extents does not. A method takes the finest setting that fits; where none does, there is no row. Weights
are rebuilt in float32 and run in the real model (comoe/aggregate/judge.py).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from comoe.aggregate import decompose, merging
from comoe.aggregate.build import Workshop
from comoe.aggregate.candidates import coded_set, group_moments
from comoe.aggregate.experts import Expert
from comoe.aggregate.judge import Approximation, Judge, Layer
from comoe.aggregate.stored import StoredRungs, level_sizes
from comoe.policy.solver import InfeasibleError, Problem, solve
from comoe_kernels.ladder_codec import LEVEL_BITS

FRACTIONS = (0.5, 0.3, 0.2, 0.14, 0.1)
PLAIN = ("2", "3", "4", "8", "exact")
CALIBRATED = ("2c", "3c", "4c", "8", "exact")
BASE_BITS = 4
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Setting:
    """What a method makes of the model at some size: layer -> expert -> what stands for it.

    records: sizes of the records that it needs, by (layer, offset), where it is made of the store's."""

    expert_bytes: int
    layers: Mapping[int, Layer]
    records: Mapping[tuple[int, int], int] | None = None


class Sweep:
    """The methods over one aggregated folder; each is a function of the fraction of bytes kept."""

    def __init__(self, shop: Workshop) -> None:
        self.shop, self.statistics = shop, shop.statistics
        self.rungs = StoredRungs(shop.weights)
        self.levels = self.rungs.levels.names
        self.own, self.shared, self.shared_bytes = level_sizes(shop.weights)
        self.losses = shop.weights.store.losses()
        counts = [s.spec.num_experts for s in self.statistics]
        self.layer = np.repeat(np.arange(len(counts)), counts)
        self.use = np.concatenate([s.use for s in self.statistics])
        self.methods: dict[str, Callable[[float], Setting | None]] = {
            "plain bits": functools.partial(self.even, PLAIN),
            "calibrated bits": functools.partial(
                self.even, [name for name in CALIBRATED if name in self.levels]
            ),
            "m-smoe": functools.partial(self.merged, "m-smoe", 16),
            "hc-smoe": functools.partial(self.merged, "hc-smoe", 16),
            "ream": functools.partial(self.merged, "ream", 16),
            "gated merge": functools.partial(self.merged, "gated", 16),
            "hc-smoe, 4-bit": functools.partial(self.merged, "hc-smoe", 4),
            "gated merge, 4-bit": functools.partial(self.merged, "gated", 4),
            "base + residual": self.base_residual,
            "base + low rank": self.base_low_rank,
            "e-wemoe": self.e_wemoe,
            "allocator": self.allocated,
        }
        if "2c" not in self.levels:
            del self.methods["calibrated bits"]
        if self.losses is None:
            del self.methods["allocator"]

    @property
    def full_bytes(self) -> int:
        return self.shop.full_bytes

    # ---- levels of the store --------------------------------------------------------------------

    def chosen(self, choice: np.ndarray) -> Setting:
        """A level of the store for every expert."""
        rows = np.arange(len(choice))
        ids = np.unique(self.shared[rows, choice])
        nbytes = int(self.own[rows, choice].sum() + self.shared_bytes[ids[ids >= 0]].sum())
        layers, records = {}, {}
        for layer, info in enumerate(self.shop.weights.store.layers):
            mine = choice[self.layer == layer].tolist()
            layers[layer] = functools.partial(self._stored, layer, mine)
            needs = self.rungs.levels.needs(info.records.shape[1])
            for expert, level in enumerate(mine):
                for record in info.records[expert, needs[level]]:
                    records[layer, int(record["offset"])] = int(record["nbytes"])
        return Setting(nbytes, layers, records)

    def _stored(self, layer: int, levels: list[int], expert: int) -> Approximation:
        return self.rungs.expert(layer, expert, levels[expert])

    def even(self, names: Sequence[str], fraction: float) -> Setting | None:
        """The finest of the named levels that fits for all, and the next one for those used most."""
        limit = fraction * self.full_bytes
        columns = [self.levels.index(name) for name in names]
        totals = [int(self.own[:, c].sum()) for c in columns]
        fitting = [i for i, total in enumerate(totals) if total <= limit]
        if not fitting:
            return None
        at = fitting[-1]
        choice = np.full(len(self.own), columns[at])
        if at + 1 < len(columns):
            finer = columns[at + 1]
            order = np.argsort(-self.use, kind="stable")
            more = (self.own[:, finer] - self.own[:, columns[at]])[order]
            taken = order[np.cumsum(more) <= limit - totals[at]]
            choice[taken] = finer
        return self.chosen(choice)

    def allocated(self, fraction: float) -> Setting | None:
        """The solver's choice, on the losses in the store."""
        loss = self.losses["loss"].astype(np.float64)
        loss[np.arange(loss.shape[1])[None] < self.losses["floor"][:, None]] = np.nan
        loss[self.own < 0] = np.nan
        problem = Problem(
            loss,
            np.maximum(self.own, 0)[None].astype(float),
            np.array([fraction * self.full_bytes]),
            ("expert bytes",),
            shared=self.shared,
            shared_cost=self.shared_bytes[None].astype(float),
        )
        try:
            return self.chosen(solve(problem).choice)
        except InfeasibleError:
            return None

    # ---- fewer experts --------------------------------------------------------------------------

    def merged(self, method: str, bits: int, fraction: float) -> Setting | None:
        """As many groups as fit, in the checkpoint's own bits (16) or in calibrated codes."""
        sizes = [self._expert_bytes(layer, bits) for layer in range(len(self.statistics))]
        limit, layers, total = fraction * self.full_bytes, {}, 0
        experts = np.array([s.spec.num_experts for s in self.statistics])
        groups = np.minimum(experts, np.floor(limit / np.dot(experts, sizes) * experts)).astype(int)
        if (groups < 1).any():
            return None
        centres = merging.global_centres([s.use for s in self.statistics], int(groups.sum()))
        for layer in range(len(self.statistics)):
            count = len(centres[layer]) if method == "m-smoe" else int(groups[layer])
            found = self._merge(method, layer, count, centres[layer])
            stand_ins = [self._as_bits(layer, method, count, found, g, bits) for g in range(count)]
            layers[layer] = functools.partial(_of_group, stand_ins, found.groups.tolist())
            total += count * sizes[layer]
        return Setting(total, layers) if total <= limit else None

    @functools.cache  # noqa: B019  (one sweep lives as long as its merges are needed)
    def _merge_of(self, method: str, layer: int, count: int, centres: tuple | None) -> Any:
        statistics = self.statistics[layer]
        if method == "m-smoe":
            return merging.m_smoe(statistics, np.array(centres))
        return {"hc-smoe": merging.hc_smoe, "ream": merging.ream, "gated": merging.gated}[method](
            statistics, count
        )

    def _merge(self, method: str, layer: int, count: int, centres: np.ndarray) -> Any:
        return self._merge_of(
            method, layer, count, tuple(centres.tolist()) if method == "m-smoe" else None
        )

    def _as_bits(
        self, layer: int, method: str, count: int, found: Any, group: int, bits: int
    ) -> Expert:
        expert = found.experts[group]
        if bits == 16:
            return expert
        moments = group_moments(self.statistics[layer], merging.members(found.groups)[group])
        return coded_set(expert, moments, bits).expert

    def _expert_bytes(self, layer: int, bits: int) -> int:
        """Of one expert of the layer, headers and parameters included."""
        records = self.shop.weights.store.layers[layer].records["nbytes"][0].astype(np.int64)
        return int(records[4] if bits == 16 else records[: LEVEL_BITS.index(bits) + 1].sum())

    # ---- base and differences -------------------------------------------------------------------

    @functools.cache  # noqa: B019
    def _base(self, layer: int) -> tuple[decompose.Base, Expert]:
        """One base for the layer, and as its codes hold it."""
        statistics = self.statistics[layer]
        group = list(range(statistics.spec.num_experts))
        base = decompose.base_of(statistics, group, statistics.use)
        return base, coded_set(base.expert, None, BASE_BITS).expert

    def base_residual(self, fraction: float) -> Setting | None:
        limit = fraction * self.full_bytes
        for bits in reversed(LEVEL_BITS[:3]):
            total = sum(
                self._expert_bytes(layer, BASE_BITS)
                + s.spec.num_experts * self._expert_bytes(layer, bits)
                for layer, s in enumerate(self.statistics)
            )
            if total <= limit:
                layers = range(len(self.statistics))
                return Setting(
                    total, {x: functools.partial(self._with_residual, x, bits) for x in layers}
                )
        return None

    @functools.cache  # noqa: B019
    def _with_residual(self, layer: int, bits: int, expert: int) -> Expert:
        base, held = self._base(layer)
        delta = decompose.residual(base.members[expert], held)
        moments = self._aligned_moments(layer, expert)
        return decompose.added(held, coded_set(delta, moments, bits).expert)

    def _aligned_moments(self, layer: int, expert: int) -> Any:
        """Second moments in the order of the base's neurons."""
        return self.statistics[layer].second_moments(expert, self._base(layer)[0].members[expert])

    def base_low_rank(self, fraction: float) -> Setting | None:
        limit = fraction * self.full_bytes
        smallest = min(min(s.spec.hidden, s.spec.intermediate) for s in self.statistics)
        for rank in range(smallest // 16 * 16, -1, -16):
            total = 0
            for layer, s in enumerate(self.statistics):
                each = rank and decompose.low_rank_bytes(
                    s.spec.hidden, s.spec.intermediate, 3 if s.spec.gated else 2, rank
                )
                total += self._expert_bytes(layer, BASE_BITS) + s.spec.num_experts * each
            if total <= limit:
                layers = range(len(self.statistics))
                return Setting(
                    total, {x: functools.partial(self._with_rank, x, rank) for x in layers}
                )
        return None

    @functools.cache  # noqa: B019
    def _with_rank(self, layer: int, rank: int, expert: int) -> Expert:
        base, held = self._base(layer)
        if rank == 0:
            return held
        delta = decompose.residual(base.members[expert], held)
        found = decompose.low_rank(delta, self._aligned_moments(layer, expert), rank)
        return decompose.added(held, found.delta(rank))

    def e_wemoe(self, fraction: float) -> Setting | None:
        """Base in 16 bits and the largest entries of each difference."""
        limit = fraction * self.full_bytes
        weights = [layer.geometry.num_weights for layer in self.shop.weights.store.layers]
        experts = [s.spec.num_experts for s in self.statistics]
        fixed = sum(2 * w + e * -(-w // 8) for w, e in zip(weights, experts, strict=True))
        kept = (limit - fixed) / sum(2 * w * e for w, e in zip(weights, experts, strict=True))
        if kept <= 0:
            return None
        kept = min(kept, 1.0)
        total = sum(
            2 * w + e * decompose.pruned_bytes(w, kept)
            for w, e in zip(weights, experts, strict=True)
        )
        layers = range(len(self.statistics))
        return Setting(total, {x: functools.partial(self._with_pruned, x, kept) for x in layers})

    def _with_pruned(self, layer: int, kept: float, expert: int) -> Expert:
        base, _ = self._base(layer)
        delta = decompose.residual(base.members[expert], base.expert)
        return decompose.added(base.expert, decompose.pruned(delta, kept))


def bytes_to_move(before: Setting, after: Setting) -> int:
    """Bytes to read to go from one setting to another while running. What is not made of the store's
    records is another set of weights, which has to be made beforehand and read whole."""
    if before.records is None or after.records is None:
        return after.expert_bytes
    return sum(n for key, n in after.records.items() if key not in before.records)


def price_of_change(
    sweep: Sweep, bandwidth: float, *, more: float = 0.3, less: float = 0.2
) -> list[dict[str, Any]]:
    """For every method: bytes to read, and seconds at `bandwidth` bytes/s, from `more` to `less` of the
    bytes and back. Methods that do not have both sizes are left out."""
    rows = []
    for name, method in sweep.methods.items():
        large, small = method(more), method(less)
        if large is None or small is None:
            continue
        down, up = bytes_to_move(large, small), bytes_to_move(small, large)
        rows.append(
            {
                "method": name,
                "from": more,
                "to": less,
                "expert_bytes_from": large.expert_bytes,
                "expert_bytes_to": small.expert_bytes,
                "bytes_down": down,
                "bytes_up": up,
                "seconds_down": down / bandwidth,
                "seconds_up": up / bandwidth,
                "needs_second_set": large.records is None,
            }
        )
    return rows


def _of_group(stand_ins: list[Expert], groups: list[int], expert: int) -> Expert:
    return stand_ins[groups[expert]]


def run_sweep(
    sweep: Sweep,
    judge: Judge,
    *,
    fractions: Sequence[float] = FRACTIONS,
    methods: Sequence[str] | None = None,
    progress: Progress = lambda done, total: None,
    **extra: Any,
) -> list[dict[str, Any]]:
    """Rows of method, fraction, expert_bytes, perplexity, perplexity_exact, kl, and `extra`."""
    names = list(sweep.methods) if methods is None else list(methods)
    unknown = set(names) - set(sweep.methods)
    if unknown:
        raise ValueError(
            f"sweep: unknown methods {sorted(unknown)}; there are {', '.join(map(repr, sweep.methods))} "
            "(the store's own levels and 'allocator' after comoe aggregate)"
        )
    rows, done = [], 0
    for name in names:
        for fraction in fractions:
            setting = sweep.methods[name](fraction)
            done += 1
            progress(done, len(names) * len(fractions))
            if setting is None:
                continue
            verdict = judge.measure({x: _kept(layer) for x, layer in setting.layers.items()})
            rows.append(
                {
                    "method": name,
                    "fraction": fraction,
                    "expert_bytes": setting.expert_bytes,
                    "perplexity": verdict.perplexity,
                    "perplexity_exact": verdict.perplexity_exact,
                    "kl": verdict.kl,
                    **extra,
                }
            )
    return rows


def _kept(layer: Layer) -> Layer:
    """Each expert is rebuilt once for a trial, not once per window."""
    return functools.cache(layer)


def plot_rows(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> None:
    """KL against bytes kept, a line for each method, one panel for each text; a PNG."""
    from matplotlib.figure import Figure

    domains = list(dict.fromkeys(row.get("domain", "") for row in rows))
    figure = Figure(figsize=(7 * len(domains), 5), layout="constrained")
    for number, domain in enumerate(domains):
        axes = figure.add_subplot(1, len(domains), number + 1)
        mine = [row for row in rows if row.get("domain", "") == domain]
        for method in dict.fromkeys(row["method"] for row in mine):
            points = sorted(
                (row["expert_bytes"], max(row["kl"], 1e-6))
                for row in mine
                if row["method"] == method
            )
            ours = method == "allocator"
            axes.plot(
                [x / 1e6 for x, _ in points],
                [y for _, y in points],
                marker="o",
                label=method,
                linewidth=3 if ours else 1,
                color="black" if ours else None,
            )
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="expert bytes kept (MB)",
            ylabel="KL (nats per token)",
        )
        axes.set_title(domain)
        axes.grid(True, which="both", alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
