"""A folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from comoe.aggregate.errors import AggregateError


@contextlib.contextmanager
def published(folder: Path, op: str, error: type[Exception] = AggregateError) -> Iterator[Path]:
    """A folder to write in, which takes the place of `folder` at the end, or goes away on an error.

    The disk's errors become `error`, which names `op`.
    """
    part = old = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        old = part.with_name(part.name + ".old")
        yield part
        part.chmod(0o755)
        if folder.exists():
            folder.rename(old)
        part.rename(folder)
    except OSError as problem:
        raise error(
            f"{op}: cannot write to {folder}: {problem}; make room, mend the disk or choose another folder"
        ) from problem
    finally:
        for path in (part, old):
            if path is not None:
                shutil.rmtree(path, ignore_errors=True)
