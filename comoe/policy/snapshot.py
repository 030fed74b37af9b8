"""What is, as far as it is known, at one moment: the frozen input of planner and controller."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Estimate:
    """A measured quantity. std: of single samples about the mean, so that a change can be told from noise.
    samples: how many it rests on; 0: it is an assumption (a device profile's figure)."""

    mean: float
    std: float = 0.0
    samples: int = 0


@dataclass(frozen=True)
class Link:
    """A way for bytes to come: bandwidth in bytes/s, latency in seconds per request that is waited for."""

    bandwidth: Estimate
    latency: Estimate


@dataclass(frozen=True)
class Snapshot:
    """time: seconds of a clock that never runs backwards.
    host_free: bytes that this process can still take (its cgroup's limit counts); None: nothing tells.
    host_total: bytes it could ever have.  device_free: bytes of the accelerator, None without one.
    pressure: share of the time, 0 to 1, in which some task of the system waited for memory.
    tiers: "disk", "host", ... by name.  compute: seconds per weight and token of each level, by name.
    dense: seconds per token outside the experts, None until measured.
    power: "mains", "battery" or "unknown".  battery: charge, 0 to 1, None without one.
    sources: links to network sources by name."""

    time: float
    host_free: int | None = None
    host_total: int | None = None
    device_free: int | None = None
    pressure: float = 0.0
    tiers: Mapping[str, Link] = field(default_factory=dict)
    compute: Mapping[str, Estimate] = field(default_factory=dict)
    dense: Estimate | None = None
    power: str = "unknown"
    battery: float | None = None
    sources: Mapping[str, Link] = field(default_factory=dict)
