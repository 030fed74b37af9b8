"""Packs a checkpoint without keeping the exact rungs on disk, for a disk that is too small for both.

    python bench/thin_store.py SRC DST

The store is what `comoe pack` writes, but as soon as a layer is whole, the extents of its exact rungs become holes: a third of
the bytes is left. Whatever asks for an exact rung of it gets a checksum error.
"""

from __future__ import annotations

import argparse
import ctypes
import os
from pathlib import Path

from comoe import packing
from comoe.cli.common import bytes_bar
from comoe.store.checks import parse_layer_header
from comoe.store.format import NUM_RECORDS, padded

PUNCH_HOLE = 0x03  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
_LIBC = ctypes.CDLL(None, use_errno=True)


def punch(path: Path) -> None:
    """Gives the disk back what a layer file's exact rungs take."""
    with path.open("r+b") as file:
        info = parse_layer_header(file, os.fstat(file.fileno()).st_size, path.name)
        for record in info.records[:, NUM_RECORDS - 1]:
            begin, count = int(record["offset"]), padded(int(record["nbytes"]))
            hole = (ctypes.c_int(PUNCH_HOLE), ctypes.c_longlong(begin), ctypes.c_longlong(count))
            if _LIBC.fallocate(file.fileno(), *hole):
                error = ctypes.get_errno()
                raise OSError(error, os.strerror(error), str(path))


def pack_thin(source: Path, destination: Path) -> None:
    punched: set[Path] = set()
    folder = destination.with_name(destination.name + ".partial") / "experts"

    def thin() -> None:
        for path in sorted(folder.glob("layer-*.bin")):
            if path not in punched:
                punch(path)
                punched.add(path)

    packing._Packing._check_space = lambda self: None  # it would count what is punched
    with bytes_bar(f"packing {source.name}, thin") as update:

        def progress(done: int, total: int) -> None:
            update(done, total)
            thin()

        packing.pack(source, destination, progress=progress)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("destination", type=Path)
    args = parser.parse_args()
    pack_thin(args.source, args.destination)
