"""The experts of a packed store within a memory budget: the runtime that computes them for callers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from comoe import memory
from comoe.config import CoMoEConfig
from comoe.runtime.budget import ModelSizes, Step
from comoe.runtime.runtime import Runtime
from comoe.runtime.spec import ExpertsSpec
from comoe.store import Store
from comoe.store.format import StoreError
from comoe.store.identity import store_id
from comoe.tiers.expert_wire import Call


class CallError(ValueError):
    """A call that this host cannot compute; the message says what was expected."""


class ExpertHost:
    """One at a time: `compute` is called from a single thread. Needs no dense weights and no transformers.

    memory: bytes for experts and workspace beside what the process has now; None: what is free.
    exact: only the original weights, read from disk when they do not fit.
    """

    def __init__(
        self,
        folder: str | Path,
        memory_bytes: int | None = None,
        *,
        exact: bool = False,
        threads: int = 0,
        max_tokens: int = 1024,
    ):
        self.store = Store.open(folder)
        self.max_tokens = max_tokens
        for layer in self.store.layers:
            if layer.activation is None:
                raise StoreError(
                    f"{self.store.folder}: the experts of {layer.name} need code of their model and cannot be "
                    "computed from the store alone; run them on the device (docs/families.md)"
                )
        specs = [
            ExpertsSpec(
                layer.name,
                layer.num_experts,
                layer.hidden,
                layer.intermediate,
                layer.gated,
                layer.biased,
                layer.activation,
                layer.alpha,
                layer.limit,
            )
            for layer in self.store.layers
        ]
        widest = max(spec.hidden + spec.intermediate for spec in specs)
        rows = 4 * 2 * widest
        self.runtime = Runtime(
            self.store,
            specs,
            CoMoEConfig.create(memory=memory_bytes, exact=exact, threads=threads),
            # Inputs, outputs and sums in float32, and the experts' rows.
            ModelSizes(dense=0, activations_per_token=16 * widest, expert_rows_per_token=rows),
            baseline=memory.rss(),
        )
        self.store_id = store_id(self.store)

    def levels(self) -> list[list[int]]:
        """Of each layer and expert, the level that it is computed at."""
        plan = self.runtime.plan.min_level
        return [layer.tolist() for layer in self.runtime.store_sizes.of_layer(plan)]

    def check(self, call: Call) -> None:
        """Raises CallError unless `compute` can do it."""
        if call.store_id != self.store_id:
            raise CallError(
                f"the call is for store {call.store_id.hex()}, this server has {self.store_id.hex()}; pack "
                "the same model, or copy the store"
            )
        layers = self.store.layers
        if call.layer_idx >= len(layers):
            raise CallError(f"layer: expected less than {len(layers)}, got {call.layer_idx}")
        layer = layers[call.layer_idx]
        tokens, k = call.expert_idx.shape
        if call.x.shape[1] != layer.hidden:
            raise CallError(f"H: expected {layer.hidden}, got {call.x.shape[1]}")
        if tokens > self.max_tokens or k > layer.num_experts:
            raise CallError(
                f"T and K: expected at most {self.max_tokens} and {layer.num_experts}, got {tokens} and {k}"
            )
        if call.expert_idx.max() >= layer.num_experts or call.expert_idx.min() < -1:
            raise CallError(
                f"expert_idx: expected -1 to {layer.num_experts - 1}, got {call.expert_idx.min()} to "
                f"{call.expert_idx.max()}"
            )

    def compute(self, calls: Sequence[Call]) -> tuple[list[np.ndarray], float]:
        """Of calls that `check` has passed, all of one layer: float32 [T, H] of each; and seconds for all.

        A row's result does not depend on what it is computed with.
        """
        begin = time.perf_counter()
        layer_idx = calls[0].layer_idx
        none = self.store.layers[layer_idx].num_experts
        widest = max(call.expert_idx.shape[1] for call in calls)
        tokens = sum(len(call.x) for call in calls)
        index = np.full((tokens, widest), none, np.int64)
        weights = np.zeros((tokens, widest), np.float32)
        at = 0
        for call in calls:
            rows, k = call.expert_idx.shape
            index[at : at + rows, :k] = np.where(call.expert_idx < 0, none, call.expert_idx)
            weights[at : at + rows, :k] = call.weights
            at += rows
        x = torch.from_numpy(np.concatenate([call.x for call in calls]))
        self.runtime.begin_step(Step(1, tokens))
        try:
            out = self.runtime.experts_forward(
                layer_idx,
                x.to(self._dtype(layer_idx)),
                torch.from_numpy(index),
                torch.from_numpy(weights),
            )
        finally:
            self.runtime.end_step()
        whole = out.float().numpy()
        ends = np.cumsum([len(call.x) for call in calls])
        return np.split(whole, ends[:-1]), time.perf_counter() - begin

    def _dtype(self, layer_idx: int) -> torch.dtype:
        """What the kernels get: exact experts of a 16-bit model then round as the model's own do."""
        exact = self.store.layers[layer_idx].exact_dtype
        return {"float32": torch.float32, "float16": torch.float16}.get(exact, torch.bfloat16)

    def close(self) -> None:
        self.runtime.close()
