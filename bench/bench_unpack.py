"""Prefill: many rows per expert through `expert_ffn_prefill` (unpack, then torch's matmul) and through the
decode kernel, against torch's matmuls alone on weights that are already unpacked.

    python bench/bench_unpack.py [--repeats 9] [--write]

Shows the share of torch's FLOP/s that prefill reaches, the share of its time that unpacking takes, and
from how many rows it beats the decode kernel (`PREFILL_ROWS` in comoe_kernels/expert_ffn.py).
"""

from __future__ import annotations

import argparse

import bench_expert_ffn
import numpy as np
import pytest
import torch
from bench_expert_ffn import SHAPES, Arena, experts_of
from harness import interleave, quantiles, write_rows
from kernel import Ceiling, Kernel, memory_copy

from comoe import _C
from comoe_kernels import threads
from comoe_kernels.expert_ffn import Workspace, expert_ffn, expert_ffn_prefill, expert_ffn_ref
from comoe_kernels.unpack import LEVELS, unpack, unpack_bytes

EVERY = np.arange(64, dtype=np.int32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64, 128, 512])
    parser.add_argument("--levels", nargs="+", default=list(LEVELS), choices=LEVELS)
    parser.add_argument("--isa", default="auto", help="force an instruction set, such as avx2")
    parser.add_argument(
        "--torch-threads", action="store_true", help="inside torch's OpenMP, not the native pool"
    )
    parser.add_argument(
        "--write", action="store_true", help="append rows to bench/results/unpack.csv"
    )
    args = parser.parse_args()
    _C.force_isa(args.isa)
    threads.share_torch_threads() if args.torch_threads else threads.use_own_threads()
    rng = np.random.default_rng(0)
    bench_expert_ffn.COLD_BYTES = (
        128 << 20
    )  # more than the last cache: experts are read once per chunk of tokens
    arena = Arena(bench_expert_ffn.COLD_BYTES + (1 << 20))
    rows_out = []
    for hidden, intermediate in SHAPES:
        for level in (LEVELS.index(name) for name in args.levels):
            experts = experts_of(arena, rng, hidden, intermediate, level, "bf16")
            state = {"next": 0}

            def expert(experts=experts, state=state):
                state["next"] += 1
                return experts[state["next"] % len(experts)]

            dense = [unpack(experts[0], m) for m in range(3)]
            workspace = Workspace()
            for rows in args.rows:
                x = torch.randn(rows, hidden).bfloat16()
                a = torch.randn(rows, intermediate).bfloat16()
                every = np.arange(rows, dtype=np.int32)
                out = torch.empty(rows, hidden)
                prefill = expert_ffn_prefill(x, experts[0], workspace=workspace)
                decode = expert_ffn(x, experts[:1], [every], [every], rows)
                worse = (prefill - decode).norm() / decode.norm()
                if not worse < 0.02:
                    raise SystemExit(f"prefill and decode kernel differ by {worse:.3f}")

                def unpack_all(
                    expert=expert, workspace=workspace, hidden=hidden, intermediate=intermediate
                ):
                    e = expert()
                    for m, shape in enumerate(
                        [(intermediate, hidden)] * 2 + [(hidden, intermediate)]
                    ):
                        unpack(e, m, out=workspace.matrix(*shape, torch.bfloat16))

                times = interleave(
                    {
                        "matmul": lambda x=x, a=a, dense=dense: (
                            x @ dense[0].T,
                            x @ dense[1].T,
                            a @ dense[2].T,
                        ),
                        "prefill": lambda x=x, expert=expert, w=workspace: expert_ffn_prefill(
                            x, expert(), workspace=w
                        ),
                        "unpack": unpack_all,
                        "decode": lambda x=x, expert=expert, e=every, out=out: expert_ffn(
                            x, [expert()], [e], [e], len(e), out=out
                        ),
                    },
                    args.repeats,
                )
                flop = 2 * rows * 3 * hidden * intermediate
                low, mid, high = quantiles(times["prefill"])
                share = float(np.median(times["matmul"] / times["prefill"]))
                unpacking = float(np.median(times["unpack"] / times["prefill"]))
                gain = float(np.median(times["decode"] / times["prefill"]))
                nbytes = sum(unpack_bytes(experts[0], m, torch.bfloat16) for m in range(3))
                row = {
                    "op": "prefill", "T": rows, "H": hidden, "I": intermediate, "level": LEVELS[level],
                    "us": round(mid * 1e6), "us_p20": round(low * 1e6), "us_p80": round(high * 1e6),
                    "GFLOPs": round(flop / mid / 1e9, 1),
                    "torch_GFLOPs": round(flop / float(np.median(times["matmul"])) / 1e9, 1),
                    "share": round(share, 3), "unpack_share": round(unpacking, 3),
                    "unpack_GBps": round(nbytes / float(np.median(times["unpack"])) / 1e9, 2),
                    "speedup_over_decode": round(gain, 2),
                    "pool": "torch" if args.torch_threads else "own",
                }  # fmt: skip
                rows_out.append(row)
                print(
                    f"prefill T={rows} H={hidden} I={intermediate} {LEVELS[level]:6s} | {row['us']} us"
                    f" ({row['us_p20']}-{row['us_p80']}) | {row['GFLOPs']} GFLOP/s | {share:.0%} of torch"
                    f" ({row['torch_GFLOPs']}) | unpack {unpacking:.0%} of it at {row['unpack_GBps']} GB/s"
                    f" | {gain:.2f}x decode kernel",
                    flush=True,
                )
    if args.write:
        print(write_rows("unpack", rows_out))


@pytest.fixture(scope="module")
def arena():
    return Arena(bench_expert_ffn.COLD_BYTES + (1 << 20))


@pytest.mark.parametrize("level", LEVELS)
def test_unpack(bench, arena, level):
    """All three matrices of eight experts to bf16; bytes are those read and written."""
    threads.use_own_threads()
    (hidden, intermediate), rng = SHAPES[0], np.random.default_rng(0)
    experts = experts_of(arena, rng, hidden, intermediate, LEVELS.index(level), "bf16")[:8]
    shapes = [(intermediate, hidden)] * 2 + [(hidden, intermediate)]
    out = [torch.empty(shape, dtype=torch.bfloat16) for shape in shapes]
    codes = [torch.randint(0, 16, shape, dtype=torch.uint8) for shape in shapes]
    table, scale = torch.rand(16), torch.rand(1)

    def torch_decode():
        for code in codes:
            (table[code.int()] * scale).bfloat16()

    exact = [unpack(experts[0], m, torch.float32) for m in range(3)]
    error = max(
        float((unpack(experts[0], m, torch.bfloat16).float() - w).norm() / w.norm())
        for m, w in enumerate(exact)
    )
    assert error <= 2**-8
    bench(
        Kernel(
            "unpack",
            f"H={hidden} I={intermediate} {level} to bf16",
            lambda: [unpack(e, m, out=out[m]) for e in experts for m in range(3)],
            len(experts) * sum(unpack_bytes(experts[0], m, torch.bfloat16) for m in range(3)),
            ceiling=memory_copy(),
            rival_name="torch: table[codes] * scale",
            rival=torch_decode,
            rival_share=1 / len(experts),
            error=error,
            error_of="relative (bf16)",
        )
    )


@pytest.mark.parametrize("level", ["bits4", "exact"])
def test_prefill(bench, arena, level):
    threads.use_own_threads()
    (hidden, intermediate), rows, rng = SHAPES[0], 512, np.random.default_rng(0)
    expert = experts_of(arena, rng, hidden, intermediate, LEVELS.index(level), "bf16")[0]
    x, a = torch.randn(rows, hidden).bfloat16(), torch.randn(rows, intermediate).bfloat16()
    weights = [unpack(expert, m) for m in range(3)]
    workspace = Workspace()
    want = expert_ffn_ref(x, [unpack(expert, m, torch.float32) for m in range(3)])
    got = expert_ffn_prefill(x, expert, workspace=workspace).float()
    flop = 2.0 * rows * 3 * hidden * intermediate

    def matmul():
        return x @ weights[0].T, x @ weights[1].T, a @ weights[2].T

    bench(
        Kernel(
            "prefill",
            f"T={rows} H={hidden} I={intermediate} {level}",
            lambda: expert_ffn_prefill(x, expert, workspace=workspace),
            flop,
            "GFLOP/s",
            ceiling=Ceiling("torch's matmuls alone", matmul, flop),
            rival_name="the decode kernel",
            rival=lambda: expert_ffn(x[:64], [expert], [EVERY], [EVERY], 64),
            rival_share=64 / rows,
            error=float((got - want).norm() / want.norm()),
            error_of="relative",
        )
    )


if __name__ == "__main__":
    main()
