"""Reads this machine's sensors. What cannot be read is None; nothing here raises, nothing is judged."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import psutil

from comoe import memory
from comoe.policy.nvml import Nvml

T = TypeVar("T")


@dataclass(frozen=True)
class Readings:
    """host_free, host_total, device_free: bytes.  stalled: seconds, since the system started, in which some
    task waited for memory.  plugged: on mains.  battery: charge, 0 to 1.  None: no such sensor."""

    host_free: float | None = None
    host_total: float | None = None
    device_free: float | None = None
    stalled: float | None = None
    plugged: bool | None = None
    battery: float | None = None


class Sensors(Protocol):
    def read(self, *, slow: bool) -> Readings:
        """slow: also what rarely changes and takes longer (power)."""
        ...


class SystemSensors:
    """Memory from the system and its cgroups, pressure from PSI, power from the battery's driver.

    device: of NVML, for device_free (see nvml.Nvml); None: not asked.  root: for tests.
    """

    def __init__(self, device: int | str | None = None, root: str | os.PathLike = "/"):
        self._root = Path(root)
        self._pressure = str(self._root / "proc/pressure/memory")
        self._nvml = None if device is None else _attempt(lambda: Nvml(device))

    def read(self, *, slow: bool) -> Readings:
        free, total = _attempt(self._host) or (None, None)
        device = _attempt(self._nvml.memory) if self._nvml is not None else None
        charge = _attempt(self._power) if slow else None
        return Readings(
            free,
            total,
            None if device is None else device[0],
            _attempt(self._stalled),
            None if charge is None else charge[0],
            None if charge is None else charge[1],
        )

    def _host(self) -> tuple[int, int]:
        machine, limit = psutil.virtual_memory(), memory.cgroup_limit(self._root)
        if limit is None:
            return machine.available, machine.total
        left = max(limit[0] - limit[1], 0)
        return min(machine.available, left), min(machine.total, limit[0])

    def _stalled(self) -> float | None:
        """Pressure stall information: https://docs.kernel.org/accounting/psi.html"""
        with open(self._pressure, "rb") as file:
            match = re.match(rb"some .*total=(\d+)", file.readline())
        return None if match is None else int(match[1]) * 1e-6

    def _power(self) -> tuple[bool | None, float | None] | None:
        if not hasattr(psutil, "sensors_battery"):
            return None
        found = psutil.sensors_battery()
        if found is None:
            return None
        return found.power_plugged, found.percent / 100.0


def _attempt(read: Callable[[], T]) -> T | None:
    try:
        return read()
    except (OSError, ValueError, AttributeError, RuntimeError, psutil.Error):
        return None
