"""A file that appears under its name whole, or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from comoe.store.format import ALIGNMENT, StoreError


class PartFile:
    """Written as `path`.part; `publish` makes it durable and gives it its name.

    Leaving the block without that removes it. A disk that is full or fails becomes a StoreError.
    Aligned writes of aligned memory go past the page cache where the file system allows it.
    """

    def __init__(self, path: Path, nbytes: int):
        self.path, self.nbytes = path, nbytes
        self.part = path.with_name(path.name + ".part")

    def __enter__(self) -> PartFile:
        with self._disk_errors():
            self.part.unlink(missing_ok=True)  # of a process that was killed
            # Asked for whole now, so that a full disk shows before any work is done.
            if shutil.disk_usage(self.path.parent).free < self.nbytes:
                raise OSError(errno.ENOSPC, "not enough space for the file")
            self.fd = os.open(self.part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            self.direct_fd = os.open(self.part, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
        except OSError:
            self.direct_fd = None
        try:
            with self._disk_errors():
                _allocate(self.fd, self.nbytes)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        os.close(self.fd)
        if self.direct_fd is not None:
            os.close(self.direct_fd)
        self.part.unlink(missing_ok=True)

    def write(self, payload: bytes | memoryview, offset: int) -> None:
        """All of it: a nearly full disk makes short writes before it makes errors."""
        view = memoryview(payload)
        with self._disk_errors():
            while len(view):
                aligned = offset % ALIGNMENT == 0 and len(view) % ALIGNMENT == 0
                direct = aligned and self.direct_fd is not None
                try:
                    count = os.pwrite(self.direct_fd if direct else self.fd, view, offset)
                except OSError as error:
                    if direct and error.errno == errno.EINVAL:  # refused only when it comes to it
                        os.close(self.direct_fd)
                        self.direct_fd = None
                        continue
                    raise
                if count == 0:
                    raise OSError(errno.ENOSPC, "write of 0 bytes")
                if not direct:
                    # Starts writing to the disk now, instead of all at the end, and then drops the
                    # pages: they are of no more use here, and should not push out those that are.
                    os.posix_fadvise(self.fd, offset, count, os.POSIX_FADV_DONTNEED)
                view, offset = view[count:], offset + count

    def publish(self) -> None:
        with self._disk_errors():
            os.fsync(self.fd)
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.replace(self.part, self.path)
            folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)  # the rename
            finally:
                os.close(folder)

    @contextmanager
    def _disk_errors(self):
        try:
            yield
        except OSError as error:
            folder = self.path.parent
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                free = shutil.disk_usage(folder).free
                raise StoreError(
                    f"disk full while writing to {folder}: the next file needs {self.nbytes:,} bytes, {free:,} are "
                    "free; make room and run again: finished layers are kept and skipped"
                ) from error
            raise StoreError(f"cannot write to {folder}: {error}; run again to resume") from error


def _allocate(fd: int, nbytes: int) -> None:
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        os.truncate(fd, nbytes)  # this file system cannot promise
