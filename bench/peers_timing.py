"""How long a peer is warmed up and timed, the same for all. Imports nothing of comoe."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def read_bytes() -> int:
    """Bytes that storage has delivered to this process, page faults of mapped files included."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    return 0


def timed_decode(feed: Callable[[int], float], job: dict[str, Any]) -> dict[str, Any]:
    """Tokens per second of decoding. feed(token): seconds.

    Warmed up for `warm_tokens` and until `warm_seconds` are over; then timed until `timed_tokens`, or, with at least
    `least_tokens`, `timed_seconds` are over: slow peers need not finish what takes them minutes.
    """
    steps = iter(job["steps"])
    began, count = time.perf_counter(), 0
    while count < job["warm_tokens"] or (
        time.perf_counter() - began < job["warm_seconds"] and count < job["most_warm_tokens"]
    ):
        feed(next(steps))
        count += 1
    seconds: list[float] = []
    before = read_bytes()
    while len(seconds) < job["timed_tokens"] and (
        len(seconds) < job["least_tokens"] or sum(seconds) < job["timed_seconds"]
    ):
        seconds.append(feed(next(steps)))
    return {
        "decode_tokens_per_second": len(seconds) / sum(seconds),
        "read_bytes_per_token": round((read_bytes() - before) / len(seconds)),
        "timed_tokens": len(seconds),
        "warm_tokens": count,
        "token_seconds": [round(s, 5) for s in seconds],
    }
