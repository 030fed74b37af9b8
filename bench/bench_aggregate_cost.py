"""What aggregation costs: seconds per expert at the shapes of real models, and what that makes for the whole.

    OMP_NUM_THREADS=1 python bench/bench_aggregate_cost.py [--shapes demo olmoe mixtral]

Measured for one expert of random weights, with 1,024 routed rows: second moments, rounding at 2, 3 and 4 bits, the
low-rank part of a difference, the order of neurons that fits another expert, and the expert's forward. Rounding costs the
same for every row of a matrix, so `--rows` rows are rounded and the time is scaled; preparing the moments, which does
not depend on rows, is measured apart, once. The singular values and the assignment of large matrices are
measured on smaller ones and scaled by the cube of the size, which is more than an assignment takes as a rule.

The whole: what `aggregate` does with its usual sources. Each expert is rounded at 2, 3 and 4 bits, as half a
merged expert at 2 and 3, and as a residual at 2; errors are measured for all rungs; each layer has `TRIALS` runs
of the whole model over the held-out text, of which the experts are counted, not the dense part.
Memory: one expert at work, and the rungs of one layer in float32, which are kept until they are measured.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import numpy as np
import torch
from harness import write_rows
from scipy.optimize import linear_sum_assignment

from comoe.aggregate.rounding import SWEEPS, _Moment, _Rounding


@dataclass(frozen=True)
class Model:
    name: str
    layers: int
    experts: int
    top_k: int
    hidden: int
    intermediate: int

    @property
    def weights(self) -> int:
        """Of one expert."""
        return 3 * self.hidden * self.intermediate


MODELS = {
    "demo": Model("the bundled model", 5, 16, 4, 256, 64),
    "olmoe": Model("OLMoE-1B-7B", 16, 64, 8, 2048, 1024),
    "mixtral": Model("Mixtral-8x7B", 32, 8, 2, 4096, 14336),
}
ROUTED_ROWS = 1024  # of an expert at most, as for LayerStatistics
# How often an expert is rounded at each number of bits: for itself, as half a merged one, as a residual.
ROUNDINGS = {2: 2.5, 3: 1.5, 4: 1.0}
MOMENTS = 6  # second moments that are worked out for these
ORDERS = 2  # orders of neurons: for the merged experts and for the base
RUNGS, TRIALS = 13, 7  # measured by their errors, and in the whole model
HELD_OUT_TOKENS = 12_288  # a quarter of 49,152
KEPT_RUNGS = 7  # rungs whose matrices a layer keeps in float32, merged ones counted as half
ROUNDING_BYTES = (
    40  # per weight of the matrix that is being rounded: itself, decoded, codes, errors
)
MOMENT_COPIES = 6  # float32 matrices that preparing a moment holds at once
LARGEST = 2048  # side up to which singular values and assignments are measured as they are


def seconds(run) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def per_row_seconds(weight: torch.Tensor, moment: _Moment, bits: int, rows: int) -> float:
    """From runs on half of the rows and on all `rows`."""

    def run(count: int) -> float:
        return seconds(lambda: _Rounding(weight[:count], moment, bits, 0).run(SWEEPS, False))

    run(rows // 2)
    return max(run(rows) - run(rows // 2), 0.0) / (rows - rows // 2)


def scaled(side: int, run) -> float:
    """Seconds of run(side), measured on at most LARGEST and scaled by the cube."""
    small = min(side, LARGEST)
    run(8)  # the first call loads the library
    return seconds(lambda: run(small)) * (side / small) ** 3


def measure(model: Model, rows: int) -> dict:
    torch.manual_seed(0)
    hidden, inter = model.hidden, model.intermediate
    x, inner = torch.randn(ROUTED_ROWS, hidden), torch.randn(ROUTED_ROWS, inter)
    moment_seconds = sum(seconds(lambda m=m: m.T @ m) for m in (x, inner))
    prepared, preparing = [], 0.0
    for m in (x, inner):
        moment = m.T @ m / ROUTED_ROWS + 0.01 * torch.eye(m.shape[1])
        begin = time.perf_counter()
        prepared.append(_Moment.of(moment, 0.01))
        preparing += time.perf_counter() - begin
        del moment
    rows = min(rows, hidden, inter)
    up, down = torch.randn(rows, hidden), torch.randn(rows, inter)
    rounding = 0.0
    for bits, times in ROUNDINGS.items():
        each = 2 * inter * per_row_seconds(up, prepared[0], bits, rows)
        each += hidden * per_row_seconds(down, prepared[1], bits, rows)
        rounding += times * (each + preparing)
    del prepared
    small = min(hidden, inter)
    long = max(hidden, inter) / small
    svd = 3 * long * scaled(small, lambda n: torch.linalg.svd(torch.randn(n, n).double()))
    order = scaled(inter, lambda n: linear_sum_assignment(np.random.default_rng(0).random((n, n))))
    gate = torch.randn(inter, hidden)
    w_down = torch.randn(hidden, inter)
    forward = seconds(lambda: (torch.nn.functional.silu(x @ gate.T) * (x @ gate.T)) @ w_down.T)
    per_expert = {
        "moment_seconds": MOMENTS * (moment_seconds + forward),
        "rounding_seconds": rounding,
        "low_rank_seconds": svd,
        "order_seconds": ORDERS * order,
        "error_seconds": (RUNGS + 1) * forward,
    }
    count = model.layers * model.experts
    uses = HELD_OUT_TOKENS * model.layers * model.top_k
    trial = uses * forward / ROUTED_ROWS
    expert_hours = sum(per_expert.values()) * count / 3600
    trial_hours = model.layers * TRIALS * trial / 3600
    work = 3 * 4 * model.weights + ROUNDING_BYTES * hidden * inter
    work += MOMENT_COPIES * 4 * max(hidden, inter) ** 2
    layer = KEPT_RUNGS * 4 * model.weights * model.experts
    return {
        "model": model.name,
        "experts": count,
        "hidden": hidden,
        "intermediate": inter,
        "seconds_per_expert": round(sum(per_expert.values()), 3),
        **{name: round(value, 3) for name, value in per_expert.items()},
        "trial_seconds": round(trial, 2),
        "expert_hours": round(expert_hours, 3),
        "trial_hours": round(trial_hours, 3),
        "hours": round(expert_hours + trial_hours, 3),
        "work_bytes": work,
        "layer_bytes": layer,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--write", action="store_true", help="to bench/results")
    args = parser.parse_args()
    rows = []
    for name in args.shapes:
        row = measure(MODELS[name], args.rows)
        rows.append(row)
        parts = ", ".join(
            f"{part.removesuffix('_seconds')} {row[part]:.2f}"
            for part in row
            if part.endswith("_seconds") and part != "trial_seconds"
        )
        print(
            f"aggregate {row['model']} | {row['seconds_per_expert']:.2f} s per expert ({parts}) | "
            f"{row['experts']} experts: {row['expert_hours']:.2f} h | a trial {row['trial_seconds']:.0f} s, "
            f"all {row['trial_hours']:.2f} h | memory beside the model's budget: {row['work_bytes'] / 1e9:.2f} GB "
            f"at work + {row['layer_bytes'] / 1e9:.2f} GB of rungs",
            flush=True,
        )
    if args.write:
        write_rows("aggregate_cost", rows)


if __name__ == "__main__":
    main()
