"""Puts the figures of bench/results into the README's tables.

python bench/update_readme.py              # runs `comoe demo` first, for bench/results/demo.json
python bench/update_readme.py --only-table # writes the tables from the figures that are there

Each table stands between `<!-- figures of bench/results/FILE -->` and `<!-- end of figures -->`; where FILE has not been
measured, its part of the README stays empty.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "bench" / "results"
SECTION = re.compile(
    r"(<!-- figures of bench/results/(\S+) -->\n)(.*?)(<!-- end of figures -->)", re.DOTALL
)
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
# Rows of the README, in its order; the others are in docs/performance.md.
SWITCH_ROWS = {
    "plain": "plain transformers, bf16",
    "accelerate@4.7GB": "accelerate, experts on disk",
    "lru@4.7GB": "experts on demand, LRU",
    "comoe@4.7GB": "**comoe**",
    "comoe@2.4GB": "**comoe**",
    "comoe@1.6GB": "**comoe**",
    "comoe@4.7GB dense8": "**comoe**, dense 8 bits",
    "comoe@2.4GB dense8": "**comoe**, dense 8 bits",
    "comoe@1.6GB dense8": "**comoe**, dense 8 bits",
}
PEER_CASES = ("resident", "2 GiB", "1 GiB")
PEERS = {
    "transformers eager": "transformers",
    "accelerate, experts on disk": "accelerate, experts on disk",
    "llama.cpp bf16": "llama.cpp bf16",
    "llama.cpp Q4_K_M": "llama.cpp Q4_K_M",
    "comoe exact": "**comoe** exact",
    "comoe exact, compiled": "**comoe** exact, compiled",
    "comoe 4 bits": "**comoe** 4 bits",
    "comoe 4 bits, dense 8, compiled": "**comoe** 4 bits, dense 8 bits, compiled",
    "comoe quality=high": "**comoe** quality=high",
    "comoe as fits, dense 8, compiled": "**comoe** as fits, dense 8 bits, compiled",
}
FRACTIONS = (0.3, 0.2, 0.14, 0.1)
MERGING = (
    "gated merge",
    "gated merge, 4-bit",
    "m-smoe",
    "hc-smoe",
    "ream",
    "base + low rank",
    "e-wemoe",
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


def markdown(titles: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def gigabytes(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB"


def demo_table(figures: dict) -> str:
    def line(name: str, row: dict) -> tuple[str, ...]:
        return (
            name,
            f"{max(row['peak'] - row['baseline'], 0) / 1e6:.1f} MB",
            f"{row['bits_per_weight']:.2f}",
            f"{row['perplexity']:.2f}",
            f"{row['tokens_per_second']:.1f}",
        )

    cpu, versions = figures["cpu"], figures["versions"]
    lines = [
        *markdown(
            (
                "`--memory`",
                "peak above baseline",
                "bits per expert weight",
                "perplexity",
                "tokens/s",
            ),
            [
                line("plain transformers", figures["plain"]),
                *(line(f"{row['memory'] / 1e6:.1f} MB", row) for row in figures["rows"]),
            ],
        ),
        "",
        f"`{figures['command']}`: the bundled model on {cpu['cores']} cores of {cpu['model']} ({cpu['isa']}, load "
        f"{cpu['load']:.1f} at the start), torch {versions['torch']}, transformers {versions['transformers']}, "
        f"{figures['date']}. Perplexity per token of standard-library modules that the model has never seen; the "
        f"baseline is what the interpreter, torch and transformers take ({figures['rows'][0]['baseline'] / 1e6:.0f} MB).",
    ]
    return "\n".join(lines)


def switch_table(figures: dict) -> str:
    """The paper's model. Times of a row and of plain transformers beside it are of the same run, in turns."""
    known = {row["row"]: row for row in figures["rows"] if "failed" not in row}
    rows = []
    for name, title in SWITCH_ROWS.items():
        if name not in known:
            continue
        row = known[name]
        plain = row.get("plain_mean_ms_per_token")
        bits = f"{row['bits_used']:.2f}" if "bits_used" in row else "16"
        loss = f"{row['demo_loss_percent']:+.1f} %" if "demo_loss_percent" in row else ""
        rows.append(
            (
                title,
                gigabytes(row["budget"]) if row.get("budget") else "none",
                gigabytes(row["peak_rss"]),
                f"{row['mean_ms_per_token']:.1f}",
                f"{plain / row['mean_ms_per_token']:.2f}x"
                if plain
                else "1x"
                if name == "plain"
                else "-",
                f"{row['encoder_ms']:.0f}",
                bits,
                loss,
            )
        )
    titles = (
        "Switch-Base-128, 7.4 B",
        "limit",
        "peak RSS",
        "ms/token",
        "speed of plain",
        "ms/128 tokens",
        "bits used",
        "loss at these bits",
    )
    at = next(iter(known.values()))["conditions"]
    command = "python bench/switch_base_128.py --folder DIR --write"
    note = (
        f"`{command}`: random weights, uneven routing, {at['threads']} threads of {at['cpu']}, {at['date']}. Limits are "
        "those of a memory cgroup around the whole process, page cache counted; times of plain transformers with "
        "every expert in memory were taken in turns with each row's. The loss is that of the bundled trained model's "
        "perplexity at as many bits. The paper ([CoMoE](https://arxiv.org/abs/2508.09208)): 15.6 -> 4.7 GB, 10.5 % less latency "
        "than offloading."
    )
    return "\n".join([*markdown(titles, rows), "", note])


def peers_table(rows: list[dict[str, str]]) -> str:
    """Medians over the repeats of the last run: tokens/s per case, prefill, perplexity."""
    run = rows[-1]["run"]
    rows = [row for row in rows if row["run"] == run]

    def figure(case: str, peer: str, name: str) -> float | None:
        mine = [row for row in rows if (row["case"], row["peer"]) == (case, peer)]
        found = [float(row[name]) for row in mine if row[name]]
        return statistics.median(found) if found else None

    def cell(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    lines = []
    for peer, title in PEERS.items():
        speeds = [figure(case, peer, "decode_tokens_per_second") for case in PEER_CASES]
        if all(speed is None for speed in speeds):
            continue
        prefill = figure("resident", peer, "prefill_tokens_per_second")
        ppl = figure("perplexity", peer, "perplexity")
        lines.append((title, *(cell(s, 2) for s in speeds), cell(prefill, 0), cell(ppl, 2)))
    titles = (
        "tokens/s, one sequence",
        "all resident",
        "2 GiB",
        "1 GiB",
        "prefill, resident",
        "perplexity",
    )
    at = rows[-1]
    note = (
        f"`python bench/peers.py`: Qwen3-MoE of 1.77 B parameters (3.5 GB in bf16; 16 layers, 64 experts, top 8), random "
        f"weights and even routing, identical for all; {at['threads']} threads of {at['cpu']}, {at['date']}. Limits as above. "
        "Perplexity of the bundled trained model in the same format on the same text. -: not run, or it did not fit."
    )
    return "\n".join([*markdown(titles, lines), "", note])


def sweep_table(rows: list[dict]) -> str:
    """Perplexity over exact of the bundled model, at equal bytes."""

    def over(methods: tuple[str, ...], fraction: float) -> str:
        found = [
            row["perplexity"] / row["perplexity_exact"] - 1
            for row in rows
            if row["method"] in methods and row["fraction"] == fraction
        ]
        return f"{min(found):+.1%}".replace("%", " %") if found else "does not fit"

    return "\n".join(
        markdown(
            ("expert bytes kept", "aggregated", "plain bits", "best merging method"),
            [
                (
                    f"{fraction:.0%}".replace("%", " %"),
                    over(("allocator",), fraction),
                    over(("plain bits",), fraction),
                    over(MERGING, fraction),
                )
                for fraction in FRACTIONS
            ],
        )
    )


def soak_line(figures: dict[str, dict]) -> str:
    exact = figures["exact"]
    _, slope, high = exact["rss_slope_bytes_per_minute"]
    return (
        f"{exact['minutes']:.0f} minutes of random prompts, batches and budgets with `--exact`: {exact['jobs']:,} calls, "
        f"{exact['tokens']:,} tokens, {exact['changes']:,} changes of the budget, {exact['equal']:,} outputs equal bit for bit to those "
        f"of a model loaded anew, {exact['different']} not; no page leaked, RSS {slope / 1e3:+.0f} kB a minute (at most "
        f"{high / 1e3:+.0f} with 95 % confidence). `{exact['command']}`"
    )


def _json(text: str) -> Any:
    return json.loads(text)


def _csv(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(text.splitlines()))


# file of bench/results -> (how it is read, what is written)
TABLES: dict[str, tuple[Callable[[str], Any], Callable[[Any], str]]] = {
    "demo.json": (_json, demo_table),
    "switch_base_128.json": (_json, switch_table),
    "peers.csv": (_csv, peers_table),
    "sweep.json": (_json, sweep_table),
    "soak.json": (_json, soak_line),
}


def with_tables(readme: str, results: Path = RESULTS) -> str:
    """The README with every table made anew; raises ValueError for a section that nobody knows."""

    def made(match: re.Match) -> str:
        begin, name, _, end = match.groups()
        if name not in TABLES:
            raise ValueError(
                f"README.md: figures of {name}: expected one of {', '.join(TABLES)}; "
                "add how it is shown to bench/update_readme.py"
            )
        read, table = TABLES[name]
        path = results / name
        return begin + (table(read(path.read_text())) + "\n" if path.exists() else "") + end

    found = SECTION.sub(made, readme)
    if not SECTION.search(readme):
        raise ValueError("README.md: expected the lines '<!-- figures of bench/results/FILE -->'")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only-table", action="store_true")
    if not parser.parse_args().only_table:
        (RESULTS / "demo.json").write_text(json.dumps(measure(), indent=1) + "\n")
    readme = ROOT / "README.md"
    readme.write_text(with_tables(readme.read_text()))


if __name__ == "__main__":
    main()
