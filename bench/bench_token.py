"""Whole tokens: plain transformers, comoe, comoe with dense layers in 8 bits, and that compiled, in turns.

    python bench/bench_token.py --folder /tmp/shape-b [--layers 16] [--turns 5] [--write]

Shape B of docs/performance.md: Qwen3-MoE, H=1024, I=512, 64 experts, top-8, 16 query and 8 KV heads of 128,
vocabulary 50,257; 16 layers are 1.76 B parameters. Experts at 4 bits, all resident; a prompt of 128 tokens, then
one token at a time. The time in the MoE blocks is taken beside it. FOLDER gets the checkpoint and the packed
folder unless they are there already; --clean removes them at the end. 16 layers need 9 GB of memory and of disk.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from harness import quantiles, write_rows
from rich.progress import track
from synthetic import make_checkpoint
from transformers import AutoModelForCausalLM

import comoe
from comoe.config import format_bytes
from comoe.hf.attach import BoundExperts
from comoe.runtime.engine import RecordTable, store_sizes
from comoe.store import Store

PROMPT, TOKENS = 128, 32
VARIANTS = {
    "comoe": {},
    "comoe dense=bits8": {"dense": "bits8"},
    "comoe compile": {"compile": True},
    "comoe dense=bits8 compile": {"dense": "bits8", "compile": True},
    "comoe dense=bits4 compile": {"dense": "bits4", "compile": True},
}


def prepare(folder: Path, layers: int) -> tuple[Path, Path]:
    source, packed = folder / "source", folder / "packed"
    if not (source / "config.json").exists():
        make_checkpoint(
            source, layers=layers, experts=64, top_k=8, hidden=1024, intermediate=512,
            vocab=50257, heads=16, kv_heads=8,
        )  # fmt: skip
    comoe.pack(source, packed)  # at once if it is there
    return source, packed


def budget(packed: Path) -> int:
    """Bytes in which every expert is held at 4 bits."""
    store = Store.open(packed / "experts")
    sizes = store_sizes(store, RecordTable(store))
    four = store.levels.names.index("4")
    return int(1.06 * sizes.total(four)) + store.manifest.dense_bytes + 60_000_000


class Intervals:
    """A streamer that notes when tokens came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class BlockClock:
    """Seconds inside the experts, token by token."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, run: Callable) -> Callable:
        def timed(*args, **kwargs):
            begin = time.perf_counter()
            try:
                return run(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - begin

        return timed


def turn(model, clock: BlockClock) -> tuple[np.ndarray, float]:
    """(seconds of each decoded token [TOKENS - 3], seconds a token in the experts)."""
    stream, ids = Intervals(), torch.arange(PROMPT)[None] * 7
    with torch.inference_mode():
        clock_before: list[float] = []
        put = stream.put

        def noted(value):
            put(value)
            clock_before.append(clock.seconds)

        stream.put = noted
        model.generate(ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, streamer=stream)  # fmt: skip
    # The prompt, which comes first, the prefill's token, and the first of decoding are left out.
    times, inside = np.diff(stream.times[2:]), clock_before[-1] - clock_before[2]
    return times, inside / len(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--no-eager", action="store_true", help="without plain transformers")
    parser.add_argument("--clean", action="store_true", help="remove FOLDER at the end")
    parser.add_argument("--write", action="store_true", help="append to bench/results/token.csv")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    source, packed = prepare(args.folder, args.layers)
    memory, clock = budget(packed), BlockClock()
    BoundExperts.run = clock.around(BoundExperts.run)
    models, first = {}, {}
    if not args.no_eager:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        model.set_experts_implementation("eager")
        for module in model.modules():
            if type(module).__name__.endswith("Experts"):
                module.forward = clock.around(module.forward)
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # out of the file's mapping
        models["transformers eager"] = model
    for name in args.variants:
        models[name] = comoe.load(packed, memory, upgrade=False, **VARIANTS[name])
        models[name].comoe.wait_ready()
        print(f"{name}: {models[name].comoe.describe()}", flush=True)
    for name, model in models.items():
        begin = time.perf_counter()
        turn(model, clock)
        first[name] = time.perf_counter() - begin
    times: dict[str, list[np.ndarray]] = {name: [] for name in models}
    inside: dict[str, list[float]] = {name: [] for name in models}
    for _ in track(range(args.turns), description="turns"):
        for name, model in models.items():
            seconds, moe = turn(model, clock)
            times[name].append(seconds)
            inside[name].append(moe)
    base = None
    for name, model in models.items():
        low, mid, high = quantiles(np.concatenate(times[name]))
        base = base or mid
        runtime = getattr(model, "comoe", None)
        row = {
            "variant": name, "layers": args.layers, "prompt": PROMPT, "tokens": TOKENS * args.turns,
            "ms": round(mid * 1e3, 2), "ms_p20": round(low * 1e3, 2), "ms_p80": round(high * 1e3, 2),
            "tokens_per_second": round(1 / mid, 1), "moe_ms": round(float(np.median(inside[name])) * 1e3, 2),
            "faster": round(base / mid, 2), "first_seconds": round(first[name], 1),
            "dense_bytes": runtime.stats()["dense_bytes"] if runtime else 0,
            "memory": runtime.budget.memory if runtime else 0,
        }  # fmt: skip
        print(
            f"{name:26s} | {row['ms']:7.2f} ms ({row['ms_p20']}-{row['ms_p80']}) | {row['tokens_per_second']:5.1f} token/s"
            f" | MoE blocks {row['moe_ms']:6.2f} ms | {row['faster']:.2f}x {next(iter(models))}"
            f" | first {row['first_seconds']} s | dense {format_bytes(row['dense_bytes'])}",
            flush=True,
        )
        if args.write:
            write_rows("token", [row])
    if args.clean:
        shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()
