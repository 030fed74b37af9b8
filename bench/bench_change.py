"""The price of change, measured: bytes and seconds from one size of the experts to another while the model runs.

    OMP_NUM_THREADS=1 python bench/bench_change.py DST [--nested DST2] [--write]

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
import functools
import json
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import RESULTS, conditions, quantiles
from transformers import AutoConfig, AutoModelForCausalLM, StoppingCriteria

import comoe
from comoe.demo import PROMPT, model_folder
from comoe.generate import TokenStream
from comoe.policy.curve import Curve, CurvePlanner
from comoe.runtime.engine import RESIDENT
from comoe.store import Store

CHANGES = ((0.3, 0.2), (0.2, 0.3), (0.3, 0.14), (0.14, 0.3))
SIZES = sorted({size for change in CHANGES for size in change})
LEVELS_OF = ("plain bits", "calibrated bits", "allocator")  # of the sweep, made of a store's levels
NESTED = "allocator, --nested"
MERGES = ("m-smoe", "hc-smoe", "ream", "gated")
FOUR = 2  # level of 4 bits in packing's ladder
FOUR_BITS = ("hc-smoe", "gated")
PATIENCE = 20.0  # seconds
CALM = 0.25  # seconds of generation before and after a change
Switch = tuple[float, int, float]  # seconds, bytes, longest wait for a token in seconds


# ---- what the sizes are, in another process ---------------------------------------------------------


def choices_of(dst: str, methods: tuple[str, ...]) -> dict[str, list[list[int]]]:
    """For each method, the level of every expert at each of SIZES."""
    from comoe.aggregate.build import Workshop
    from comoe.aggregate.sweep import Sweep

    class Choices(Sweep):
        def chosen(self, choice: np.ndarray) -> Any:
            return choice

    with Workshop(Path(dst), memory="200MB") as shop:
        sweep = Choices(shop)
        return {m: [sweep.methods[m](size).tolist() for size in SIZES] for m in methods}


def merged_sets(dst: str, out: str) -> dict[str, list[str]]:
    """Writes a checkpoint, or a packed one at 4 bits, for each merging method and size: folders by SIZES, ""
    where fewer experts would be left than a token uses."""
    from comoe.aggregate.fewer import write_fewer

    store = Store.open(dst)
    full = sum(2 * x.num_experts * x.geometry.num_weights for x in store.layers)
    experts = store.layers[0].num_experts
    least = AutoConfig.from_pretrained(dst).num_experts_per_tok
    four = sum(int(x.records["nbytes"][:, :3].sum()) for x in store.layers)
    found: dict[str, list[str]] = {}
    for method in MERGES:
        for name, all_of_them in ((method, full), (f"{method}, 4-bit", four)):
            packed = all_of_them == four
            if packed and method not in FOUR_BITS:
                continue
            for size in SIZES:
                count = min(int(size * full / (all_of_them / experts)), experts)
                if count < least:
                    found.setdefault(name, []).append("")
                    continue
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
    failed: list[BaseException] = []

    def run() -> None:
        try:
            with torch.inference_mode():
                while not stop.is_set():
                    stream._prompt_next = True
                    model.generate(
                        ids, max_new_tokens=128, min_new_tokens=128, do_sample=True, pad_token_id=0,
                        streamer=stream, stopping_criteria=[_Stop(stop)],
                    )  # fmt: skip
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield stream
    finally:
        stop.set()
        thread.join()
        if failed:
            raise failed[0]


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
    model = comoe.load(dst, memory="40MB")
    runtime, tokenizer = model.comoe, comoe.load_tokenizer(dst)
    found: dict[tuple[float, float], list[Switch]] = {change: [] for change in CHANGES}
    calm: list[float] = []
    try:
        runtime.set_planner(Fixed(Curve(levels, np.zeros(len(levels), np.float32))))
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


class Fixed(CurvePlanner):
    """The curve's points and nothing above them, so that only what a point needs is read."""

    def plan(self, sizes: Any, pool_bytes: int, *, exact: bool) -> Any:
        found = super().plan(sizes, pool_bytes, exact=exact)
        return replace(found, want_level=found.min_level)


def settle(runtime: Any, levels: np.ndarray) -> None:
    """To these levels; returns when all that they need is resident. `wait_ready` is not enough: what had no room
    while a pass held its experts is asked for again some steps later."""
    runtime.set_memory(memory_for(runtime, levels))
    needed = runtime.store_sizes.chosen(levels)
    if not np.array_equal(runtime.plan.min_level, levels):
        raise RuntimeError(f"another plan than the one to measure: {runtime.describe()}")
    deadline = time.perf_counter() + PATIENCE
    while not (runtime.engine.resident()[needed] == RESIDENT).all():
        if time.perf_counter() > deadline:
            raise RuntimeError(f"not resident after {PATIENCE} s: {runtime.describe()}")
        time.sleep(0.0005)


# ---- another set of weights -------------------------------------------------------------------------


def drop_from_cache(folder: Path) -> int:
    """Takes the weight files out of the page cache; their bytes."""
    total = 0
    for path in (*folder.glob("*.safetensors"), *folder.glob("experts/*.bin")):
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


def finest_level(folder: Path, size: float) -> int:
    """Of packing's ladder, the finest level that takes `size` of the bytes of all experts, or 1% more (3 bits
    take 20.05%)."""
    store = Store.open(folder)
    full = sum(2 * x.num_experts * x.geometry.num_weights for x in store.layers)
    planes = [sum(int(x.records["nbytes"][:, r].sum()) for x in store.layers) for r in range(4)]
    return int(np.searchsorted(np.cumsum(planes), 1.01 * size * full, side="right")) - 1


@functools.cache
def memory_of(folder: Path, level: int) -> int:
    """A budget at which every expert is resident at the level, and no finer one."""
    runtime = comoe.load(folder, memory="40MB").comoe
    try:
        return memory_for(runtime, runtime.store_sizes.all_at(level))
    finally:
        runtime.close()


def by_loading_packed(folder: Path, level: int, ids: torch.Tensor) -> Switch:
    """A packed model at a level of its ladder."""
    memory = memory_of(folder, level)
    drop_from_cache(folder)
    begin = time.perf_counter()
    model = comoe.load(folder, memory=memory, upgrade=False)
    runtime = model.comoe
    try:
        runtime.wait_ready()
        if set(runtime.plan.min_level.tolist()) != {level}:
            raise RuntimeError(f"another plan than the one to measure: {runtime.describe()}")
        first_token(model, ids)
        seconds = time.perf_counter() - begin
        nbytes = runtime.engine.stats()["bytes_read"] + runtime.budget.sizes.dense
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
    parser.add_argument("--nested", type=Path, metavar="DST", help="another, of aggregate --nested")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--write", action="store_true", help="bench/results/price_of_change.json")
    args = parser.parse_args()
    rows, calm = [], []
    ids = comoe.load_tokenizer(args.dst)(PROMPT, return_tensors="pt").input_ids
    choices = apart(choices_of, str(args.dst), LEVELS_OF)
    folders = dict.fromkeys(LEVELS_OF, args.dst)
    if args.nested is not None:
        folders[NESTED] = args.nested
        choices[NESTED] = apart(choices_of, str(args.nested), ("allocator",))["allocator"]
    levels = {m: np.array(c, np.uint8) for m, c in choices.items()}
    for method, own in levels.items():
        found, waits = through_set_memory(folders[method], own, args.repeats)
        calm += waits
        rows += [row_of(method, c, s, "set_memory") for c, s in found.items()]
    print(f"waits for a token else: median {np.median(calm) * 1e3:.1f} ms")
    with tempfile.TemporaryDirectory() as scratch:
        sets = apart(merged_sets, str(args.dst), scratch)
        packed = comoe.pack(model_folder(), Path(scratch) / "packed")
        sets["plain bits, loaded anew"] = [str(packed)] * len(SIZES)
        for method, folders in sets.items():
            for change in CHANGES:
                if not folders[SIZES.index(change[1])]:
                    print(f"{method}: none of {change[1]:.0%}")
                    continue
                folder = Path(folders[SIZES.index(change[1])])
                found = []
                for _ in range(args.repeats):
                    if (folder / "experts").is_dir():
                        level = finest_level(folder, change[1]) if folder == packed else FOUR
                        found.append(by_loading_packed(folder, level, ids))
                    else:
                        found.append(by_loading(folder, ids))
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
