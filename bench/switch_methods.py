"""Ways to run a Switch Transformers checkpoint in less memory than it has, each as fair as we can write it.

Each returns a `Method`: a transformers model whose experts come from somewhere, what it has read, and how to stop it.
Baselines keep experts in bf16 and share comoe's way into transformers (one call per MoE block with an index per token), so
that they differ in where the experts are and in nothing else. They read the checkpoint's own files past the page cache.
T tokens, H hidden, I intermediate, E experts per layer.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from comoe import memory
from comoe.aggregate import merging
from comoe.hf.blocks import discover
from comoe.hf.checkpoint import find_tensors, meta_model, read_config
from comoe.hf.safetensors_io import TensorEntry

PAGE = 4096
CHUNK = 1 << 20
READERS = 8  # reads in flight
WORKSPACE = 150_000_000  # of a budget, for activations, KV cache and what torch keeps
SWAP_EVERY, SWAPS = 16, 4  # SwapMoE: tokens between rankings, experts of a layer changed at each


@dataclass
class Method:
    """A model, and what is beside it. finish() -> figures of the method's own."""

    model: Any
    finish: Callable[[], dict] = dict
    settle: Callable[[], None] = lambda: None  # waits for what loads in the background
    marks: Callable[[], dict] = dict  # counters; the driver takes differences
    about: dict = field(default_factory=dict)


# ---- plain transformers, accelerate, comoe --------------------------------------------------------------


def plain(folder: Path, budget: int | None) -> Method:
    from transformers import AutoModelForSeq2SeqLM

    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    def finish() -> dict:
        # safetensors maps files: pages that no token has asked for are not resident yet.
        return {"touched": float(sum(p.sum(dtype=torch.float32) for p in model.parameters()))}

    finish()
    return Method(model, finish)


def accelerate(folder: Path, budget: int | None) -> Method:
    """accelerate's disk offload with dense layers and as many experts as fit in memory, the others on disk: its automatic
    split goes by whole stacks here, and puts everything on disk."""
    from transformers import AutoModelForSeq2SeqLM

    skeleton = meta_model(read_config(folder))
    blocks = discover(skeleton)
    nbytes = 2 * 2 * blocks[0].spec.hidden * blocks[0].spec.intermediate
    dense = sum(p.numel() for n, p in skeleton.named_parameters() if ".experts." not in n) * 2
    room = (budget - memory.peak_rss() - dense - WORKSPACE) // nbytes
    held = max(room // len(blocks), 0)
    disk = {
        f"{block.name}.expert_{e}" for block in blocks for e in range(held, block.spec.num_experts)
    }
    places = {
        name: "disk" if name.rpartition(".")[0] in disk else "cpu"
        for name, module in skeleton.named_modules()
        if module._parameters
    }
    model = AutoModelForSeq2SeqLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map=places, offload_folder=f"{folder}-offload"
    ).eval()
    return Method(model, about={"experts held": held * len(blocks), "per layer": held})


def comoe(folder: Path, budget: int | None, **options: Any) -> Method:
    import comoe
    from comoe.baseline import warm_up

    baseline = warm_up()
    # The promise is baseline + memory + max(3 %, 64 MB); this row is held to the budget itself.
    room = min(int((budget - baseline) / 1.03), budget - baseline - 64_000_000)
    model = comoe.load(folder, memory=room, **options)
    runtime = model.comoe

    def marks() -> dict:
        counters = runtime._policy.counters()
        return {name: counters[name] for name in ("bits", "uses", "waited")}

    def finish() -> dict:
        stats = runtime.stats()
        weights = stats["expert_bytes_exact"] / 2
        return {
            "bits_held": 8 * stats["expert_bytes"] / weights,
            "plan": stats["plan"],
            "memory": room,
            "baseline": baseline,
        }

    return Method(model, finish, runtime.wait_ready, marks)


# ---- what the baselines share ----------------------------------------------------------------------------


def without_experts(folder: Path) -> tuple[Any, list[Any], list[list[tuple[TensorEntry, ...]]]]:
    """The model with all but its experts loaded, its MoE blocks, and where each expert's (up, down) lie."""
    model = meta_model(read_config(folder))
    tensors = find_tensors(folder)
    blocks = discover(model)
    inside = {f"{block.name}.{name}" for block in blocks for name in block.parameter_names}
    for name in set(tensors) - inside:
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        value = torch.nn.Parameter(tensors[name].read(), requires_grad=False)
        owner._parameters[leaf] = value
    model.tie_weights()
    places = [
        [
            tuple(tensors[f"{block.name}.expert_{e}.{part}.weight"] for part in ("wi", "wo"))
            for e in range(block.spec.num_experts)
        ]
        for block in blocks
    ]
    for block in blocks:
        block.strip()
    return model.eval(), blocks, places


class Slot:
    """Room for one expert, aligned for direct reads, and its matrices as torch sees them."""

    def __init__(self, entries: tuple[TensorEntry, ...]):
        self.nbytes = [-(-entry.nbytes // PAGE) * PAGE + 2 * PAGE for entry in entries]
        self.data = mmap.mmap(-1, sum(self.nbytes))
        self.matrices: tuple[torch.Tensor, ...] = ()

    def begin(self, i: int) -> int:
        return sum(self.nbytes[:i])


class ExpertReader:
    """Reads experts of the checkpoint into slots: O_DIRECT, READERS chunks in flight."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(READERS)
        self.files: dict[Path, int] = {}
        self.bytes = 0

    def start(self, entries: tuple[TensorEntry, ...], slot: Slot) -> Callable[[], None]:
        """Begins to read; the function that it returns waits for the end."""
        reads: list[Future] = []
        matrices = []
        for i, entry in enumerate(entries):
            first = entry.offset // PAGE * PAGE
            last = -(-(entry.offset + entry.nbytes) // PAGE) * PAGE
            at = slot.begin(i)
            for begin in range(first, last, CHUNK):
                end = min(begin + CHUNK, last)
                view = memoryview(slot.data)[at + begin - first : at + end - first]
                reads.append(self.pool.submit(self._read, entry.path, view, begin))
            matrices.append(
                torch.frombuffer(
                    slot.data,
                    dtype=entry.torch_dtype,
                    count=entry.nbytes // entry.torch_dtype.itemsize,
                    offset=at + entry.offset - first,
                ).view(entry.shape)
            )
        slot.matrices = tuple(matrices)
        self.bytes += sum(entry.nbytes for entry in entries)

        def wait() -> None:
            for read in reads:
                read.result()

        return wait

    def _read(self, path: Path, view: memoryview, offset: int) -> None:
        if path not in self.files:
            self.files[path] = os.open(path, os.O_RDONLY | os.O_DIRECT)
        done = os.preadv(self.files[path], [view], offset)
        # The file's last page may be shorter than a page.
        if done < len(view) - PAGE:
            raise OSError(f"{path}: {done} bytes at {offset}, expected {len(view)}")


def expert(x: torch.Tensor, matrices: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """[T, H] -> [T, H]"""
    return F.linear(F.relu(F.linear(x, matrices[0])), matrices[1])


def by_expert(
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    get: Callable[[int], tuple[torch.Tensor, ...]],
    num_experts: int,
) -> torch.Tensor:
    """Weighted outputs of top-1 experts; get(e) gives an expert's matrices, in order of the experts' numbers."""
    if len(index) == 1:
        e = int(index[0, 0] if index.dim() > 1 else index[0])
        return expert(hidden, get(e)) * weights if e < num_experts else torch.zeros_like(hidden)
    flat = index.reshape(-1)
    out = torch.zeros_like(hidden)
    for e in flat.unique().tolist():
        if e < num_experts:
            rows = (flat == e).nonzero()[:, 0]
            out[rows] = (expert(hidden[rows], get(e)) * weights[rows]).to(out.dtype)
    return out


def slots_for(budget: int, entries: tuple[TensorEntry, ...]) -> int:
    """Experts that fit beside what the process has now."""
    room = budget - memory.rss() - WORKSPACE
    return max(room // (sum(entry.nbytes for entry in entries) + 4 * PAGE), 2)


# ---- LRU ---------------------------------------------------------------------------------------------------


class Cache:
    """Experts of all layers in `count` slots, the one not used for longest gives way."""

    def __init__(self, places: list[list[tuple[TensorEntry, ...]]], count: int):
        self.places = places
        self.reader = ExpertReader()
        self.free = [Slot(places[0][0]) for _ in range(count)]
        self.held: OrderedDict[tuple[int, int], Slot] = OrderedDict()
        self.coming: dict[tuple[int, int], Callable[[], None]] = {}
        self.hits = self.misses = 0

    def ask(self, key: tuple[int, int], wanted: set[tuple[int, int]]) -> bool:
        """Begins to read an expert that is not here; False: all slots hold what is wanted now."""
        if key in self.held:
            return True
        if self.free:
            slot = self.free.pop()
        else:
            victim = next((k for k in self.held if k not in wanted and k not in self.coming), None)
            if victim is None:
                return False
            slot = self.held.pop(victim)
        self.held[key] = slot
        self.coming[key] = self.reader.start(self.places[key[0]][key[1]], slot)
        return True

    def run(self, layer: int, hidden, index, weights) -> torch.Tensor:
        ahead = [(layer, e) for e in index.unique().tolist() if e < len(self.places[layer])]
        wanted = set(ahead)
        for key in ahead:
            self.hits += key in self.held
            self.misses += key not in self.held
        ahead = [key for key in ahead if key not in self.held]

        def fill() -> None:
            while ahead and self.ask(ahead[0], wanted):
                ahead.pop(0)

        def get(e: int) -> tuple[torch.Tensor, ...]:
            key = (layer, e)
            if key not in self.held:  # no room for all at once
                fill()
            if key in self.coming:
                self.coming.pop(key)()
            self.held.move_to_end(key)
            wanted.discard(key)
            found = self.held[key].matrices
            fill()
            return found

        fill()
        return by_expert(hidden, index, weights, get, len(self.places[layer]))


def lru(folder: Path, budget: int | None) -> Method:
    """Experts read on demand into an LRU cache; of a prompt, the next are read while one computes."""
    model, blocks, places = without_experts(folder)
    cache = Cache(places, slots_for(budget, places[0][0]))
    for layer, block in enumerate(blocks):
        block.layout.bind(block.module, lambda h, i, w, layer=layer: cache.run(layer, h, i, w))
    count = len(cache.free)

    def finish() -> dict:
        return {"hit rate": cache.hits / max(cache.hits + cache.misses, 1)}

    return Method(model, finish, about={"experts held": count})


# ---- SwapMoE --------------------------------------------------------------------------------------------------


class Resident:
    """One layer of SwapMoE (arXiv 2308.15030): the router chooses among the experts here; those that would have been
    wanted most, by sum of ||x|| * G (experts of random weights have about one norm), are swapped in beside the
    computing."""

    def __init__(self, layer: int, block: Any, places, count: int, reader: ExpertReader, router):
        self.places, self.reader, self.router = places, reader, router
        num = len(places)
        self.slots = {e: Slot(places[e]) for e in range(min(count, num))}
        for e, slot in self.slots.items():
            reader.start(places[e], slot)()
        self.spare = Slot(places[0])
        self.mask = torch.full((num,), float("-inf"))
        self.mask[list(self.slots)] = 0
        self.score = torch.zeros(num)
        self.seen = 0
        self.swapping: Future | None = None
        self.swaps = ThreadPoolExecutor(1)
        self.lock = threading.Lock()
        router.forward = self.route
        block.layout.bind(block.module, self.run)

    def route(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        router = self.router
        x = hidden.to(router.dtype)
        router.classifier = router.classifier.to(router.dtype)
        logits = router.classifier(x)
        norms = x.norm(dim=-1, keepdim=True)
        self.score.mul_(0.98).add_((logits.softmax(-1) * norms).flatten(0, -2).sum(0))
        self.seen += logits[..., 0].numel()
        logits = logits + self.mask
        probs = logits.softmax(-1)
        top, index = probs.max(-1, keepdim=True)
        chosen = F.one_hot(index[..., 0], router.num_experts)
        chosen = chosen * (chosen.cumsum(-2) <= router.expert_capacity)
        if self.seen >= SWAP_EVERY and (self.swapping is None or self.swapping.done()):
            self.seen = 0
            self.swapping = self.swaps.submit(self.swap, self.score.clone())
        return chosen, top.to(hidden.dtype), logits

    def swap(self, score: torch.Tensor) -> None:
        order = score.argsort(descending=True).tolist()
        best = order[: len(self.slots)]
        wanted = [e for e in best if e not in self.slots][:SWAPS]
        out = [e for e in reversed(order) if e in self.slots and e not in best]
        for new, old in zip(wanted, out, strict=False):
            self.reader.start(self.places[new], self.spare)()
            with self.lock:
                self.mask[old], self.mask[new] = float("-inf"), 0
                self.slots[new], self.spare = self.spare, self.slots.pop(old)

    def run(self, hidden, index, weights) -> torch.Tensor:
        with self.lock:  # an expert leaves between two calls of the layer, not within one
            held = dict(self.slots)
            fallback = next(iter(held.values()))
            return by_expert(
                hidden, index, weights, lambda e: held.get(e, fallback).matrices, len(self.mask)
            )


def swapmoe(folder: Path, budget: int | None) -> Method:
    model, blocks, places = without_experts(folder)
    count = (slots_for(budget, places[0][0]) - len(blocks)) // len(blocks)
    reader = ExpertReader()
    for layer, block in enumerate(blocks):
        router = model.get_submodule(block.name.rpartition(".")[0]).router
        Resident(layer, block, places[layer], count, reader, router)
    return Method(model, about={"experts held": count * len(blocks), "per layer": count})


# ---- M-SMoE ------------------------------------------------------------------------------------------------------


def m_smoe(folder: Path, budget: int | None, keep: int = 37) -> Method:
    """M-SMoE (arXiv 2310.01334): the `keep` most used experts of each layer absorb those whose router logits are most like
    theirs, weighted by use; the router keeps its rows, which become aliases. Neurons are not aligned: experts of random
    weights have none in common, and time and memory do not depend on it."""
    model, blocks, places = without_experts(folder)
    routers = [model.get_submodule(b.name.rpartition(".")[0]).router for b in blocks]
    logits = routing_of(model, blocks, routers, places)
    for layer, block in enumerate(blocks):
        found = logits[layer]
        use = np.bincount(found.argmax(1).numpy(), minlength=len(places[layer])).astype(float)
        centres = np.sort((-use).argsort(kind="stable")[:keep])
        groups = merging.groups_around(centres, merging.router_similarity(found))
        merged = []
        for members in merging.members(groups):
            share = use[members] / use[members].sum() if use[members].sum() else None
            total = None
            for n, e in enumerate(members):
                weight = 1 / len(members) if share is None else float(share[n])
                if not weight:
                    continue
                parts = [entry.read().float() * weight for entry in places[layer][e]]
                total = parts if total is None else [a + b for a, b in zip(total, parts, strict=True)]  # fmt: skip
            merged.append(tuple(part.to(torch.bfloat16) for part in total))
        alias = torch.from_numpy(np.append(groups, len(merged)))

        def run(hidden, index, weights, alias=alias, merged=merged):
            return by_expert(hidden, alias[index], weights, merged.__getitem__, len(merged))

        block.layout.bind(block.module, run)
    memory.give_back_free()
    memory.reset_peak()  # merging is done once, elsewhere
    return Method(model, about={"experts held": keep * len(blocks), "per layer": keep})


@torch.inference_mode()
def routing_of(model, blocks, routers, places, prompts: int = 12) -> list[torch.Tensor]:
    """Router logits [S, E] of random tokens, by layer, the experts left out: they add a tenth to the residual stream."""
    found: list[list[torch.Tensor]] = [[] for _ in blocks]
    hooks = []
    for layer, (block, router) in enumerate(zip(blocks, routers, strict=True)):
        block.layout.bind(block.module, lambda h, i, w: torch.zeros_like(h))
        keep = found[layer].append
        hooks.append(
            router.register_forward_hook(
                lambda m, args, out, keep=keep: keep(out[2].flatten(0, 1).float())
            )
        )
    for seed in range(prompts):
        ids = torch.randint(2, model.config.vocab_size, (1, 128), generator=torch.Generator().manual_seed(900 + seed))  # fmt: skip
        model(input_ids=ids, decoder_input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [torch.cat(parts) for parts in found]
