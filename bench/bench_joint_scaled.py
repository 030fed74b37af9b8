"""Joint against separate in the simulator, in the shapes of Switch-Base-128, OLMoE-1B-7B and Mixtral-8x7B.

    python bench/bench_joint_scaled.py DST --text NAME=FILE [--tokens 300] [--shape OLMoE-1B-7B] [--write] [--plot FILE]

DST: the bundled model, packed and aggregated. It reads the text; what it chose is scaled (scaling.py says how, and
what is kept). The first third calibrates uses; the rest is replayed against the device profile of each shape with
the planners, cache, predictors, gauge and rule of production. Rivals, at equal memory for experts:

    aggregation   least loss with everything resident, nothing read later; no offloading
    offloading    exact weights, least recently used, the next layer's experts read ahead
    separately    the fewest bytes that lose 0.01 nats, chosen without regard to memory; offloaded as above

A rival is beaten by one of ours with less time at no more loss, or less loss at no more time. Seeds: 0, of what the
predictions miss.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from harness import RESULTS, conditions
from scaling import SHAPES, Shape, losses_per_use, next_layer_recall, scaled_sizes, scaled_trace

import comoe
from comoe.evaluate import encode
from comoe.forecast import Model
from comoe.heldout import held_out_text
from comoe.policy.cache import LRU
from comoe.policy.costs import Costs
from comoe.policy.devices import load_device
from comoe.policy.goal import QUALITIES, Goal
from comoe.policy.joint import GoalError, JointPlanner, Situation
from comoe.policy.misses import LeastCost
from comoe.policy.next_use import NextUse
from comoe.policy.plan import BudgetError, Plan, Sizes, all_cached
from comoe.policy.predictors import BestOf, Recorded
from comoe.policy.scoring import AlwaysOn
from comoe.policy.simulator import Simulator
from comoe.policy.solver import Problem, solve
from comoe.policy.token_table import TokenTable
from comoe.replay import first_tokens
from comoe.trace import Trace, record_text, trace_of

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)
SEPARATE_LOSS = QUALITIES["balanced"]
OURS = {**QUALITIES, "0.0005": 0.0005, "0.1": 0.1}


def record(dst: str, text: str, tokens: int) -> Trace:
    model = comoe.load(dst, memory="400MB", exact=True)
    ids, _ = encode(comoe.load_tokenizer(dst), text[len(text) // 3 :][: 20 * tokens], tokens)
    found = trace_of(model, record_text(model, ids, 512, depth=1), "the bundled model")
    model.comoe.close()
    return found


class World:
    """One shape: sizes, costs, losses and traces."""

    def __init__(self, model: Model, trace: Trace, shape: Shape, recall: float):
        self.shape = shape
        self.sizes: Sizes = scaled_sizes(model.sizes, float(model.weights[0]), shape)
        scaled = scaled_trace(trace, shape, 0, recall)
        third = scaled.num_tokens // 3
        self.trace = _rows(scaled, third, scaled.num_tokens)
        learnt = scaled.experts[:third].astype(np.int64)
        flat = learnt + np.arange(shape.layers)[:, None] * shape.experts
        count = len(self.sizes.records)
        seen = np.bincount(flat.ravel(), minlength=count) + shape.top_k / shape.experts
        self.use = np.clip(seen / (third + 1), 0, 1)
        squares = np.bincount(flat.ravel(), scaled.weights[:third].ravel() ** 2, count)
        mean = float((scaled.weights[:third] ** 2).mean())
        self.square = (squares + mean) / (np.bincount(flat.ravel(), minlength=count) + 1)
        losses = model.store.losses()
        self.per_use = losses_per_use(model.sizes, losses["loss"], losses["use"], shape, self.use)
        self.loss = self.per_use * self.use[:, None]
        self.total = self.sizes.total(self.sizes.levels.exact)
        device = load_device(shape.device)
        self.costs = Costs.from_profile(
            device,
            self.sizes,
            np.full(count, float(shape.weights)),
            int(shape.dense_bytes),
            tier=device.tier_of(self.total),
            num_layers=shape.decoder_layers,
        )

    def planner(self, goal: Goal) -> JointPlanner:
        made = JointPlanner(self.loss, self.use)
        made.situation = Situation(goal, self.costs)
        return made

    def run(self, name: str, share: float, plan: Plan, *, separate: bool, rule=None) -> dict:
        trace = self.trace
        recorded = Recorded(trace.predicted)
        table = TokenTable(trace.num_experts.tolist(), trace.experts.shape[2])
        result = Simulator(
            self.sizes,
            self.costs,
            plan,
            trace=trace,
            cache=LRU(trace.num_experts) if separate else NextUse(trace.num_experts),
            predictor=recorded if separate else BestOf([table, recorded]),
            prefetch=not plan.resident,
            gauge=AlwaysOn() if separate else None,
            misses=rule,
            loss=np.where(np.isfinite(self.per_use), self.per_use, 0.0),
            mean_square=self.square,
        ).run()
        found = result.summary()
        row = {"shape": self.shape.name, "share": share, "method": name, "ms": found["token_ms"]}
        keys = ("stall_ms", "loss", "hit_rate", "bytes_per_token")
        return row | {key: found[key] for key in keys} | {"plan": plan.describe()}

    def ours(self, share: float, name: str, goal: Goal) -> dict | None:
        try:
            plan = self.planner(goal).plan(self.sizes, int(share * self.total), exact=False)
        except (GoalError, BudgetError):
            return None
        rule = None
        if not plan.resident and plan.price > 0:
            rule = LeastCost(
                self.loss,
                self.use * self.square,
                self.sizes.bytes_at,
                self.sizes.step_bytes,
                price=plan.price,
                bandwidth=self.costs.bandwidth,
                latency=self.costs.latency,
            )
        return self.run(f"joint, {name}", share, plan, separate=False, rule=rule)

    def separate_levels(self) -> np.ndarray:
        """uint8 [X]: fewest bytes within SEPARATE_LOSS."""
        loss = np.where(self.sizes.has & np.isfinite(self.loss), self.loss, np.inf)
        cost = np.where(np.isfinite(loss), loss, 0.0)[None]
        nbytes = np.where(np.isfinite(loss), self.sizes.bytes_at, np.inf).astype(float)
        chosen = solve(Problem(nbytes, cost, np.array([SEPARATE_LOSS])))
        return chosen.choice.astype(np.uint8)

    def rows(self, share: float, progress) -> list[dict]:
        pool, sizes = int(share * self.total), self.sizes
        exact, levels = sizes.all_at(sizes.levels.exact), self.separate_levels()
        made = [
            self.run("offloading", share, all_cached(sizes, exact, pool), separate=True),
            self.run("separately", share, all_cached(sizes, levels, pool), separate=True),
            self.run("joint, exact", share, all_cached(sizes, exact, pool), separate=False),
        ]
        try:
            plan = self.planner(Goal()).plan(sizes, pool, exact=False)
            if plan.resident:
                made.append(self.run("aggregation", share, plan, separate=True))
        except BudgetError:
            pass
        for name, loss in OURS.items():
            made.append(self.ours(share, name, Goal(loss=loss)))
            progress()
        made = [row for row in made if row is not None]
        # For a rival's own loss or time: the two questions that are asked of the dial.
        for rival in made[:2] + [row for row in made if row["method"] == "aggregation"]:
            if rival["loss"] > 0:
                made.append(
                    self.ours(share, f"as {rival['method']}", Goal(loss=0.7 * rival["loss"]))
                )
        return [row for row in made if row is not None]


def _rows(trace: Trace, begin: int, end: int) -> Trace:
    part = first_tokens(trace, end)
    arrays = (part.sequence, part.position, part.token, part.experts, part.weights, part.predicted)
    return Trace(
        part.model, part.layers, part.num_experts, *(a[begin:] for a in arrays), part.depth
    )


def verdicts(rows: list[dict]) -> list[dict]:
    """For each rival the best of ours: least time at no more loss, else least loss at no more time."""
    found = []
    ours = [row for row in rows if row["method"].startswith("joint")]
    for rival in (row for row in rows if not row["method"].startswith("joint")):
        quicker = [o for o in ours if o["loss"] <= rival["loss"] and o["ms"] < rival["ms"]]
        better = [o for o in ours if o["ms"] <= rival["ms"] and o["loss"] < rival["loss"]]
        time_saved = max((1 - o["ms"] / rival["ms"] for o in quicker), default=0.0)
        loss_saved = max((1 - o["loss"] / rival["loss"] for o in better), default=0.0)
        found.append(
            {
                "shape": rival["shape"],
                "share": rival["share"],
                "rival": rival["method"],
                "time_saved": time_saved,
                "loss_saved": loss_saved,
            }
        )
    return found


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure, axes = pyplot.subplots(
        len(shapes),
        len(SHARES),
        figsize=(15, 3.2 * len(shapes)),
        layout="constrained",
        squeeze=False,
    )
    marks = {"aggregation": "s", "offloading": "^", "separately": "D"}
    for line, shape in zip(axes, shapes, strict=True):
        for axis, share in zip(line, SHARES, strict=True):
            mine = [r for r in rows if r["shape"] == shape and r["share"] == share]
            ours = sorted(
                (r["ms"], max(r["loss"], 1e-5)) for r in mine if r["method"].startswith("joint")
            )
            axis.plot(*zip(*ours, strict=True), "o", ms=4, label="joint")
            for name, mark in marks.items():
                points = [(r["ms"], max(r["loss"], 1e-5)) for r in mine if r["method"] == name]
                if points:
                    axis.plot(*zip(*points, strict=True), mark, ms=7, label=name)
            axis.set(yscale="log", xscale="log", title=f"{shape}, {share:.0%}")
            axis.set(xlabel="ms per token", ylabel="nats per token")
    axes[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("dst")
    parser.add_argument("--text", help="NAME=FILE; default: held-out modules of the library")
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--shape", choices=[s.name for s in SHAPES], action="append")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument(
        "--write", action="store_true", help="into --out, beside other shapes' rows"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "joint_scaled.json")
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    name, text = "held-out python", held_out_text()[: 60 * arguments.tokens]
    if arguments.text:
        name, _, path = arguments.text.partition("=")
        text = Path(path).read_text(encoding="utf-8")
    model = Model.open(arguments.dst)
    trace = record(arguments.dst, text, arguments.tokens)
    recall = next_layer_recall(trace)
    print(f"{name}: {trace.num_tokens} tokens, next layer's router recalls {recall:.1%}")
    path = arguments.out
    known = json.loads(path.read_text()) if path.exists() else {"rows": [], "verdicts": []}
    wanted = arguments.shape or [s.name for s in SHAPES]
    for shape in (s for s in SHAPES if s.name in wanted):
        world, begin = World(model, trace, shape, recall), time.perf_counter()
        rows, beaten = [], []
        for share in arguments.shares:
            found = world.rows(share, lambda: None)
            rows += found
            beaten += verdicts(found)
            print(f"\n{shape.name} ({shape.device}), {share:.0%} of {world.total / 1e9:.1f} GB")
            for row in found:
                print(
                    f"  {row['method']:20s} {row['ms']:9.2f} ms (stall {row['stall_ms']:9.2f})  loss {row['loss']:.4f}"
                    f"  read {row['bytes_per_token'] / 1e6:8.2f} MB  hits {row['hit_rate']:.0%}"
                )
            for v in beaten[-3:]:
                print(
                    f"  beats {v['rival']}: {v['time_saved']:.0%} less time, or {v['loss_saved']:.0%} less loss",
                    flush=True,
                )
        print(f"({time.perf_counter() - begin:.0f} s)")
        for key, new in (("rows", rows), ("verdicts", beaten)):
            known[key] = [r for r in known[key] if r["shape"] != shape.name] + new
        if arguments.write:
            about = {"text": name, "tokens": trace.num_tokens, "recall": recall, "seed": 0}
            out = {"conditions": conditions(), **about, **known}
            path.write_text(json.dumps(out, indent=1) + "\n")
    if arguments.plot:
        plot(known["rows"], arguments.plot)


if __name__ == "__main__":
    main()
