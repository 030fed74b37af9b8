"""Whether the quality dial keeps its word: KL to the exact model at every setting and budget, decoding token by token.

    OMP_NUM_THREADS=1 python bench/bench_dial.py DST [--tokens 240] [--sequences 4] [--label after] [--write]

Held-out modules of the standard library, each sequence from another place and with an empty KV cache; the first tokens
of a sequence are read but not counted. No contender changes between sequences. `expected` is what the plan in force
at the end says, `taken` what the run time says of itself. Milliseconds are of a busy machine unless said otherwise;
where they count: bench_joint.py.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from bench_joint import memory_for
from harness import write_rows
from transformers import DynamicCache

import comoe
from comoe.heldout import held_out_text
from comoe.policy.goal import QUALITIES

COUNT_FROM = 16  # tokens of a sequence
EXTRA = (0.0002, 0.1)


def read(model: torch.nn.Module, ids: list[int]) -> tuple[torch.Tensor, np.ndarray]:
    """(log probabilities float32 [tokens, vocabulary], seconds [tokens])."""
    cache, rows, seconds = DynamicCache(), [], []
    with torch.inference_mode():
        for token in ids:
            begin = time.perf_counter()
            out = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            seconds.append(time.perf_counter() - begin)
            rows.append(out.logits[0, -1].float().log_softmax(-1))
    return torch.stack(rows), np.array(seconds)


def measure(
    dst: str, memory: int, quality: float, texts: list[list[int]], wanted: list[torch.Tensor]
) -> dict[str, object]:
    model = comoe.load(dst, memory=memory, quality=quality)
    runtime = model.comoe
    runtime.wait_ready()
    kl, seconds = [], []
    for ids, want in zip(texts, wanted, strict=True):
        found, took = read(model, ids)
        kl.append((want.exp() * (want - found)).sum(-1)[COUNT_FROM:].numpy())
        seconds.append(took[COUNT_FROM:])
    stats, kl, seconds = runtime.stats(), np.concatenate(kl), np.concatenate(seconds)
    row = {
        "dial": quality,
        "kl": round(float(kl.mean()), 5),
        "kl_error": round(float(kl.std() / np.sqrt(len(kl))), 5),
        "expected": round(float(runtime.plan.loss or 0.0), 5),
        "taken": round(stats.get("loss", {}).get("taken", float("nan")), 5),
        "ms": round(1e3 * float(seconds.mean()), 3),
        "read_per_token": round(stats["bytes_read"]["disk"] / len(kl)),
        "coarser_per_token": round(stats["decided"]["coarser"] / len(kl), 3),
        "waited_per_token": round(stats["decided"]["waited"] / len(kl), 3),
        "held": round(float(np.mean(runtime.plan.held >= runtime.plan.min_level)), 2),
    }
    model.comoe.close()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dst")
    parser.add_argument("--tokens", type=int, default=240, help="of a sequence")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.4, 0.5])
    parser.add_argument("--dials", type=float, nargs="+", default=[*QUALITIES.values(), *EXTRA])
    parser.add_argument("--label", default="after", help="of the rows")
    parser.add_argument("--write", action="store_true", help="to bench/results/dial.csv")
    args = parser.parse_args()
    ids = comoe.load_tokenizer(args.dst).encode(held_out_text())
    apart = (len(ids) - args.tokens) // max(args.sequences, 1)
    texts = [ids[i * apart : i * apart + args.tokens] for i in range(args.sequences)]
    exact = comoe.load(args.dst)
    wanted = [read(exact, text)[0] for text in texts]
    memories = {fraction: memory_for(exact.comoe, fraction) for fraction in args.fractions}
    exact.comoe.close()
    for fraction, memory in memories.items():
        for quality in args.dials:
            row = {"label": args.label, "fraction": fraction}
            row |= measure(args.dst, memory, quality, texts, wanted)
            row["tokens"] = sum(map(len, texts)) - COUNT_FROM * len(texts)
            print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
            if args.write:
                write_rows("dial", [row])


if __name__ == "__main__":
    main()
