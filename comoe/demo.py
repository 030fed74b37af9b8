"""The demonstration: one packed file, less and less memory, next to plain transformers.

Each budget runs in a process of its own (`python -m comoe.demo`), whose peak is read from outside, so
that no run inherits another's memory. Its baseline is its peak after the tiny dummy model of
baseline.py and before the model is loaded.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from comoe import memory
from comoe.config import format_bytes

PROMPT = '''import os


class Reader:
    """Reads lines from a file."""

    def __init__(self, path):
        self.path = path
        self.lines = []

    def read(self'''
WINDOW, CONTEXT = 256, 64
TEXT_BYTES = 24_000  # of held-out text; about 8,000 tokens
QUICK_TEXT_BYTES = 1_500
TEMPERATURE, SEED = 0.6, 2  # a small model's likeliest text goes round in circles
SLACK = 1.1  # the pool is taken in slabs, so a level needs somewhat more than its own bytes


def model_folder() -> Path:
    """The bundled model, an ordinary checkpoint folder."""
    folder = Path(str(resources.files("comoe") / "demo_model"))
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"demo: the bundled model is missing ({folder}); install comoe again"
        )
    return folder


def run(
    out: Path,
    *,
    prompt: str = PROMPT,
    max_tokens: int = 64,
    quick: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Packs the bundled model into out/packed and runs it under falling budgets.

    Per budget: memory, peak, baseline, bits_per_weight, tokens_per_second, perplexity, perplexity_exact
    (that of the original weights), text, plan, and `plain`: the same figures of plain transformers.
    """
    import comoe

    out.mkdir(parents=True, exist_ok=True)
    packed = out / "packed"
    say(f"packing the bundled model into {packed}")
    comoe.pack(model_folder(), packed, overwrite=True)
    job = {
        "prompt": prompt,
        "max_tokens": max_tokens,
        "text_bytes": QUICK_TEXT_BYTES if quick else TEXT_BYTES,
    }

    say("plain transformers")
    plain = run_worker({**job, "folder": str(model_folder()), "plain": True})
    plain["bits_per_weight"] = 16.0
    say("original weights through comoe")
    exact = run_worker({**job, "folder": str(packed), "memory": None, "exact": True})
    rows = []
    for budget in budgets(exact["beside_pool"], exact["level_bytes"], quick):
        say(f"memory {format_bytes(budget)}")
        row = run_worker({**job, "folder": str(packed), "memory": budget, "exact": False})
        row["perplexity_exact"], row["plain"] = exact["perplexity"], plain
        rows.append(row)
    return rows


def budgets(beside_pool: int, level_bytes: list[int], quick: bool) -> list[int]:
    """Falling budgets: enough for every expert at each level from exact down to 2 bits, then for half
    of the experts at 2 bits. level_bytes: the pool's bytes with all experts at each level, coarsest first."""
    pools = [int(SLACK * nbytes) for nbytes in reversed(level_bytes)] + [level_bytes[0] // 2]
    return [beside_pool + pool for pool in (pools[0::4] if quick else pools)]


def run_worker(job: dict[str, Any]) -> dict[str, Any]:
    """Runs one job in a new process; adds its peak, read by this process while it still stands."""
    worker = subprocess.Popen(
        [sys.executable, "-m", "comoe.demo", json.dumps(job)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        line = worker.stdout.readline()
        result = json.loads(line) if line else {"error": "the process ended without a result"}
        if "error" not in result:
            result["peak"] = memory.peak_rss(worker.pid)
        worker.communicate()
    except BaseException:
        worker.kill()
        worker.wait()
        raise
    if "error" in result or worker.returncode:
        what = "plain transformers" if job.get("plain") else f"memory {job.get('memory')}"
        raise RuntimeError(
            f"demo: {what}: {result.get('error', f'exit status {worker.returncode}')}"
        )
    return result


def work(job: dict[str, Any]) -> dict[str, Any]:
    """One job, in the worker: loads, generates, and scores held-out text."""
    from comoe.baseline import warm_up

    baseline = warm_up()
    import torch
    from transformers import AutoModelForCausalLM

    import comoe
    from comoe.cli.common import quiet_transformers
    from comoe.evaluate import encode, plan_windows, score
    from comoe.generate import generate_text
    from comoe.heldout import held_out_text

    quiet_transformers()
    tokenizer = comoe.load_tokenizer(job["folder"])
    if job.get("plain"):
        model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=torch.bfloat16).eval()
    else:
        model = comoe.load(job["folder"], memory=job["memory"], exact=job["exact"])
        model.comoe.wait_ready()
    # Twice, and the second is reported: in a fresh process torch makes code for every new shape, which
    # took plain transformers from 88 tokens/s to 6.
    for _ in range(2):
        result = generate_text(
            model,
            tokenizer,
            job["prompt"],
            max_tokens=job["max_tokens"],
            temperature=TEMPERATURE,
            seed=SEED,
        )
    ids, num_bytes = encode(tokenizer, held_out_text(job["text_bytes"]))
    scored = score(model, ids, plan_windows(len(ids), WINDOW, CONTEXT))
    result |= {
        "prompt": job["prompt"],
        "baseline": baseline,
        "perplexity": scored.perplexity,
        "tokens": scored.tokens,
        "bits_per_byte": scored.nats / math.log(2) / num_bytes,
    }
    if not job.get("plain"):
        runtime = model.comoe
        stats = runtime.stats()
        names = (
            "memory",
            "bits_per_weight",
            "expert_bytes",
            "expert_bytes_exact",
            "bytes_read",
            "hits",
            "misses",
            "plan",
        )
        result |= {name: stats[name] for name in names}
        result["beside_pool"] = runtime.budget.least(0)
        result["level_bytes"] = [runtime.store_sizes.total(level) for level in range(5)]
        runtime.close()
    return result


def plot(rows: list[dict[str, Any]], path: Path) -> Path:
    """Saves perplexity, speed and peak over the memory asked for; returns the path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    plain = rows[0]["plain"]
    asked = [row["memory"] / 1e6 for row in rows]
    figure, (quality, speed, peak) = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    quality.plot(asked, [row["perplexity"] for row in rows], "o-", label="comoe")
    quality.axhline(rows[0]["perplexity_exact"], color="gray", ls="--", label="original weights")
    quality.set_ylabel("perplexity, held-out text")
    for row, x in zip(rows, asked, strict=True):
        quality.annotate(f"{row['bits_per_weight']:.1f} bit", (x, row["perplexity"]), fontsize=7)
    speed.plot(asked, [row["tokens_per_second"] for row in rows], "o-", label="comoe")
    speed.axhline(plain["tokens_per_second"], color="gray", ls="--", label="plain transformers")
    speed.set_ylabel("tokens/s")
    speed.set_ylim(bottom=0)
    peak.plot(asked, [(row["peak"] - row["baseline"]) / 1e6 for row in rows], "o-", label="comoe")
    peak.axhline(
        (plain["peak"] - plain["baseline"]) / 1e6, color="gray", ls="--", label="plain transformers"
    )
    peak.set_ylabel("peak above baseline, MB")
    for axes in (quality, speed, peak):
        axes.set_xlabel("memory asked, MB")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def main() -> int:
    """The worker: prints its result as one line, and stays until its standard input is closed."""
    # What libraries print must not stand between us and our reader.
    result_to, sys.stdout = sys.stdout, sys.stderr
    try:
        result = work(json.loads(sys.argv[1]))
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        result = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(result), file=result_to, flush=True)
    sys.stdin.read()
    return 0


if __name__ == "__main__":
    sys.exit(main())
