"""Which threads the native kernels run in: a pool of their own, or torch's OpenMP threads.

On an otherwise idle machine of 2 cores both take the same (2.1 and 2.2 ms for a torch matmul and an
expert_ffn call). But libgomp waits for every thread of its team, also for one that the system does not
let run; the native pool waits only for threads that have begun. With other processes busy on both cores:
13.6 ms in torch's threads, 5.9 ms in our own (bench/bench_threads.py). The native pool is the default.
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
