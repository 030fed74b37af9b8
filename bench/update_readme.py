"""Runs `comoe demo` and puts its figures into bench/results/demo.json and the README's table.

python bench/update_readme.py              # measures, then writes both
python bench/update_readme.py --only-table # writes the table from the figures that are there
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "bench" / "results" / "demo.json"
BEGIN, END = "<!-- figures of bench/results/demo.json -->", "<!-- end of figures -->"
KEPT = (
    "memory",
    "peak",
    "baseline",
    "bits_per_weight",
    "tokens_per_second",
    "perplexity",
    "perplexity_exact",
    "plan",
)


def measure() -> dict:
    from comoe.doctor import cpu, native_module, versions

    command = [sys.executable, "-m", "comoe", "demo", "--out", "demo-out", "--json"]
    rows = json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    return {
        "command": "comoe demo --json",
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "cpu": cpu(native_module()),
        "versions": versions(),
        "rows": [{name: row[name] for name in KEPT} for row in rows],
        "plain": {name: rows[0]["plain"][name] for name in KEPT if name in rows[0]["plain"]},
    }


def table(figures: dict) -> str:
    """The README's table, with its conditions."""

    def line(name: str, row: dict) -> str:
        return (
            f"| {name} | {max(row['peak'] - row['baseline'], 0) / 1e6:.1f} MB | {row['bits_per_weight']:.2f} | "
            f"{row['perplexity']:.2f} | {row['tokens_per_second']:.1f} |"
        )

    cpu, versions = figures["cpu"], figures["versions"]
    lines = [
        "| `--memory` | peak above baseline | bits per expert weight | perplexity | tokens/s |",
        "|---|---|---|---|---|",
        line("plain transformers", figures["plain"]),
        *(line(f"{row['memory'] / 1e6:.1f} MB", row) for row in figures["rows"]),
        "",
        f"`{figures['command']}`: the bundled model on {cpu['cores']} cores of {cpu['model']} ({cpu['isa']}, load "
        f"{cpu['load']:.1f} at the start), torch {versions['torch']}, transformers {versions['transformers']}, "
        f"{figures['date']}. Perplexity per token of standard-library modules that the model has never seen; the "
        f"baseline is what the interpreter, torch and transformers take ({figures['rows'][0]['baseline'] / 1e6:.0f} MB).",
    ]
    return "\n".join(lines)


def with_table(readme: str, text: str) -> str:
    head, found, rest = readme.partition(BEGIN)
    _, found_end, tail = rest.partition(END)
    if not found or not found_end:
        raise ValueError(f"README.md: expected the lines {BEGIN!r} and {END!r}")
    return f"{head}{BEGIN}\n{text}\n{END}{tail}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only-table", action="store_true")
    if not parser.parse_args().only_table:
        RESULTS.write_text(json.dumps(measure(), indent=1) + "\n")
    readme = ROOT / "README.md"
    readme.write_text(with_table(readme.read_text(), table(json.loads(RESULTS.read_text()))))


if __name__ == "__main__":
    main()
