"""Decode steps compiled by torch.compile, with the experts as one opaque op per layer.

A pass of one new token per sequence over a static KV cache runs a compiled copy of the model's forward;
every other pass, a prompt's for instance, runs as before. The hooks that tell the runtime of a pass stay
outside, so budgets, predictions and changes of plan work as without.

In the compiled graph coded layers of one input are one op (graph_pass.py), large products of few rows
read their weights at memory bandwidth, and attention reads what counts of a static cache.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.cpp_builder import get_cpp_compiler

from comoe import _C
from comoe.hf.decode_attention import use_decode_attention
from comoe.hf.graph_pass import DecodePass


def is_static(cache: object) -> bool:
    """Whether every layer of a KV cache has its full size already."""
    layers = getattr(cache, "layers", None)
    return bool(layers) and all(
        getattr(layer, "is_compileable", False) and getattr(layer, "is_initialized", False)
        for layer in layers
    )


# How long the native pool's threads wait for work between a step's ops before they sleep: a wake-up costs up
# to 50 us, five times a layer. Only while nothing is read from disk, which needs the core.
SPIN_MICROSECONDS = 400


class CompiledDecode:
    """In place of `model.forward`: decode steps go to a compiled one."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.forward = model.forward
        functools.update_wrapper(self, self.forward)
        self.compiled = torch.compile(
            self.forward,
            fullgraph=True,
            dynamic=False,
            options={
                "post_grad_custom_pre_pass": DecodePass(),
                "cpp.threads": 1,
                "size_asserts": False,
                "alignment_asserts": False,
            },
        )
        self.failed = False
        self._threads = 0  # torch's own, while it computes with one; 0: it does not

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.wants(args, kwargs):
            self.free_threads()
            return self.forward(*args, **kwargs)
        self._hold_threads()
        try:
            return self.compiled(*args, **kwargs)
        except TorchDynamoException as error:  # before anything was computed
            self.failed = True
            _warn(f"torch.compile cannot take this model ({_first_line(error)})")
            return self.forward(*args, **kwargs)
        finally:
            if not self._generating:
                self.free_threads()

    def _hold_threads(self) -> None:
        """From now on torch computes in the caller alone: its threads would spin beside the native pool's
        for products that take microseconds (2.5 ms of 20 a token)."""
        if not self._threads:
            self._threads = torch.get_num_threads()
            torch.set_num_threads(1)
            if self.model.comoe.plan.resident:
                _C.set_spin(SPIN_MICROSECONDS)

    def free_threads(self) -> None:
        if self._threads:
            torch.set_num_threads(self._threads)
            _C.set_spin(_C.SPIN_MICROSECONDS)
            self._threads = 0

    _generating = False

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Inside, sampling too runs in one thread."""
        self._generating = True
        try:
            yield
        finally:
            self._generating = False
            self.free_threads()

    def wants(self, args: tuple, kwargs: dict) -> bool:
        if self.failed:
            return False
        ids, cache = kwargs.get("input_ids"), kwargs.get("past_key_values")
        if args or not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.shape[1] != 1:
            return False
        return is_static(cache) and not torch.is_grad_enabled()


def why_not(model: nn.Module) -> str:
    """Why decode steps of this model cannot be compiled here; "" if they can."""
    if getattr(model.config, "is_encoder_decoder", False):
        return f"{type(model).__name__} has an encoder, whose cache is not static"
    if getattr(model, "generation_config", None) is None:
        return f"{type(model).__name__} does not generate"
    try:
        get_cpp_compiler()
    except Exception as error:
        # Of several types, and all mean that there is none.
        return f"torch.compile found no C++ compiler ({_first_line(error)}); install g++ or set CXX"
    return ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _warn(reason: str) -> None:
    warnings.warn(f"compile: {reason}; running without", stacklevel=3)


def compile_decode(model: nn.Module) -> None:
    """Gives `model`, which has a runtime, compiled decode steps; `generate` then takes a static cache."""
    reason = why_not(model)
    if reason:
        _warn(reason)
        return
    use_decode_attention(model)
    decode = model.forward = CompiledDecode(model)
    generate = model.generate

    @functools.wraps(generate)
    def generate_compiled(*args: Any, **kwargs: Any) -> Any:
        with decode.generating():
            return generate(*args, **kwargs)

    model.generate = generate_compiled
    model.generation_config.cache_implementation = "static"
    model.generation_config.disable_compile = True
