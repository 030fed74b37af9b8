"""Calibrated on one kind of text, used on another: what each method loses, for all pairs of domains.

    OMP_NUM_THREADS=1 python bench/bench_domains.py --domain plays=FILE [--domain ...] [--calibrate plays] --write

`code` is always a domain: modules of the standard library to calibrate on, those of comoe/heldout.py to
evaluate on. Of a file the first three quarters are for calibration, the rest for evaluation. For every
domain of --calibrate (all, if not given) the bundled model is packed, aggregated on that domain alone and
evaluated on all. `all` calibrates on every domain at once, with no more tokens.
--write: into bench/results/domains.json, in the place of what is there of the same calibration domains.
--table: prints the table that docs/aggregation.md has, from that file, and does nothing else.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_aggregate import library_text
from harness import RESULTS

import comoe
from comoe.aggregate.build import Workshop, aggregate
from comoe.aggregate.judge import Judge
from comoe.aggregate.sweep import Sweep, run_sweep
from comoe.demo import CONTEXT, WINDOW, model_folder
from comoe.evaluate import encode, plan_windows
from comoe.heldout import held_out_text

FRACTIONS = (0.2, 0.14)
METHODS = ("allocator", "calibrated bits", "plain bits", "gated merge, 4-bit", "hc-smoe, 4-bit")
MEMORY = "200MB"
ALL = "all"
FILE = RESULTS / "domains.json"


def texts_of(named: list[str]) -> dict[str, tuple[str, str]]:
    """Domain -> (text to calibrate on, text to evaluate on)."""
    found = {"code": (library_text(), held_out_text())}
    for entry in named:
        name, _, path = entry.partition("=")
        if not path or name in (*found, ALL):
            raise SystemExit(f"--domain {entry}: expected NAME=FILE with a name of its own")
        text = Path(path).read_text(encoding="utf-8", errors="replace")
        cut = len(text) * 3 // 4
        found[name] = text[:cut], text[cut:]
    return found


def evaluate(
    packed: Path, texts: dict[str, tuple[str, str]], max_tokens: int, **extra: Any
) -> list[dict[str, Any]]:
    """Rows of run_sweep for every domain's evaluation text."""
    rows, tokenizer = [], comoe.load_tokenizer(packed)
    with Workshop(packed, memory=MEMORY) as shop:
        sweep = Sweep(shop)
        for domain, (_, text) in texts.items():
            ids, _ = encode(tokenizer, text, max_tokens)
            windows = plan_windows(len(ids), WINDOW, CONTEXT)
            with Judge(shop.model, shop.weights, ids, windows) as judge:
                rows += run_sweep(
                    sweep,
                    judge,
                    fractions=FRACTIONS,
                    methods=METHODS,
                    domain=domain,
                    tokens=len(ids),
                    **extra,
                )
    return rows


def measure(
    name: str, texts: dict[str, tuple[str, str]], tokens: int, max_tokens: int
) -> list[dict[str, Any]]:
    chosen = list(texts) if name == ALL else [name]
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        packed = comoe.pack(model_folder(), Path(scratch) / "packed")
        report = aggregate(
            packed, {d: texts[d][0] for d in chosen}, memory=MEMORY, tokens=tokens, validate=False
        )
        made = time.perf_counter()
        rows = evaluate(
            packed, texts, max_tokens, calibrated=name, calibration_tokens=report.tokens
        )
    print(
        f"calibrated on {name}, {report.tokens} tokens: {made - begin:.0f} s, "
        f"evaluation {time.perf_counter() - made:.0f} s"
    )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Markdown: a line for each method and calibration domain, a column for each evaluation domain."""
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    calibrated = [d for d in (*domains, ALL) if any(row["calibrated"] == d for row in rows)]
    exact = {row["domain"]: row["perplexity_exact"] for row in rows}
    print("| method | calibrated on | " + " | ".join(domains) + " |")
    print("|---|---|" + "---:|" * len(domains))
    print("| exact: perplexity | | " + " | ".join(f"{exact[d]:.1f}" for d in domains) + " |")
    by_key = {(r["method"], r["calibrated"], r["domain"], r["fraction"]): r for r in rows}
    for method in METHODS:
        # Codes that know no text: only which few experts get more bits depends on it.
        for name in [ALL] if method == "plain bits" and ALL in calibrated else calibrated:
            cells = []
            for domain in domains:
                found = [by_key.get((method, name, domain, f)) for f in FRACTIONS]
                cells.append(", ".join(_cell(row) for row in found))
            print(f"| {method} | {name} | " + " | ".join(cells) + " |")


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "n/a"
    return f"{row['perplexity'] / row['perplexity_exact'] - 1:+.1%} / {row['kl']:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--domain", action="append", metavar="NAME=FILE", default=[])
    parser.add_argument("--calibrate", action="append", metavar="NAME")
    parser.add_argument("--tokens", type=int, default=16_384, help="of calibration")
    parser.add_argument("--max-tokens", type=int, default=4_096, help="of each evaluation text")
    parser.add_argument("--write", action="store_true", help=f"into {FILE.name}")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    known = json.loads(FILE.read_text()) if FILE.is_file() else []
    if args.table:
        show(known)
        return
    texts = texts_of(args.domain)
    for name in args.calibrate or [*texts, ALL]:
        if name not in (*texts, ALL):
            raise SystemExit(f"--calibrate {name}: there are {', '.join([*texts, ALL])}")
        rows = measure(name, texts, args.tokens, args.max_tokens)
        known = [row for row in known if row["calibrated"] != name] + rows
        if args.write:
            FILE.write_text(json.dumps(known, indent=1) + "\n")
    show(known)


if __name__ == "__main__":
    main()
