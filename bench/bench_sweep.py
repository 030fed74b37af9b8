"""Quality against bytes on the bundled model, by the commands that a user has: packs it, aggregates copies of it
in several ways, and sweeps them.

    OMP_NUM_THREADS=1 python bench/bench_sweep.py [--work FOLDER] [--write]

Calibrated on the standard library's modules, evaluated on those that are held out (comoe/heldout.py). Every method is
measured on the folder of plain `comoe aggregate`; what another way of aggregating changes is measured again on its
folder, as rows of `<method>, <option>`. With --work, what is finished there is not done again. --write puts
the rows measured so far into bench/results/sweep.json after each method.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_aggregate import library_text
from harness import RESULTS

import comoe
from comoe.demo import WINDOW, model_folder
from comoe.heldout import held_out_text

TEXT_BYTES = 60_000  # 16,588 tokens of the bundled tokenizer
METHODS = (
    "allocator", "calibrated bits", "plain bits", "base + residual", "base + low rank", "e-wemoe", "ream",
    "gated merge", "m-smoe", "hc-smoe", "gated merge, 4-bit", "hc-smoe, 4-bit",
)  # fmt: skip
OURS = ("allocator", "calibrated bits")
WAYS = {"": METHODS, "--nested": OURS, "--distil 60": OURS}
FIELDS = ("fraction", "expert_bytes", "perplexity", "perplexity_exact", "kl")


def command(*arguments: object) -> Any:
    line = [sys.executable, "-m", "comoe", *map(str, arguments), "--json"]
    return json.loads(subprocess.run(line, check=True, stdout=subprocess.PIPE).stdout)


def aggregated(work: Path, option: str, tokens: int) -> Path:
    """The folder that is made with `option`, and beside it the report of `comoe aggregate`."""
    folder = work / ("aggregated" + option.replace(" ", ""))
    report = folder.with_suffix(".json")
    if not report.exists():
        if folder.exists() and not option.startswith("--distil"):  # distillation goes on by itself
            shutil.rmtree(folder)
        if not folder.exists():
            comoe.pack(model_folder(), folder)
        found = command(
            "aggregate", folder, "--text", work / "library.txt", "--tokens", tokens, *option.split()
        )
        report.write_text(json.dumps(found, indent=1))
    return folder


def swept(folder: Path, method: str, text: Path) -> list[dict[str, Any]]:
    kept = folder.with_name(f"{folder.name}.{method}.json")
    if not kept.exists():
        rows = command(
            "eval", folder, "--text", text, "--window", WINDOW, "--sweep", "--method", method
        )
        kept.write_text(json.dumps(rows))
    return json.loads(kept.read_text())


def show(rows: list[dict[str, Any]]) -> None:
    """Markdown: perplexity over exact / KL."""
    fractions = sorted({row["fraction"] for row in rows}, reverse=True)
    print("| method | " + " | ".join(f"{f:.0%}" for f in fractions) + " |")
    print("|---|" + "---:|" * len(fractions))
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = {row["fraction"]: row for row in rows if row["method"] == method}
        texts = [
            f"{cells[f]['perplexity'] / cells[f]['perplexity_exact'] - 1:+.2%} / {cells[f]['kl']:.4f}"
            if f in cells
            else "n/a"
            for f in fractions
        ]
        print(f"| {method} | " + " | ".join(texts) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work", type=Path, help="a folder to keep what is made, and to go on from"
    )
    parser.add_argument("--tokens", type=int, default=49_152, help="of calibration")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        (work / "library.txt").write_text(library_text(), encoding="utf-8")
        (work / "heldout.txt").write_text(held_out_text(TEXT_BYTES), encoding="utf-8")
        rows = []
        for option, methods in WAYS.items():
            folder = aggregated(work, option, args.tokens)
            for method in methods:
                name = f"{method}, {option}" if option else method
                for row in swept(folder, method, work / "heldout.txt"):
                    rows.append({"method": name} | {field: row[field] for field in FIELDS})
                print(f"{name}: done", file=sys.stderr, flush=True)
                if args.write:
                    (RESULTS / "sweep.json").write_text(json.dumps(rows, indent=1) + "\n")
    show(rows)


if __name__ == "__main__":
    main()
