"""What a token takes that no weights explain, measured with small models of random weights.

Two models that differ in their number of layers only are packed and run token by token, in each of these ways:

    resident   everything in memory: transformers and torch, and calling the kernels
    reading    everything in memory, but under a plan that may read: what deciding adds
    waiting    with room for few experts: what a layer that waits adds beside the bytes, in waiting and in
               computing more slowly meanwhile

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
    def done(self) -> bool:
        return self.at >= len(self.tokens)


class Probe:
    """The small models at work. `turn` feeds each some tokens; whoever times something else beside them
    takes turns with it, so that whatever else the machine does hits all alike. Close it in the end."""

    def __init__(self, folder: str | Path):
        """folder: on the disk that stores lie on; small models are written there, and removed at once."""
        import comoe

        self._scratch = tempfile.TemporaryDirectory(prefix=".comoe-", dir=folder)
        self._readers: dict[tuple[str, int], _Reader] = {}
        root = Path(self._scratch.name)
        for layers in LAYERS:
            checkpoint = _checkpoint(root / f"of{layers}", layers)
            packed = comoe.pack(checkpoint, root / f"packed{layers}")
            self._readers["resident", layers] = _Reader(packed, 1, memory="200MB", exact=True)
            reading = self._readers["reading", layers] = _Reader(packed, 1, memory="200MB")
            runtime = reading.model.comoe
            runtime.set_planner(_Cached())
            sizes, budget = runtime.store_sizes, runtime.budget
            few = KEPT * sizes.largest(sizes.all_at(sizes.levels.exact))
            memory = budget.sizes.dense + budget.reserve(0) + few
            self._readers["waiting", layers] = _Reader(packed, 1, memory=int(memory), exact=True)
        for reader in self._readers.values():
            reader.model.comoe.wait_ready()

    @property
    def done(self) -> bool:
        return all(reader.done for reader in self._readers.values())

    def turn(self) -> None:
        with torch.inference_mode():
            for reader in self._readers.values():
                if not reader.done:
                    reader.turn()

    def overheads(self, disk_bandwidth: float) -> Overheads:
        """disk_bandwidth: bytes/s of large reads."""
        few, many = LAYERS
        seconds = {key: middle(reader.seconds) for key, reader in self._readers.items()}
        layer = {
            way: (seconds[way, many] - seconds[way, few]) / (many - few)
            for way in ("resident", "reading")
        }
        # All that tokens take longer, not only the waits: reading also takes cores from computing.
        waiting = self._readers["waiting", many]
        engine, tokens = waiting.model.comoe.engine.stats(), waiting.at
        longer = (seconds["waiting", many] - seconds["reading", many]) * tokens
        wait = (longer - engine["demand_bytes"] / disk_bandwidth) / max(engine["waits"], 1)
        return Overheads(
            max(seconds["resident", few] - few * layer["resident"], 0.0),
            max(layer["resident"], 0.0),
            max(layer["reading"] - layer["resident"], 0.0),
            max(wait, 0.0),
        )

    def close(self) -> None:
        for reader in self._readers.values():
            reader.model.comoe.close()
        self._scratch.cleanup()


def middle(seconds: list[float]) -> float:
    """Mean of the middle half: what a step takes when nothing interrupts it."""
    ordered = np.sort(seconds)
    cut = len(ordered) // 4
    return float(ordered[cut : len(ordered) - cut].mean())


def measure_overheads(folder: str | Path, disk_bandwidth: float) -> Overheads:
    """folder: on the disk that stores lie on.  disk_bandwidth: bytes/s of large reads there."""
    probe = Probe(folder)
    try:
        while not probe.done:
            probe.turn()
        return probe.overheads(disk_bandwidth)
    finally:
        probe.close()


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
