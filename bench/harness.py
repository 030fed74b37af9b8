"""Timing for the benchmarks: variants interleaved in one run, medians with p20 and p80, rows in CSV."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from comoe import _C

RESULTS = Path(__file__).resolve().parent / "results"
SCRATCH = RESULTS.parent.parent / "build" / "bench"  # on the disk of the repository, ignored by git


def scratch() -> tempfile.TemporaryDirectory:
    """A folder for models and stores that goes when the benchmark ends."""
    SCRATCH.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(dir=SCRATCH)


def interleave(variants: dict[str, Callable[[], object]], repeats: int) -> dict[str, np.ndarray]:
    """Seconds of each call, [repeats] per variant. Variants take turns, so that whatever else the machine
    does hits all alike; the first turn is not counted."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 1):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: np.array(t) for name, t in times.items()}


def quantiles(times: np.ndarray) -> tuple[float, float, float]:
    """p20, median, p80."""
    return tuple(np.quantile(times, [0.2, 0.5, 0.8]))


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.machine()


def conditions() -> dict[str, object]:
    """What a figure depends on besides its own parameters."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=RESULTS.parent,
    ).stdout.strip()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit or "n/a",
        "cpu": cpu_name(),
        "isa": _C.isa_name(),
        "threads": _C.num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def write_rows(name: str, rows: list[dict[str, object]]) -> Path:
    """Appends rows to bench/results/<name>.csv."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    known = conditions()
    rows = [{**row, **known} for row in rows]
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)
    return path
