"""Calibration-aware rounding and distillation of the bundled model: perplexity over exact, by level.

    python bench/bench_rounding.py [--distil STEPS] [--bytes 60000] [--json rows.json]

Calibrates on modules of the standard library that are not held out, rounds every expert at each anchor,
and scores held-out text with the coarse experts computed in torch (float32). Bytes kept: payloads of the
records that a level needs, over those of bf16. With --distil the 2-bit set is then tuned against the
exact model's predictions on further text of the same kind.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import comoe
from comoe.aggregate import distil
from comoe.aggregate.calibrate import calibrate
from comoe.aggregate.coded_layer import CodedLayer
from comoe.aggregate.experts import ExpertWeights
from comoe.aggregate.rounding import round_routed
from comoe.aggregate.statistics import LayerStatistics
from comoe.demo import model_folder
from comoe.evaluate import encode, plan_windows, score
from comoe.heldout import HELD_OUT_MODULES, held_out_text
from comoe_kernels.ladder_codec import EXACT_LEVEL, LEVEL_BITS, Shape, expert_bytes

WINDOW = 256
LEVELS = ((4, 4), (3, 3), (2, 2), (4, 3), (4, 2), (3, 2))  # (anchor, bits)


def calibration_text(seed: int = 0) -> str:
    """Modules of the standard library in shuffled order, those that are held out excepted."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    paths = [path for path in paths if path.stem not in HELD_OUT_MODULES]
    order = np.random.default_rng(seed).permutation(len(paths))
    return "\n".join(paths[i].read_text(encoding="utf-8", errors="replace") for i in order)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32_768, help="to calibrate on")
    parser.add_argument("--rows", type=int, default=6000, help="per expert, at most")
    parser.add_argument("--bytes", type=int, default=60_000, help="of held-out text")
    parser.add_argument("--distil", type=int, default=0, metavar="STEPS")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="comoe-rounding-") as folder:
        rows = run(Path(folder), args)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


def run(folder: Path, args: argparse.Namespace) -> list[dict]:
    packed = comoe.pack(model_folder(), folder / "packed")
    tokenizer = comoe.load_tokenizer(packed)
    calibration_ids, _ = encode(tokenizer, calibration_text())
    calibration = calibrate(packed, {"stdlib": calibration_ids}, tokens=args.tokens)
    weights = ExpertWeights.open(packed)
    exact = [weights.layer(layer) for layer in range(weights.num_layers)]
    statistics = [
        LayerStatistics(weights, calibration, layer, limit=args.rows)
        for layer in range(weights.num_layers)
    ]
    model = comoe.load(packed, exact=True, dtype=torch.float32)
    ids, _ = encode(tokenizer, held_out_text(args.bytes))
    windows = plan_windows(len(ids))
    truth = score(model, ids, windows).perplexity
    print(f"exact: perplexity {truth:.4f} on {len(ids)} tokens")

    found, rows = {}, []

    def measure(method: str, layers: list[CodedLayer], bits: int) -> None:
        with torch.no_grad(), distil.coarse(model, layers, bits):
            perplexity = score(model, ids, windows).perplexity
        spec = weights.specs[0]
        shape = Shape(spec.hidden, spec.intermediate)
        kept = expert_bytes(shape, LEVEL_BITS.index(bits)) / expert_bytes(shape, EXACT_LEVEL)
        rows.append(
            {
                "method": method,
                "fraction": kept,
                "perplexity": perplexity,
                "perplexity_exact": truth,
            }
        )
        print(
            f"{method}: {kept:.2%} of bytes, perplexity {perplexity / truth - 1:+.2%}", flush=True
        )

    for anchor in (4, 3, 2):
        started = time.monotonic()
        found[anchor] = [
            CodedLayer(
                weights.specs[layer],
                [
                    round_routed(
                        expert,
                        weights.specs[layer],
                        statistics[layer].inputs(e, held_out=False),
                        statistics[layer].routed(e, held_out=False).gate,
                        anchor=anchor,
                    )
                    for e, expert in enumerate(exact[layer])
                ],
                exact[layer],
                anchor=anchor,
                bits=range(2, anchor + 1),
            )
            for layer in range(weights.num_layers)
        ]
        print(f"rounded at {anchor} bits in {time.monotonic() - started:.0f} s")
        for at, bits in LEVELS:
            if at == anchor:
                measure(f"{bits} bits of {anchor}", found[anchor], bits)
    if args.distil:
        per_step = distil.BATCH_TOKENS // WINDOW
        count = min(args.distil * per_step, len(calibration_ids) // WINDOW - 16)
        cut = torch.tensor(calibration_ids[: (count + 16) * WINDOW]).view(-1, WINDOW)
        cut = cut[torch.randperm(len(cut), generator=torch.Generator().manual_seed(0))]
        report = distil.distil_logits(
            model, found[2], cut[16:], cut[:16], steps=args.distil, rate=0.7,
            progress=lambda step, steps, loss: print(f"\r{step}/{steps} {loss:.4f}", end="", flush=True),
        )  # fmt: skip
        print(f"\n{report}")
        measure(f"2 bits of 2, {args.distil} steps", found[2], 2)
    model.comoe.close()
    return rows


if __name__ == "__main__":
    main()
