"""The monitor: what sampling and learning cost, as a share of the run time of decoding.

    python bench/bench_monitor.py [--token-ms 20] [--notes 1] [--seconds 10] [--write]

A loop that stands for decoding: each token reads memory for --token-ms, so that caches are cold, polls the monitor, and notes --notes transfers
and compute times while it listens (the runtime: the sums of a step). The goal is below 0.5 % of the run time for all of it.
Checked first: what is learnt is what was told.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from harness import write_rows

from comoe.policy.monitor import Monitor
from comoe.policy.snapshot import Estimate, Link

GOAL = 0.005  # of the run time


def microseconds(run, repeats: int) -> np.ndarray:
    """p20, median, p80 of one call."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return np.quantile(times, [0.2, 0.5, 0.8]) * 1e6


def decode(weights: np.ndarray, seconds: float) -> None:
    """Reads through `weights`, 1 MiB at a time, for about `seconds`."""
    end, i = time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        weights[i : i + (1 << 18)].sum()
        i = (i + (1 << 18)) % weights.size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--token-ms", type=float, default=20.0)
    parser.add_argument("--notes", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--write", action="store_true", help="Append to bench/results/monitor.csv.")
    args = parser.parse_args()
    prior = {"disk": Link(Estimate(1e9), Estimate(1e-4))}

    monitor = Monitor(prior=prior)
    for size in (1e5, 1e6, 1e7) * 40:
        monitor.note_transfer("disk", size, size / 2e9 + 2e-4)
        monitor.sample()
    found = monitor.sample().tiers["disk"]
    wrong = abs(found.bandwidth.mean / 2e9 - 1), abs(found.latency.mean / 2e-4 - 1)
    if max(wrong) > 0.05:
        raise SystemExit(f"wrong: learnt {found} from 2 GB/s and 200 us")

    calls = {
        "sample": microseconds(monitor.sample, 300),
        "poll": microseconds(monitor.poll, 3000),
        "note_transfer": microseconds(lambda: monitor.note_transfer("disk", 1e6, 7e-4), 3000),
        "note_compute": microseconds(lambda: monitor.note_compute("4", 1e6, 1e-4), 3000),
    }

    monitor, noting, tokens = Monitor(prior=prior), 0.0, 0
    weights = np.ones(1 << 23, np.float32)
    begin = time.perf_counter()
    while time.perf_counter() - begin < args.seconds:
        decode(weights, args.token_ms / 1e3)
        monitor.poll()
        start = time.thread_time()  # other processes' turns are not its cost
        for _ in range(args.notes * monitor.listening):
            monitor.note_transfer("disk", 1e6, 7e-4)
            monitor.note_compute("4", 1e6, 1e-4)
        noting += time.thread_time() - start
        tokens += 1
    total = time.perf_counter() - begin
    sampling = monitor.seconds / total
    print(
        f"monitor token={args.token_ms:g} ms notes={args.notes} | sampling {sampling:.3%} + noting "
        f"{noting / total:.3%} of the run time (at most {GOAL:.1%}), {monitor.samples / total:.1f} samples/s"
    )
    for name, (low, middle, high) in calls.items():
        print(f"  {name}: {middle:.1f} us (p20 {low:.1f}, p80 {high:.1f})")
    if args.write:
        row = {
            "token_ms": args.token_ms,
            "notes": args.notes,
            "tokens": tokens,
            "sampling_share": round(sampling, 6),
            "noting_share": round(noting / total, 6),
            "samples_per_second": round(monitor.samples / total, 2),
        }
        row |= {f"{name}_us": round(float(times[1]), 2) for name, times in calls.items()}
        write_rows("monitor", [row])
    if sampling + noting / total > GOAL:
        raise SystemExit(f"too much: {sampling + noting / total:.3%}, at most {GOAL:.1%} allowed")


if __name__ == "__main__":
    main()
