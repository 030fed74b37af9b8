"""One contender on the device: reads a text token by token from a remote store while the link changes.

Started by run.py on the testbed's `ue`; talks JSON lines on stdout: {"ready": ...}, then after a line on stdin
one {"tokens": [...], ...} at the end. Contenders:

    comoe       as loaded
    demand      exact weights read when a token uses them, the last used kept (LRU of the same memory): plain offloading
    demand4     the same at 4 bits
    once        the joint plan for `--quality`, made for the link at the start; what it aims at is waited for as it
                decided then
    local       the coarsest rungs, all in memory; the network is not used
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import numpy as np
import torch

import comoe
from comoe.policy.misses import Wait
from comoe.policy.plan import BudgetError, Plan, Sizes, all_cached
from comoe.runtime.engine import PREFETCH, RESIDENT, UPGRADE

WINDOW = 128  # tokens before the context starts anew


class OnDemand:
    """Nothing is held; everything is used at one level."""

    def __init__(self, level: int):
        self.level = level

    def least(self, sizes: Sizes, *, exact: bool) -> np.ndarray:
        return sizes.all_at(self.level)

    def plan(self, sizes: Sizes, pool_bytes: int, *, exact: bool) -> Plan:
        if sizes.largest(sizes.all_at(self.level)) > pool_bytes:
            raise BudgetError("the pool cannot hold one expert")
        return all_cached(sizes, sizes.all_at(self.level), pool_bytes)


class Coarsest:
    """All experts at the coarsest level, resident."""

    def least(self, sizes: Sizes, *, exact: bool) -> np.ndarray:
        return sizes.all_at(0)

    def plan(self, sizes: Sizes, pool_bytes: int, *, exact: bool) -> Plan:
        low = sizes.all_at(0)
        held = low.astype(np.int8)
        return Plan(sizes.levels, held, low, low, 0, pool_bytes, sizes.chosen(held))


def as_contender(runtime, name: str) -> None:
    """Makes a loaded model's runtime one of the rivals."""
    if name == "comoe":
        return
    runtime.remote.face = lambda *args, **kwargs: None  # what is missing is waited for
    runtime.controller.observe = lambda *args: None
    runtime._watch_path = lambda snapshot: None
    runtime._follow_text = lambda: None
    runtime.placement.network_rule = None
    runtime.network = runtime.placement.parts.network = None
    runtime.placement.upgrade = lambda upgrades: None
    if name == "once":
        rule = runtime.live.rule(runtime.plan, runtime.planner.loss, runtime.planner.use)
        runtime.placement.own_rule = rule if rule is not None else Wait()
        return
    exact = runtime.store.levels.exact
    planner = {"demand": OnDemand(exact), "demand4": OnDemand(2), "local": Coarsest()}[name]
    runtime.set_planner(planner)
    if name != "local":
        runtime.set_miss_rule(Wait())
    runtime.wait_ready(60)


def forget_finer(runtime) -> None:
    """The state after the coarsest rungs were pulled: nothing finer is here."""
    for kind in (PREFETCH, UPGRADE):
        runtime.engine.cancel(kind)
    runtime.engine.wait_idle(20)
    finer = ~runtime.store_sizes.chosen(runtime.store_sizes.all_at(0))
    finer = np.flatnonzero(finer).astype(np.int32)
    runtime.engine.evict(finer)
    # The device has no storage for more, so that what memory does not hold comes over the network.
    fetcher = runtime.remote._fetcher
    fetcher._cache.put = lambda *args: False
    fetcher._cache.forget(fetcher._extent_of[finer])
    runtime.engine.set_local(finer, False)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("contender")
    parser.add_argument("--url", action="append", required=True)
    parser.add_argument("--memory", required=True)
    parser.add_argument("--reference", required=True, help="npz: ids, logp of the exact model")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--pace", type=float, default=0.05, help="seconds from token to token")
    parser.add_argument("--quality")
    parser.add_argument("--expert-server")
    parser.add_argument("--expert-token-file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    reference = np.load(args.reference)
    ids, want = reference["ids"], reference["logp"]
    options = {}
    if args.contender == "once" or args.quality:
        options["quality"] = args.quality or "balanced"
    if args.expert_server and args.contender == "comoe":
        options |= {
            "expert_server": args.expert_server,
            "expert_token_file": args.expert_token_file,
        }
    model = comoe.load(
        args.url[0],
        args.memory,
        sources=args.url[1:],
        threads=1,
        upgrade=args.contender != "local",
        **options,
    )
    runtime = model.comoe
    as_contender(runtime, args.contender)
    rows = []
    with torch.inference_mode():
        warm(model, ids)
        if args.contender != "local":
            forget_finer(runtime)
        print(json.dumps({"ready": runtime.describe()}), flush=True)
        sys.stdin.readline()
        if args.contender == "comoe":
            runtime.placement.ask_for_plan()
        began = time.perf_counter()
        cache, i = None, -1
        while time.perf_counter() - began < args.seconds:
            i += 1
            at = i % len(ids)
            if at % WINDOW == 0:
                cache = None
            bits = runtime.stats()
            begin = time.perf_counter()
            out = model(torch.tensor([[int(ids[at])]]), past_key_values=cache, use_cache=True)
            took = time.perf_counter() - begin
            cache = out.past_key_values
            logp = out.logits[0, -1].float().log_softmax(-1).numpy()
            rows.append(row(runtime, begin - began, took, logp, want[at], bits))
            # A reader, not a race: the processor of the testbed is shared with its links.
            left = args.pace - (time.perf_counter() - begin)
            if left > 0:
                time.sleep(left)
    stats = runtime.stats()
    result = {"tokens": rows, "plan": stats["plan"], "decided": stats["decided"]}
    result["remote"] = stats.get("remote")
    result["network"] = stats.get("network")
    result["bytes"] = stats["bytes_read"]
    print(json.dumps(result, default=float), flush=True)
    runtime.close()


def warm(model, ids: np.ndarray) -> None:
    """First calls bring in code."""
    cache = None
    for i in range(8):
        out = model(torch.tensor([[int(ids[i])]]), past_key_values=cache, use_cache=True)
        cache = out.past_key_values


def row(runtime, at: float, took: float, logp: np.ndarray, want: np.ndarray, before: dict) -> dict:
    """Of one token: when, how long, its divergence from the exact model, bits per weight that are here."""
    want = want.astype(np.float32)
    kl = float((np.exp(want) * (want - logp)).sum())
    here = runtime.engine.resident() == RESIDENT
    share = float(runtime.records.payload_bytes(here)) / runtime.records.exact_bytes()
    return {"t": at, "ms": 1e3 * took, "kl": max(kl, 0.0), "bits": 16 * share,
            "network": runtime.engine.stats()["remote_bytes"]}  # fmt: skip


if __name__ == "__main__":
    main()
