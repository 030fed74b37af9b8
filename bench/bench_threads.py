"""The two thread pools next to torch: a layer's worth of torch (one 2048 x 2048 matrix product) and an
expert_ffn call in turn, with the native pool and inside torch's OpenMP.

    python bench/bench_threads.py [--repeats 200] [--write]
"""

from __future__ import annotations

import argparse

import bench_expert_ffn
import numpy as np
import torch
from bench_expert_ffn import Arena, experts_of
from harness import interleave, quantiles, write_rows

from comoe_kernels import threads
from comoe_kernels.expert_ffn import expert_ffn
from comoe_kernels.unpack import LEVELS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument(
        "--write", action="store_true", help="append rows to bench/results/threads.csv"
    )
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    bench_expert_ffn.COLD_BYTES = 256 << 20
    experts = experts_of(Arena(257 << 20), rng, 2048, 768, LEVELS.index("bits4"))
    x = torch.randn(1, 2048).bfloat16()
    w = torch.randn(2048, 2048).bfloat16()
    out = torch.empty(8, 2048)
    tokens = [np.zeros(1, np.int32)] * 8
    pairs = [np.full(1, i, np.int32) for i in range(8)]
    state = {"next": 0}

    def layer(use):
        def run():
            use()
            for _ in range(4):
                _ = x @ w
                chosen = [experts[(state["next"] + i) % len(experts)] for i in range(8)]
                state["next"] += 8
                expert_ffn(x, chosen, tokens, pairs, 8, out=out)

        return run

    times = interleave(
        {"own": layer(threads.use_own_threads), "torch": layer(threads.share_torch_threads)},
        args.repeats,
    )
    rows = []
    for pool, t in times.items():
        low, mid, high = (round(v / 4 * 1e6, 1) for v in quantiles(t))
        rows.append(
            {"op": "matmul + expert_ffn", "pool": pool, "us": mid, "us_p20": low, "us_p80": high}
        )
        print(f"{pool:5s} | {mid} us ({low}-{high}) per matmul + expert_ffn")
    if args.write:
        print(write_rows("threads", rows))


if __name__ == "__main__":
    main()
