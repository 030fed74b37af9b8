"""Checksums of the files beside the expert store (configuration, tokenizer, dense weights), in the manifest.

    "files": {"chunk_bytes": 8388608, "sums": {"config.json": {"bytes": 967, "crc32c": ["5ac1f0b2"]}, ...}}

One CRC-32C per chunk. What is read from elsewhere is verified by them chunk by chunk (comoe/tiers). Stores
without them can be used where they lie, and not from elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comoe import _C
from comoe.store import format as fmt
from comoe.store.checks import DAMAGED
from comoe.store.format import Manifest, StoreError
from comoe.store.part_file import PartFile

CHUNK_BYTES = 8 << 20
MAX_FILES = 4096
FILES_KEY = "files"


@dataclass(frozen=True)
class FileSum:
    """A file as it must be. crcs: of each chunk of `chunk_bytes`, the last one perhaps shorter."""

    nbytes: int
    chunk_bytes: int
    crcs: tuple[int, ...]

    def chunks(self) -> list[tuple[int, int, int]]:
        """(offset, bytes, crc) of each."""
        step = self.chunk_bytes
        return [
            (i * step, min(step, self.nbytes - i * step), crc) for i, crc in enumerate(self.crcs)
        ]


def file_sums(folder: Path) -> dict[str, Any]:
    """What the manifest says of all files right inside a packed folder, hidden ones left out."""
    sums = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.is_file():
            continue
        crcs = []
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(CHUNK_BYTES):
                while len(chunk) < CHUNK_BYTES and (more := file.read(CHUNK_BYTES - len(chunk))):
                    chunk += more
                crcs.append(f"{_C.crc32c(chunk):08x}")
        sums[path.name] = {"bytes": path.stat().st_size, "crc32c": crcs}
    return {"chunk_bytes": CHUNK_BYTES, "sums": sums}


def add_file_sums(folder: str | Path) -> None:
    """Gives a finished packed folder's manifest the checksums of the files as they are now."""
    from comoe.store.writer import manifest_text

    folder = Path(folder)
    path = folder / fmt.EXPERTS_FOLDER / fmt.MANIFEST_FILE
    manifest = json.loads(path.read_bytes())
    manifest[FILES_KEY] = file_sums(folder)
    text = manifest_text(manifest)
    with PartFile(path, len(text)) as part:
        part.write(text, 0)
        part.publish()


def read_sums(manifest: Manifest, what: str) -> dict[str, FileSum]:
    """The files that belong to a store, checked; `what` names it in errors."""
    found = manifest.extra.get(FILES_KEY)
    if found is None:
        raise StoreError(
            f"{what}: the store has no checksums of the files beside it, without which they are not believed from "
            "elsewhere; run `comoe pack` with the same SRC and DST again where it lies, which adds them"
        )

    def require(good: bool, problem: str) -> None:
        if not good:
            raise StoreError(f"{what}: files: {problem}; {DAMAGED}")

    require(isinstance(found, Mapping), "must be an object")
    step, sums = found.get("chunk_bytes"), found.get("sums")
    require(type(step) is int and 4096 <= step <= 1 << 30, "chunk_bytes must be 4096..2^30")
    require(
        isinstance(sums, Mapping) and 1 <= len(sums) <= MAX_FILES, "sums must have 1..4096 files"
    )
    checked = {}
    for name, entry in sums.items():
        plain = 0 < len(name) <= 255 and not name.startswith(".") and not set("/\\\0") & set(name)
        require(plain, f"{name!r} is not a plain file name")
        require(isinstance(entry, Mapping), f"{name}: must be an object")
        nbytes, crcs = entry.get("bytes"), entry.get("crc32c")
        require(type(nbytes) is int and 0 <= nbytes < 2**48, f"{name}: bytes is wrong")
        require(
            isinstance(crcs, list) and len(crcs) == -(-nbytes // step),
            f"{name}: expected a checksum per chunk",
        )
        try:
            checked[name] = FileSum(nbytes, step, tuple(int(crc, 16) for crc in crcs))
        except (TypeError, ValueError):
            require(False, f"{name}: checksums must be hexadecimal")
    return checked
