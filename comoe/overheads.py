"""What a token takes that no weights explain, measured with small models of random weights.

Two models that differ in their number of layers only are packed and run token by token, in each of these ways:

    resident   everything in memory: transformers and torch, and calling the kernels
    reading    everything in memory, but under a plan that may read: what deciding adds
    waiting    with room for few experts: what a wait adds beside the bytes

The difference of the two models is that of their layers; what is left is the step's. A few seconds.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from comoe.policy.plan import Plan, Sizes, all_cached

LAYERS = (2, 8)
# Small enough that overheads prevail, wide enough that torch uses all its threads, as it does with larger ones.
HIDDEN, HEAD, INTERMEDIATE, EXPERTS, TOP_K = 256, 64, 64, 16, 4
WARM_UP, TOKENS, TURN = 16, 64, 8
KEPT = 12  # experts in memory while waiting is measured, of both models


@dataclass(frozen=True)
class Overheads:
    """Seconds: step, per token; layer, per layer; deciding, per MoE layer under a plan that may read; wait, per
    MoE layer that waits for something, beside the time of the bytes."""

    step: float
    layer: float
    deciding: float
    wait: float


@dataclass
class _Cached:
    """Plans in which nothing is held, at the original weights."""

    def least(self, sizes: Sizes, *, exact: bool) -> np.ndarray:
        return sizes.all_at(sizes.levels.exact)

    def plan(self, sizes: Sizes, pool_bytes: int, *, exact: bool) -> Plan:
        return all_cached(sizes, sizes.all_at(sizes.levels.exact), pool_bytes)


class _Reader:
    """One model, fed random tokens one at a time."""

    def __init__(self, folder: Path, seed: int, **options):
        import comoe

        self.model = comoe.load(folder, **options)
        # Each runtime would count the others' memory as taken from its own budget.
        self.model.comoe.budget.baseline = 1 << 50
        self.tokens = np.random.default_rng(seed).integers(0, 200, WARM_UP + TOKENS)
        self.seconds: list[float] = []
        self.at, self.cache = 0, None

    def turn(self) -> None:
        from transformers import DynamicCache

        if self.cache is None:
            self.cache = DynamicCache()
        for i in range(TURN):
            token = torch.tensor([[int(self.tokens[self.at])]])
            begin = time.perf_counter()
            self.model(token, past_key_values=self.cache, use_cache=True)
            if i and self.at >= WARM_UP:  # the first of a turn pays for the change
                self.seconds.append(time.perf_counter() - begin)
            self.at += 1

    @property
    def typical(self) -> float:
        return float(np.median(self.seconds))


def measure_overheads(folder: str | Path, disk_bandwidth: float) -> Overheads:
    """folder: on the disk that stores lie on.  disk_bandwidth: bytes/s of large reads there."""
    import comoe

    with tempfile.TemporaryDirectory(prefix=".comoe-", dir=folder) as scratch:
        readers = {}
        for layers in LAYERS:
            packed = comoe.pack(
                _checkpoint(Path(scratch) / f"of{layers}", layers), Path(scratch) / f"p{layers}"
            )
            readers["resident", layers] = _Reader(packed, 1, memory="200MB", exact=True)
            reading = readers["reading", layers] = _Reader(packed, 1, memory="200MB")
            reading.model.comoe.set_planner(_Cached())
            fixed = reading.model.comoe.budget
            least = fixed.sizes.dense + fixed.reserve(0)
            one = reading.model.comoe.store_sizes.largest(
                _Cached().least(reading.model.comoe.store_sizes, exact=True)
            )
            readers["waiting", layers] = _Reader(
                packed, 1, memory=int(least + KEPT * one), exact=True
            )
        with torch.inference_mode():
            for reader in readers.values():
                reader.model.comoe.wait_ready()
            for _ in range((WARM_UP + TOKENS) // TURN):
                for reader in readers.values():
                    reader.turn()
        few, many = LAYERS
        seconds = {key: reader.typical for key, reader in readers.items()}
        layer = {
            way: (seconds[way, many] - seconds[way, few]) / (many - few)
            for way in ("resident", "reading")
        }
        engine = readers["waiting", many].model.comoe.engine.stats()
        waits = max(engine["waits"], 1)
        wait = (engine["wait_seconds"] - engine["demand_bytes"] / disk_bandwidth) / waits
        for reader in readers.values():
            reader.model.comoe.close()
    return Overheads(
        max(seconds["resident", few] - few * layer["resident"], 0.0),
        max(layer["resident"], 0.0),
        max(layer["reading"] - layer["resident"], 0.0),
        max(wait, 0.0),
    )


def _checkpoint(folder: Path, layers: int) -> Path:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        moe_intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        num_attention_heads=HIDDEN // HEAD,
        num_key_value_heads=HIDDEN // HEAD,
        head_dim=HEAD,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder
