"""Joint against separate: the bundled model (or DST), one token at a time, at five budgets of expert memory.

    python bench/bench_joint.py DST [--tokens 400] [--fractions .1 .2 .3 .4 .5] [--text FILE] [--only ...] [--write]

DST: packed, and aggregated (comoe aggregate). Rivals, at equal memory and on the same engine and kernels:

    aggregation   the store's curve of best rungs, all resident, nothing read later
    offloading    exact weights, least recently used cache, next layer's experts fetched ahead
    separately    rungs chosen first (the coarsest one that keeps the "balanced" loss, for all alike), then
                  offloaded as above

and ours at every named quality. All read the same held-out text, token by token, taking turns every 16
tokens, every second time in the opposite order; loss is KL to the exact model with everything in memory. Times are
compared turn by turn: the ratio of two contenders is the median over turns, with the 90 % interval of that median
from resampled turns (seed 0). A rival is beaten by one of our settings in less time at no more loss if the whole
interval is below 1, or with less loss in no more time if the interval is not all above 1. --write replaces a
fraction's rows in bench/results/joint.json as soon as it is measured.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from harness import RESULTS, conditions
from transformers import DynamicCache

import comoe
from comoe.heldout import held_out_text
from comoe.policy.goal import QUALITIES
from comoe.policy.plan import Plan, Sizes, all_cached, require_room

WARM_UP = 32  # tokens that are fed but not counted
TURN = 16  # tokens that one contender reads before it is the next one's turn
AS_QUICK = "joint, as quick as aggregation"
TIE = 0.002  # nats; KL closer than this over some hundred tokens is the same


@dataclass
class OneLevel:
    """Everything at one level, the last used cached: rungs chosen without regard to where they lie."""

    level: int

    def least(self, sizes: Sizes, *, exact: bool) -> np.ndarray:
        return sizes.all_at(self.level)

    def plan(self, sizes: Sizes, pool_bytes: int, *, exact: bool) -> Plan:
        levels = sizes.all_at(self.level)
        require_room(sizes, levels, pool_bytes)
        return all_cached(sizes, levels, pool_bytes)


@dataclass
class Contender:
    name: str
    model: torch.nn.Module
    cache: DynamicCache = field(default_factory=DynamicCache)
    seconds: list[float] = field(default_factory=list)
    turns: list[float] = field(default_factory=list)  # mean seconds of a token, of each turn
    kl: list[float] = field(default_factory=list)
    nats: list[float] = field(default_factory=list)

    def step(self, token: int, target: int, want: torch.Tensor | None) -> torch.Tensor:
        begin = time.perf_counter()
        out = self.model(torch.tensor([[token]]), past_key_values=self.cache, use_cache=True)
        took = time.perf_counter() - begin
        logp = out.logits[0, -1].float().log_softmax(-1)
        if want is not None:
            self.seconds.append(took)
            self.kl.append(float((want.exp() * (want - logp)).sum()))
            self.nats.append(-float(logp[target]))
        return logp

    def row(self) -> dict:
        stats = self.model.comoe.stats()
        decided = stats["decided"]
        return {
            "method": self.name,
            "ms_mean": 1e3 * float(np.mean(self.seconds)),
            "ms_median": 1e3 * float(np.median(self.seconds)),
            "turn_ms": [round(1e3 * float(q), 3) for q in np.quantile(self.turns, [0.2, 0.5, 0.8])],
            "kl": float(np.mean(self.kl)),
            "taken": stats["loss"]["taken"],
            "perplexity": float(np.exp(np.mean(self.nats))),
            "bits_used": stats["bits_per_weight"],
            "bytes_read": stats["bytes_read"]["disk"],
            "pool_bytes": self.model.comoe.plan.pool_bytes,
            "coarser": decided["coarser"],
            "waited": decided["waited"],
            "plan": stats["plan"],
        }


def coarsest_within(model, loss: float) -> int:
    """The level with the fewest bytes that loses at most `loss` if all experts are at it."""
    losses, sizes = model.comoe.store.losses()["loss"], model.comoe.store_sizes
    good = [
        level
        for level in range(len(sizes.levels))
        if sizes.has[:, level].all() and losses[:, level].sum() <= loss
    ]
    return min(good, key=sizes.total)


def contenders(dst: str, memory: int, only: list[str] | None) -> list[Contender]:
    made = [
        Contender("aggregation", comoe.load(dst, memory=memory, upgrade=False)),
        Contender("offloading", comoe.load(dst, memory=memory, exact=True)),
        Contender("separately", comoe.load(dst, memory=memory)),
    ]
    runtime = made[-1].model.comoe
    runtime.set_planner(OneLevel(coarsest_within(made[-1].model, QUALITIES["balanced"])))
    made.append(Contender("joint, resident", comoe.load(dst, memory=memory, quality="resident")))
    for quality in QUALITIES:
        made.append(Contender(f"joint, {quality}", comoe.load(dst, memory=memory, quality=quality)))
    for loss in (0.0002, 0.0005, 0.004, 0.007, 0.02):
        made.append(Contender(f"joint, {loss:g}", comoe.load(dst, memory=memory, quality=loss)))
    if only:
        for contender in made:
            if contender.name not in only:
                contender.model.comoe.close()
        made = [contender for contender in made if contender.name in only]
    if not only or AS_QUICK in only:
        made.append(as_quick_as(made[0].model.comoe, dst, memory))
    for contender in made:
        # Each runtime would count the others' memory as taken from its own budget.
        contender.model.comoe.budget.baseline = 1 << 50
        contender.model.comoe.wait_ready()
    return made


def as_quick_as(rival, dst: str, memory: int) -> Contender:
    """Ours with the time that our costs expect of the rival's plan as latency target: least loss in that time."""
    contender = Contender(AS_QUICK, comoe.load(dst, memory=memory, quality="resident"))
    runtime = contender.model.comoe
    _, seconds = runtime.planner.judge(runtime.store_sizes, rival.plan)
    runtime.set_latency_target(seconds)
    return contender


def memory_for(runtime, fraction: float) -> int:
    """Bytes for everything else and a fraction of the experts' exact bytes."""
    fixed = runtime.budget.sizes.dense + runtime.budget.reserve(0)
    return fixed + int(fraction * runtime.records.exact_bytes())


def take_turns(reference: Contender, made: list[Contender], ids: list[int]) -> None:
    """All go through the text, TURN tokens each at a time; compared with the reference from WARM_UP on."""
    with torch.inference_mode():
        for begin in range(0, len(ids) - 1, TURN):
            turn = range(begin, min(begin + TURN, len(ids) - 1))
            want = [reference.step(ids[i], ids[i + 1], None) for i in turn]
            for contender in made if begin // TURN % 2 else made[::-1]:
                before = len(contender.seconds)
                for i in turn:
                    counts = i >= WARM_UP and i > begin  # the first pays for the change of turns
                    contender.step(ids[i], ids[i + 1], want[i - begin] if counts else None)
                if len(contender.seconds) > before:
                    contender.turns.append(float(np.mean(contender.seconds[before:])))


def ratio_of_times(ours: Contender, rival: Contender) -> tuple[float, float, float]:
    """(low, median, high): ours over the rival's, turn by turn; 90 % interval of the median."""
    ratios = np.array(ours.turns) / np.array(rival.turns)
    drawn = np.random.default_rng(0).integers(0, len(ratios), (2000, len(ratios)))
    low, high = np.quantile(np.median(ratios[drawn], axis=1), [0.05, 0.95])
    return float(low), float(np.median(ratios)), float(high)


def compare(
    dst: str, fraction: float, ids: list[int], only: list[str] | None
) -> tuple[list[dict], dict[str, str]]:
    reference = Contender("exact", comoe.load(dst))
    memory = memory_for(reference.model.comoe, fraction)
    made = contenders(dst, memory, only)
    take_turns(reference, made, ids)
    rows = [{"fraction": fraction, "memory": memory, **c.row()} for c in made]
    found = verdicts(made)
    for contender in (*made, reference):
        contender.model.comoe.close()
    return rows, found


def verdicts(made: list[Contender]) -> dict[str, str]:
    """Which of ours beats each rival, and how."""
    found = {}
    ours = [c for c in made if c.name.startswith("joint")]
    for rival in (c for c in made if not c.name.startswith("joint")):
        loss = np.mean(rival.kl)
        ratios = {c.name: ratio_of_times(c, rival) for c in ours}
        quicker = [c for c in ours if np.mean(c.kl) <= loss + TIE and ratios[c.name][2] < 1.0]
        better = [c for c in ours if np.mean(c.kl) < loss - TIE and ratios[c.name][0] <= 1.0]
        said = []
        if quicker:
            best = min(quicker, key=lambda c: ratios[c.name][1])
            said.append(f"{best.name}: {1 - ratios[best.name][1]:.0%} less time")
        if better:
            best = min(better, key=lambda c: np.mean(c.kl))
            said.append(f"{best.name}: {1 - np.mean(best.kl) / loss:.0%} less loss")
        if not said:
            near = [c for c in ours if np.mean(c.kl) <= loss + TIE]
            best = min(near or ours, key=lambda c: ratios[c.name][1])
            said.append(f"not beaten ({best.name})")
        shown = ", ".join(f"{x:.3f}" for x in ratios[best.name])
        found[rival.name] = f"{'; '.join(said)} (time {shown})"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("dst")
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.4, 0.5])
    parser.add_argument("--only", nargs="+", help="of the contenders, rivals among them")
    parser.add_argument("--text", type=Path, help="default: held-out modules of the library")
    parser.add_argument("--write", action="store_true", help="to bench/results/joint.json")
    arguments = parser.parse_args()
    text = held_out_text() if arguments.text is None else arguments.text.read_text()
    ids = comoe.load_tokenizer(arguments.dst).encode(text)[: arguments.tokens + WARM_UP + 1]
    for fraction in arguments.fractions:
        rows, found = compare(arguments.dst, fraction, ids, arguments.only)
        print(f"\n{fraction:.0%} of the expert bytes, {len(ids) - 1 - WARM_UP} tokens")
        for row in rows:
            print(
                f"  {row['method']:18s} {row['ms_mean']:7.2f} ms (turns {row['turn_ms']})  KL {row['kl']:.4f}"
                f"  {row['bits_used']:5.2f} bits  read {row['bytes_read'] / 1e6:7.1f} MB  waited {row['waited']}"
            )
        for rival, verdict in found.items():
            print(f"  against {rival}: {verdict}", flush=True)
        if arguments.write:
            path = RESULTS / "joint.json"
            known = json.loads(path.read_text()) if path.exists() else {}
            kept = [row for row in known.get("rows", []) if row["fraction"] != fraction]
            said = {**known.get("verdicts", {}), f"{fraction:g}": found}
            rows = sorted(kept + rows, key=lambda row: row["fraction"])
            out = {
                "conditions": conditions(), "tokens": arguments.tokens, "rows": rows, "verdicts": said
            }  # fmt: skip
            path.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
