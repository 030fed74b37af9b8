"""How much memory this process uses, has used at most, and may use: Linux's own figures, in bytes.

rss and peak_rss include pages of files that are mapped in; they are what `ps` and a cgroup show. What
the interpreter and its libraries take before any model is there is the *baseline*: see baseline.py.

Imports nothing of comoe, so that everything may import it.
"""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

import psutil

_PAGE = os.sysconf("SC_PAGE_SIZE")
_C_LIBRARY = ctypes.CDLL(None)
_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_KEEP, _RETURN = 32 << 20, 128 << 10  # the most and the least that glibc itself sets


def rss() -> int:
    """Bytes of this process in memory now. A few microseconds."""
    try:
        with open("/proc/self/statm", "rb") as statm:
            return int(statm.read().split()[1]) * _PAGE
    except OSError:
        return psutil.Process().memory_info().rss


def peak_rss(pid: int | None = None) -> int:
    """The most that a process (default: this one) has had in memory since it began, or since reset_peak.

    VmHWM belongs to the program that runs, unlike getrusage's maxrss, which a child inherits from the
    parent that started it. Raises OSError if the process is gone.
    """
    path = f"/proc/{'self' if pid is None else pid}/status"
    status = Path(path).read_text()
    match = re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)
    if match is None:
        raise ProcessLookupError(f"peak_rss: {path} has no VmHWM; the process has ended")
    return int(match[1]) * 1024


def reset_peak() -> bool:
    """Makes peak_rss start again from what is in memory now; False where the system does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def give_back_free() -> None:
    """Gives the system what the C library keeps of freed memory: with glibc, the holes that large
    tensors leave. After a prompt of 6,144 tokens at hidden size 1,024 those were 180 MB."""
    if hasattr(_C_LIBRARY, "malloc_trim"):  # glibc's
        _C_LIBRARY.malloc_trim(0)


def keep_freed(keep: bool) -> None:
    """Whether glibc may keep large blocks that are freed. If not, what is in memory is what is in
    use, but for holes that it kept before: in the middle of the pass above, half of what it was. The price is a page fault for every page of
    every large tensor, which took about half again as much CPU time for a prompt of 1,024 tokens."""
    if hasattr(_C_LIBRARY, "mallopt"):
        _C_LIBRARY.mallopt(_M_MMAP_THRESHOLD, _KEEP if keep else _RETURN)


def cgroup_limit(root: str | os.PathLike = "/") -> tuple[int, int] | None:
    """(limit, bytes used without what can be dropped) of the tightest memory cgroup around this process.

    None when nothing limits it. Reads version 2 and version 1; `root` is for tests.
    """
    root = Path(root)
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    tightest = None
    for line in lines:
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0" and not controllers:
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # Inside a container the path may be that of the host, while only the container's own group
        # is mounted, at the top: groups that are not there are passed over.
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            found = _read_limit(folder, *names)
            if found is not None and (
                tightest is None or found[0] - found[1] < tightest[0] - tightest[1]
            ):
                tightest = found
            if folder == top:
                break
    return tightest


def _read_limit(
    folder: Path, limit_name: str, used_name: str, cache_name: str
) -> tuple[int, int] | None:
    try:
        limit = (folder / limit_name).read_text().strip()
        used = int((folder / used_name).read_text())
        stat = (folder / "memory.stat").read_text()
    except (OSError, ValueError):
        return None
    # "max", or on version 1 a number near 2^63, is no limit.
    if not limit.isdigit() or int(limit) >= 1 << 60:
        return None
    droppable = re.search(rf"^{cache_name} (\d+)$", stat, re.MULTILINE)
    return int(limit), max(used - (int(droppable[1]) if droppable else 0), 0)


def total() -> int:
    """Bytes of memory that this process could ever have: the machine's, or its cgroup's limit."""
    limit = cgroup_limit()
    machine = psutil.virtual_memory().total
    return machine if limit is None else min(machine, limit[0])


def available() -> int:
    """Bytes that this process can still take without swapping and without meeting its cgroup's limit."""
    machine = psutil.virtual_memory().available
    limit = cgroup_limit()
    return machine if limit is None else min(machine, max(limit[0] - limit[1], 0))
