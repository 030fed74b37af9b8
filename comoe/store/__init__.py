"""The packed expert store on disk: `experts/manifest.json` and one `experts/layer-N.bin` per MoE layer.

Knows bytes, not models. The format is written down in docs/format.md.
"""

from comoe.store.added import AddedRecord
from comoe.store.format import LayerInfo, LayerSpec, Manifest, StoreError
from comoe.store.inspect import inspect
from comoe.store.losses import write_losses
from comoe.store.reader import Store
from comoe.store.writer import Payloads, StoreWriter, copied_experts

__all__ = [
    "AddedRecord",
    "LayerInfo",
    "LayerSpec",
    "Manifest",
    "Payloads",
    "Store",
    "StoreError",
    "StoreWriter",
    "copied_experts",
    "inspect",
    "write_losses",
]
