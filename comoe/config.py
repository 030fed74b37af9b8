"""Settings of a loaded model, and the one place where sizes such as "4.7GB" are read and written."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields, replace
from typing import Any

from comoe.policy.goal import Goal, parse_quality

DENSE_BITS = {"source": 0, "bits8": 8, "bits4": 4}  # 0: as in the checkpoint

_UNITS = {"": 1, "b": 1}
for _power, _prefix in enumerate("kmgt", 1):
    for _end in ("", "b"):
        _UNITS[_prefix + _end] = 1000**_power
        _UNITS[_prefix + "i" + _end] = 1024**_power
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-z]*)\s*", re.ASCII | re.IGNORECASE)


def parse_bytes(size: str | int | float, name: str = "memory") -> int:
    """Bytes in "4.7GB" (10^9), "3GiB" (2^30), "512 MB", "123" or 123. `name` is the argument that errors speak of."""
    expected = f"{name}: expected a size such as '4.7GB', '3GiB', '512MB' or a number of bytes"
    if isinstance(size, bool) or not isinstance(size, (str, int, float)):
        raise TypeError(f"{expected}; got {size!r} of type {type(size).__name__}")
    if isinstance(size, str):
        match = _SIZE.fullmatch(size)
        if match is None:
            raise ValueError(f"{expected}; got {size!r}")
        number, unit = match.groups()
        if unit.lower() not in _UNITS:
            raise ValueError(
                f"{expected}; got the unit {unit!r} in {size!r}, known are KB, MB, GB, TB, KiB, MiB, GiB, TiB"
            )
        # Whole numbers stay whole: a double would round the last digits of a large one.
        value = (float(number) if "." in number else int(number)) * _UNITS[unit.lower()]
    else:
        value = size
    if not math.isfinite(value) or value < 1 or value >= 2**63:
        raise ValueError(f"{expected} of at least 1 byte and less than 2^63; got {size!r}")
    return round(value)


def format_bytes(num_bytes: int | float) -> str:
    """A size for people, in decimal units and three digits: 4700000000 -> "4.70 GB"."""
    value = float(num_bytes)
    unit = "B"
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if abs(value) < 999.5 or unit == "TB":
            break
        value /= 1000
    if unit == "B":
        return f"{value:.0f} B"
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f} {unit}"


@dataclass(frozen=True)
class CoMoEConfig:
    """What a user may choose when a model is loaded. Everything else is decided from the store and the device.

    memory       bytes for dense weights + KV cache + experts + staging + workspace, beside the interpreter's own
                 baseline ("4.7GB" is read too); None: all experts, as far as the machine, or the container, has room.
    exact        use only the original weights, bit for bit; missing ones are waited for.
    device       where the model computes: "cpu" now.
    threads      threads of the expert kernels; 0: as many as torch uses.
    max_context  tokens that the KV cache is accounted for; 0: taken as it grows.
    io_threads   threads that read where io_uring is refused (with it, 16 reads are in flight).
    direct_io    read past the page cache (O_DIRECT) where the file system can.
    verify       check the checksum of every increment when it is read.
    upgrade      read finer rungs in the background while coarser ones are in use.
    quality      "high", "balanced", "fast", or nats per token that may be lost: experts that the memory
                 does not hold finely enough are then read when that is worth the time. None: never waited for.
    latency      seconds that a token should take at most; the rest goes into quality. None: no target.
    dense        what attention, shared experts, dense layers, embeddings and lm_head are kept in: "source", or "bits8" or
                 "bits4": read faster and smaller (docs/dense.md). Not with exact.
    compile      decode steps run compiled by torch.compile (docs/dense.md); without a C++ compiler as before.
    routing_tolerance
                 cache-aware routing: an expert of which something is missing gives way to a resident one whose router
                 logit is at most this much lower; 0: never. What it costs: docs/policy.md. Not with exact.
    expert_server, expert_token_file
                 URL of a machine that runs `comoe serve-experts` on the same store, and a file with its token:
                 experts of which something is missing are computed there when that is the best way. Not with exact.
    """

    memory: int | None = None
    exact: bool = False
    device: str = "cpu"
    threads: int = 0
    max_context: int = 0
    io_threads: int = 4
    direct_io: bool = True
    verify: bool = True
    upgrade: bool = True
    quality: str | float | None = None
    latency: float | None = None
    dense: str = "source"
    compile: bool = False
    routing_tolerance: float = 0.0
    expert_server: str | None = None
    expert_token_file: str | None = None

    def __post_init__(self) -> None:
        if self.memory is not None:
            object.__setattr__(self, "memory", parse_bytes(self.memory))
        if not isinstance(self.device, str) or not self.device:
            raise TypeError(f"device: expected a name such as 'cpu', got {self.device!r}")
        if self.device != "cpu":
            raise ValueError(
                f"device: expected 'cpu', got {self.device!r}: the parts for GPUs are built and tested "
                "(docs/device.md) but load does not use them yet; leave device out"
            )
        for name, least in (("threads", 0), ("max_context", 0), ("io_threads", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(
                    f"{name}: expected a whole number, got {value!r} of type {type(value).__name__}"
                )
            if not least <= value < 2**31:
                raise ValueError(
                    f"{name}: expected at least {least} and less than 2^31, got {value}"
                )
        self.goal()  # checks quality and latency
        if self.exact and (self.quality is not None or self.latency is not None):
            raise ValueError(
                "exact: expected neither quality nor latency beside it, since exact weights are always "
                "waited for; leave one of them out"
            )
        if self.dense not in DENSE_BITS:
            known = ", ".join(repr(name) for name in DENSE_BITS)
            raise ValueError(f"dense: expected one of {known}, got {self.dense!r}")
        if self.exact and self.dense != "source":
            raise ValueError(
                f"exact: expected dense='source' beside it, since {self.dense} rounds the dense weights; "
                "leave one of them out"
            )
        tolerance = self.routing_tolerance
        if isinstance(tolerance, bool) or not isinstance(tolerance, int | float):
            raise TypeError(f"routing_tolerance: expected a number, got {tolerance!r}")
        if not 0 <= tolerance < math.inf:
            raise ValueError(
                f"routing_tolerance: expected a finite number of at least 0, got {tolerance}"
            )
        if self.exact and tolerance:
            raise ValueError(
                "exact: expected no routing_tolerance beside it, since it changes the routing"
            )
        if (self.expert_server is None) != (self.expert_token_file is None):
            raise ValueError(
                "expert_server: expected a URL and expert_token_file together; give both or none"
            )
        if self.exact and self.expert_server is not None:
            raise ValueError(
                "exact: expected no expert_server beside it, since what comes back is rounded; leave one out"
            )
        for name in ("exact", "direct_io", "verify", "upgrade", "compile"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected True or False, got {getattr(self, name)!r}")

    def goal(self) -> Goal:
        """What quality and latency ask of the planner."""
        return Goal(parse_quality(self.quality), self.latency)

    @classmethod
    def create(cls, **options: Any) -> CoMoEConfig:
        """From keyword arguments; an unknown one is an error that lists the known ones."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise TypeError(f"unknown option {', '.join(unknown)}; known are {', '.join(known)}")
        return cls(**options)

    def with_(self, **changes: Any) -> CoMoEConfig:
        """A copy with some settings changed (checked again)."""
        return replace(self, **changes)
