"""Decode: share of the memory-read bandwidth that expert_ffn reaches on cold weights.

    python bench/bench_expert_ffn.py [--repeats 9] [--write]

Each call runs K experts that have not been touched for at least 512 MB of other reads; the ceiling is a plain read of
the same number of bytes by the same threads, taken in turn with it. The first call of each line is
checked against the dense reference.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from harness import interleave, quantiles, write_rows
from kernel import Kernel, memory_read

from comoe import _C
from comoe_kernels import threads
from comoe_kernels.expert_ffn import (
    expert_ffn,
    expert_ffn_bytes,
    expert_ffn_ref,
    rounding,
    rounding_of_results,
)
from comoe_kernels.unpack import DTYPES, EXACT_DTYPES, LEVELS, unpack

EXACT = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "mxfp4": "mxfp4"}
COLD_BYTES = 640 << 20
# Read per timing: memory may give short bursts at a higher rate than it sustains.
TURN_BYTES = 256 << 20
SHAPES = ((2048, 768), (768, 3072))


class Arena:
    """One big array of pages, reused for all lines: experts of a line lie behind each other in it."""

    def __init__(self, nbytes: int) -> None:
        self.data = np.zeros(nbytes, np.uint8)
        self.base = -self.data.ctypes.data % 4096


def payload(
    rng: np.random.Generator, hidden: int, intermediate: int, record: int, exact_dtype: str
) -> np.ndarray:
    """Random bytes with a sane header (record 0) or random weights (exact)."""
    blocks = 3 * -(-hidden // 16) * -(-intermediate // 32)
    if record == 4 and exact_dtype != "bf16":
        g = _C.Geometry(hidden, intermediate, True, False, EXACT_DTYPES[EXACT[exact_dtype]])
        data = rng.integers(0, 256, g.record_bytes(4), dtype=np.uint8)
        data[data & 127 == 127] ^= 1  # NaN, where these are FP8 codes
        scales = data[: g.exact_scales_offset(3)]
        if exact_dtype == "fp8":
            scales.view(np.float32)[:] = 1e-4
        else:
            scales[:] = rng.integers(117, 121, len(scales))
        return data
    if record == 4:
        weights = torch.from_numpy(
            rng.standard_normal(blocks * 512, dtype=np.float32) / hidden**0.5
        )
        return weights.bfloat16().view(torch.uint8).numpy()
    if record:
        return rng.integers(0, 256, blocks * {1: 64, 2: 64, 3: 256}[record], dtype=np.uint8)
    groups = 2 * (intermediate // 16) * (hidden // 128) + (hidden // 16) * (intermediate // 128)
    head = -(-(3 * 64 + groups * 32) // 128) * 128
    data = rng.integers(0, 256, head + blocks * 128, dtype=np.uint8)
    tables = [np.linspace(16, 240, 1 << b).astype(np.uint8) for b in (2, 3, 4)]
    header = np.concatenate([np.array([-13, 0.01], np.float32).view(np.uint8), *tables])
    for m in range(3):
        data[m * 64 : m * 64 + len(header)] = header
    params = data[192 : 192 + groups * 32].reshape(groups, 2, 16)
    params[:, 1] = rng.integers(100, 156, (groups, 16))
    return data


def experts_of(
    arena: Arena, rng, hidden: int, intermediate: int, level: int, exact_dtype: str
) -> list[_C.PagedExpert]:
    """As many copies of one random expert as fill COLD_BYTES."""
    page_bytes = max(3 * hidden * intermediate // 64 // 4096, 1) * 4096  # as the design says
    records = [4] if level == 4 else list(range(level + 1))
    payloads = {r: payload(rng, hidden, intermediate, r, exact_dtype) for r in records}
    at, experts = arena.base, []
    limit = arena.base + COLD_BYTES
    while True:
        mapped = {}
        for r, data in payloads.items():
            pages = -(-len(data) // page_bytes)
            if at + pages * page_bytes > limit:
                return experts
            arena.data[at : at + len(data)] = data
            mapped[r] = (arena.data, at + np.arange(pages, dtype=np.int64) * page_bytes)
            at += pages * page_bytes
        experts.append(
            _C.PagedExpert(
                hidden,
                intermediate,
                True,
                False,
                EXACT_DTYPES[EXACT[exact_dtype]],
                level,
                mapped,
                page_bytes,
            )
        )


def check(experts, x, level) -> float:
    """Error against float32 over the error of the stated rounding; stops on a wrong result."""
    every = np.arange(len(x))
    got = expert_ffn(x, experts[:1], [every], [every], len(x)).double()
    # Codes are decoded to bf16, the type of x; the levels are not rounded.
    dtype = torch.bfloat16 if level == 4 else torch.float32
    dense = [unpack(experts[0], m, dtype).float() for m in range(3)]
    want = expert_ffn_ref(x, dense).double()
    rounded = expert_ffn_ref(
        x,
        dense,
        round_activations=rounding(level, True),
        round_results=rounding_of_results(level, x.dtype),
    ).double()
    error, allowed = (got - want).norm() / want.norm(), (rounded - want).norm() / want.norm()
    if not error <= 2 * allowed + 1e-6:
        raise SystemExit(f"wrong result: error {error:.2e}, rounding explains {allowed:.2e}")
    return float(error / allowed)


def decode(
    experts: Sequence[_C.PagedExpert], x: torch.Tensor, num: int, calls: int, *, hot: bool = False
) -> Callable[[], None]:
    """A function that runs all rows of x through `num` experts, `calls` times; each time the next ones."""
    rows, at = len(x), 0
    tokens = [np.arange(rows, dtype=np.int32)] * num
    pairs = [np.arange(rows, dtype=np.int32) + i * rows for i in range(num)]
    out = torch.empty(num * rows, x.shape[1])

    def run() -> None:
        nonlocal at
        for _ in range(calls):
            chosen = [experts[(at + i) % len(experts)] for i in range(num)]
            at += 0 if hot else num
            # Not through the wrapper: the runtime calls this from C++.
            _C.expert_ffn(
                chosen, tokens, pairs, 0, 0.0, 0.0, x.data_ptr(), DTYPES[x.dtype],
                len(x), x.stride(0), out.data_ptr(), len(out),
            )  # fmt: skip

    return run


def stream(arena: Arena, nbytes: int) -> Callable[[], None]:
    """A function that reads as many bytes (at most the arena's), each time further on."""
    nbytes, at = min(nbytes, COLD_BYTES) // 64 * 64, 0

    def run() -> None:
        nonlocal at
        if at + nbytes > COLD_BYTES:
            at = 0
        begin = arena.base + at
        at += nbytes
        _C.stream_read(arena.data[begin : begin + nbytes])

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--experts", type=int, default=8, help="experts per call (K)")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--levels", nargs="+", default=list(LEVELS), choices=LEVELS)
    parser.add_argument("--exact-dtype", default="bf16", choices=EXACT, help="of level exact")
    parser.add_argument(
        "--torch-threads", action="store_true", help="inside torch's OpenMP, not the native pool"
    )
    parser.add_argument(
        "--hot", action="store_true", help="the same experts again and again: what computing takes"
    )
    parser.add_argument(
        "--write", action="store_true", help="append rows to bench/results/expert_ffn.csv"
    )
    args = parser.parse_args()
    threads.share_torch_threads() if args.torch_threads else threads.use_own_threads()
    rng = np.random.default_rng(0)
    arena = Arena(COLD_BYTES + (1 << 20))
    rows_out = []
    for hidden, intermediate in SHAPES:
        for level in (LEVELS.index(name) for name in args.levels):
            coded = level == 4 and args.exact_dtype != "bf16"
            label = args.exact_dtype if coded else LEVELS[level]
            label += " hot" if args.hot else ""
            experts = experts_of(arena, rng, hidden, intermediate, level, args.exact_dtype)
            for rows in args.rows:
                x = torch.randn(rows, hidden).bfloat16()
                worse = check(experts, x, level)
                num = args.experts
                call_bytes = expert_ffn_bytes(
                    hidden,
                    intermediate,
                    gated=True,
                    level=level,
                    exact_dtype=EXACT[args.exact_dtype],
                    num_experts=num,
                    num_rows=num * rows,
                )
                calls = -(-TURN_BYTES // call_bytes)
                nbytes = calls * call_bytes
                ours = decode(experts, x, num, calls, hot=args.hot)
                read = stream(arena, nbytes)
                times = interleave({"ours": ours, "read": read}, args.repeats)
                low, mid, high = quantiles(times["ours"])
                speed = nbytes / times["ours"] / 1e9
                ceiling = min(nbytes, COLD_BYTES) / times["read"] / 1e9
                share = float(np.median(speed / ceiling))
                best = float(speed.max() / ceiling.max())
                row = {
                    "op": "expert_ffn", "T": rows, "H": hidden, "I": intermediate, "K": num, "level": label,
                    "us": round(mid / calls * 1e6, 1), "us_p20": round(low / calls * 1e6, 1),
                    "us_p80": round(high / calls * 1e6, 1), "GBps": round(float(np.median(speed)), 2),
                    "ceiling_GBps": round(float(np.median(ceiling)), 2), "share": round(share, 3),
                    "share_of_best": round(best, 3), "error_ratio": round(worse, 2),
                    "pool": "torch" if args.torch_threads else "own",
                }  # fmt: skip
                rows_out.append(row)
                print(
                    f"expert_ffn T={rows} H={hidden} I={intermediate} K={num} {label:6s}"
                    f" | {row['us']:8.1f} us ({row['us_p20']}-{row['us_p80']}) | {row['GBps']:6.2f} GB/s"
                    f" | {share:5.1%} of read ({row['ceiling_GBps']} GB/s; best/best {best:5.1%})"
                    f" | error {worse:.2f}x its rounding",
                    flush=True,
                )
    if args.write:
        print(write_rows("expert_ffn", rows_out))


@pytest.fixture(scope="module")
def arena():
    return Arena(COLD_BYTES + (1 << 20))


@pytest.fixture(scope="module")
def dense():
    """bf16 matrices of cold experts, as transformers' loop over experts multiplies them."""
    hidden, intermediate = SHAPES[0]
    return [
        tuple(
            torch.randn(s).bfloat16()
            for s in [(intermediate, hidden)] * 2 + [(hidden, intermediate)]
        )
        for _ in range(32)
    ]


@pytest.mark.parametrize("level", LEVELS)
def test_decode(bench, arena, dense, level):
    threads.use_own_threads()
    (hidden, intermediate), num, rng = SHAPES[0], 8, np.random.default_rng(0)
    experts = experts_of(arena, rng, hidden, intermediate, LEVELS.index(level), "bf16")
    x = torch.randn(1, hidden).bfloat16()
    error = check(experts, x, LEVELS.index(level))
    nbytes = expert_ffn_bytes(
        hidden, intermediate, gated=True, level=LEVELS.index(level), num_experts=num, num_rows=num
    )
    calls = -(-(64 << 20) // nbytes)
    turn = 0

    def torch_loop():
        nonlocal turn
        turn += num
        for i in range(num):
            gate, up, down = dense[(turn + i) % len(dense)]
            (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    bench(
        Kernel(
            "expert_ffn",
            f"T=1 K={num} H={hidden} I={intermediate} {level}",
            decode(experts, x, num, calls),
            calls * nbytes,
            ceiling=memory_read(),
            rival_name="torch bf16",
            rival=torch_loop,
            rival_share=1 / calls,
            error=error,
            error_of="of its rounding",
        )
    )


if __name__ == "__main__":
    main()
