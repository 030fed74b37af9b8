"""Cache-aware routing: what a tolerance of the router's logits saves, and what it costs.

The bundled model (or DST), one token at a time over held-out text, contenders taking turns; KL against the exact model
on the same text.

    python bench/bench_routing.py DST [--tokens 200] [--fractions 0.1 0.2 0.3] [--write]
"""

from __future__ import annotations

import argparse

from bench_joint import WARM_UP, Contender, memory_for, take_turns
from harness import write_rows

import comoe
from comoe.heldout import held_out_text

TOLERANCES = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0)


def compare(dst: str, fraction: float, ids: list[int], quality: str | None) -> list[dict]:
    reference, made = Contender("exact", comoe.load(dst)), []
    memory = memory_for(reference.model.comoe, fraction)
    for tolerance in TOLERANCES:
        model = comoe.load(dst, memory=memory, quality=quality, routing_tolerance=tolerance)
        made.append(Contender(f"{tolerance:g}", model))
        # Each runtime would count the others' memory as taken from its own budget.
        model.comoe.budget.baseline = 1 << 50
        model.comoe.wait_ready()
    take_turns(reference, made, ids)
    rows = []
    for contender in made:
        stats = contender.model.comoe.stats()
        row = contender.row()
        rows.append(
            {
                "fraction": fraction,
                "quality": quality or "default",
                "tolerance": contender.name,
                "ms": round(row["ms_mean"], 3),
                "kl": round(row["kl"], 5),
                "read_per_token": round(row["bytes_read"] / len(ids)),
                "replaced_per_token": round(stats["decided"]["replaced"] / len(ids), 3),
            }
        )
        contender.model.comoe.close()
    reference.model.comoe.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("dst")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.1, 0.2, 0.3])
    parser.add_argument("--quality", help="as of comoe.load")
    parser.add_argument("--write", action="store_true", help="rows to bench/results/routing.csv")
    args = parser.parse_args()
    ids = comoe.load_tokenizer(args.dst).encode(held_out_text())[: args.tokens + WARM_UP + 1]
    rows = []
    for fraction in args.fractions:
        for row in compare(args.dst, fraction, ids, args.quality):
            rows.append(row)
            print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    if args.write:
        print(write_rows("routing", rows))


if __name__ == "__main__":
    main()
