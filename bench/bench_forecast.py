"""Forecast against reality: tokens per second of `comoe plan` and of the simulator beside those of real runs.

    python bench/bench_forecast.py DST [--tokens 128] [--fractions .1 .3 .5] [--write]

DST: the bundled model, packed and aggregated. The machine is measured first (comoe doctor, comoe/overheads.py: small
models of other sizes, never this one); then the model runs a held-out text token by token at several sizes of expert
memory, exact and balanced, with least loss resident, and with everything in memory. Contenders and the small models
take turns every 8 tokens. Nothing is fitted to a row. Times are means of the middle half of the tokens, measured and simulated
alike, since other processes interrupt some. The goal: predicted within 15 % of measured.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from harness import write_rows
from transformers import DynamicCache

import comoe
from comoe.config import CoMoEConfig
from comoe.doctor import examine
from comoe.forecast import Forecaster, Model
from comoe.heldout import held_out_text
from comoe.overheads import Probe, middle
from comoe.policy.devices import measured_device
from comoe.policy.misses import LeastCost
from comoe.policy.next_use import NextUse
from comoe.policy.plan import Plan
from comoe.policy.predictors import Recorded
from comoe.policy.simulator import Simulator
from comoe.trace import Trace, record_text, trace_of

GOAL = 0.15
WARM_UP, TURN, DEPTH = 32, 8, 2
WAYS = {
    "exact": {"exact": True},
    "balanced": {"quality": "balanced"},
    "resident": {"quality": "resident"},
}


@dataclass
class Run:
    """One real run."""

    name: str
    fraction: float
    memory: int
    options: dict
    seconds: list[float] = field(default_factory=list)

    def start(self, dst: str) -> None:
        self.model = comoe.load(dst, memory=self.memory, **self.options)
        # Each runtime would count the others' memory as taken from its own budget.
        self.model.comoe.budget.baseline = 1 << 50
        self.cache = DynamicCache()

    def feed(self, token: int, counts: bool) -> None:
        begin = time.perf_counter()
        self.model(torch.tensor([[token]]), past_key_values=self.cache, use_cache=True)
        if counts:
            self.seconds.append(time.perf_counter() - begin)


def simulated(forecaster: Forecaster, plan: Plan, trace: Trace) -> float:
    """Seconds per token of the trace under a plan."""
    model, costs = forecaster.model, forecaster.costs
    loss, use = model.losses
    rule = None
    if not plan.resident and 0 < plan.price < 1e9:
        flat = trace.experts.astype(np.int64) + np.arange(len(trace.layers))[:, None] * 16
        squares = np.bincount(flat.ravel(), trace.weights.ravel() ** 2, len(use))
        square = squares / np.maximum(np.bincount(flat.ravel(), minlength=len(use)), 1)
        rule = LeastCost(
            loss,
            np.maximum(use, 1e-3) * square,
            model.sizes.bytes_at,
            model.sizes.step_bytes,
            price=plan.price,
            bandwidth=costs.bandwidth,
            latency=costs.latency,
        )
    result = Simulator(
        model.sizes,
        costs,
        plan,
        trace=trace,
        cache=NextUse(trace.num_experts),
        predictor=Recorded(trace.predicted, DEPTH, DEPTH),
        prefetch=not plan.resident,
        misses=rule,
    ).run()
    return middle(result.token_time[WARM_UP:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("dst")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.1, 0.3, 0.5])
    parser.add_argument("--write", action="store_true", help="to bench/results/forecast.csv")
    arguments = parser.parse_args()
    folder = Path(arguments.dst)
    text = held_out_text()[: 8 * (arguments.tokens + WARM_UP)]
    ids = comoe.load_tokenizer(folder).encode(text)[: arguments.tokens + WARM_UP]
    full = comoe.load(folder, exact=True)
    fixed = full.comoe.budget.sizes.dense + full.comoe.budget.reserve(0)
    total = full.comoe.records.exact_bytes()
    trace = trace_of(full, record_text(full, ids, 512, depth=DEPTH), "bundled")
    full.comoe.close()

    runs = [Run("everything", 1.3, fixed + int(1.3 * total), WAYS["exact"])]
    for fraction in arguments.fractions:
        for name, options in WAYS.items():
            runs.append(Run(name, fraction, fixed + int(fraction * total), options))
    for run in runs:
        run.start(arguments.dst)
    report = examine(folder.parent, disk_bytes=64 << 20)
    bandwidth = report["bandwidth"]["disk"]["bytes_per_second"]
    probe = Probe(folder.parent)
    with torch.inference_mode():
        for run in runs:
            run.model.comoe.wait_ready()
        for begin in range(0, len(ids), TURN):
            for run in runs:
                for i in range(begin, min(begin + TURN, len(ids))):
                    # The first token of a turn pays for the change.
                    run.feed(ids[i], counts=i >= WARM_UP and i > begin)
            if not probe.done:
                probe.turn()
    device = measured_device(report, asdict(probe.overheads(bandwidth)))
    probe.close()

    forecaster = Forecaster(Model.open(folder), device)
    print(
        f"step {device.step_overhead * 1e6:.0f} us, layer {device.layer_overhead * 1e6:.0f} us, deciding "
        f"{device.deciding_overhead * 1e6:.0f} us a layer, wait {device.disk_latency * 1e6:.0f} us, disk "
        f"{device.disk_bandwidth / 1e9:.2f} GB/s, memory {device.memory_bandwidth / 1e9:.1f} GB/s"
    )
    rows, worst = [], {"plan": 0.0, "simulator": 0.0}
    for run in runs:
        outlook = forecaster.outlook(
            run.memory, CoMoEConfig.create(memory=run.memory, **run.options)
        )
        real = middle(run.seconds)
        engine, runtime = run.model.comoe.engine.stats(), run.model.comoe
        told = {
            "plan": outlook.seconds,
            "simulator": simulated(forecaster, outlook.plan, trace),
        }
        for name, seconds in told.items():
            worst[name] = max(worst[name], abs(seconds / real - 1), abs(real / seconds - 1))
        count = len(ids)
        print(
            f"{run.name:10s} {run.fraction:4.0%} measured {1 / real:6.1f} tokens/s ({1e3 * real:.2f} ms; mean {1e3 * np.mean(run.seconds):.2f}) | "
            + " | ".join(f"{n} {1 / s:6.1f} ({real / s - 1:+.0%})" for n, s in told.items())
            + f" | waited {1e3 * engine['wait_seconds'] / count:.2f} ms, {engine['waits'] / count:.2f} times, "
            f"read {engine['demand_bytes'] / count / 1e3:.0f} kB, ahead {engine['prefetch_bytes'] / count / 1e3:.0f} "
            f"({engine['prefetch_used_bytes'] / count / 1e3:.0f} used); foreseen {1e3 * outlook.stall:.2f} ms, {outlook.read / 1e3:.0f} kB",
            flush=True,
        )
        rows.append(
            {
                "way": run.name,
                "fraction": run.fraction,
                "memory": run.memory,
                "tokens": len(run.seconds),
                "measured_ms": 1e3 * real,
                "measured_mean_ms": 1e3 * float(np.mean(run.seconds)),
                "waited_ms": 1e3 * engine["wait_seconds"] / count,
                **{f"{name}_ms": 1e3 * seconds for name, seconds in told.items()},
                "step_us": 1e6 * device.step_overhead,
                "layer_us": 1e6 * device.layer_overhead,
                "deciding_us": 1e6 * device.deciding_overhead,
                "wait_us": 1e6 * device.disk_latency,
            }
        )
        runtime.close()
    if arguments.write:
        print(write_rows("forecast", rows))
    for name, apart in worst.items():
        print(f"{name}: at most {apart:.0%} off (goal {GOAL:.0%})")


if __name__ == "__main__":
    main()
