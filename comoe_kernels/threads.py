"""Lets the native kernels run inside torch's OpenMP threads.

Two thread pools on the same cores hurt each other: the idle one spins while the other works. Where
torch's OpenMP is libgomp, `share_torch_threads` hands the native code its entry point; elsewhere the
native pool, which stops spinning after 20 us, stays in use.

Measured with bench/bench_threads.py (a 2048 x 2048 product in torch and an expert_ffn call in turn, 2
threads): undisturbed, sharing takes 1.8 to 1.9 ms a pair and the native pool 2.1 to 2.2. On cores that
five other processes keep busy both suffer and libgomp's spinning barriers more (70 ms against 27).
"""

from __future__ import annotations

import ctypes
import os

import torch

from comoe import _C


def find_gomp_parallel() -> int | None:
    """Address of `GOMP_parallel` in the libgomp that this process has loaded, or None."""
    try:
        with open("/proc/self/maps") as maps:
            paths = {line.split(maxsplit=5)[5].strip() for line in maps if "libgomp" in line}
    except OSError:
        return None
    # Several OpenMP runtimes at once: which one torch uses cannot be told from outside.
    if len(paths) != 1:
        return None
    try:
        library = ctypes.CDLL(paths.pop(), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        return ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


def share_torch_threads() -> bool:
    """Uses torch's threads, as many as torch has now; False if its OpenMP cannot be shared."""
    address = find_gomp_parallel()
    _C.set_num_threads(torch.get_num_threads())
    _C.use_gomp(address or 0)
    return address is not None


def use_own_threads() -> None:
    """Uses the native pool, with as many threads as torch has now."""
    _C.set_num_threads(torch.get_num_threads())
    _C.use_gomp(0)
