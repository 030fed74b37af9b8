"""Exact decoding with a share of the experts resident: measured time per token against its floor.

    bound = 1.15 * (max(C, D) + (1 - r) * min(C, D))

C: time per token with every expert resident.  D: missed bytes per token / disk bandwidth of direct
reads.  r: byte-weighted recall of prefetching. All three and the time itself are measured in this run,
interleaved; one line per repeat, the median last.

`--text random` makes every token random, in a model where each has experts of its own: the cache helps
least and the disk works most.

    python bench/bench_offload.py [--text greedy|random] [--resident 0.333] [--tokens 24] [--repeats 3]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from harness import write_rows
from synthetic import make_checkpoint

import comoe
from comoe import _C


def decode(
    model, prompt: torch.Tensor, tokens: int, text: str, seed: int
) -> tuple[float, dict, dict]:
    """Seconds per generated token after a warm-up, and the statistics before and after."""
    choice = {"do_sample": False}
    if text == "random":
        choice = {"do_sample": True, "temperature": 1e5, "top_k": 0}
    torch.manual_seed(seed)
    with torch.no_grad():
        model.generate(prompt, max_new_tokens=4, **choice)
        before = model.comoe.stats()
        start = time.perf_counter()
        model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, **choice)
        seconds = time.perf_counter() - start
    return seconds / tokens, before, model.comoe.stats()


def disk_bandwidth(folder: Path, chunk_bytes: int, depth: int = 8) -> float:
    """Bytes per second of raw direct reads of whole layer files, `depth` in flight: no engine, no
    checksum, no pages."""
    files = sorted((folder / "experts").glob("layer-*.bin"))
    total = seconds = 0.0
    for file in files[:3]:
        size = file.stat().st_size // 4096 * 4096
        seconds += _C.raw_read_seconds(str(file), 0, size, chunk_bytes, depth)
        total += size
    return total / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="a packed model; default: a synthetic one")
    parser.add_argument("--resident", type=float, default=1 / 3)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--text", choices=["greedy", "random"], default="greedy")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        folder = args.folder
        if folder is None:
            source, folder = Path(scratch, "source"), Path(scratch, "packed")
            make_checkpoint(
                source,
                layers=args.layers,
                experts=64,
                top_k=8,
                hidden=1024,
                intermediate=512,
                embedding_scale=50.0 if args.text == "random" else 1.0,
            )
            comoe.pack(source, folder)
        run(folder, args)


def run(folder: Path, args: argparse.Namespace) -> None:
    prompt = torch.arange(1, 9)[None]
    full = comoe.load(folder, memory="20GB", exact=True)
    full.comoe.wait_ready()
    sizes = full.comoe.stats()
    experts = sizes["expert_bytes_exact"]
    memory = int(sizes["dense_bytes"] + args.resident * experts + 30e6)
    part = comoe.load(folder, memory=memory, exact=True)
    rows = []
    for repeat in range(args.repeats):
        compute, _, _ = decode(full, prompt, args.tokens, args.text, repeat)
        first = disk_bandwidth(folder, 1 << 20)
        seconds, before, after = decode(part, prompt, args.tokens, args.text, repeat)
        # Before and after, since other tenants of the disk take 30 % of it at times.
        bandwidth = 2 / (1 / first + 1 / disk_bandwidth(folder, 1 << 20))
        read = (after["bytes_read"]["disk"] - before["bytes_read"]["disk"]) / args.tokens
        engine = {
            k: after["engine"][k] - before["engine"][k]
            for k in ("demand_bytes", "prefetch_used_bytes", "prefetch_joined_bytes")
        }
        hidden = engine["prefetch_used_bytes"] + engine["prefetch_joined_bytes"]
        recall = hidden / max(hidden + engine["demand_bytes"], 1)
        disk = (hidden + engine["demand_bytes"]) / args.tokens / bandwidth
        floor = max(compute, disk) + (1 - recall) * min(compute, disk)
        row = {
            "text": args.text,
            "repeat": repeat,
            "resident": args.resident,
            "seconds_per_token": seconds,
            "compute": compute,
            "disk": disk,
            "recall": recall,
            "floor": floor,
            "ratio": seconds / floor,
            "read_bytes_per_token": read,
            "disk_bandwidth": bandwidth,
        }
        rows.append(row)
        print(
            f"exact {args.resident:.0%} resident | {seconds * 1e3:.1f} ms/token | C {compute * 1e3:.1f} D {disk * 1e3:.1f} "
            f"r {recall:.2f} | {seconds / floor:.2f}x of the floor (at most 1.15)"
        )
    print(f"median: {statistics.median(r['ratio'] for r in rows):.2f}x of the floor")
    write_rows("offload", rows)


if __name__ == "__main__":
    main()
