"""What aggregation costs: seconds per expert at the shapes of real models, and what that makes for the whole.

    python bench/bench_aggregate_cost.py [--shapes demo olmoe mixtral]

For one expert of random weights: second moments of 1,024 routed rows, rounding at 2, 3 and 4 bits, and the
gated errors of eight rungs. Rounding costs the same for every row of a matrix, so of large matrices
`--rows` rows are rounded and the time is scaled (the part that does not depend on rows, which is preparing
the moments, is measured apart). Memory: the largest sum of arrays that one expert needs at once.
"""

from __future__ import annotations

import argparse
import time

import torch
from harness import write_rows

from comoe.aggregate.candidates import coded_set
from comoe.aggregate.experts import Expert
from comoe.aggregate.rounding import round_matrices

# layers, experts, hidden, intermediate
MODELS = {
    "demo": (5, 16, 256, 64),
    "olmoe": (16, 64, 2048, 1024),
    "mixtral": (32, 8, 4096, 14336),
}
NAMES = {"demo": "the bundled model", "olmoe": "OLMoE-1B-7B", "mixtral": "Mixtral-8x7B"}
ROUTED_ROWS, RUNGS, BITS = 1024, 8, (2, 3, 4)


def seconds(run) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def rounding_seconds(weight: torch.Tensor, moment: torch.Tensor, rows: int, bits: int) -> float:
    """Of a whole matrix, from two runs on few rows."""
    total = weight.shape[0]
    few, more = min(rows // 2, total), min(rows, total)
    short = seconds(lambda: round_matrices([weight[:few]], [moment], anchor=bits))
    long = seconds(lambda: round_matrices([weight[:more]], [moment], anchor=bits))
    per_row = max(long - short, 0.0) / max(more - few, 1)
    return long + per_row * (total - more)


def measure(name: str, rows: int) -> dict:
    layers, experts, hidden, intermediate = MODELS[name]
    torch.manual_seed(0)
    x = torch.randn(ROUTED_ROWS, hidden)
    up, down = torch.randn(intermediate, hidden), torch.randn(hidden, intermediate)
    inner = torch.randn(ROUTED_ROWS, intermediate)
    moments = [m.T @ m / ROUTED_ROWS + 0.01 * torch.eye(m.shape[1]) for m in (x, inner)]
    moment_seconds = sum(seconds(lambda m=m: m.T @ m) for m in (x, inner))
    forward = seconds(lambda: (torch.nn.functional.silu(x @ up.T) * (x @ up.T)) @ down.T)
    if name == "demo":
        expert = Expert((up, up.clone(), down))
        rounding = sum(seconds(lambda b=b: coded_set(expert, tuple(moments), b)) for b in BITS)
    else:
        rounding = sum(
            2 * rounding_seconds(up, moments[0], rows, b)
            + rounding_seconds(down, moments[1], rows, b)
            for b in BITS
        )
    per_expert = moment_seconds + rounding + (RUNGS + 2) * forward
    weights = 3 * hidden * intermediate
    # Matrices exact and rounded, moments and the double-precision copy that is inverted.
    memory = 3 * 4 * weights + 3 * 8 * max(hidden, intermediate) ** 2
    return {
        "model": NAMES[name],
        "experts": layers * experts,
        "hidden": hidden,
        "intermediate": intermediate,
        "seconds_per_expert": per_expert,
        "rounding_seconds": rounding,
        "hours": per_expert * layers * experts / 3600,
        "memory_bytes_beside_model": memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=list(MODELS), default=["demo", "olmoe"])
    parser.add_argument("--rows", type=int, default=64)
    args = parser.parse_args()
    rows = []
    for name in args.shapes:
        row = measure(name, args.rows)
        rows.append(row)
        print(
            f"aggregate {row['model']} | {row['seconds_per_expert']:.2f} s per expert | {row['experts']} experts: "
            f"{row['hours']:.2f} h | {row['memory_bytes_beside_model'] / 1e9:.2f} GB beside the model's budget"
        )
    write_rows("aggregate_cost", rows)


if __name__ == "__main__":
    main()
