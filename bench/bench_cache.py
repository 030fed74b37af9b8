"""Cache policies and predictors on traces of the bundled model: stall time of each against LRU and Belady.

    python bench/bench_cache.py --text plays=FILE --text german=FILE --text talks=FILE [--tokens 2048] [--write]

For every text and budget (10, 20, 30, 50% of the experts' bytes): hits, stall, and the share of the stall
between LRU and Belady that each policy avoids, first without reading ahead (the main figure), then with
the same reading ahead for all. `known-token`: the default policy told the present token's whole routing in
advance, which no real predictor exceeds about that token. Then each predictor by itself: recall, bytes
wasted, time saved. Without --text: the held-out modules of the standard library. The constants of the
default policy were chosen on other Python modules, never on these texts.

Simulated (comoe/policy/simulator.py): a disk of 1.1 GB/s and 100 us, a core that streams weights at 10 GB/s,
one token at a time, experts at the original weights. Checked first: Belady misses least.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from harness import write_rows

import comoe
from comoe.demo import model_folder
from comoe.evaluate import encode
from comoe.heldout import held_out_text
from comoe.policy.next_use import NextUse
from comoe.policy.plan import Sizes, all_cached
from comoe.policy.predictor import Predictor
from comoe.policy.predictors import BestOf, Recorded, SequenceMatrix, TransitionTable
from comoe.policy.scoring import score_predictors
from comoe.policy.simulator import Simulator
from comoe.policy.token_table import TokenTable
from comoe.replay import (
    DISK_BANDWIDTH,
    DISK_LATENCY,
    SHARES,
    compare,
    default_costs,
)
from comoe.runtime.engine import RecordTable, store_sizes
from comoe.store import Store
from comoe.trace import Trace, record_text, trace_of

DEPTH = 4
WINDOW = 512


class KnownToken(Predictor):
    """Tells the present token's routing before it runs."""

    def __init__(self, trace: Trace):
        self._experts, self._row = trace.experts.astype(np.int64), -1

    def begin_token(self, token: int) -> None:
        self._row += 1

    def predict(self, layer_idx: int, hidden: object) -> list[tuple[int, np.ndarray]]:
        if layer_idx >= 0:
            return []
        return [*enumerate(self._experts[self._row])]


def record(texts: dict[str, str], tokens: int) -> tuple[dict[str, Trace], Sizes, int]:
    """Traces of the bundled model in the original weights, with all memory that it wants."""
    traces = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = comoe.pack(model_folder(), Path(scratch) / "demo")
        store = Store.open(folder)
        sizes = store_sizes(store, RecordTable(store))
        model = comoe.load(folder, memory="400MB", exact=True)
        tokenizer = comoe.load_tokenizer(folder)
        for name, text in texts.items():
            # From the middle: the beginning of a file is often unlike the rest.
            ids, _ = encode(tokenizer, text[len(text) // 3 :][: 20 * tokens], tokens)
            recorder = record_text(model, ids, WINDOW, depth=DEPTH)
            traces[name] = trace_of(model, recorder, "demo")
        model.comoe.close()
    return traces, sizes, store.manifest.dense_bytes


def predictors_of(trace: Trace) -> dict[str, object]:
    num_experts, k = trace.num_experts.tolist(), trace.experts.shape[2]
    return {
        "transitions": lambda: TransitionTable(num_experts, k),
        "sequence-matrix": lambda: SequenceMatrix(num_experts, k),
        "next-gate": lambda: Recorded(trace.predicted, DEPTH, 1),
        "next-gates-2": lambda: Recorded(trace.predicted, DEPTH, 2),
        "next-gates-4": lambda: Recorded(trace.predicted, DEPTH, 4),
        "token-table": lambda: TokenTable(num_experts, k),
        "best-of": lambda: BestOf(
            [TokenTable(num_experts, k), Recorded(trace.predicted, DEPTH, DEPTH)]
        ),
    }


def known_token(sizes, costs, trace, pool_bytes, level, lru, belady) -> dict[str, object]:
    result = Simulator(
        sizes,
        costs,
        all_cached(sizes, sizes.all_at(level), pool_bytes),
        trace=trace,
        cache=NextUse(trace.num_experts),
        predictor=KnownToken(trace),
        prefetch=False,
    ).run()
    summary = result.summary()
    closed = (lru - summary["stall_ms"]) / (lru - belady)
    return {"policy": "known-token", "prefetch": False, **summary, "closed": closed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--score-share", type=float, default=0.3, help="budget for the predictors")
    parser.add_argument("--bandwidth", type=float, default=DISK_BANDWIDTH)
    parser.add_argument("--latency", type=float, default=DISK_LATENCY)
    parser.add_argument("--write", action="store_true", help="append rows to bench/results")
    parser.add_argument("--device", default="cpu", help="only cpu: nothing here is timed")
    args = parser.parse_args()
    if args.device != "cpu":
        print("bench_cache: simulated, the same on every device")
        return
    texts = {}
    for pair in args.text:
        name, _, path = pair.partition("=")
        texts[name] = Path(path).read_text(encoding="utf-8")
    traces, sizes, dense = record(texts or {"held-out python": held_out_text()}, args.tokens)
    costs = default_costs(sizes, args.bandwidth, args.latency, dense)
    level = sizes.levels.exact
    rows, scored = [], []
    totals: dict[tuple[bool, str], float] = {}
    for domain, trace in traces.items():
        common = {"text": domain, "tokens": trace.num_tokens}
        common |= {"disk_bytes_per_s": args.bandwidth, "disk_latency_s": args.latency}
        print(f"{domain}: {trace.num_tokens} tokens, entropy {trace.entropy_share().mean():.3f}")
        for share in args.shares:
            pool = int(share * sizes.total(level))
            for prefetch in (False, True):
                begin = time.perf_counter()
                found = compare(sizes, costs, trace, pool, level, prefetch=prefetch)
                by_name = {row["policy"]: row for row in found}
                lru, belady = (by_name[name]["stall_ms"] for name in ("lru", "belady"))
                if not prefetch:
                    best = max(row["hit_rate"] for row in found)
                    if by_name["belady"]["hit_rate"] < best:
                        raise SystemExit("wrong: a policy has more hits than Belady's")
                    found.append(known_token(sizes, costs, trace, pool, level, lru, belady))
                for row in found:
                    key = (prefetch, row["policy"])
                    totals[key] = totals.get(key, 0.0) + row["stall_ms"]
                rows += [{**common, "share": share, **row} for row in found]
                shown = " | ".join(
                    f"{r['policy']} {r['hit_rate']:.1%} {r['stall_ms']:.3f} ms "
                    f"{'n/a' if r['closed'] is None else format(r['closed'], '.0%')}"
                    for r in found
                )
                ahead = "read ahead" if prefetch else "on demand "
                seconds = time.perf_counter() - begin
                print(f"  {share:.0%} {ahead} {shown} ({seconds:.0f} s)", flush=True)
            if share != args.score_share:
                continue
            plan = all_cached(sizes, sizes.all_at(level), pool)
            scores = score_predictors(
                predictors_of(trace),
                sizes,
                costs,
                plan,
                trace,
                lambda t=trace: NextUse(t.num_experts),
            )
            for name, score in scores.items():
                scored.append({**common, "share": share, "predictor": name, **vars(score)})
                print(
                    f"  {share:.0%} {name}: recall {score.recall:.1%}, wasted "
                    f"{score.wasted_bytes / 1e3:.0f} kB a token, saved {1e6 * score.saved:.0f} us a token; "
                    f"gated {score.gated_wasted_bytes / 1e3:.0f} kB, {1e6 * score.gated_saved:.0f} us",
                    flush=True,
                )
    for prefetch in (False, True):
        lru, belady = totals[prefetch, "lru"], totals[prefetch, "belady"]
        for (ahead, name), stall in totals.items():
            if ahead == prefetch:
                closed = (lru - stall) / (lru - belady)
                how = "read ahead" if prefetch else "on demand"
                print(f"all texts and budgets, {how}: {name} closes {closed:.1%}")
    if args.write:
        print(write_rows("cache", rows), write_rows("predictors", scored))


if __name__ == "__main__":
    main()
