"""Device profiles: what a device has and how fast it is, from comoe/data/devices.json or measured here.

A profile is one flat object; sizes in bytes, rates per second, energy in joules:

    memory, memory_bandwidth      of the host
    accelerator_memory, accelerator_bandwidth, link_bandwidth, link_latency
                                  optional, all four or none: a device with memory of its own, which then
                                  computes, and the link to it. Unified memory has none
    disk_bandwidth, disk_latency  large reads; seconds of a small one
    flops                         fp32 of the processor that computes
    kernel_share                  of its memory bandwidth that decode kernels reach
    layer_overhead, step_overhead seconds per decoder layer, and per token, that do not depend on bytes
    deciding_overhead             seconds per layer with experts, of plans under which something may be read
    watts                         of the whole device at work
    disk_joules_per_byte, memory_joules_per_byte
    sources                       where each figure is from, by its name
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from comoe.policy.snapshot import Estimate, Link

MEASURED = "measured"
# Seconds, of one core of an AMD EPYC (Zen 4).
LAYER_OVERHEAD, STEP_OVERHEAD, DECIDING_OVERHEAD = 5.6e-4, 7e-4, 8e-5
ACCELERATOR = (
    "accelerator_memory",
    "accelerator_bandwidth",
    "link_bandwidth",
    "link_latency",
)


class DeviceError(ValueError):
    """No such profile, or one that is wrong; the message says what to do."""


@dataclass(frozen=True)
class Device:
    """One profile; see above."""

    name: str
    title: str
    memory: float
    memory_bandwidth: float
    disk_bandwidth: float
    disk_latency: float
    flops: float
    kernel_share: float
    layer_overhead: float
    step_overhead: float
    deciding_overhead: float
    watts: float
    disk_joules_per_byte: float
    memory_joules_per_byte: float
    accelerator_memory: float | None = None
    accelerator_bandwidth: float | None = None
    link_bandwidth: float | None = None
    link_latency: float | None = None

    @property
    def compute_memory(self) -> float:
        """Bytes of the memory that experts are computed from."""
        return self.memory if self.accelerator_memory is None else self.accelerator_memory

    @property
    def compute_bandwidth(self) -> float:
        """Bytes/s of that memory."""
        return (
            self.memory_bandwidth
            if self.accelerator_bandwidth is None
            else self.accelerator_bandwidth
        )

    @property
    def tiers(self) -> dict[str, Link]:
        """Links to what lies below the memory that is computed from, fastest first."""
        links = {}
        if self.link_bandwidth is not None:
            links["host"] = Link(Estimate(self.link_bandwidth), Estimate(self.link_latency or 0.0))
        links["disk"] = Link(Estimate(self.disk_bandwidth), Estimate(self.disk_latency))
        return links

    def link(self, tier: str) -> Link:
        if tier not in self.tiers:
            raise DeviceError(f"device {self.name} {_no_such('tier', tier, self.tiers)}")
        return self.tiers[tier]

    def tier_of(self, num_bytes: float) -> str:
        """Where `num_bytes` that are not computed from lie: in host memory if there is room beside an
        accelerator, else on disk."""
        return "host" if "host" in self.tiers and num_bytes <= self.memory else "disk"

    def joules_per_byte(self, tier: str) -> float:
        """Of bytes that come from a tier; what comes from disk passes through memory."""
        self.link(tier)
        return self.memory_joules_per_byte + (tier == "disk") * self.disk_joules_per_byte


NUMBERS = tuple(f.name for f in fields(Device) if f.name not in ("name", "title"))
REQUIRED = tuple(name for name in NUMBERS if name not in ACCELERATOR)


def device_names() -> list[str]:
    """Names of the profiles, without "measured"."""
    return list(_profiles(None))


def load_device(name: str, path: str | Path | None = None) -> Device:
    """The profile of that name. path: another file of profiles.

    Raises DeviceError for a name that is not there, or a profile with a typo or an absurd figure.
    """
    profiles = _profiles(path)
    if name not in profiles:
        raise DeviceError(f"device: comoe {_no_such('profile', name, [*profiles, MEASURED])}")
    return parse_device(name, profiles[name])


def parse_device(name: str, profile: Any) -> Device:
    """A Device from one object of the file. Raises DeviceError."""
    what = f"device profile {name}"
    if not isinstance(profile, Mapping):
        raise DeviceError(f"{what}: expected an object of figures, got {profile!r}")
    known = ("title", *NUMBERS, "sources")
    for key in profile:
        if key not in known:
            raise DeviceError(f"{what} {_no_such('figure', key, known)}")
    missing = [key for key in REQUIRED if key not in profile]
    if missing:
        raise DeviceError(
            f"{what} lacks {', '.join(missing)}; add {'it' if len(missing) == 1 else 'them'}"
        )
    given = [key for key in ACCELERATOR if profile.get(key) is not None]
    if given and len(given) < len(ACCELERATOR):
        lacks = [key for key in ACCELERATOR if key not in given]
        raise DeviceError(f"{what} has {given[0]} but lacks {', '.join(lacks)}; give all or none")
    numbers = {}
    for key in (*REQUIRED, *given):
        value = profile[key]
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not good or not (0 < value < math.inf):
            raise DeviceError(f"{what}: {key}: expected a number above 0, got {value!r}")
        numbers[key] = float(value)
    if numbers["kernel_share"] > 1:
        raise DeviceError(
            f"{what}: kernel_share: expected a share of at most 1, got {numbers['kernel_share']}"
        )
    return Device(name, str(profile.get("title", name)), **numbers)


def measured_device(
    report: Mapping[str, Any], overheads: Mapping[str, float] | None = None
) -> Device:
    """This machine, from what `comoe doctor` measured (doctor.examine). What it does not measure is as
    on a machine like the one that the kernels were measured on.

    overheads: step, layer, deciding and wait in seconds, as comoe/overheads.py measures them.

    Raises DeviceError where the native module is missing, since then nothing was measured.
    """
    bandwidth, memory = report["bandwidth"], report["memory"]
    if not bandwidth["memory_read"]:
        raise DeviceError(
            "device measured: memory bandwidth cannot be measured without the native module; build it "
            "(make build), or name a profile: " + ", ".join(device_names())
        )
    disk, known = bandwidth["disk"], dict(overheads or {})
    return Device(
        MEASURED,
        f"this machine: {report['cpu']['model']}, {report['cpu']['cores']} cores",
        memory=float(memory["total"]),
        memory_bandwidth=float(bandwidth["memory_read"]),
        disk_bandwidth=float(disk["bytes_per_second"]),
        disk_latency=float(known.get("wait", disk["latency_seconds"])),
        # 16 fp32 lanes, two at once, at 2.5 GHz: decode is bound by memory long before.
        flops=8e10 * report["cpu"]["cores"],
        kernel_share=0.8,
        layer_overhead=known.get("layer", LAYER_OVERHEAD),
        step_overhead=known.get("step", STEP_OVERHEAD),
        deciding_overhead=known.get("deciding", DECIDING_OVERHEAD),
        watts=15.0 * report["cpu"]["cores"],
        disk_joules_per_byte=1.24e-9,
        memory_joules_per_byte=8e-11,
    )


def _profiles(path: str | Path | None) -> dict[str, Any]:
    try:
        if path is None:
            text = (resources.files("comoe") / "data" / "devices.json").read_text("utf-8")
        else:
            text = Path(path).read_text("utf-8")
        found = json.loads(text)
    except ValueError as error:
        raise DeviceError(f"{path or 'devices.json'} is not JSON: {error}; mend it") from error
    if not isinstance(found, dict):
        raise DeviceError(f"{path or 'devices.json'}: expected an object of profiles by name")
    return found


def _no_such(kind: str, name: str, known: Iterable[str]) -> str:
    """has no <kind> <name>: the nearest, and all."""
    known = list(known)
    near = difflib.get_close_matches(str(name).lower(), known, 1, 0.4)
    hint = f"; did you mean {near[0]}?" if near else ";"
    return f"has no {kind} {name!r}{hint} Known are {', '.join(known)}"
