"""What a packed store is called wherever it lies: the same bytes have the same name."""

from __future__ import annotations

import hashlib

from comoe.store.format import MANIFEST_FILE
from comoe.store.reader import Store

ID_BYTES = 16


def store_id(store: Store) -> bytes:
    """16 bytes of the manifest's SHA-256. The manifest names every layer file with size and header checksum, and the
    headers hold the checksum of every record."""
    return hashlib.sha256((store.folder / MANIFEST_FILE).read_bytes()).digest()[:ID_BYTES]
