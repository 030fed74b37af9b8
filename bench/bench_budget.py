"""A budget cut in half while generating, and given back: how long until memory, speed and quality are what they
should be.

Per change: seconds until the process's memory (RSS, as the kernel counts it) is within the new budget; until a token
takes at most SPEED times what tokens take in the second half of a phase (the plan's own speed); and until all that the
plan holds is resident again. Tokens are sampled at random. The goal: memory 1 s, speed 2 s, quality 5 s.

    python bench/bench_budget.py DST --high 1.2GB [--low 0.6GB] [--repeats 3] [--write]
"""

from __future__ import annotations

import argparse
import threading
import time

import numpy as np
import torch
from harness import write_rows
from transformers import DynamicCache

import comoe
from comoe import memory
from comoe.config import format_bytes, parse_bytes
from comoe.runtime.engine import RESIDENT

SPEED = 1.25  # times the phase's own speed
SETTLED = 3  # tokens in a row that must be as quick


class Watch(threading.Thread):
    """Samples memory and residency beside the model, every 10 ms."""

    def __init__(self, runtime):
        super().__init__(daemon=True)
        self.runtime, self.rows, self.on = runtime, [], True

    def run(self) -> None:
        while self.on:
            plan = self.runtime.plan
            held = self.runtime.engine.resident()[plan.base] == RESIDENT
            share = held.mean() if held.size else 1.0
            self.rows.append((time.perf_counter(), memory.rss(), float(share)))
            time.sleep(0.01)


class Text:
    """One token after another, drawn at random; a fresh cache every `context` tokens."""

    def __init__(self, model, seed: int, context: int = 256):
        self.model, self.context = model, context
        self.generator = torch.Generator().manual_seed(seed)
        self.vocab = model.get_input_embeddings().num_embeddings
        self.cache, self.length = DynamicCache(), 0
        self.times: list[tuple[float, float]] = []  # when it was done, seconds

    def step(self) -> None:
        if self.length == self.context:
            self.cache, self.length = DynamicCache(), 0
        token = torch.randint(self.vocab, (1, 1), generator=self.generator)
        begin = time.perf_counter()
        self.model(token, past_key_values=self.cache, use_cache=True)
        end = time.perf_counter()
        self.length += 1
        self.times.append((end, end - begin))


def seconds_until(when: list[tuple[float, bool]], begin: float) -> float:
    """From `begin` to the first moment from which on all that is listed is true; nan if there is none."""
    last_bad = max((t for t, good in when if not good), default=None)
    later = [t for t, good in when if good and (last_bad is None or t > last_bad)]
    return min(later) - begin if later else float("nan")


def change(text: Text, watch: Watch, size: int, seconds: float) -> dict[str, float]:
    runtime = text.model.comoe
    begin = time.perf_counter()
    runtime.set_memory(size)
    called = time.perf_counter() - begin
    first = len(text.times)
    while time.perf_counter() < begin + seconds:
        text.step()
    tokens = text.times[first:]
    usual = np.median([took for _, took in tokens[len(tokens) // 2 :]])
    # Quick again: SETTLED tokens in a row, so that one slow token by chance does not count.
    quick = [
        (tokens[i][0], max(t for _, t in tokens[i : i + SETTLED]) <= SPEED * usual)
        for i in range(len(tokens) - SETTLED)
    ]
    speed = next((t - begin for t, good in quick if good), float("nan"))
    limit = runtime.budget.baseline + size + max(0.03 * size, 64e6)  # as promised
    seen = [row for row in watch.rows if row[0] > begin]
    return {
        "memory": size,
        "call_s": called,
        "rss_within_s": seconds_until([(t, rss <= limit) for t, rss, _ in seen], begin),
        "speed_s": speed,
        "quality_s": seconds_until([(t, share > 0.999) for t, _, share in seen], begin),
        "ms_per_token": 1e3 * float(usual),
        "held": runtime.plan.describe(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("dst")
    parser.add_argument("--high", required=True, help="budget before the cut, such as 1.2GB")
    parser.add_argument("--low", help="budget after it; default: half")
    parser.add_argument("--quality", help="as of comoe.load")
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--seconds", type=float, default=8.0, help="between two changes")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="rows to bench/results/budget.csv")
    args = parser.parse_args()
    high = parse_bytes(args.high)
    low = parse_bytes(args.low) if args.low else high // 2
    model = comoe.load(args.dst, memory=high, quality=args.quality, exact=args.exact)
    model.comoe.wait_ready()
    watch, rows = Watch(model.comoe), []
    watch.start()
    with torch.inference_mode():
        text = Text(model, seed=0)
        begin = time.perf_counter()
        while time.perf_counter() < begin + args.seconds / 2:
            text.step()
        for repeat in range(args.repeats):
            for size in (low, high):
                row = {"repeat": repeat, **change(text, watch, size, args.seconds)}
                rows.append(row)
                print(
                    f"{'cut to' if size == low else 'back to'} {format_bytes(size)}: memory {row['rss_within_s']:.2f} s, "
                    f"speed {row['speed_s']:.2f} s, quality {row['quality_s']:.2f} s "
                    f"({row['ms_per_token']:.1f} ms a token; {row['held']})",
                    flush=True,
                )
    watch.on = False
    watch.join()
    model.comoe.close()
    if args.write:
        print(write_rows("budget", rows))


if __name__ == "__main__":
    main()
