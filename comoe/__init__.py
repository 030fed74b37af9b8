"""comoe runs Mixture-of-Experts language models in a memory far smaller than the model.

    model = comoe.load("packed-model", memory="4.7GB")
    model.generate(...)

Importing this package loads neither torch nor transformers and touches no device; the functions
below do so when they are called.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# name -> module that defines it
_EXPORTS = {
    "CoMoEConfig": "comoe.config",
    "load": "comoe.loading",
    "load_tokenizer": "comoe.loading",
    "offload": "comoe.loading",
    "open_url": "comoe.loading",
    "pack": "comoe.packing",
    "register": "comoe.loading",
}
__all__ = [
    "CoMoEConfig",
    "__version__",
    "load",
    "load_tokenizer",
    "offload",
    "open_url",
    "pack",
    "register",
]

if TYPE_CHECKING:
    from comoe.config import CoMoEConfig
    from comoe.loading import load, load_tokenizer, offload, open_url, register
    from comoe.packing import pack


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'comoe' has no attribute {name!r}")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value
