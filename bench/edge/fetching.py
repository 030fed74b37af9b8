"""The whole way of a remote record, for benchmarks: ranges in a few threads, verified, chosen, timed and watched."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from comoe import _C
from comoe.tiers.source import open_source
from comoe.tiers.sources import Sources

NAME, STEP = "big.bin", 2 << 20


def several(url: str, nbytes: int, crcs: dict[int, int], threads: int = 4) -> Callable[[], None]:
    """As the fetcher does it: 2 MiB ranges in a few threads, each verified, chosen, timed and watched."""

    sources = Sources([open_source(url)])

    def one(begin: int) -> None:
        count = min(STEP, nbytes - begin)
        right = crcs[begin]
        sources.fetch(NAME, begin, count, lambda v: _C.crc32c(v) == right, size=nbytes)

    def run() -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(one, range(0, nbytes, STEP)))

    return run
