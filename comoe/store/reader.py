"""Opens a store and reads records from it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from comoe import _C
from comoe.store import checks
from comoe.store import format as fmt
from comoe.store.format import LayerInfo, Manifest, StoreError


class Store:
    """A checked store. Reading it at run time is the engine's work; `payload` serves tools and tests."""

    def __init__(
        self, folder: Path, manifest: Manifest, layers: tuple[LayerInfo, ...], verify: bool
    ):
        self.folder, self.manifest, self.layers, self.verify = folder, manifest, layers, verify

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = True) -> Store:
        """Checks manifest and headers of all layers. `folder`: a packed checkpoint, or its experts folder.

        verify: check each record's checksum when `payload` reads it.
        """
        folder = Path(folder)
        if (folder / fmt.EXPERTS_FOLDER).is_dir():
            folder = folder / fmt.EXPERTS_FOLDER
        manifest = checks.read_manifest(folder)
        layers = []
        for layer_idx, entry in enumerate(manifest.layers):
            info = checks.check_layer(folder, entry, layer_idx)
            layers.append(replace(info, file=entry["file"]))
        return cls(folder, manifest, tuple(layers), verify)

    @property
    def page_bytes(self) -> int:
        return self.manifest.page_bytes

    @property
    def level_masks(self) -> tuple[int, ...]:
        return fmt.LEVEL_MASKS

    def path(self, layer_idx: int) -> Path:
        return self.folder / self.layers[layer_idx].file

    def payload(self, layer_idx: int, expert: int, record: int) -> bytes:
        """The payload of one record, read through the page cache."""
        entry = self.layers[layer_idx].records[expert, record]
        nbytes, offset = int(entry["nbytes"]), int(entry["offset"])
        path = self.path(layer_idx)
        try:
            with open(path, "rb", buffering=0) as file:
                payload = os.pread(file.fileno(), nbytes, offset)
        except OSError as error:
            raise StoreError(f"{path} cannot be read: {error}") from error
        where = f"{path}: record {record} of expert {expert}"
        if len(payload) != nbytes:
            raise StoreError(
                f"{where}: {nbytes:,} bytes expected, got {len(payload):,}; {checks.DAMAGED}"
            )
        if self.verify and _C.crc32c(payload) != entry["crc32c"]:
            raise StoreError(f"{where}: checksum does not match; {checks.DAMAGED}")
        return payload

    def level_bytes(self, layer_idx: int, level: int) -> int:
        """Payload bytes per expert that a level needs."""
        mask, sizes = fmt.LEVEL_MASKS[level], self.layers[layer_idx].records["nbytes"][0]
        return sum(int(n) for r, n in enumerate(sizes) if mask >> r & 1)
