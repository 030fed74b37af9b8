"""How times grow with experts, layers, memory, batch and context, and how they should.

    python bench/growth.py [--sweep experts layers memory batch context] [--write] [--json]

Models of random weights (hidden size 256, experts of 98,304 weights, top 4), one token per sequence and step:

    experts   8 to 512 in each of 4 layers        layers   2 to 32, of 64 experts
    memory    5 to 100% of the experts' bytes     batch    1 to 64       context   64 to 4,096

each with `default` (rungs, nothing waited for; 40% of the experts' bytes), `balanced` (the joint planner decides) and
`exact` (original weights, of which 50% fit). Of each point:

    step         milliseconds of a step          moe     of them in experts_forward
    begin        what comoe does before a pass
    plan         planning anew for a budget      change  set_memory, until it returns
    load         comoe.load, without reading ahead

The exponent p of time ~ x^p is fitted over the upper half of each sweep, where fixed costs count least, and
printed beside the largest that is expected (EXPECTED says why). Medians; steps of one point in a row.

About 8 minutes on two idle cores. --write: each row goes to bench/results/growth.csv at once, and points that are there
for this commit and machine are not measured again; growth.png is drawn at the end.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from fits import Slope, exponent
from harness import RESULTS, conditions, scratch, write_rows
from rich.console import Console
from rich.table import Table
from synthetic import make_checkpoint
from transformers import DynamicCache
from transformers.utils import logging

import comoe

HIDDEN, INTERMEDIATE, TOP_K = 256, 128, 4
MODES = {
    "default": (0.4, {}),
    "balanced": (0.4, {"quality": "balanced"}),
    "exact": (0.5, {"exact": True}),
}
WARM_UP, STEPS = 6, 24
METRICS = ("step", "moe", "begin", "plan", "change", "load")
SWEEPS = {
    "experts": (8, 16, 32, 64, 128, 256, 512),
    "layers": (2, 4, 8, 16, 32),
    "memory": (0.05, 0.1, 0.25, 0.5, 0.75, 1.0),
    "batch": (1, 2, 4, 8, 16, 32, 64),
    "context": (64, 256, 1024, 2048, 4096),
}
# Largest exponent that is expected. A token uses TOP_K experts however many there are, so steps grow with experts
# only by the router's row each, and by misses where more of them are cold; planning and all tables are linear in
# layers x experts. With exact, more memory means fewer reads; with rungs more bits to read, so at most
# linear. A batch touches at most batch x TOP_K experts; attention is linear in the context.
EXPECTED = {
    "experts": {"step": 0.5, "moe": 0.5, "begin": 1, "plan": 1, "change": 1, "load": 1},
    "layers": dict.fromkeys(METRICS, 1.0),
    "memory": {"step": 0.5, "moe": 0.5, "begin": 0.5, "plan": 0.5, "change": 1, "load": 0.5},
    "batch": {"step": 1, "moe": 1, "begin": 0.5, "plan": 0, "change": 0, "load": 0},
    "context": {"step": 1, "moe": 0, "begin": 0, "plan": 0, "change": 0, "load": 0},
}
MARGIN = 0.25  # above the expected exponent that noise may take


@dataclass(frozen=True)
class Point:
    sweep: str
    x: float
    experts: int = 64
    layers: int = 4
    batch: int = 1
    context: int = 64
    memory: float = 0.0  # share of the experts' exact bytes; 0: as the mode has it


def points(sweep: str) -> Iterator[Point]:
    for x in SWEEPS[sweep]:
        yield replace(Point(sweep, x), **{sweep: x})


class Models:
    """Packed models of the shapes asked for, one at a time on disk."""

    def __init__(self, folder: Path):
        self.folder, self.shape = folder, None

    def packed(self, point: Point) -> Path:
        shape = {"layers": point.layers, "experts": point.experts}
        if shape != self.shape:
            shutil.rmtree(self.folder / "packed", ignore_errors=True)
            make_checkpoint(
                self.folder / "source",
                top_k=TOP_K,
                hidden=HIDDEN,
                intermediate=INTERMEDIATE,
                embedding_scale=50.0,
                **shape,
            )
            comoe.pack(self.folder / "source", self.folder / "packed")
            shutil.rmtree(self.folder / "source")
            self.shape = shape
        return self.folder / "packed"


class Clock:
    """Wraps a method of one object and sums, or keeps, what its calls take."""

    def __init__(self, owner: object, name: str):
        self.seconds: list[float] = []
        call = getattr(owner, name)

        def timed(*args, **kwargs):
            begin = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds.append(time.perf_counter() - begin)

        setattr(owner, name, timed)


def milliseconds(run, repeats: int) -> float:
    """Median."""
    taken = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        taken.append(time.perf_counter() - begin)
    return 1e3 * float(np.median(taken))


def measure(folder: Path, point: Point, mode: str) -> dict[str, float]:
    share, options = MODES[mode]
    expert_bytes = 2 * 3 * HIDDEN * INTERMEDIATE * point.experts * point.layers
    pool = int((point.memory or share) * expert_bytes)
    # What is beside the pool does not depend on it, so that it is known after a first load.
    model = comoe.load(folder, memory="8GB", **options)
    beside = model.comoe.budget.reserve(0) + model.comoe.budget.sizes.dense
    pool = max(pool, model.comoe.budget.pool_floor)
    model.comoe.close()
    begin = time.perf_counter()
    model = comoe.load(folder, memory=beside + pool, **options)
    load = time.perf_counter() - begin
    runtime = model.comoe
    runtime.wait_ready()
    before, inside = Clock(runtime, "begin_step"), Clock(runtime, "experts_forward")
    tokens = torch.Generator().manual_seed(0)
    vocab = model.get_input_embeddings().num_embeddings
    steps = []
    with torch.inference_mode():
        ids = torch.randint(vocab, (point.batch, point.context), generator=tokens)
        cache = DynamicCache()
        for part in ids.split(256, dim=1):
            model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        for step in range(WARM_UP + STEPS):
            if step == WARM_UP:
                before.seconds.clear()
                inside.seconds.clear()
            ids = torch.randint(vocab, (point.batch, 1), generator=tokens)
            start = time.perf_counter()
            model(ids, past_key_values=cache, use_cache=True)
            steps.append(time.perf_counter() - start)
    bytes_read = runtime.stats()["bytes_read"]["disk"]
    inner = np.array(inside.seconds).reshape(STEPS, point.layers).sum(1)
    size = runtime.budget.memory
    # Back and forth by an eighth of the pool.
    sizes = iter([size - pool // 8, size] * 3)
    least = runtime.budget.least(0)
    change = milliseconds(lambda: runtime.set_memory(max(next(sizes), least)), 6)
    plan = milliseconds(
        lambda: runtime.planner.plan(
            runtime.store_sizes, runtime.plan.pool_bytes, exact="exact" in options
        ),
        5,
    )
    runtime.close()
    return {
        "step": 1e3 * float(np.median(steps[WARM_UP:])),
        "moe": 1e3 * float(np.median(inner)),
        "begin": 1e3 * float(np.median(before.seconds)),
        "plan": plan,
        "change": change,
        "load": 1e3 * load,
        "read_mb": bytes_read / 1e6,
    }


def known_rows(path: Path) -> list[dict[str, str]]:
    """Those of this commit on this machine."""
    if not path.exists():
        return []
    now = conditions()
    with path.open(newline="") as file:
        return [r for r in csv.DictReader(file) if all(r[n] == now[n] for n in ("commit", "cpu"))]


def growth(rows: list[dict], sweep: str, mode: str, metric: str) -> tuple[Slope, bool]:
    """(exponent over the upper half of the sweep, whether it is larger than it should be)."""
    mine = sorted(
        (float(r["x"]), float(r[metric])) for r in rows if (r["sweep"], r["mode"]) == (sweep, mode)
    )
    mine = mine[min(len(mine) // 2, max(len(mine) - 4, 0)) :]
    found = exponent([x for x, _ in mine], [max(y, 1e-6) for _, y in mine])
    return found, bool(found.value > EXPECTED[sweep][metric] + MARGIN)


def table(rows: list[dict]) -> tuple[Table, list[str]]:
    found = Table("sweep", "mode", *METRICS, title="exponents: fitted / largest expected")
    steep = []
    for sweep in SWEEPS:
        for mode in MODES:
            if not any((r["sweep"], r["mode"]) == (sweep, mode) for r in rows):
                continue
            cells = []
            for metric in METRICS:
                fitted, over = growth(rows, sweep, mode, metric)
                cells.append(f"{fitted.value:.2f} / {EXPECTED[sweep][metric]:g}")
                if over:
                    cells[-1] = f"[red]{cells[-1]}[/red]"
                    steep.append(f"{sweep}, {mode}: {metric} ~ x^{fitted.value:.2f}")
            found.add_row(sweep, mode, *cells)
    return found, steep


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sweeps = [s for s in SWEEPS if any(r["sweep"] == s for r in rows)]
    figure, grid = pyplot.subplots(
        2, len(sweeps), figsize=(3.2 * len(sweeps), 6), layout="constrained", squeeze=False
    )
    for column, sweep in enumerate(sweeps):
        for axes, metrics in (
            (grid[0][column], ("step", "moe")),
            (grid[1][column], ("begin", "plan")),
        ):
            for number, mode in enumerate(MODES):
                mine = sorted(
                    (r for r in rows if (r["sweep"], r["mode"]) == (sweep, mode)),
                    key=lambda r: float(r["x"]),
                )
                for metric, style in zip(metrics, ("o-", "s--"), strict=True):
                    axes.loglog(
                        [float(r["x"]) for r in mine],
                        [float(r[metric]) for r in mine],
                        style,
                        color=f"C{number}",
                        ms=3,
                        label=f"{mode}: {metric}",
                    )
            axes.set_xlabel(sweep)
            axes.grid(alpha=0.3)
        grid[0][column].set_title(sweep)
    for axes in grid[:, 0]:
        axes.set_ylabel("ms")
        axes.legend(fontsize=6)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sweep", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--most", type=float, default=float("inf"), help="leave larger points out")
    parser.add_argument("--write", action="store_true", help="bench/results/growth.csv and .png")
    parser.add_argument("--json", action="store_true", help="the rows on standard output")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console(stderr=True, highlight=False)
    rows: list[dict] = known_rows(RESULTS / "growth.csv") if args.write else []
    have = {(r["sweep"], float(r["x"]), r["mode"]) for r in rows}
    with scratch() as made:
        models = Models(Path(made))
        # Points of one shape in a row.
        todo = [p for s in args.sweep for p in points(s) if p.x <= args.most]
        for point in sorted(todo, key=lambda p: (p.experts, p.layers)):
            for mode in args.mode:
                if (point.sweep, point.x, mode) in have:
                    continue
                figures = measure(models.packed(point), point, mode)
                row = {"sweep": point.sweep, "x": point.x, "mode": mode}
                row |= {name: round(value, 4) for name, value in figures.items()}
                rows.append(row)
                if args.write:
                    write_rows("growth", [row])
                console.print(
                    "  ".join(f"{name} {value}" for name, value in row.items()), soft_wrap=True
                )
                gc.collect()
    found, steep = table(rows)
    console.print(found)
    for line in steep:
        console.print(f"steeper than expected: {line}")
    if args.write:
        plot(rows, RESULTS / "growth.png")
    if args.json:
        print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
