"""The paper's table: Switch-Base-128 (7.4 B parameters) run in every way there is to run it in less memory.

    python bench/switch_base_128.py --folder DIR [--rows plain comoe@2.4GB ...] [--write]
    python bench/switch_base_128.py --folder DIR --layers 2 --experts 16      # small: a look at whether it runs

A checkpoint of the true shape with random weights and uneven routing is made in DIR (14.8 GB; `comoe bench make-model`), and
packed (22 GB), once. Each row is a process of its own in a memory cgroup of its own, where one can be made: limited to the
row's budget, page cache counted. It takes turns with plain transformers, which holds every expert in memory, so that both
meet the same state of the machine: each turn encodes a prompt of 128 tokens and generates; the tokens are given, since
greedy text of random weights repeats itself. Peaks are the kernel's (VmHWM, of the whole process, and of the cgroup).

Each row is written when it is measured (bench/results/switch_base_128.json, .csv); rows that are there are not measured again
unless --again. At the end: the paper's and our bounds, met or missed.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from cgroup import CgroupError, MemoryGroup, drop_from_cache
from harness import RESULTS, conditions
from rich.console import Console
from rich.table import Table

from comoe.config import format_bytes, parse_bytes

HERE = Path(__file__).resolve().parent
PAPER = "CoMoE, arXiv 2508.09208: 15.6 -> 4.7 GB, -10.5 % latency against offloading"
FAST = {"quality": "fast", "max_context": 512}
# name -> (method, budget, options).
ROWS: dict[str, tuple[str, str | None, dict]] = {
    "plain": ("plain", None, {}),
    "accelerate@4.7GB": ("accelerate", "4.7GB", {}),
    "lru@4.7GB": ("lru", "4.7GB", {}),
    "lru@2.4GB": ("lru", "2.4GB", {}),
    "swapmoe@4.7GB": ("swapmoe", "4.7GB", {}),
    "m-smoe-37": ("m_smoe", None, {}),
    "comoe@4.7GB": ("comoe", "4.7GB", {"max_context": 512}),
    "comoe@3.1GB": ("comoe", "3.1GB", FAST),
    "comoe@2.4GB": ("comoe", "2.4GB", FAST),
    "comoe@1.6GB": ("comoe", "1.6GB", FAST),
    "comoe@4.7GB dense8": ("comoe", "4.7GB", {"max_context": 512, "dense": "bits8"}),
    "comoe@2.4GB dense8": ("comoe", "2.4GB", FAST | {"dense": "bits8"}),
    "comoe@1.6GB dense8": ("comoe", "1.6GB", FAST | {"dense": "bits8"}),
}
KEEP = 32  # tokens whose logits are compared
ERRORS = 700  # seed of the prompt on which errors are measured
OUTPUT = Console(stderr=True, width=170)


class Process:
    """A worker (switch_worker.py) that answers one command at a time."""

    def __init__(
        self, method: str, folder: Path, budget: int | None, options: dict, stack: ExitStack
    ):
        self.group = None
        try:
            self.group = stack.enter_context(MemoryGroup(budget))
        except CgroupError as error:
            OUTPUT.print(f"[yellow]no cgroup, so the page cache is not counted: {error}")
        command = [sys.executable, str(HERE / "switch_worker.py")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        start = self.group.popen if self.group else subprocess.Popen
        self.process = start(command, **pipes)
        stack.callback(self.stop)
        asked = {"method": method, "folder": str(folder), "budget": budget, "options": options}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        self.answer()

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            killed = self.group is not None and self.group.killed()
            why = "killed at its memory limit" if killed else f"exit {self.process.returncode}"
            raise RuntimeError(f"the worker ended: {why}")
        return json.loads(line)

    def ask(self, do: str, **more: Any) -> dict:
        self.process.stdin.write(json.dumps({"do": do, **more}) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def stop(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def prepare(args: argparse.Namespace) -> tuple[Path, Path]:
    """The checkpoint and its packed form, made if they are not there."""
    name = "switch" + "".join(
        f"-{key}{value}" for key, value in (("l", args.layers), ("e", args.experts)) if value
    )
    source, packed = args.folder / name, args.folder / f"{name}-packed"
    comoe = [sys.executable, "-m", "comoe"]
    wants = {ROWS[row][0] for row in args.rows}
    if not source.exists() and wants != {"comoe"}:
        more = [f"--layers={args.layers}"] if args.layers else []
        more += [f"--experts={args.experts}"] if args.experts else []
        make = ["bench", "make-model", str(source), "--like", "switch-base-128"]
        subprocess.run(
            [*comoe, *make, "--popularity", args.popularity, *more], check=True, stdout=sys.stderr
        )
    if not packed.exists() and "comoe" in wants:
        pack = [sys.executable, str(HERE / "thin_store.py")] if args.thin else [*comoe, "pack"]
        subprocess.run([*pack, str(source), str(packed)], check=True, stdout=sys.stderr)
    return source, packed


def measure(name: str, args, source: Path, packed: Path, reference: Process, exact: Path) -> dict:
    """One row, in turns with the reference; with no reference (its mapped files would be accelerate's page cache, and count
    for nobody), alone."""
    method, budget, options = ROWS[name]
    options = {
        **options,
        **({"quality": args.quality} if args.quality and method == "comoe" else {}),
    }
    limit = parse_bytes(budget) if budget else None
    folder = packed if method == "comoe" else source
    with ExitStack() as stack:
        loaded = time.perf_counter()
        drop_from_cache(source.glob("*.safetensors"))
        row = Process(method, folder, limit, options, stack) if name != "plain" else reference
        others = [reference] if reference else []
        loaded = time.perf_counter() - loaded
        for seed in range(args.warm):  # caches and plans settle on text that is not measured
            row.ask("generate", seed=seed, count=args.tokens)
        turns: list[tuple[dict, dict, dict, dict]] = []
        for turn in range(args.turns):
            seed = 100 + turn
            parts = []
            for process in [*others, row] if turn % 2 else [row, *others]:
                encoded = process.ask("encode", seed=seed)
                parts.append(
                    (process, encoded, process.ask("generate", seed=seed, count=args.tokens))
                )
            own = next(p for p in parts if p[0] is row)
            other = next((p for p in parts if p[0] is reference), own)
            turns.append((*own[1:], *other[1:]))
        folder = exact.parent / name
        save_outputs(row, folder)
        end = row.ask("finish")
        peak = row.group.peak() if row.group else None
    times = np.concatenate([t[1]["s"] for t in turns])
    plain = np.concatenate([t[3]["s"] for t in turns])
    found = {
        "row": name,
        "budget": limit,
        "peak_rss": end.pop("peak_rss"),
        "peak_cgroup": peak,
        "ms_per_token": 1e3 * float(np.median(times)),
        "ms_p20": 1e3 * float(np.quantile(times, 0.2)),
        "ms_p80": 1e3 * float(np.quantile(times, 0.8)),
        "mean_ms_per_token": 1e3 * float(times.mean()),
        "moe_ms_per_token": 1e3 * float(np.median([t[1]["moe_s"] for t in turns])),
        "encoder_ms": 1e3 * float(np.median([t[0]["s"] for t in turns])),
        "mb_read_per_token": float(np.mean([t[1]["bytes_read"] for t in turns])) / 1e6,
        "mb_read_per_prompt": float(np.mean([t[0]["bytes_read"] for t in turns])) / 1e6,
        "load_s": loaded,
    }
    if exact.exists():
        found |= errors(folder, exact)
    if reference:
        found |= {
            "plain_ms_per_token": 1e3 * float(np.median(plain)),
            "plain_mean_ms_per_token": 1e3 * float(plain.mean()),
            "plain_moe_ms_per_token": 1e3 * float(np.median([t[3]["moe_s"] for t in turns])),
            "plain_encoder_ms": 1e3 * float(np.median([t[2]["s"] for t in turns])),
        }
    uses = sum(t[1]["marks"].get("uses", 0) for t in turns)
    if uses:
        found["bits_used"] = sum(t[1]["marks"]["bits"] for t in turns) / uses
        found["waited_per_token"] = sum(t[1]["marks"]["waited"] for t in turns) / len(turns) / args.tokens  # fmt: skip
        found["bits_held"] = end["bits_held"]
        found |= demo_loss(found["bits_used"])
    found["detail"] = {k: v for k, v in end.items() if k not in ("bits_held", "touched")}
    found["shape"] = {"layers": args.layers or 12, "experts": args.experts or 128}
    found["conditions"] = {**conditions(), "tokens": args.tokens, "turns": args.turns,
                           "popularity": args.popularity}  # fmt: skip
    return found


def save_outputs(process: Process, folder: Path) -> None:
    """What errors are measured on: the encoder's output and the logits of given tokens."""
    folder.mkdir(exist_ok=True)
    process.ask("encode", seed=ERRORS, out=str(folder / "hidden.npy"))
    process.ask("generate", seed=ERRORS, count=KEEP, keep=KEEP, out=str(folder / "logits.npy"))


def errors(own: Path, exact: Path) -> dict:
    """Relative error of the encoder's output and of the logits of given tokens."""
    hidden, want = np.load(own / "hidden.npy"), np.load(exact / "hidden.npy")
    logits, right = np.load(own / "logits.npy"), np.load(exact / "logits.npy")
    return {
        "encoder_error": float(np.linalg.norm(hidden - want) / np.linalg.norm(want)),
        "logits_error": float(np.linalg.norm(logits - right) / np.linalg.norm(right)),
    }


def demo_loss(bits: float) -> dict:
    """What the demo model's perplexity loses with `bits` per expert weight (bench/results/sweep.json), in per cent:
    with plain codes, as here, and aggregated; interpolated in log perplexity."""
    rows = json.loads((RESULTS / "sweep.json").read_text())
    found = {}
    for field, method in (
        ("demo_loss_percent", "plain bits"),
        ("demo_aggregated_percent", "allocator"),
    ):
        points = sorted(
            (16 * r["fraction"], math.log(r["perplexity"] / r["perplexity_exact"]))
            for r in rows
            if r["method"] == method
        )
        found[field] = 100 * math.expm1(np.interp(bits, *zip(*points, strict=True)))
    return found


# ---- what comes of it ------------------------------------------------------------------------------------


def bounds(rows: dict[str, dict]) -> list[tuple[str, str, bool | None]]:
    """(what was asked, what was measured, met); None: the rows that it needs are not there."""
    out: list[tuple[str, str, bool | None]] = []

    def check(text: str, needs: tuple[str, ...], what: Callable) -> None:
        if any(name not in rows or "failed" in rows[name] for name in needs):
            out.append((f"{needs[0]}: {text}", "not measured", None))
        else:
            said, met = what(*(rows[name] for name in needs))
            out.append((f"{needs[0]}: {text}", said, bool(met)))

    def ms(row: dict, field: str = "mean_ms_per_token") -> tuple[str, float, float]:
        own, plain = row[field], row[f"plain_{field}"]
        return f"{own:.2f} against {plain:.2f} ms", own, plain

    def below(share: float, field: str = "mean_ms_per_token") -> Callable:
        def what(row: dict) -> tuple[str, bool]:
            said, own, plain = ms(row, field)
            return said, own <= share * plain

        return what

    def faster(share: float) -> Callable:
        def what(row: dict, other: dict) -> tuple[str, bool]:
            own, theirs = row["mean_ms_per_token"], other["mean_ms_per_token"]
            return f"{own:.1f} against {theirs:.1f} ms", own <= share * theirs

        return what

    def peak(limit: float) -> Callable:
        return lambda row: (format_bytes(row["peak_rss"]), row["peak_rss"] <= limit)

    def mix(row: dict) -> tuple[str, bool]:
        loss = row["demo_loss_percent"]
        used = f"{row['bits_used']:.2f} bits used, {row['bits_held']:.2f} held"
        return f"{used}: {loss:+.1f} %", loss <= 5

    for name in ("comoe@2.4GB", "comoe@2.4GB dense8"):
        check("peak of the whole process <= 2.4 GB", (name,), peak(2.4e9))
        check("demo model at the bits used at most +5 %", (name,), mix)
        check("mean time per token <= plain transformers'", (name,), below(1.0))
        check("MoE blocks at least 2x less time", (name,), below(0.5, "moe_ms_per_token"))
        check(
            "5x less time than accelerate's disk offload", (name, "accelerate@4.7GB"), faster(0.2)
        )
    for name in ("comoe@4.7GB", "comoe@4.7GB dense8"):
        check("peak of the whole process <= 4.7 GB", (name,), peak(4.7e9))
        check("faster than plain transformers (mean)", (name,), below(1.0))
        check("10.5 % less time than offloading (LRU)", (name, "lru@4.7GB"), faster(0.895))
    return out


def _number(row: dict, field: str, form: str) -> str:
    return format(row[field], form) if field in row else "n/a"


COLUMNS = (
    ("peak RSS", lambda r: format_bytes(r["peak_rss"])),
    ("with page cache", lambda r: format_bytes(r["peak_cgroup"]) if r["peak_cgroup"] else "n/a"),
    ("ms/token", lambda r: f"{r['mean_ms_per_token']:.1f}"),
    ("plain then", lambda r: _number(r, "plain_mean_ms_per_token", ".1f")),
    ("MoE ms", lambda r: f"{r['moe_ms_per_token']:.2f} / {_number(r, 'plain_moe_ms_per_token', '.2f')}"),
    ("encoder ms", lambda r: f"{r['encoder_ms']:.0f} / {_number(r, 'plain_encoder_ms', '.0f')}"),
    ("MB read/token", lambda r: f"{r['mb_read_per_token']:.1f}"),
    ("bits held/used", lambda r: f"{r['bits_held']:.2f} / {r['bits_used']:.2f}" if "bits_used" in r else "16"),
    ("demo ppl", lambda r: f"{r['demo_loss_percent']:+.1f} %" if "demo_loss_percent" in r else ""),
    ("error", lambda r: f"{100 * r['encoder_error']:.2f} %" if "encoder_error" in r else "n/a"),
)  # fmt: skip


def show(rows: dict[str, dict]) -> None:
    table = Table("row", *(name for name, _ in COLUMNS))
    for name in ROWS:
        if name in rows:
            row = rows[name]
            cells = [row["failed"]] if "failed" in row else [cell(row) for _, cell in COLUMNS]
            table.add_row(name, *cells)
    OUTPUT.print(table)
    for text, said, met in bounds(rows):
        OUTPUT.print(f"{'not measured' if met is None else 'met' if met else 'MISSED':>12}  {text}: {said}")  # fmt: skip


def write(path: Path, rows: dict[str, dict]) -> None:
    """JSON, whole or not at all; CSV beside it."""
    listed = [rows[name] for name in ROWS if name in rows]
    verdicts = [{"bound": b, "measured": s, "met": m} for b, s, m in bounds(rows)]
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"rows": listed, "bounds": verdicts, "paper": PAPER}, indent=1) + "\n")  # fmt: skip
    os.replace(part, path)
    flat = [{k: v for k, v in row.items() if not isinstance(v, dict)} for row in listed]
    names = list(dict.fromkeys(name for row in flat for name in row))
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)


def plot(path: Path, rows: dict[str, dict]) -> None:
    """Time per token over plain transformers' in the same run, against peak memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name, row in rows.items():
        if "failed" in row:
            continue
        plain = row.get("plain_mean_ms_per_token") or rows.get("plain", row).get(
            "mean_ms_per_token"
        )
        ratio = row["mean_ms_per_token"] / plain
        at = (row["peak_rss"] / 1e9, ratio)
        axes.plot(*at, "o", color="tab:blue" if name.startswith("comoe") else "tab:gray")
        axes.annotate(name, at, textcoords="offset points", xytext=(5, 4), fontsize=8)
    axes.set(xlabel="peak memory of the whole process, GB", yscale="log",
             ylabel="time per token / plain transformers", title="Switch-Base-128, batch 1")  # fmt: skip
    axes.axhline(1, lw=0.8, color="black")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="for the model: up to 37 GB")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument("--layers", type=int, help="of encoder and decoder each: a smaller model")
    parser.add_argument("--experts", type=int, help="a smaller model")
    parser.add_argument(
        "--thin", action="store_true", help="pack without exact rungs: 7.4 GB for 22"
    )
    parser.add_argument("--popularity", default="zipf", help="as of comoe bench make-model")
    parser.add_argument("--quality", help="of comoe's rows, instead of their own")
    parser.add_argument("--tokens", type=int, default=48, help="generated per turn")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--warm", type=int, default=4, help="turns that are not measured")
    parser.add_argument("--again", action="store_true", help="measure rows that are there")
    parser.add_argument("--write", action="store_true", help="to bench/results/switch_base_128.*")
    parser.add_argument("--json", action="store_true", help="print all rows as JSON")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    results = (RESULTS if args.write else args.folder) / "switch_base_128.json"
    rows = {}
    if results.exists():
        rows = {row["row"]: row for row in json.loads(results.read_text())["rows"]}
    todo = [name for name in args.rows if args.again or name not in rows or "failed" in rows[name]]
    source, packed = prepare(args)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        reference = None
        for name in sorted(todo, key=lambda name: ROWS[name][0] != "accelerate"):
            OUTPUT.print(f"{name} ...")
            try:
                if ROWS[name][0] != "accelerate" and reference is None:
                    reference = Process("plain", source, None, {}, stack)
                    save_outputs(reference, scratch / "exact")
                rows[name] = measure(name, args, source, packed, reference, scratch / "exact")
            except RuntimeError as error:
                rows[name] = {"row": name, "failed": str(error)}
            write(results, rows)
    if todo:
        plot(results, rows)
    show(rows)
    if args.json:
        print(json.dumps({"rows": list(rows.values()), "bounds": bounds(rows)}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
