"""Makes a model's experts modules call a runtime, and lets go of it again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from comoe.hf.blocks import MoEBlock
from comoe.hf.experts_op import handle_of

IMPLEMENTATION = "comoe"


class Runtime(Protocol):
    def experts_forward(
        self,
        layer_idx: int,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor: ...


class _InferenceOnly(torch.autograd.Function):
    """Passes `out` on, and refuses gradients: the runtime has none, and zeros would train wrongly."""

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return out

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor):
        raise RuntimeError(
            "backward: experts that comoe runs are for inference and have no gradients; "
            "train the original model, and wrap inference in torch.no_grad()"
        )


class BoundExperts:
    """What an experts module holds in place of its weights."""

    def __init__(self, runtime: Runtime, layer_idx: int, name: str) -> None:
        self.runtime: Runtime | None = runtime
        self.layer_idx = layer_idx
        self.name = name
        self.handle = handle_of(self)
        self.instead: Callable[..., torch.Tensor] | None = None  # see `replaced`

    def experts_forward(
        self, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return torch.ops.comoe.experts(hidden, top_k_index, top_k_weights, self.handle)
        return self.run(hidden, top_k_index, top_k_weights)

    def run(
        self, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        if self.instead is not None:
            return self.instead(self.layer_idx, hidden, top_k_index, top_k_weights)
        if self.runtime is None:
            raise RuntimeError(
                f"{self.name}: its comoe runtime was closed and the expert weights are not in memory. "
                "Load the model again with comoe.load."
            )
        out = self.runtime.experts_forward(
            self.layer_idx, hidden.detach(), top_k_index, top_k_weights.detach()
        )
        if torch.is_grad_enabled() and (hidden.requires_grad or top_k_weights.requires_grad):
            return _InferenceOnly.apply(hidden if hidden.requires_grad else top_k_weights, out)
        return out


def comoe_experts_forward(
    self: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """The function that transformers' ExpertsInterface calls for `experts_implementation="comoe"`."""
    bound = getattr(self, "_comoe", None)
    if bound is None:
        raise RuntimeError(
            f'{type(self).__name__}: experts_implementation="comoe" was chosen, but no comoe runtime '
            "is attached. Load with comoe.load(path, memory=...) or call comoe.offload(model, memory=...)."
        )
    return bound.experts_forward(hidden_states, top_k_index, top_k_weights)


def register_experts_function() -> None:
    if IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS[IMPLEMENTATION] = comoe_experts_forward


def attach(blocks: Sequence[MoEBlock], runtime: Runtime) -> None:
    """Bind block i to layer i of `runtime`."""
    register_experts_function()
    # A private copy, since the caller's other models may share the config object.
    configs: dict[int, object] = {}
    for layer_idx, block in enumerate(blocks):
        module = block.module
        bound = BoundExperts(runtime, layer_idx, block.name)
        module._comoe = bound
        block.layout.bind(module, bound.experts_forward)
        if hasattr(getattr(module, "config", None), "_experts_implementation"):
            config = configs.setdefault(id(module.config), copy.deepcopy(module.config))
            config._experts_implementation = IMPLEMENTATION
            module.config = config


@contextmanager
def replaced(model: nn.Module, forward: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Inside, the experts of a loaded model are `forward(layer_idx, hidden, top_k_index, top_k_weights)`,
    gradients included, and its runtime rests."""
    found = [
        m._comoe for m in model.modules() if isinstance(getattr(m, "_comoe", None), BoundExperts)
    ]
    before = [bound.instead for bound in found]
    for bound in found:
        bound.instead = forward
    try:
        yield
    finally:
        for bound, was in zip(found, before, strict=True):
            bound.instead = was


def detach(blocks: Sequence[MoEBlock]) -> None:
    """Let go of the runtime. A call of the model then raises, since its experts have no weights."""
    for block in blocks:
        bound = getattr(block.module, "_comoe", None)
        if bound is not None:
            bound.runtime = None


def refuse_saving(model: nn.Module, instead: str) -> None:
    """`model.save_pretrained` would write a checkpoint without experts: make it an error."""

    def save_pretrained(*args: object, **kwargs: object) -> None:
        raise RuntimeError(
            f"save_pretrained: the expert weights of this {type(model).__name__} are in comoe's store, "
            f"not in the model; {instead}."
        )

    model.save_pretrained = save_pretrained
