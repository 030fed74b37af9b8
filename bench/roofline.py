"""The kernels on one roofline: arithmetic rate over arithmetic intensity, from the rows of bench/results.

    python bench/roofline.py     # writes bench/results/roofline.png; measures nothing

Points: expert_ffn.csv (decode, T rows per expert, cold weights) and unpack.csv (prefill), the last row of each shape, level
and T. Roofs: how fast the same threads read memory, in the machine's two states, and torch's best bf16 matmul.
"""

from __future__ import annotations

import csv
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
FAST = 40.0  # GB/s from which on memory is in its faster state
BITS = {"bits2": 2, "bits3": 3, "bits4": 4, "bits8": 8, "exact": 16, "fp8": 8, "mxfp4": 4}


def rows_of(name: str) -> list[dict[str, str]]:
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def decode_points() -> dict[tuple, dict[str, float]]:
    """{(level, H, T, "slow" or "fast"): intensity in FLOP per byte, GFLOP/s, share of memory's rate}, the last row of each."""
    points = {}
    for row in rows_of("expert_ffn"):
        flops = 2 * 3 * int(row["H"]) * int(row["I"]) * int(row["T"]) * int(row["K"])
        seconds = float(row["us"]) * 1e-6
        ceiling = float(row["ceiling_GBps"])
        key = (
            row["level"],
            int(row["H"]),
            int(row["T"]),
            "fast" if ceiling >= FAST else "slow",
        )
        points[key] = {
            "intensity": flops / (float(row["GBps"]) * 1e9 * seconds),
            "gflops": flops / seconds / 1e9,
            "ceiling": ceiling,
            "gbps": float(row["GBps"]),
            "share": float(row["share"]),
        }
    return points


def prefill_points() -> dict[tuple, dict[str, float]]:
    """{(level, H, T): the same}; the bytes are those of the weights, read once."""
    points = {}
    for row in rows_of("unpack"):
        intensity = 2 * int(row["T"]) / (BITS[row["level"]] / 8)
        points[row["level"], int(row["H"]), int(row["T"])] = {
            "intensity": intensity,
            "gflops": float(row["GFLOPs"]),
            "torch": float(row["torch_GFLOPs"]),
            "share": float(row["share"]),
            "unpacking": float(row["unpack_share"]),
        }
    return points


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot

    decode, prefill = decode_points(), prefill_points()
    ceilings = {
        state: np.median([p["ceiling"] for k, p in decode.items() if k[3] == state])
        for state in ("slow", "fast")
        if any(k[3] == state for k in decode)
    }
    peak = max(p["torch"] for p in prefill.values())
    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    x = np.geomspace(0.5, 4096, 200)
    for (state, rate), style in zip(ceilings.items(), ("-", "--"), strict=False):
        label = f"memory, {rate:.0f} GB/s ({state} state)"
        roof = x[x * rate < 2 * peak]  # whole-number products reach beyond torch's bf16 peak
        axes.plot(roof, roof * rate, "k" + style, lw=1, label=label)
    axes.axhline(peak, color="gray", ls=":", lw=1, label=f"torch bf16 matmul, {peak:.0f} GFLOP/s")
    levels = [name for name in BITS if any(k[0] == name for k in decode)]
    colours = dict(zip(levels, pyplot.get_cmap("tab10").colors, strict=False))
    for level, colour in colours.items():
        for state, marker in (("slow", "o"), ("fast", "^")):
            found = [p for k, p in decode.items() if k[0] == level and k[3] == state]
            axes.plot(
                [p["intensity"] for p in found],
                [p["gflops"] for p in found],
                marker,
                color=colour,
                ms=5,
                label=f"decode, {level}" if state == "slow" else None,
            )
        found = [p for k, p in prefill.items() if k[0] == level]
        axes.plot([p["intensity"] for p in found], [p["gflops"] for p in found], "s", color=colour, ms=5, mfc="none")  # fmt: skip
    axes.plot([], [], "k^", ms=5, label="in memory's fast state")
    axes.plot([], [], "ks", ms=5, mfc="none", label="prefill: unpack, then matmul")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("FLOP per byte of weights")
    axes.set_ylabel("GFLOP/s")
    axes.set_title("Expert kernels on 2 cores (Zen 4)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2, loc="lower right")
    path = RESULTS / "roofline.png"
    figure.savefig(path, dpi=120)
    print(path)


if __name__ == "__main__":
    main()
