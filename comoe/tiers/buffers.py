"""Memory that transfers come into: one block per thread, page aligned, so that it can be written to disk
past the page cache."""

from __future__ import annotations

import mmap
import threading

_mine = threading.local()


def block(nbytes: int) -> memoryview:
    """This thread's block, uint8 [nbytes]. The next call may give the same memory."""
    have = getattr(_mine, "block", None)
    if have is None or len(have) < nbytes:
        _mine.block = have = mmap.mmap(-1, max(-(-nbytes // (1 << 20)) << 20, 1 << 20))
    return memoryview(have)[:nbytes]
