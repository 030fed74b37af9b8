"""Opens a store and reads records from it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from comoe import _C
from comoe.policy.plan import Levels
from comoe.store import checks
from comoe.store.format import EXPERTS_FOLDER, MANIFEST_FILE, LayerInfo, Manifest, StoreError
from comoe.store.losses import read_losses


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
        if (folder / EXPERTS_FOLDER).is_dir():
            folder = folder / EXPERTS_FOLDER
        manifest = checks.read_manifest(folder)
        layers = []
        for layer_idx, entry in enumerate(manifest.layers):
            info = checks.check_layer(folder, entry, layer_idx)
            layers.append(replace(info, file=entry["file"]))
        checks.check_levels(manifest.levels, layers, str(folder / MANIFEST_FILE))
        return cls(folder, manifest, tuple(layers), verify)

    @property
    def page_bytes(self) -> int:
        return self.manifest.page_bytes

    @property
    def levels(self) -> Levels:
        """What an expert may be, coarsest first; see `LayerInfo.has_levels`."""
        return self.manifest.levels

    def losses(self) -> dict[str, np.ndarray] | None:
        """Measured losses and the curve of best levels (comoe/store/losses.py), or None if the store has
        none."""
        entry = self.manifest.extra.get("losses")
        return entry and read_losses(self.folder, entry, self.levels, self.layers)

    def path(self, layer_idx: int) -> Path:
        return self.folder / self.layers[layer_idx].file

    def payload(self, layer_idx: int, expert: int, record: int) -> bytes:
        """The payload of one record, read through the page cache; empty if the expert lacks it."""
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

    def level_bytes(self, layer_idx: int, level: int) -> tuple[int, int]:
        """Payload bytes of all experts of a layer that have a level, at that level, what they share
        counted once; and how many have it."""
        layer = self.layers[layer_idx]
        experts = layer.has_levels(self.levels)[:, level]
        needs = self.levels.needs(layer.records.shape[1])[level]
        records = layer.records[experts][:, needs].reshape(-1)
        _, once = np.unique(records["offset"], return_index=True)
        return int(records["nbytes"][once].sum()), int(experts.sum())
