"""Dense layers of one token: the coded kernel against torch's own, on cold weights.

    python bench/bench_dense.py [--repeats 7] [--rows 1 4] [--write]

Each call takes another copy of the matrix, so that weights come from memory; the ceiling is a plain read of
as many bytes as the coded matrix has, taken in turn. Results are checked against float32 first.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from harness import interleave, quantiles, write_rows
from rich.progress import track

from comoe import _C
from comoe_kernels import threads
from comoe_kernels.coded_linear import coded_linear, encode_linear
from comoe_kernels.dense_linear import MOST_ROWS, dense_linear

COLD_BYTES = 320 << 20
SHAPES = ((2048, 1024), (1024, 2048), (4096, 1024), (50257, 1024))


def copies(tensor: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.clone() for _ in range(max(COLD_BYTES // tensor.nbytes, 2))]


def measure(rows: int, cols: int, tokens: int, repeats: int) -> list[dict[str, object]]:
    torch.manual_seed(0)
    weight = torch.randn(rows, cols) * cols**-0.5
    x = torch.randn(tokens, cols).bfloat16()
    want = F.linear(x.float(), weight)
    scale = weight.abs().amax(1) / 127
    codes = (weight / scale[:, None]).round().to(torch.int8)
    scale = scale.bfloat16()
    kinds = {
        "comoe bits8": (encode_linear(weight, 8), lambda w: coded_linear(x, w, None, rows, 8)),
        "comoe bits4": (encode_linear(weight, 4), lambda w: coded_linear(x, w, None, rows, 4)),
        "torch int8pack": (codes, lambda w: torch.ops.aten._weight_int8pack_mm(x, w, scale)),
        "torch bf16": (weight.bfloat16(), lambda w: F.linear(x, w)),
    }
    if tokens <= MOST_ROWS:
        kinds["comoe bf16"] = (weight.bfloat16(), lambda w: dense_linear(x, w))
    errors, sets, runs = {}, {}, {}
    for name, (tensor, run) in kinds.items():
        errors[name] = float((run(tensor).float() - want).norm() / want.norm())
        if not errors[name] < (0.2 if name.endswith("bits4") else 0.02):
            raise SystemExit(f"{name}: wrong result, relative error {errors[name]:.2e}")
        sets[name] = copies(tensor)
        runs[name] = lambda name=name, run=run: [run(w) for w in sets[name]]
    data = np.random.default_rng(0).integers(0, 256, COLD_BYTES, dtype=np.uint8)
    runs["read"] = lambda: _C.stream_read(data)
    times = interleave(runs, repeats)
    ceiling = COLD_BYTES / float(np.median(times["read"])) / 1e9
    base = float(np.median(times["torch bf16"])) / len(sets["torch bf16"])
    out = []
    for name, tensors in sets.items():
        low, mid, high = (q / len(tensors) for q in quantiles(times[name]))
        speed = tensors[0].nbytes / mid / 1e9
        out.append(
            {
                "op": name, "T": tokens, "rows": rows, "cols": cols, "us": round(mid * 1e6, 1),
                "us_p20": round(low * 1e6, 1), "us_p80": round(high * 1e6, 1),
                "GBps": round(speed, 2), "read_GBps": round(ceiling, 2),
                "share": round(speed / ceiling, 3), "against_torch_bf16": round(base / mid, 2),
                "error": round(errors[name], 5),
            }
        )  # fmt: skip
        print(
            f"{name:14s} T={tokens} [{rows}, {cols}] | {mid * 1e6:8.1f} us | {speed:5.1f} GB/s"
            f" | {speed / ceiling:4.0%} of read | {base / mid:.2f}x torch bf16 | error {errors[name]:.4f}",
            flush=True,
        )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4], help="tokens at once (T)")
    parser.add_argument("--write", action="store_true", help="append to bench/results/dense.csv")
    args = parser.parse_args()
    threads.use_own_threads()
    for rows, cols in track(SHAPES, description="matrices"):
        for tokens in args.rows:
            found = measure(rows, cols, tokens, args.repeats)
            if args.write:
                write_rows("dense", found)


if __name__ == "__main__":
    main()
