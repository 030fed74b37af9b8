"""Leaves a core to the thread that reads while a model waits for its disk.

torch's OpenMP threads spin between two parallel regions and take the reading thread's core. With a third of the
experts resident, random text, 2 cores: 93 ms per token with two torch threads, 86 with one, alternating in one process
(docs/performance.md).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import torch

FEW_TOKENS = 16  # more of them keep every core busy between two layers' reads
WAITING_SHARE = 0.25  # of the time


class ReaderCore:
    """One thread fewer for torch in steps of few tokens, while the step before waited for the disk.

    Only in the thread that runs the step, and only until it ends: `begin` and `end` go together.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._began: tuple[float, float] | None = None
        self._lent = threading.local()

    def begin(self, tokens: int, wait_seconds: float) -> None:
        """tokens: of all sequences.  wait_seconds: that computing has waited for reads so far."""
        self.end()
        now = self._clock()
        before, self._began = self._began, (now, wait_seconds)
        if before is None or tokens > FEW_TOKENS:
            return
        waits = wait_seconds - before[1] >= WAITING_SHARE * (now - before[0])
        threads = torch.get_num_threads()
        if waits and threads > 1:
            self._lent.threads = threads
            torch.set_num_threads(threads - 1)

    def end(self) -> None:
        threads = getattr(self._lent, "threads", 0)
        if threads:
            self._lent.threads = 0
            torch.set_num_threads(threads)
