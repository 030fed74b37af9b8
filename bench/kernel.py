"""One form for all benchmarks of single kernels, which `make bench` runs with pytest-benchmark.

A `bench_<op>.py` has tests that make a Kernel and hand it to `measure`. Before each timed call the ceiling and the rival
run, so that all three see the same moment of the machine and none finds its data in a cache that another left. The
ceiling is what the machine allows for the same amount of work, measured in the same run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from comoe import _C
from comoe_kernels import threads

ROUNDS = 9
READ_BYTES = 256 << 20  # of the ceiling: more than any cache


@dataclass(frozen=True)
class Ceiling:
    """name, a run, and how much work one run does, in the kernel's unit of work."""

    name: str
    run: Callable[[], object]
    work: float


@dataclass(frozen=True)
class Kernel:
    """label: shape and level.  work: bytes, FLOP or items of one run; unit: what work / second / `per` is in.

    rival: the same job done otherwise, for `rival_share` of the work that one run does.  error: over the fp32
    reference's own rounding, or relative, as `error_of` says; checked before the kernel is timed.
    """

    op: str
    label: str
    run: Callable[[], object]
    work: float
    unit: str = "GB/s"
    per: float = 1e9
    ceiling: Ceiling | None = None
    rival_name: str = ""
    rival: Callable[[], object] | None = None
    rival_share: float = 1.0
    error: float | None = None
    error_of: str = ""
    prepare: Callable[[], object] | None = None


@cache
def _block() -> np.ndarray:
    return np.ones(READ_BYTES, np.uint8)


def memory_read() -> Ceiling:
    """The kernels' own threads reading memory that is in no cache."""
    threads.use_own_threads()
    return Ceiling("memory read", lambda: _C.stream_read(_block()), READ_BYTES)


def memory_copy() -> Ceiling:
    """One thread's copy; work counts bytes read and bytes written."""
    half = READ_BYTES // 2
    block = _block()
    return Ceiling("memcpy", lambda: np.copyto(block[:half], block[half:]), 2 * half)


def seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def measure(benchmark: Any, kernel: Kernel, rounds: int = ROUNDS) -> dict[str, object]:
    """Times the kernel with pytest-benchmark's fixture; the row is in its extra_info too."""
    ceilings: list[float] = []
    rivals: list[float] = []

    def beside() -> None:
        if kernel.rival is not None:
            rivals.append(seconds(kernel.rival))
        if kernel.ceiling is not None:
            ceilings.append(seconds(kernel.ceiling.run))
        if kernel.prepare is not None:
            kernel.prepare()

    beside()  # the first turn of each is not counted
    kernel.run()
    ceilings.clear()
    rivals.clear()
    benchmark.pedantic(kernel.run, setup=beside, rounds=rounds)
    times = np.array(benchmark.stats.stats.data)
    low, middle, high = np.quantile(times, [0.2, 0.5, 0.8])
    rate = kernel.work / middle / kernel.per
    row: dict[str, object] = {
        "op": kernel.op,
        "case": kernel.label,
        "us": round(middle * 1e6, 1),
        "us_p20": round(low * 1e6, 1),
        "us_p80": round(high * 1e6, 1),
        "rate": round(rate, 3),
        "unit": kernel.unit,
        "ceiling": "",
        "ceiling_rate": "",
        "share": "",
        "rival": "",
        "times_rival": "",
        "error": "" if kernel.error is None else float(f"{kernel.error:.3g}"),
        "error_of": kernel.error_of,
    }
    if kernel.ceiling is not None:
        best = kernel.ceiling.work / float(np.median(ceilings)) / kernel.per
        row |= {
            "ceiling": kernel.ceiling.name,
            "ceiling_rate": round(best, 3),
            "share": round(rate / best, 3),
        }
    if kernel.rival is not None:
        slower = float(np.median(rivals)) / kernel.rival_share / middle
        row |= {"rival": kernel.rival_name, "times_rival": round(slower, 2)}
    benchmark.extra_info.update(row)
    return row
