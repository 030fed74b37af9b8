"""A decoder-only shape, all resident: ours at the 4-bit rung against transformers' eager experts in bf16, in one run, in turns.

    python bench/decoder_shape.py [--folder DIR] [--write]

12 layers, H=1024, I=512, 64 experts, top-8, vocabulary 50,257, random weights (2.6 GB, made and packed in DIR if not there).
The tokens are given. Goal: MoE blocks at least 6x, whole token at least 2.2x faster. `dense bits8` and `compiled` are comoe's
options of these names (docs/dense.md); a compiled step has no hooks, so its MoE blocks cannot be timed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from harness import RESULTS, conditions
from switch_worker import Forced, MoEClock, tokens
from transformers import AutoModelForCausalLM, LogitsProcessorList

import comoe
from comoe.baseline import warm_up
from comoe.synthetic import config_of, make_model

SHAPE = {"hidden": 1024, "intermediate": 512, "experts": 64, "top_k": 8, "heads": 8, "kv_heads": 4, "vocab": 50_257, "tied": True}  # fmt: skip
VARIANTS = {
    "comoe 4 bits": {},
    "comoe 4 bits, dense bits8": {"dense": "bits8"},
    "comoe 4 bits, dense bits8, compiled": {"dense": "bits8", "compile": True},
}


class Variant:
    """A model that generates given tokens; its times."""

    def __init__(self, model, static: bool):
        self.model, self.static = model, static
        # Hooks would be compiled with the rest, and a clock cannot be.
        self.clock = MoEClock(torch.nn.Identity() if static else model, decoding=True)
        self.seconds: list[float] = []
        self.moe: list[float] = []

    @torch.inference_mode()
    def turn(self, seed: int, count: int, timed: bool) -> None:
        vocab = self.model.config.vocab_size
        forced = Forced(tokens(vocab, count, seed + 500), 0)
        prompt = tokens(vocab, 16, seed)
        self.clock.seconds = 0.0
        options = {"cache_implementation": "static"} if self.static else {}
        self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([forced]),
            **options,
        )
        if timed:
            self.seconds += np.diff(forced.times).tolist()
            self.moe.append(self.clock.seconds / (count - 1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--folder", type=Path, help="for the model; default: a temporary one")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--experts", type=int, help="a smaller model")
    parser.add_argument("--tokens", type=int, default=32, help="per turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--write", action="store_true", help="to bench/results/decoder_shape.json")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    warm_up()
    with tempfile.TemporaryDirectory() as scratch:
        source, packed = prepare(args.folder or Path(scratch), args)
        plain = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.bfloat16, experts_implementation="eager"
        )
        variants = {"transformers eager bf16": Variant(plain.eval(), False)}
        for name in args.variants:
            model = comoe.load(packed, memory=four_bits(packed), **VARIANTS[name])
            model.comoe.wait_ready()
            variants[name] = Variant(model, bool(VARIANTS[name].get("compile")))
        for turn in range(args.turns + 2):
            for variant in variants.values():
                variant.turn(turn, args.tokens, timed=turn >= 2)
        rows = report(variants, args)
        for variant in variants.values():
            if hasattr(variant.model, "comoe"):
                variant.model.comoe.close()
    if args.write:
        path = RESULTS / "decoder_shape.json"
        path.write_text(json.dumps({"rows": rows, "conditions": conditions()}, indent=1) + "\n")
    if args.json:
        print(json.dumps(rows, indent=1))
    return 0


def prepare(folder: Path, args: argparse.Namespace) -> tuple[Path, Path]:
    name = f"decoder-l{args.layers}" + (f"-e{args.experts}" if args.experts else "")
    source, packed = folder / name, folder / f"{name}-packed"
    if not source.exists():
        shape = SHAPE | ({"experts": args.experts} if args.experts else {})
        print("making the model ...", file=sys.stderr)
        make_model(source, config_of("qwen3-30b-a3b", layers=args.layers, **shape))
    if not packed.exists():
        print("packing ...", file=sys.stderr)
        comoe.pack(source, packed)
    return source, packed


def four_bits(packed: Path) -> int:
    """Bytes of `memory` with which every expert fits at 4 bits, and not at 8."""
    from comoe.store import inspect

    found = inspect(packed)
    at = next(rung for rung in found["rungs"] if rung["name"] == "4")
    return int(found["dense_bytes"] + 1.1 * at["bytes"] + 120_000_000)


def report(variants: dict[str, Variant], args: argparse.Namespace) -> list[dict]:
    rows = []
    first = next(iter(variants.values()))
    for name, variant in variants.items():
        row = {
            "variant": name,
            "layers": args.layers,
            "ms_per_token": 1e3 * float(np.median(variant.seconds)),
            "p20": 1e3 * float(np.quantile(variant.seconds, 0.2)),
            "p80": 1e3 * float(np.quantile(variant.seconds, 0.8)),
            "moe_ms": 1e3 * float(np.median(variant.moe)) if not variant.static else None,
        }
        row["times_faster"] = 1e3 * float(np.median(first.seconds)) / row["ms_per_token"]
        if row["moe_ms"]:
            row["moe_times_faster"] = 1e3 * float(np.median(first.moe)) / row["moe_ms"]
        if hasattr(variant.model, "comoe"):
            stats = variant.model.comoe.stats()
            row |= {"bits_used": stats["bits_per_weight"], "plan": stats["plan"]}
        rows.append(row)
        blocks = f"MoE blocks {row['moe_ms']:.1f} ms ({row['moe_times_faster']:.1f}x)" if row["moe_ms"] else "MoE blocks n/a"  # fmt: skip
        print(f"{name}: {row['ms_per_token']:.1f} ms a token ({row['times_faster']:.2f}x), {blocks}", file=sys.stderr)  # fmt: skip
    return rows


if __name__ == "__main__":
    sys.exit(main())
