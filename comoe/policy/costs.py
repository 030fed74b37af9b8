"""What things take: seconds and joules of one model's experts on one device.

    seconds per token = dense + sum over layers (deciding + C_l + stall_l)
    C_l      = sum over the layer's experts: touched * compute[expert, level used]
    read_l   = P(anything missing in the layer) * latency + expected missing bytes / bandwidth
    stall_l  = read_l - min(overlap * read_l, C_l + dense / layers)
    touched  = 1 - (1 - use)^T          of T tokens in one pass, independent of each other

Expert choices count as independent, which is a little low for P(anything missing) where K is fixed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from comoe.policy.plan import Sizes
from comoe.policy.snapshot import Snapshot

if TYPE_CHECKING:
    from comoe.policy.devices import Device

LEAST_SAMPLES = 3  # of a measured speed before it replaces the profile's


@dataclass(frozen=True)
class Costs:
    """compute: float [X, levels], seconds of one token through one expert; inf: it has no such level.
    dense: seconds per token outside the experts.
    bandwidth: bytes/s from where the missing records lie, the slowest tier in use.
    latency: seconds per layer in which something is missing and waited for.
    deciding: seconds per layer with experts under a plan that may read, for predictions, values and misses.
    overlap: share of read time that is hidden behind compute, 0 to 1.
    joules_per_byte: of missing bytes.  joules_per_second: of the whole device at work."""

    compute: np.ndarray
    dense: float
    bandwidth: float
    latency: float
    overlap: float = 0.0
    joules_per_byte: float = 0.0
    joules_per_second: float = 0.0
    deciding: float = 0.0

    def __post_init__(self) -> None:
        if self.compute.ndim != 2 or not (self.compute >= 0).all():
            raise ValueError(
                "Costs: compute: expected seconds >= 0 of shape [experts, levels], got shape "
                f"{self.compute.shape}; check the measured speeds"
            )
        for name in ("dense", "latency", "joules_per_byte", "joules_per_second", "deciding"):
            if not 0 <= getattr(self, name) < np.inf:
                raise ValueError(
                    f"Costs: {name}: expected a number >= 0, got {getattr(self, name)}"
                )
        if not self.bandwidth > 0:
            raise ValueError(f"Costs: bandwidth: expected bytes/s > 0, got {self.bandwidth}")
        if not 0 <= self.overlap <= 1:
            raise ValueError(f"Costs: overlap: expected a share from 0 to 1, got {self.overlap}")

    @classmethod
    def from_profile(
        cls,
        device: Device,
        sizes: Sizes,
        weights: np.ndarray,
        dense_bytes: int,
        *,
        tier: str = "disk",
        num_layers: int | None = None,
        overlap: float = 0.0,
    ) -> Costs:
        """What a device profile promises.

        weights: [X], weights of each expert.  dense_bytes: what every token reads outside the experts.
        tier: where missing records lie, one of device.tiers.  num_layers: decoder layers, each with the
        profile's overhead (default: the MoE layers).
        """
        link = device.link(tier)
        read = sizes.bytes_at / (device.kernel_share * device.compute_bandwidth)
        multiply = 2.0 * np.asarray(weights, float)[:, None] / device.flops
        compute = np.where(sizes.has, np.maximum(read, multiply), np.inf)
        layers = len(sizes.num_experts) if num_layers is None else num_layers
        return cls(
            compute,
            dense_bytes / device.compute_bandwidth
            + layers * device.layer_overhead
            + device.step_overhead,
            link.bandwidth.mean,
            link.latency.mean,
            overlap,
            device.joules_per_byte(tier),
            device.watts,
            device.deciding_overhead,
        )

    def outside(self, sizes: Sizes, *, resident: bool) -> float:
        """Seconds per token that neither experts nor reads take. resident: nothing may have to be read."""
        return self.dense + (0.0 if resident else len(sizes.num_experts) * self.deciding)

    def measured(
        self, snapshot: Snapshot, sizes: Sizes, weights: np.ndarray, tier: str = "disk"
    ) -> Costs:
        """The same with what `snapshot` knows better; energy is priced on battery only.

        A level that was not timed is scaled like those that were, by the median of their ratios.
        weights: [X], weights of each expert.
        """
        compute, ratios, timed = self.compute.copy(), [], np.zeros(len(sizes.levels), bool)
        for level, name in enumerate(sizes.levels.names):
            known = snapshot.compute.get(name)
            if known is None or known.samples < LEAST_SAMPLES:
                continue
            column = np.where(sizes.has[:, level], known.mean * np.asarray(weights, float), np.inf)
            before = np.isfinite(column) & (self.compute[:, level] > 0)
            if before.any():
                ratios.append(column[before].sum() / self.compute[before, level].sum())
            compute[:, level], timed[level] = column, True
        if ratios:
            compute[:, ~timed] *= float(np.median(ratios))
        changes: dict[str, object] = {"compute": compute}
        if snapshot.dense is not None and snapshot.dense.samples >= LEAST_SAMPLES:
            changes["dense"] = snapshot.dense.mean
        link = snapshot.tiers.get(tier) or snapshot.sources.get(tier)
        if link is not None:
            changes |= {"bandwidth": link.bandwidth.mean, "latency": link.latency.mean}
        if snapshot.power != "battery":
            changes |= {"joules_per_byte": 0.0, "joules_per_second": 0.0}
        return replace(self, **changes)

    def layer_times(
        self,
        sizes: Sizes,
        used_levels: np.ndarray,
        use: np.ndarray,
        missing_bytes: np.ndarray,
        *,
        tokens: int = 1,
        misses: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """(compute, stall) in seconds, each [layers]; arguments as for token_time."""
        used_levels = np.asarray(used_levels).astype(np.int64)
        touched = np.asarray(use, float)
        if tokens != 1:
            touched = 1.0 - (1.0 - np.minimum(touched, 1.0)) ** tokens
        one = self.compute[np.arange(len(used_levels)), np.maximum(used_levels, 0)]
        one = np.where(used_levels >= 0, one, 0.0)
        if not np.isfinite(one).all():
            wrong = int(np.argmin(np.isfinite(one)))
            raise ValueError(
                f"Costs: used_levels: expert {wrong} has no level "
                f"{sizes.levels.names[used_levels[wrong]]}; plan for levels that sizes.has"
            )
        missing = np.asarray(missing_bytes, float)
        misses = (missing > 0).astype(float) if misses is None else np.asarray(misses, float)
        starts = np.concatenate([[0], np.cumsum(sizes.num_experts)[:-1]])
        compute = np.add.reduceat(touched * one, starts)
        nothing = np.multiply.reduceat(1.0 - np.minimum(touched, 1.0) * misses, starts)
        read = (1.0 - nothing) * self.latency
        read += np.add.reduceat(touched * missing, starts) / self.bandwidth
        hidden = np.minimum(self.overlap * read, compute + self.dense / len(starts))
        return compute, read - hidden

    def token_time(
        self,
        sizes: Sizes,
        used_levels: np.ndarray,
        use: np.ndarray,
        missing_bytes: np.ndarray,
        *,
        tokens: int = 1,
        misses: np.ndarray | None = None,
    ) -> float:
        """Expected seconds of one pass over `tokens` tokens of as many sequences.

        used_levels: int [X], -1 for an expert that is skipped.  use: [X], probability that a token uses it.
        missing_bytes: [X], bytes that are read when it is used (expected ones, where a cache may hold it).
        misses: [X], probability that anything is missing when it is used; default 1 where bytes are.
        """
        compute, stall = self.layer_times(
            sizes, used_levels, use, missing_bytes, tokens=tokens, misses=misses
        )
        outside = self.outside(sizes, resident=not np.any(missing_bytes))
        return float(outside + compute.sum() + stall.sum())

    def token_joules(self, seconds: float, read_bytes: float) -> float:
        """Joules of a pass that takes `seconds` and reads `read_bytes`."""
        return self.joules_per_second * seconds + self.joules_per_byte * read_bytes
