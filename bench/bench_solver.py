"""The solver: milliseconds for 1,536 and 14,848 experts, cold and warm, one limit and two, with shared bases.

    python bench/bench_solver.py [--repeats 15]

Bounds: 1,536 experts 15 ms cold and 5 ms warm; 14,848 experts 300 and 50. Checked first: limits hold, and
the loss is within 1% of the Lagrangian bound. Warm: limits 3% smaller than those of the solution started
from, and the same
options, whose sharing is known. Sizes, losses and uses are random, shaped like a ladder's.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import numpy as np
import pytest
from harness import write_rows
from kernel import Kernel
from scipy import sparse
from scipy.optimize import linprog

from comoe.policy.shared_costs import Sharing
from comoe.policy.solver import Problem, solve

BOUNDS_MS = {1536: (15, 5), 14848: (300, 50)}


def make(experts: int, options: int, limits: int, shared: bool, seed: int = 0) -> Problem:
    """Bytes rise and expected reads fall with the option; the loss falls as 4 ** -bits."""
    rng = np.random.default_rng(seed)
    bits = np.sort(rng.uniform(0.5, 16, (experts, options)), axis=1)
    use = rng.gamma(0.5, 1.0, (experts, 1))
    loss = use * np.exp(-0.7 * bits) * rng.uniform(0.8, 1.2, bits.shape)
    reads = use * bits[:, ::-1] * rng.uniform(0.8, 1.2, bits.shape)
    cost = np.stack([bits, reads])[:limits]
    totals = np.array([4.0 * experts, 0.85 * reads.mean(1).sum()])[:limits]
    fields = {}
    if shared:  # the second option of each of eight neighbours adds to one base
        ids = np.full((experts, options, 1), -1)
        ids[:, 1, 0] = np.arange(experts) // 8
        fields = {"shared": Sharing(ids), "shared_cost": np.full((limits, -(-experts // 8)), 4.0)}
    return Problem(loss, cost, totals, **fields)


def tighter(problem: Problem, share: float) -> Problem:
    return replace(problem, limits=problem.limits * share)


def as_new(problem: Problem) -> Problem:
    """Without what was learnt of its sharing."""
    if problem.shared is None:
        return problem
    return replace(problem, shared=Sharing(problem.shared.ids))


def milliseconds(run, repeats: int) -> np.ndarray:
    """p20, median, p80; the first turn is not counted."""
    times = []
    for turn in range(repeats + 1):
        begin = time.perf_counter()
        run()
        if turn:
            times.append(time.perf_counter() - begin)
    return np.quantile(times, [0.2, 0.5, 0.8]) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    rows = []
    for experts, options, limits, shared in (
        (1536, 12, 1, False),
        (1536, 12, 2, False),
        (1536, 12, 1, True),
        (1536, 12, 2, True),
        (14848, 12, 1, False),
        (14848, 12, 2, False),
        (14848, 12, 1, True),
        (14848, 12, 2, True),
    ):
        problem = make(experts, options, limits, shared)
        first = solve(problem)
        if (first.used > problem.limits).any() or first.loss > 1.01 * first.bound:
            raise SystemExit(
                f"wrong: {first.used} of {problem.limits}, gap {first.loss / first.bound}"
            )
        next_one = tighter(problem, 0.97)
        cold = milliseconds(lambda p=problem: solve(as_new(p)), args.repeats)
        warm = milliseconds(lambda p=next_one, m=first.multipliers: solve(p, m), args.repeats)
        bounds = BOUNDS_MS[experts]
        name = f"X={experts} O={options} limits={limits}{' shared' if shared else ''}"
        print(
            f"solve {name} | cold {cold[1]:.1f} ms (at most {bounds[0]}) | warm {warm[1]:.1f} ms "
            f"(at most {bounds[1]}) | gap {first.loss / first.bound - 1:.1e}"
        )
        rows.append(
            {
                "experts": experts,
                "options": options,
                "limits": limits,
                "shared": shared,
                **{f"cold_ms_p{q}": round(t, 3) for q, t in zip((20, 50, 80), cold, strict=True)},
                **{f"warm_ms_p{q}": round(t, 3) for q, t in zip((20, 50, 80), warm, strict=True)},
                "gap": first.loss / first.bound - 1,
                "bound_cold_ms": bounds[0],
                "bound_warm_ms": bounds[1],
            }
        )
    write_rows("solver", rows)


@pytest.mark.parametrize("experts", BOUNDS_MS)
@pytest.mark.parametrize("shared", [False, True])
def test_solve(bench, experts, shared):
    """From nothing, two limits. The rival is HiGHS on the linear relaxation for one limit of 256 experts."""
    problem = make(experts, 12, 2, shared)
    first = solve(problem)
    assert (first.used <= problem.limits).all()
    small = make(256, 12, 1, False)
    n, options = small.loss.shape
    one_each = sparse.kron(sparse.eye(n), np.ones((1, options)))

    def highs():
        linprog(
            small.loss.ravel(), A_ub=small.cost[0].reshape(1, -1), b_ub=small.limits,
            A_eq=one_each, b_eq=np.ones(n), bounds=(0, 1), method="highs",
        )  # fmt: skip

    bench(
        Kernel(
            "solver",
            f"{experts} experts x 12 options{', shared bases' if shared else ''}",
            lambda: solve(as_new(problem)),
            experts * 12,
            "M options/s",
            1e6,
            rival_name="HiGHS, LP",
            rival=highs,
            rival_share=256 / experts,
            error=first.loss / first.bound - 1,
            error_of="above the bound",
        )
    )


if __name__ == "__main__":
    main()
