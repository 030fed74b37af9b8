"""What a KV cache of transformers holds, whatever kind of cache it is."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch


def positions(cache: object) -> int:
    """Positions of each sequence that are in the cache; 0 for none, or a kind that does not tell."""
    length = getattr(cache, "get_seq_length", None)
    try:
        return int(length()) if length else 0
    except (TypeError, ValueError, AttributeError, NotImplementedError):
        return 0


def coming_positions(cache: object) -> int:
    """Positions of each sequence that a static cache will take at once when it is first filled; else 0."""
    layers = getattr(cache, "layers", None) or ()
    if any(getattr(layer, "is_initialized", True) for layer in layers):
        return 0
    return max((getattr(layer, "max_cache_len", 0) for layer in layers), default=0)


def bytes_of(cache: object, least: int = 0) -> Callable[[], int]:
    """A function that tells the bytes of the tensors in `cache`: those of the moment, 0 once it is
    gone. A storage that several tensors share counts once.  least: bytes that it is about to have."""
    if not hasattr(cache, "__weakref__"):  # None, or a tuple of tensors
        return int
    reference = weakref.ref(cache)

    def held() -> int:
        storages: dict[int, int] = {}
        here = reference()
        _collect(here, storages, depth=6)
        return 0 if here is None else max(sum(storages.values()), least)

    return held


def _collect(value: object, storages: dict[int, int], depth: int) -> None:
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    elif depth:
        if isinstance(value, dict):
            inner = value.values()
        elif isinstance(value, (list, tuple)):
            inner = value
        else:
            inner = getattr(value, "__dict__", {}).values()
        for item in inner:
            _collect(item, storages, depth - 1)
