"""The price of change, measured: bytes and seconds from one size of the experts to another while the model runs.

    OMP_NUM_THREADS=1 python bench/bench_change.py DST [--write]

DST: the bundled model, packed and aggregated (comoe pack, comoe aggregate). Methods whose sizes are levels of one store
change through `set_memory` while a thread generates: seconds until all records of the new plan are resident, bytes that
the engine read for it, and the longest wait for a token meanwhile. Methods that need another set of weights load it:
seconds until the new model has its first token, bytes of its files; meanwhile the old one runs, if there is memory for
both, or nothing does. Files are dropped from the page cache before (the engine reads past it). Their second sets lie
on disk beforehand, which the seconds do not include. Each change is measured --repeats times; medians.

Choices are made in a process of its own, so that what it held is not counted as the measured model's memory.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import RESULTS, conditions, quantiles
from transformers import AutoModelForCausalLM, StoppingCriteria

import comoe
from comoe.demo import PROMPT
from comoe.generate import TokenStream
from comoe.policy.curve import Curve, CurvePlanner
from comoe.runtime.runtime import RESIDENT
from comoe.store import Store

CHANGES = ((0.3, 0.2), (0.2, 0.3), (0.3, 0.14), (0.14, 0.3))
SIZES = sorted({size for change in CHANGES for size in change})
LEVELS_OF = ("plain bits", "calibrated bits", "allocator")  # of the sweep, made of a store's levels
MERGES = ("m-smoe", "hc-smoe", "ream", "gated")
FOUR_BITS = ("hc-smoe", "gated")
CALM = 0.25  # seconds of generation before and after a change
Switch = tuple[float, int, float]  # seconds, bytes, longest wait for a token in seconds


# ---- what the sizes are, in another process ---------------------------------------------------------


def choices_of(dst: str) -> dict[str, list[list[int]]]:
    """For each method of levels, the level of every expert at each of SIZES."""
    from comoe.aggregate.build import Workshop
    from comoe.aggregate.sweep import Sweep

    class Choices(Sweep):
        def chosen(self, choice: np.ndarray) -> Any:
            return choice

    with Workshop(Path(dst), memory="200MB") as shop:
        sweep = Choices(shop)
        return {m: [sweep.methods[m](size).tolist() for size in SIZES] for m in LEVELS_OF}


def merged_sets(dst: str, out: str) -> dict[str, list[str]]:
    """Writes a checkpoint, or a packed one at 4 bits, for each merging method and size: folders by SIZES."""
    from comoe.aggregate.fewer import write_fewer

    store = Store.open(dst)
    full = sum(2 * x.num_experts * x.geometry.num_weights for x in store.layers)
    experts = store.layers[0].num_experts
    four = sum(int(x.records["nbytes"][:, :3].sum()) for x in store.layers)
    found: dict[str, list[str]] = {}
    for method in MERGES:
        for name, all_of_them in ((method, full), (f"{method}, 4-bit", four)):
            packed = all_of_them == four
            if packed and method not in FOUR_BITS:
                continue
            for size in SIZES:
                count = min(int(size * full / (all_of_them / experts)), experts)
                plain = Path(out) / f"{method}-{count}"
                if not plain.is_dir():
                    write_fewer(Path(dst), None, method, count, plain, memory="200MB")
                folder = Path(out) / f"{method}-{count}-packed" if packed else plain
                if packed and not folder.is_dir():
                    comoe.pack(plain, folder)
                found.setdefault(name, []).append(str(folder))
    return found


def apart(function: Callable, *args: Any) -> Any:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


# ---- a model that generates while it changes ------------------------------------------------------


class _Stop(StoppingCriteria):
    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids, scores, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set())


@contextmanager
def generating(model: Any, tokenizer: Any) -> Iterator[TokenStream]:
    """Generates over and over in a thread; the stream has the times of the tokens."""
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    stop, stream = threading.Event(), TokenStream(tokenizer)

    def run() -> None:
        with torch.inference_mode():
            while not stop.is_set():
                stream._prompt_next = True
                model.generate(
                    ids, max_new_tokens=128, min_new_tokens=128, do_sample=True, pad_token_id=0,
                    streamer=stream, stopping_criteria=[_Stop(stop)],
                )  # fmt: skip

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield stream
    finally:
        stop.set()
        thread.join()


def memory_for(runtime: Any, levels: np.ndarray) -> int:
    """A budget in which exactly these levels are what fits: slabs are a part of the pool."""
    fixed = runtime.budget.sizes.dense + runtime.budget.reserve(runtime.config.max_context)
    return fixed + runtime.store_sizes.total(levels) + runtime._slab_bytes


def longest_wait(times: list[float], begin: float, end: float) -> float:
    """Of a token that came, or was awaited, between begin and end."""
    around = np.array(times)
    gaps = np.diff(around)
    touched = (around[1:] >= begin) & (around[:-1] <= end)
    return float(gaps[touched].max()) if touched.any() else 0.0


def through_set_memory(
    dst: Path, levels: np.ndarray, repeats: int
) -> tuple[dict[tuple[float, float], list[Switch]], list[float]]:
    """levels: uint8 [SIZES, X]. Switches of each change, and all other waits for a token."""
    model = comoe.load(dst, memory="40MB", upgrade=False)
    runtime, tokenizer = model.comoe, comoe.load_tokenizer(dst)
    found: dict[tuple[float, float], list[Switch]] = {change: [] for change in CHANGES}
    calm: list[float] = []
    try:
        runtime.planner = CurvePlanner(Curve(levels, np.zeros(len(levels), np.float32)))
        with generating(model, tokenizer) as stream:
            for _ in range(repeats):
                for change in CHANGES:
                    before, after = (levels[SIZES.index(size)] for size in change)
                    settle(runtime, before)
                    time.sleep(CALM)
                    calm += np.diff(stream.times[-8:]).tolist()
                    read = runtime.engine.stats()["bytes_read"]
                    begin = time.perf_counter()
                    settle(runtime, after)
                    end = time.perf_counter()
                    nbytes = runtime.engine.stats()["bytes_read"] - read
                    time.sleep(CALM)
                    wait = longest_wait(stream.times, begin, end)
                    found[change].append((end - begin, nbytes, wait))
    finally:
        runtime.close()
    return found, calm


def settle(runtime: Any, levels: np.ndarray) -> None:
    """To these levels; returns when all that they need is resident."""
    runtime.set_memory(memory_for(runtime, levels))
    runtime.wait_ready()
    needed = runtime.store_sizes.chosen(levels)
    if not np.array_equal(runtime.plan.min_level, levels):
        raise RuntimeError(f"another plan than the one to measure: {runtime.describe()}")
    if not (runtime.engine.resident()[needed] == RESIDENT).all():
        raise RuntimeError("wait_ready returned before the plan's records were resident")


# ---- another set of weights -------------------------------------------------------------------------


def drop_from_cache(folder: Path) -> int:
    """Takes the weight files out of the page cache; their bytes."""
    total = 0
    for path in folder.rglob("*"):
        if path.suffix in (".safetensors", ".comoe", ".bin") or "layer" in path.name:
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            total += path.stat().st_size
    return total


def first_token(model: Any, ids: torch.Tensor) -> None:
    with torch.inference_mode():
        model.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0)


def by_loading(folder: Path, ids: torch.Tensor) -> Switch:
    """A plain checkpoint."""
    nbytes = drop_from_cache(folder)
    begin = time.perf_counter()
    first_token(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval(), ids)
    seconds = time.perf_counter() - begin
    return seconds, nbytes, seconds


def by_loading_packed(folder: Path, levels: np.ndarray, ids: torch.Tensor) -> Switch:
    """A packed model with every expert at its level [X]."""
    drop_from_cache(folder)
    begin = time.perf_counter()
    model = comoe.load(folder, memory="40MB", upgrade=False, exact=False)
    runtime = model.comoe
    try:
        read = runtime.engine.stats()["bytes_read"]
        runtime.planner = CurvePlanner(Curve(levels[None], np.zeros(1, np.float32)))
        settle(runtime, levels)
        first_token(model, ids)
        seconds = time.perf_counter() - begin
        nbytes = runtime.engine.stats()["bytes_read"] - read + runtime.budget.sizes.dense
    finally:
        runtime.close()
    return seconds, nbytes, seconds


def row_of(method: str, change: tuple[float, float], switches: list[Switch], how: str) -> dict:
    seconds, nbytes, waits = (np.array(column) for column in zip(*switches, strict=True))
    low, median, high = quantiles(seconds)
    row = {
        "method": method,
        "from": change[0],
        "to": change[1],
        "how": how,
        "bytes": int(np.median(nbytes)),
        "seconds_p20": low,
        "seconds": median,
        "seconds_p80": high,
        "longest_wait": float(np.median(waits)),
    }
    print(
        f"{method:28s} {change[0]:.0%} -> {change[1]:.0%}  {row['bytes'] / 1e6:6.2f} MB  "
        f"{median * 1e3:7.1f} ms ({low * 1e3:.1f}..{high * 1e3:.1f})  longest wait for a token "
        f"{row['longest_wait'] * 1e3:.1f} ms",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dst", type=Path, metavar="DST")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--write", action="store_true", help="bench/results/price_of_change.json")
    args = parser.parse_args()
    rows, calm = [], []
    ids = comoe.load_tokenizer(args.dst)(PROMPT, return_tensors="pt").input_ids
    choices = apart(choices_of, str(args.dst))
    levels = {m: np.array(c, np.uint8) for m, c in choices.items()}
    for method, own in levels.items():
        found, waits = through_set_memory(args.dst, own, args.repeats)
        calm += waits
        rows += [row_of(method, c, s, "set_memory") for c, s in found.items()]
    print(f"waits for a token else: median {np.median(calm) * 1e3:.1f} ms")
    for change in CHANGES:
        own = levels["plain bits"][SIZES.index(change[1])]
        found = [by_loading_packed(args.dst, own, ids) for _ in range(args.repeats)]
        rows.append(row_of("plain bits, loaded anew", change, found, "load"))
    with tempfile.TemporaryDirectory() as scratch:
        for method, folders in apart(merged_sets, str(args.dst), scratch).items():
            for change in CHANGES:
                folder = Path(folders[SIZES.index(change[1])])
                if "4-bit" in method:
                    store = Store.open(folder)
                    count = sum(layer.num_experts for layer in store.layers)
                    own = np.full(count, store.levels.names.index("4"), np.uint8)
                    found = [by_loading_packed(folder, own, ids) for _ in range(args.repeats)]
                else:
                    found = [by_loading(folder, ids) for _ in range(args.repeats)]
                rows.append(row_of(method, change, found, "load"))
    if args.write:
        known = {
            "conditions": conditions(),
            "repeats": args.repeats,
            "token_seconds_else": float(np.median(calm)),
            "rows": rows,
        }
        path = RESULTS / "price_of_change.json"
        path.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
