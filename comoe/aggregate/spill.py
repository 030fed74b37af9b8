"""Records that wait on disk until it is known which of them are written into a store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from comoe.store import AddedRecord


class Spill:
    """Payloads one after the other in one file, which the caller removes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")

    def put(self, records: Sequence[Sequence[AddedRecord | None]]) -> list[list]:
        """The same records, whose payloads are read back when they are asked for; shared ones are kept once."""
        known: dict[int, partial] = {}
        with self.path.open("ab") as file:
            for record in (r for own in records for r in own if r is not None):
                if id(record.payload) not in known:
                    known[id(record.payload)] = partial(
                        self._read, file.tell(), len(record.payload)
                    )
                    file.write(record.payload)
        return [[r and replace(r, payload=known[id(r.payload)]) for r in own] for own in records]

    def _read(self, at: int, nbytes: int) -> np.ndarray:
        return np.fromfile(self.path, np.uint8, nbytes, offset=at)
