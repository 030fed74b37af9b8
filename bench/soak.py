"""Hours of a server in minutes: random prompts, batches and budgets, while all that could leak is watched.

    python bench/soak.py [--minutes 30] [--mode exact|dial] [--write] [--json]

A packed model of random weights (--model: another packed folder) generates for --minutes. Jobs are drawn at random:
1 to 16 prompts of 1 to 190 tokens, 2 to 32 new tokens, greedy or sampled, now and then in chunks, or broken off in
their middle by an exception. Meanwhile another thread changes the budget at random moments, up and down.

exact   Every output, its tokens and all its logits bit for bit, is compared with that of a model that is loaded
        anew for this one job, with memory for everything, in another process, which itself is replaced every
        25 jobs.
dial    Quality, latency target and routing tolerance change as well. Tokens may then differ; logits must be finite.

At every checkpoint the model gets its least memory, runs one fixed job, and stands still. Then no session may
be open, no page loading or unaccounted for, and no page held once all records are evicted. RSS, threads and open files are
noted there: RSS is flat if over the run the 95% interval of its slope allows less than GROWTH. The first tenth of
the run, in which torch and the C library still get what they keep, does not count.

No time is asserted, so it may run at the lowest priority. Exit status 1, if anything was found.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from fits import slope
from harness import RESULTS, conditions, scratch
from rich.console import Console
from synthetic import make_checkpoint
from transformers import LogitsProcessor
from transformers.utils import logging

import comoe
from comoe import memory
from comoe.config import format_bytes
from comoe.policy.joint import GoalError
from comoe.policy.plan import BudgetError
from comoe.runtime.engine import RESIDENT

SHAPE = {"layers": 4, "experts": 32, "top_k": 4, "hidden": 256, "intermediate": 128}
GROWTH = 4e6  # bytes over the whole run that the interval of the slope may allow
CHECKPOINT_SECONDS = 15.0
FRESH_JOBS = 25  # that one process of the comparing side computes
SETTLING = 0.1  # share of the run that does not count for the slope
BROKEN_OFF = 0.05  # share of jobs
# torch keeps code for up to 1,024 shapes that it met: random ones fill that for a quarter of an hour, in plain
# transformers too, which would hide a leak of ours. So prompts are padded to few widths, and it keeps less.
WIDTHS = (1, 2, 5, 12, 30, 75, 190)
TORCH_SHAPES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}


@dataclass(frozen=True)
class Job:
    """One call of generate. lengths: of the prompts.  stop_at: the step that raises, -1: none."""

    seed: int
    lengths: tuple[int, ...]
    new: int
    sample: bool = False
    chunk: int = 0
    stop_at: int = -1


FIXED = Job(1, (17, 5), 8)


class BrokenOff(Exception):
    pass


class BreakOff(LogitsProcessor):
    def __init__(self, step: int):
        self.left = step

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if self.left < 0:
            raise BrokenOff
        return scores


def draw(rng: np.random.Generator) -> Job:
    batch = int(rng.choice([1, 1, 1, 2, 4, 8, 16]))
    width = int(rng.choice(WIDTHS))
    lengths = [width, *rng.integers(1, width + 1, batch - 1).tolist()]
    new = int(rng.integers(2, 33))
    chunk = 64 if batch == 1 and rng.random() < 0.2 else 0
    stop_at = int(rng.integers(new)) if rng.random() < BROKEN_OFF else -1
    return Job(int(rng.integers(2**31)), tuple(lengths), new, rng.random() < 0.5, chunk, stop_at)


def run(model, job: Job) -> tuple[str, bool]:
    """(digest of all tokens and logits, whether these were finite)."""
    random = torch.Generator().manual_seed(job.seed)
    vocab = model.get_input_embeddings().num_embeddings
    width = max(job.lengths)
    ids = torch.randint(1, vocab, (len(job.lengths), width), generator=random)
    mask = torch.zeros_like(ids)
    for row, length in zip(mask, job.lengths, strict=True):
        row[width - length :] = 1
    options = {"prefill_chunk_size": job.chunk} if job.chunk else {}
    if job.stop_at >= 0:
        options["logits_processor"] = [BreakOff(job.stop_at)]
    torch.manual_seed(job.seed)
    with torch.inference_mode():
        found = model.generate(
            ids * mask,
            attention_mask=mask,
            do_sample=job.sample,
            max_new_tokens=job.new,
            min_new_tokens=job.new,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )
    logits = torch.stack(found.logits).float().contiguous()
    digest = hashlib.sha256(found.sequences.numpy().tobytes() + logits.numpy().tobytes())
    return digest.hexdigest(), bool(logits.isfinite().all())


class Fresh:
    """The other process: every job on a model that was loaded for it alone."""

    def __init__(self, folder: Path):
        self._folder, self._process, self._jobs = folder, None, 0

    def digest(self, job: Job) -> str:
        if self._jobs == FRESH_JOBS:
            self.close()
        if self._process is None:
            command = [sys.executable, __file__, "--model", str(self._folder), "--fresh"]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            self._jobs = 0
        self._jobs += 1
        self._process.stdin.write(json.dumps(asdict(job)) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"soak: the comparing process ended at {job}; see above for its error"
            )
        return line.strip()

    def close(self) -> None:
        if self._process is not None:
            self._process.stdin.close()
            self._process.wait()
            self._process.stdout.close()
            self._process = None


def fresh_side(folder: Path) -> None:
    """Answers jobs from standard input with digests."""
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        fields = json.loads(line)
        job = Job(**fields | {"lengths": tuple(fields["lengths"])})
        model = comoe.load(folder, memory="4GB", exact=True)
        model.comoe.wait_ready()
        print(run(model, job)[0], file=answers, flush=True)
        model.comoe.close()
        del model
        gc.collect()


class Unrest(threading.Thread):
    """Changes the budget, and with `dial` what else can be changed, at random moments."""

    def __init__(self, runtime, dial: bool, seed: int):
        super().__init__(daemon=True)
        self.runtime, self.dial = runtime, dial
        self.rng = np.random.default_rng(seed)
        self.go, self.over = threading.Event(), False
        self.turn = threading.Lock()  # held while a change is made
        self.changes, self.refused, self.error = 0, 0, None
        full = runtime.store_sizes.total(runtime.store.levels.exact)
        self.least = runtime.budget.least(0)
        self.most = self.least + int(1.1 * full)

    def run(self) -> None:
        while not self.over:
            self.go.wait()
            time.sleep(self.rng.exponential(0.5))
            with self.turn:
                if not self.go.is_set() or self.over:
                    continue
                try:
                    self._change()
                    self.changes += 1
                except (BudgetError, GoalError):
                    self.refused += 1
                except Exception as error:  # told at the end: a thread's exception ends nothing
                    self.error = f"{type(error).__name__}: {error}"
                    self.over = True

    def _change(self) -> None:
        runtime, rng = self.runtime, self.rng
        what = rng.random() if self.dial else 0.0
        if what < 0.5:
            share = np.exp(rng.uniform(np.log(0.04), 0))
            runtime.set_memory(self.least + int(share * (self.most - self.least)))
        elif what < 0.8:
            choices = (None, "high", "balanced", "fast", float(np.exp(rng.uniform(-9, 0))))
            runtime.set_quality(choices[rng.integers(len(choices))])
        elif what < 0.9:
            runtime.set_latency_target(None if rng.random() < 0.5 else float(rng.uniform(0.001, 1)))
        else:
            runtime.set_routing_tolerance(float(rng.choice([0.0, 0.1, 1.0])))

    def pause(self) -> None:
        self.go.clear()
        with self.turn:
            pass


def stand_still(runtime) -> dict[str, int]:
    """Waits until the engine does nothing, evicts everything, and reads all counters. `held_before`: pages used
    before the eviction; `due_before`: pages of the records that were resident then."""
    deadline = time.monotonic() + 120
    runtime.wait_ready()
    while runtime.engine.stats()["loading"] and time.monotonic() < deadline:
        time.sleep(0.01)
    stats = runtime.engine.stats()
    page = stats["page_bytes"]
    resident = runtime.engine.resident() == RESIDENT
    due = int(runtime.store_sizes.record_bytes[resident].sum()) // page
    everything = np.arange(runtime.records.count, dtype=np.int32)
    runtime.engine.cancel(1)
    runtime.engine.cancel(2)
    runtime.engine.evict(everything)
    after = runtime.engine.stats()
    gc.collect()
    memory.give_back_free()
    return {
        "rss": memory.rss(),
        "threads": len(os.listdir("/proc/self/task")),
        "files": len(os.listdir("/proc/self/fd")),
        "sessions": after["sessions"],
        "loading": after["loading"],
        "reclaiming": after["pages_reclaiming"],
        "held_before": stats["pages_used"],
        "due_before": due,
        "held_after": after["pages_used"],
        "free_after": after["pages_free"],
        "mapped_pages": after["mapped_bytes"] // page,
        "mapped": after["mapped_bytes"],
        "budget": after["budget_bytes"],
        "failed_reads": after["failed_reads"] + after["corrupt_reads"] + after["failed_prefetches"],
    }


def faults(now: dict[str, int]) -> list[str]:
    """What is wrong with the counters of a model that stands still."""
    found = [
        f"{now[name]} {what}"
        for name, what in (
            ("sessions", "sessions are open"),
            ("loading", "records are loading"),
            ("reclaiming", "pages wait for a step"),
            ("held_after", "pages are held though all records were evicted"),
            ("failed_reads", "reads failed"),
        )
        if now[name]
    ]
    if now["held_before"] != now["due_before"]:
        found.append(f"{now['held_before']} pages are held for {now['due_before']} of records")
    if now["held_after"] + now["free_after"] != now["mapped_pages"]:
        found.append(f"of {now['mapped_pages']} mapped pages {now['free_after']} are free or held")
    if now["mapped"] > now["budget"]:
        found.append(f"{now['mapped']} bytes are mapped under a budget of {now['budget']}")
    return found


class Soak:
    def __init__(self, folder: Path, mode: str, seed: int, say):
        self.folder, self.dial, self.say = folder, mode == "dial", say
        options = {"quality": "balanced"} if self.dial else {"exact": True}
        self.model = comoe.load(folder, memory="4GB", **options)
        self.runtime = self.model.comoe
        self.rng = np.random.default_rng(seed)
        self.unrest = Unrest(self.runtime, self.dial, seed + 1)
        self.fresh = Fresh(folder)
        self.compare = ThreadPoolExecutor(1)
        self.pending: list[tuple[Job, str, Future]] = []
        self.problems: list[str] = []
        self.count = dict.fromkeys(
            ("jobs", "tokens", "equal", "different", "refused", "broken_off"), 0
        )
        self.points: list[dict[str, float]] = []
        self.fixed: str | None = None
        self.begin = 0.0

    def job(self, job: Job) -> None:
        try:
            digest, finite = run(self.model, job)
        except BrokenOff:
            self.count["broken_off"] += 1
            return
        except BudgetError:
            self.count["refused"] += 1
            return
        self.count["jobs"] += 1
        self.count["tokens"] += job.new * len(job.lengths)
        if not finite:
            self.problems.append(f"logits are not finite: {job}")
        if not self.dial:
            self.pending.append((job, digest, self.compare.submit(self.fresh.digest, job)))
            self.judge(keep=2)

    def judge(self, keep: int) -> None:
        while len(self.pending) > keep:
            job, digest, expected = self.pending.pop(0)
            equal = digest == expected.result()
            self.count["equal" if equal else "different"] += 1
            if not equal:
                self.problems.append(f"not as in a fresh run: {job}")

    def checkpoint(self) -> dict[str, int]:
        self.unrest.pause()
        if self.dial:
            self.runtime.set_latency_target(None)
            self.runtime.set_quality(None)
            self.runtime.set_routing_tolerance(0.0)
        self.runtime.set_memory(self.unrest.least)
        digest, _ = run(self.model, FIXED)
        if not self.dial:
            self.fixed = self.fixed or digest
            if digest != self.fixed:
                self.problems.append("the fixed job's output changed")
        now = stand_still(self.runtime)
        minutes = (time.perf_counter() - self.begin) / 60
        self.problems += [f"after {minutes:.1f} minutes: {fault}" for fault in faults(now)]
        self.points.append({"minutes": round(minutes, 3), **now})
        self.say(
            f"{minutes:5.1f} min: {self.count['jobs']} jobs, {self.count['tokens']} tokens, {self.count['equal']} equal, "
            f"{self.unrest.changes} changes, RSS {format_bytes(now['rss'])}, {len(self.problems)} problems"
        )
        return now

    def run(self, minutes: float) -> dict:
        self.begin = time.perf_counter()
        self.unrest.start()
        first = self.checkpoint()
        while time.perf_counter() < self.begin + 60 * minutes and self.unrest.error is None:
            self.unrest.go.set()
            until = time.perf_counter() + CHECKPOINT_SECONDS
            while time.perf_counter() < until:
                self.job(draw(self.rng))
            self.checkpoint()
        self.judge(keep=0)
        self.compare.shutdown()
        self.fresh.close()
        last = self.checkpoint()
        self.unrest.over = True
        self.unrest.go.set()
        self.unrest.join()
        if self.unrest.error:
            self.problems.append(f"changing the budget: {self.unrest.error}")
        for name in ("threads", "files"):
            if last[name] > max(first[name], self.points[1][name]):
                self.problems.append(f"{name}: {first[name]} at the start, {last[name]} at the end")
        end = self.points[-1]["minutes"]
        late = [p for p in self.points if p["minutes"] >= SETTLING * end]
        trend = slope([p["minutes"] for p in late], [p["rss"] for p in late])
        if len(late) >= 20 and not trend.high * end < GROWTH:
            self.problems.append(
                f"RSS may grow by {format_bytes(trend.high * end)} over the run, "
                f"{format_bytes(GROWTH)} are allowed"
            )
        stats = self.runtime.engine.stats()
        self.runtime.close()
        return {
            "mode": "dial" if self.dial else "exact",
            "minutes": end,
            **self.count,
            "changes": self.unrest.changes,
            "changes_refused": self.unrest.refused,
            "bytes_read": stats["bytes_from_disk"],
            "evictions": stats["evictions"],
            "moved_pages": stats["relocated_pages"],
            "cpu_seconds": round(time.process_time(), 1),
            # low, value, high; None: too few checkpoints to tell
            "rss_slope_bytes_per_minute": None
            if np.isnan(trend.value)
            else [trend.low, trend.value, trend.high],
            "start": first,
            "end": last,
            "problems": self.problems,
            "points": [{n: p[n] for n in ("minutes", "rss")} for p in self.points],
        }


def rss_change(result: dict) -> str:
    if result["rss_slope_bytes_per_minute"] is None:
        return "slope unknown: too short a run"
    low, value, high = (x / 1e3 for x in result["rss_slope_bytes_per_minute"])
    return f"{value:+.1f} kB/min (95%: {low:+.1f} to {high:+.1f})"


def write(result: dict) -> Path:
    """Into bench/results/soak.json, beside the other mode's, and soak.png."""
    path = RESULTS / "soak.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    known[result["mode"]] = {
        "command": f"python bench/soak.py --mode {result['mode']} --minutes {result['minutes']:.0f} --write",
        **conditions(),
        **result,
    }
    path.write_text(json.dumps(known, indent=1) + "\n")
    plot(known, path.with_suffix(".png"))
    return path


def plot(results: dict[str, dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    for mode, result in results.items():
        points = result["points"]
        label = f"{mode}: {rss_change(result)}"
        axes.plot([p["minutes"] for p in points], [p["rss"] / 1e6 for p in points], label=label)
    axes.set_xlabel("minutes")
    axes.set_ylabel("RSS at its least memory, MB")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--mode", choices=("exact", "dial"), default="exact")
    parser.add_argument("--model", type=Path, help="a packed folder; default: one that is made")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="bench/results/soak.json and .png")
    parser.add_argument("--json", action="store_true", help="the result on standard output")
    parser.add_argument("--fresh", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.update(
        TORCH_SHAPES
    )  # read when torch first needs it; the comparing process inherits it
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.fresh:
        fresh_side(args.model)
        return 0
    console = Console(stderr=True, highlight=False)
    with scratch() as made:
        folder = args.model
        if folder is None:
            folder = Path(made) / "packed"
            make_checkpoint(Path(made) / "source", embedding_scale=50.0, **SHAPE)
            comoe.pack(Path(made) / "source", folder)
        result = Soak(folder, args.mode, args.seed, console.print).run(args.minutes)
    console.print(
        f"{result['mode']}: {result['jobs']} jobs, {result['tokens']} tokens, {result['equal']} equal to a fresh run, "
        f"{result['different']} not; RSS {rss_change(result)}"
    )
    for problem in result["problems"]:
        console.print(f"problem: {problem}")
    if args.json:
        print(json.dumps(result))
    if args.write:
        console.print(f"written: {write(result)}")
    return int(bool(result["problems"]))


if __name__ == "__main__":
    sys.exit(main())
