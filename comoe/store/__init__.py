"""The packed expert store on disk: `experts/manifest.json` and one `experts/layer-N.bin` per MoE layer.

Knows bytes, not models. The format is written down in docs/format.md.
"""

from comoe.store.format import LayerInfo, LayerSpec, Manifest, StoreError
from comoe.store.inspect import inspect
from comoe.store.reader import Store
from comoe.store.writer import StoreWriter

__all__ = ["LayerInfo", "LayerSpec", "Manifest", "Store", "StoreError", "StoreWriter", "inspect"]
