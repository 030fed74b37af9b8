"""Predicts the next MoE layer's experts by giving its router the present layer's hidden state.

Residual streams change little from one layer to the next, so the next router already chooses nearly
the same experts (HOBBIT: 96% of top-1). Most routers choose the K largest of a linear layer's scores;
those are asked by one matrix product. Others (groups, biases that only choose) are run themselves.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from comoe.hf.blocks import MoEBlock
from comoe.hf.layouts import Layout
from comoe.policy.predictor import Predictor
from comoe.runtime.spec import ExpertsSpec
from comoe_kernels.unpack import DTYPES

PROBE_TOKENS = 64


class Gate(Protocol):
    def choose(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [T, H] -> experts [T, K], int64, in no order."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """hidden [T, H] -> the router's scores [T, E]; None: it does not give them out."""
        ...


@dataclass(frozen=True)
class LinearGate:
    """The K largest of `owner.name @ hidden` (+ bias)."""

    owner: nn.Module  # parameters are found anew at each call, since models may be converted
    name: str
    has_bias: bool
    k: int

    def choose(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.logits(hidden).topk(self.k, dim=-1).indices

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, E]"""
        weight = getattr(self.owner, self.name)
        bias = self.owner.bias if self.has_bias else None
        return F.linear(hidden.to(weight.dtype), weight, bias)

    def address(self) -> tuple[int, int, int, int] | None:
        """(weights, bias or 0, dtype as the kernels number it, k); None: not as the kernels read them."""
        weight = getattr(self.owner, self.name)
        bias = self.owner.bias if self.has_bias else None
        plain = weight.dtype in DTYPES and weight.device.type == "cpu" and weight.is_contiguous()
        if not plain or (bias is not None and bias.dtype != weight.dtype):
            return None
        return (
            weight.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            DTYPES[weight.dtype],
            self.k,
        )


@dataclass(frozen=True)
class RouterGate:
    """A router module of transformers' usual kind: (hidden) -> (..., experts [T, K])."""

    router: nn.Module
    num_experts: int

    def choose(self, hidden: torch.Tensor) -> torch.Tensor:
        # `forward`, not the call: hooks that collect router logits must not see guesses.
        return _indices(self.router.forward(hidden))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """[T, E]: the router's first such output (logits, or what it made of them); None: it has none."""
        outputs = self.router.forward(hidden)
        wide = self.num_experts
        return next(
            (
                x
                for x in outputs
                if isinstance(x, torch.Tensor)
                and x.is_floating_point()
                and x.shape == (len(hidden), wide)
            ),
            None,
        )


def _indices(outputs: object) -> torch.Tensor | None:
    if not isinstance(outputs, tuple):
        return None
    found = [x for x in outputs if isinstance(x, torch.Tensor) and x.dtype == torch.int64]
    return found[0] if len(found) == 1 and found[0].dim() == 2 else None


def find_gate(model: nn.Module, block: MoEBlock, k: int) -> Gate | None:
    """The router beside an experts module; None where it is not understood."""
    parent = model.get_submodule(block.name.rpartition(".")[0])
    linear = _linear_gate(parent, block, k)
    router = next(_router_gates(parent, block), None)
    if router is None or linear is None:
        return router or linear
    hidden = _probe(block, parent)
    same = torch.equal(linear.choose(hidden).sort().values, router.choose(hidden).sort().values)
    return linear if same else router


def router_logits(
    model: nn.Module, specs: Sequence[ExpertsSpec], k: int
) -> list[Callable[[torch.Tensor], torch.Tensor] | None]:
    """Per layer of a model with a runtime: hidden [T, H] -> the router's scores [T, E]; None where the
    router is not understood."""
    found = []
    for spec in specs:
        block = MoEBlock(spec.name, model.get_submodule(spec.name), spec, Layout())
        gate = find_gate(model, block, k)
        parent = model.get_submodule(spec.name.rpartition(".")[0])
        known = gate is not None and gate.logits(_probe(block, parent)) is not None
        found.append(gate.logits if known else None)
    return found


def _probe(block: MoEBlock, parent: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(PROBE_TOKENS, block.spec.hidden, generator=generator, device="cpu")
    return hidden.to(next((p.dtype for p in parent.parameters()), torch.float32))


def _linear_gate(parent: nn.Module, block: MoEBlock, k: int) -> LinearGate | None:
    shape = (block.spec.num_experts, block.spec.hidden)
    experts = {id(m) for m in block.module.modules()}
    found = [
        (module, name)
        for module in parent.modules()
        if id(module) not in experts
        for name, tensor in module._parameters.items()
        if tensor is not None and tensor.shape == shape
    ]
    if len(found) != 1:
        return None
    owner, name = found[0]
    bias = owner._parameters.get("bias")
    return LinearGate(owner, name, bias is not None and bias.shape == shape[:1], min(k, shape[0]))


@torch.no_grad()
def _router_gates(parent: nn.Module, block: MoEBlock) -> Iterator[RouterGate]:
    hidden = _probe(block, parent)
    for name, module in parent.named_children():
        if module is block.module or not re.search("gate|router", name):
            continue
        if any(p.device.type == "meta" for p in module.parameters()):
            continue
        try:
            indices = _indices(module.forward(hidden))
        except Exception:  # whatever a router that wants other arguments says
            continue
        # [T, E] would be a one-hot mask.
        if (
            indices is not None
            and indices.shape[0] == len(hidden)
            and indices.shape[1] < block.spec.num_experts
        ):
            yield RouterGate(module, block.spec.num_experts)


class NextGate(Predictor):
    """Layer i's hidden state through the routers of layers i + 1 to
    i + depth."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[MoEBlock],
        experts_per_token: int,
        depth: int = 1,
    ) -> None:
        if depth < 1:
            raise ValueError(f"NextGate: depth: expected at least 1 layer, got {depth}")
        self.depth = depth
        self._num_experts = [block.spec.num_experts for block in blocks]
        self._own = [find_gate(model, block, experts_per_token) for block in blocks]
        self._gates: list[Gate | None] = []
        for later, (before, block) in enumerate(itertools.pairwise(blocks), 1):
            # An encoder's last layer says nothing of the decoder's first: other tokens.
            same_stack = _stack(before.name) == _stack(block.name)
            same_width = before.spec.hidden == block.spec.hidden
            self._gates.append(self._own[later] if same_stack and same_width else None)
        self._gates.append(None)

    def own_gate(self, layer_idx: int) -> tuple[int, int, int, int] | None:
        gate = self._own[layer_idx]
        return gate.address() if isinstance(gate, LinearGate) else None

    @torch.no_grad()
    def choose(self, layer_idx: int, hidden: torch.Tensor, ahead: int = 1) -> torch.Tensor | None:
        """hidden [T, H] -> experts [T, K] that the router of layer_idx + ahead chooses for it; None where
        one on the way there is not understood or belongs to another stack."""
        gates = self._gates[layer_idx : layer_idx + ahead]
        if len(gates) < ahead or any(gate is None for gate in gates) or hidden.shape[0] == 0:
            return None
        return gates[-1].choose(hidden)

    def linear_gates(self, layer_idx: int) -> list[tuple[int, tuple[int, int, int, int]]]:
        gates = []
        for later, gate in enumerate(
            self._gates[layer_idx : layer_idx + self.depth], layer_idx + 1
        ):
            address = gate.address() if isinstance(gate, LinearGate) else None
            if address is None:
                return gates if gate is None else []
            gates.append((later, address))
        return gates

    def predict(self, layer_idx: int, hidden: torch.Tensor) -> list[tuple[int, np.ndarray]]:
        """Likely experts of the next layers, nearest layer and most wanted first; [] where the next router
        is not understood."""
        ahead = []
        for later in range(layer_idx + 1, layer_idx + 1 + self.depth):
            chosen = self.choose(layer_idx, hidden, later - layer_idx)
            if chosen is None:
                break
            if hidden.shape[0] == 1:
                experts = chosen[0]
            else:
                experts, counts = chosen.unique(return_counts=True)
                experts = experts[counts.argsort(descending=True, stable=True)]
            # Some routers name experts that do nothing, with numbers from E on.
            experts = experts.cpu().numpy()
            ahead.append((later, experts[experts < self._num_experts[later]]))
        return ahead


def _stack(name: str) -> str:
    """The part of a module's path before its layer number: "model.layers.3.mlp" -> "model.layers"."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[:number])
