"""Switch Transformers' MoE block without the operations that only its one-hot routing needs.

Its router makes a one-hot mask [B, T, E], counts every expert's tokens, and the experts search the mask again; with one
expert per token the index says the same. A pass in which no expert can be given more tokens than its capacity (so
also every decode step) goes the short way; longer ones, training, and modules that somebody has hooked (output_router_logits
does) go transformers' own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import nn

from comoe.hf.blocks import MoEBlock
from comoe.hf.layouts import LinearPairLayout

PROBE_TOKENS = 16


def shorten(model: nn.Module, blocks: list[MoEBlock]) -> None:
    """Gives the blocks that are Switch Transformers' the short way. A block of which transformers has
    changed the arithmetic is left alone: a probe compares both."""
    for block in blocks:
        name, _, leaf = block.name.rpartition(".")
        parent = model.get_submodule(name)
        router = getattr(parent, "router", None)
        arguments = tuple(inspect.signature(type(block.module).forward).parameters)[1:]
        if leaf != "experts" or arguments != LinearPairLayout.SWITCH_ARGUMENTS:
            continue
        if not isinstance(getattr(router, "classifier", None), nn.Linear):
            continue
        run = block.module._comoe.experts_forward
        if router.expert_capacity >= PROBE_TOKENS and _same(parent, router, block):
            parent.forward = _short(parent, router, run)


def _short(parent: nn.Module, router: nn.Module, run: Callable) -> Callable:
    whole = parent.forward

    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        batch, tokens, hidden = hidden_states.shape
        watched = any(m._forward_hooks or m._forward_pre_hooks for m in (router, parent.experts))
        if watched or router.training or tokens > router.expert_capacity:
            return whole(hidden_states)
        weights, index = _route(router, hidden_states)
        out = run(hidden_states.reshape(-1, hidden), index.view(-1, 1), weights.view(-1, 1))
        return out.view(batch, tokens, hidden)

    return forward


def _route(router: nn.Module, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Probability and expert of each token, both [B, T, 1]; rounded before the largest is sought, as transformers does."""
    if router.classifier.weight.dtype != router.dtype:
        router.classifier.to(router.dtype)
    logits = router.classifier(hidden.to(router.dtype))
    return logits.softmax(-1).to(hidden.dtype).max(-1, keepdim=True)


@torch.no_grad()
def _same(parent: nn.Module, router: nn.Module, block: MoEBlock) -> bool:
    """Whether transformers' own block asks its experts for what `_route` says, and returns what they return."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, PROBE_TOKENS, block.spec.hidden, generator=generator)
    hidden = hidden.to(next(parent.parameters()).dtype)
    asked = []

    def run(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        asked.append((index, weights))
        return hidden

    bound, trained = block.module.forward, parent.training
    block.layout.bind(block.module, run)
    parent.eval()
    try:
        out = parent(hidden)
    except Exception:  # whatever a block that wants other arguments says
        return False
    finally:
        parent.train(trained)
        block.module.forward = bound
    weights, index = _route(router, hidden)
    return (
        isinstance(out, torch.Tensor)
        and torch.equal(out, hidden)
        and len(asked) == 1
        and torch.equal(asked[0][0].reshape(-1), index.reshape(-1))
        and torch.equal(asked[0][1].reshape(-1), weights.reshape(-1))
    )
