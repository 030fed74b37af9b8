"""A process and its page cache in a memory cgroup of its own: its limit, its peak. Linux, version 1 or 2 of
cgroups, and the right to make groups (root, or a delegated folder)."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path


class CgroupError(RuntimeError):
    """No memory cgroup can be made here; the message says why."""


class MemoryGroup:
    """A new memory cgroup, removed at the end of the `with` block.

    limit: bytes for processes and the page cache that they fill; None: only counted. Swap is not limited by
    version 1's file used here; `bench/peers.py` refuses to run capped cases where there is swap.
    """

    def __init__(self, limit: int | None, root: str | os.PathLike = "/"):
        self.limit = limit
        self.root = Path(root)
        self.folder: Path | None = None

    def __enter__(self) -> MemoryGroup:
        parent, self._names = self._parent()
        self.folder = parent / f"comoe-bench-{os.getpid()}-{time.monotonic_ns()}"
        try:
            self.folder.mkdir()
            if self.limit is not None:
                (self.folder / self._names["limit"]).write_text(str(self.limit))
        except OSError as error:
            raise CgroupError(
                f"cannot make a memory cgroup in {parent} ({error}); run as root, or on a system that delegates "
                "the memory controller to you"
            ) from error
        return self

    def _parent(self) -> tuple[Path, dict[str, str]]:
        """The folder in which this process may make groups, and the names of its files."""
        lines = (self.root / "proc/self/cgroup").read_text().splitlines()
        for line in lines:
            _, controllers, path = line.split(":", 2)
            if "memory" in controllers.split(","):
                top = self.root / "sys/fs/cgroup/memory"
                own = top / path.lstrip("/")
                names = {
                    "limit": "memory.limit_in_bytes",
                    "peak": "memory.max_usage_in_bytes",
                    "kills": "memory.oom_control",
                }
                return (own if own.is_dir() else top), names
        top = self.root / "sys/fs/cgroup"
        if "memory" in (top / "cgroup.controllers").read_text().split():
            # A group with processes of its own can have no children with limits: beside it, then.
            return top, {"limit": "memory.max", "peak": "memory.peak", "kills": "memory.events"}
        raise CgroupError(f"{top}: no memory controller; boot with cgroup_enable=memory")

    def popen(self, command: list[str], **options) -> subprocess.Popen:
        """Starts a command inside: it joins before its program begins, so that all it ever takes counts."""
        join = f'echo $$ > "{self.folder}/cgroup.procs" && exec "$@"'
        return subprocess.Popen(["/bin/sh", "-c", join, "sh", *command], **options)

    def peak(self) -> int | None:
        """Bytes, page cache included; None where the kernel does not keep it."""
        try:
            return int((self.folder / self._names["peak"]).read_text())
        except OSError:
            return None

    def killed(self) -> bool:
        """Whether the kernel ended a process here because the limit was met."""
        fields = dict(
            line.split() for line in (self.folder / self._names["kills"]).read_text().splitlines()
        )
        return int(fields.get("oom_kill", 0)) > 0

    def __exit__(self, *exc_info) -> None:
        for _ in range(50):
            try:
                self.folder.rmdir()
                return
            except OSError:  # its last process is still being taken down
                time.sleep(0.1)


def drop_from_cache(files: Iterable[Path]) -> None:
    """Takes files out of the page cache, so that the next reader pays for their pages, and is charged for them."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
