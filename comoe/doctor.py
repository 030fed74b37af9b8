"""What this machine is, how fast each of its tiers delivers bytes, and what would make comoe faster."""

from __future__ import annotations

import errno
import mmap
import os
import platform
import statistics
import tempfile
import threading
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from comoe import __version__, memory
from comoe.config import format_bytes

READ_BYTES = 1 << 20
SMALL_READ = 4 << 10
SLOW_DISK = 200e6


def examine(folder: str | os.PathLike = ".", disk_bytes: int = 256 << 20) -> dict[str, Any]:
    """Everything `comoe doctor` shows. Writes and removes a file of disk_bytes in `folder`, where
    stores are or will be; sizes in bytes, bandwidths in bytes per second."""
    if not Path(folder).is_dir():
        raise NotADirectoryError(
            f"doctor: {folder} is not a folder; give the folder where your stores are"
        )
    native = native_module()
    gpus, why_no_gpu = list_gpus(native)
    report = {
        "versions": versions(),
        "cpu": cpu(native),
        "memory": {
            "total": memory.total(),
            "available": memory.available(),
            "cgroup_limit": (memory.cgroup_limit() or (None,))[0],
        },
        "gpus": gpus,
        "why_no_gpu": why_no_gpu,
        "bandwidth": {
            "memory_read": memory_read_bandwidth(native),
            "disk": disk_bandwidth(folder, disk_bytes),
        },
    }
    for gpu in gpus:
        gpu["host_to_device"] = native.cuda_copy_bandwidth(gpu["index"])
    report["advice"] = advice(report)
    return report


def native_module() -> Any | None:
    try:
        from comoe import _C
    except ImportError:
        return None
    return _C


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"comoe": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "safetensors", "tokenizers", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def cpu(native: Any | None) -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(
            (s.split(":", 1)[1].strip() for s in lines if s.startswith("model name")), model
        )
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": model,
        "machine": platform.machine(),
        "cores": cores,
        "load": os.getloadavg()[0],
        "isa": native.isa_name() if native is not None else None,
        "native": native is not None,
        "cuda_built": bool(native is not None and native.cuda_built),
    }


def list_gpus(native: Any | None) -> tuple[list[dict[str, Any]], str]:
    if native is None:
        return [], "the native module is not built"
    devices, why = native.cuda_devices()
    if not devices and "insufficient" in why:
        why = "there is no NVIDIA driver, or it is older than the CUDA that comoe was built with"
    return devices, why


def memory_read_bandwidth(
    native: Any | None, num_bytes: int = 512 << 20, repeats: int = 5
) -> float | None:
    """Bytes per second at which the kernels' threads together read a block that no cache holds: the
    median of `repeats`. None without the native module."""
    if native is None:
        return None
    num_bytes = max(min(num_bytes, memory.available() // 4), 1 << 20)
    block = np.ones(num_bytes, np.uint8)
    seconds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        native.stream_read(block)
        seconds.append(time.perf_counter() - begin)
    return num_bytes / statistics.median(seconds[1:])


def disk_bandwidth(folder: str | os.PathLike, num_bytes: int, threads: int = 4) -> dict[str, Any]:
    """Cold reads of 1 MiB from a fresh file by `threads` threads, past the page cache if the file
    system can; and the median of small reads one by one: {direct, why, bytes_per_second, latency_seconds}."""
    num_reads = max(num_bytes // READ_BYTES, threads)
    descriptor, path = tempfile.mkstemp(prefix=".comoe-doctor-", dir=folder)
    try:
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            block = os.urandom(READ_BYTES)
            for _ in range(num_reads):
                file.write(block)
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        direct, why = True, ""
        try:
            reader = os.open(path, os.O_RDONLY | os.O_DIRECT)
            # Some file systems accept the flag and refuse the read.
            os.preadv(reader, [mmap.mmap(-1, READ_BYTES)], 0)
        except (OSError, AttributeError) as error:
            if isinstance(error, OSError) and error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            direct, why = False, f"the file system of {Path(folder).resolve()} refuses O_DIRECT"
            reader = os.open(path, os.O_RDONLY)
        try:
            # Before all is read: a disk's own cache may hold it afterwards.
            latency = _small_read_seconds(reader, num_reads)
            seconds = _read_all(reader, num_reads, threads)
        finally:
            os.close(reader)
    finally:
        os.unlink(path)
    return {
        "folder": str(Path(folder).resolve()),
        "direct": direct,
        "why": why,
        "bytes_per_second": num_reads * READ_BYTES / seconds,
        "latency_seconds": latency,
    }


def _small_read_seconds(descriptor: int, num_blocks: int, repeats: int = 33) -> float:
    """Median seconds of one small read, each in another block."""
    buffer, seconds = mmap.mmap(-1, SMALL_READ), []
    for i in range(repeats):
        begin = time.perf_counter()
        os.preadv(descriptor, [buffer], i * 7 % num_blocks * READ_BYTES)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def _read_all(descriptor: int, num_reads: int, threads: int) -> float:
    """Seconds that it takes to read every block once."""
    order = iter(range(num_reads))
    failures: list[OSError] = []

    def work() -> None:
        buffer = mmap.mmap(-1, READ_BYTES)  # page-aligned, as O_DIRECT asks
        try:
            # next() on a shared iterator is atomic under the interpreter's lock.
            for index in order:
                if os.preadv(descriptor, [buffer], index * READ_BYTES) != READ_BYTES:
                    raise OSError(errno.EIO, "short read of the test file")
        except OSError as error:
            failures.append(error)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    begin = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        raise failures[0]
    return time.perf_counter() - begin


def advice(report: dict[str, Any]) -> list[dict[str, str]]:
    """What is missing or slow, worst first: {what, fix}."""
    found: list[dict[str, str]] = []

    def add(what: str, fix: str) -> None:
        found.append({"what": what, "fix": fix})

    cpu_, disk = report["cpu"], report["bandwidth"]["disk"]
    if not cpu_["native"]:
        add(
            "the native module comoe._C is not built",
            "make build, or pip install . in the source folder",
        )
    for name in ("torch", "transformers"):
        if report["versions"][name] is None:
            add(f"{name} is not installed", f"pip install {name}")
    if cpu_["isa"] == "portable":
        add(
            "no vector instructions that comoe has kernels for (AVX2, AVX-512): the portable kernels run",
            "use a CPU with AVX2 or later if speed matters",
        )
    if not disk["direct"]:
        add(
            disk["why"] + ": reads go through the page cache, and are dropped from it afterwards",
            "keep stores on a local ext4, xfs or btrfs file system",
        )
    if disk["bytes_per_second"] < SLOW_DISK:
        add(
            f"the disk reads {format_bytes(disk['bytes_per_second'])}/s: experts that are not in memory come slowly",
            "keep stores on an SSD, or give a larger --memory so that fewer experts are read",
        )
    if cpu_["load"] > cpu_["cores"]:
        add(
            f"the machine is busy (load {cpu_['load']:.1f} on {cpu_['cores']} cores): bandwidths above are too low",
            "run comoe doctor again when it is idle",
        )
    limit = report["memory"]["cgroup_limit"]
    if limit is not None and report["memory"]["available"] < limit // 4:
        add(
            f"of this container's {format_bytes(limit)} only {format_bytes(report['memory']['available'])} are free",
            "raise the container's memory limit, or end what uses it",
        )
    if Path("/proc/driver/nvidia/version").exists() and not cpu_["cuda_built"]:
        add(
            "there is an NVIDIA driver, but comoe was built without CUDA",
            "put nvcc on PATH and build again",
        )
    return found
