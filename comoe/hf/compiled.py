"""Decode steps compiled by torch.compile, with the experts as one opaque op per layer.

A pass of one new token per sequence over a static KV cache runs a compiled copy of the model's forward;
every other pass, a prompt's for instance, runs as before. The hooks that tell the runtime of a pass stay
outside, so budgets, predictions and changes of plan work as without.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from typing import Any

import torch
from torch import nn

_numbers = itertools.count()
EXPERTS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def handle_of(bound: Any) -> int:
    """A number for BoundExperts, which an op can take."""
    handle = next(_numbers)
    EXPERTS[handle] = bound
    return handle


_LIBRARY = torch.library.Library("comoe", "FRAGMENT")
_LIBRARY.define("experts(Tensor hidden, Tensor top_k_index, Tensor top_k_weights, int bound) -> Tensor")


def _experts(
    hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, bound: int
) -> torch.Tensor:
    return EXPERTS[bound].run(hidden, top_k_index, top_k_weights)


_LIBRARY.impl("experts", _experts, "CPU")


@torch.library.register_fake("comoe::experts", lib=_LIBRARY)
def _(hidden, top_k_index, top_k_weights, bound):
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


def is_static(cache: object) -> bool:
    """Whether every layer of a KV cache has its full size from the start."""
    layers = getattr(cache, "layers", None)
    return bool(layers) and all(getattr(layer, "is_compileable", False) for layer in layers)


class CompiledDecode:
    """In place of `model.forward`: decode steps go to a compiled one."""

    def __init__(self, model: nn.Module) -> None:
        self.forward = model.forward
        functools.update_wrapper(self, self.forward)
        self.compiled = torch.compile(self.forward, fullgraph=True, dynamic=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.wants(args, kwargs):
            return self.compiled(*args, **kwargs)
        return self.forward(*args, **kwargs)

    def wants(self, args: tuple, kwargs: dict) -> bool:
        ids, cache = kwargs.get("input_ids"), kwargs.get("past_key_values")
        if args or not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.shape[1] != 1:
            return False
        return is_static(cache) and not torch.is_grad_enabled()


def compile_decode(model: nn.Module) -> None:
    model.forward = CompiledDecode(model)
    model.generation_config.cache_implementation = "static"
    model.generation_config.disable_compile = True
