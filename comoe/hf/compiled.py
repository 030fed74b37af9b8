"""Decode steps compiled by torch.compile, with the experts as one opaque op per layer.

A pass of one new token per sequence over a static KV cache runs a compiled copy of the model's forward;
every other pass, a prompt's for instance, runs as before. The hooks that tell the runtime of a pass stay
outside, so budgets, predictions and changes of plan work as without.

In the compiled graph coded layers of one input are one op (graph_pass.py), large products of few rows
read their weights at memory bandwidth, and attention reads what counts of a static cache.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from comoe import _C
from comoe.hf.decode_attention import use_decode_attention
from comoe.hf.graph_pass import DecodePass

_numbers = itertools.count()
EXPERTS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def handle_of(bound: Any) -> int:
    """A number for BoundExperts, which an op can take."""
    handle = next(_numbers)
    EXPERTS[handle] = bound
    return handle


_LIBRARY = torch.library.Library("comoe", "FRAGMENT")
_LIBRARY.define(
    "experts(Tensor hidden, Tensor top_k_index, Tensor top_k_weights, int bound) -> Tensor"
)


def _experts(
    hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, bound: int
) -> torch.Tensor:
    return EXPERTS[bound].run(hidden, top_k_index, top_k_weights)


_LIBRARY.impl("experts", _experts, "CPU")


@torch.library.register_fake("comoe::experts", lib=_LIBRARY)
def _(hidden, top_k_index, top_k_weights, bound):
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


def is_static(cache: object) -> bool:
    """Whether every layer of a KV cache has its full size already."""
    layers = getattr(cache, "layers", None)
    return bool(layers) and all(
        getattr(layer, "is_compileable", False) and getattr(layer, "is_initialized", False)
        for layer in layers
    )


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Inside, torch computes in the caller alone: its threads would spin beside the native pool's for
    products that take microseconds. The pool's wait longer for work instead."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    _C.set_spin(SPIN_MICROSECONDS)
    try:
        yield
    finally:
        _C.set_spin(_C.SPIN_MICROSECONDS)
        torch.set_num_threads(threads)


SPIN_MICROSECONDS = 100


class CompiledDecode:
    """In place of `model.forward`: decode steps go to a compiled one."""

    def __init__(self, model: nn.Module) -> None:
        self.forward = model.forward
        functools.update_wrapper(self, self.forward)
        options = {"post_grad_custom_pre_pass": DecodePass(), "cpp.threads": 1}
        self.compiled = torch.compile(self.forward, fullgraph=True, dynamic=False, options=options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.wants(args, kwargs):
            return self.forward(*args, **kwargs)
        with _one_torch_thread():
            return self.compiled(*args, **kwargs)

    def wants(self, args: tuple, kwargs: dict) -> bool:
        ids, cache = kwargs.get("input_ids"), kwargs.get("past_key_values")
        if args or not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.shape[1] != 1:
            return False
        return is_static(cache) and not torch.is_grad_enabled()


def compile_decode(model: nn.Module) -> None:
    use_decode_attention(model)
    model.forward = CompiledDecode(model)
    model.generation_config.cache_implementation = "static"
    model.generation_config.disable_compile = True
