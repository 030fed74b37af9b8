"""Every method of merging and decomposition alone, on the bundled model: bytes kept, gated output error on
held-out calibration tokens, and perplexity of text that nothing was fitted to, over the exact model's.

    OMP_NUM_THREADS=1 python bench/bench_aggregate.py --text code=FILE [--text plays=FILE] [--write]

Experts are put into the plain model as dense matrices, so routing is the original's and members of a group
share one expert (aliases); `exported` rows have a router of their own and are plain checkpoints.
Without --text: modules of the standard library, those of comoe/heldout.py excepted.
Bytes: codes, group parameters, factors and the bases they need, over those of bf16 experts.
"""

from __future__ import annotations

import argparse
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from harness import write_rows
from transformers import AutoModelForCausalLM

import comoe
from comoe.aggregate import decompose, merging
from comoe.aggregate.calibrate import calibrate
from comoe.aggregate.experts import Expert, ExpertWeights
from comoe.aggregate.export import export
from comoe.aggregate.statistics import LayerStatistics
from comoe.demo import CONTEXT, WINDOW, model_folder
from comoe.evaluate import encode, plan_windows, score
from comoe.heldout import HELD_OUT_MODULES, held_out_text
from comoe.hf.blocks import discover
from comoe.hf.layouts import Expert as ModuleExpert

Layers = list[list[Expert]]  # per layer, per expert of the original
COUNTS, RANKS = (12, 8, 4), (16, 32, 48)  # experts left of 16; of 64 neurons


def library_text() -> str:
    folder = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(p for p in folder.glob("*.py") if p.stem not in HELD_OUT_MODULES)
    return "\n".join(p.read_text(encoding="utf-8", errors="replace") for p in paths)


class PlainModel:
    """The bundled model with transformers' own experts, whose weights are exchanged and put back."""

    def __init__(self, text_bytes: int) -> None:
        self.folder = model_folder()
        self.model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.bfloat16).eval()
        self.blocks = discover(self.model)
        self.ids, _ = encode(comoe.load_tokenizer(self.folder), held_out_text(text_bytes))
        self.windows = plan_windows(len(self.ids), WINDOW, CONTEXT)
        self.exact = self.perplexity(self.model)

    def perplexity(self, model) -> float:
        return score(model, self.ids, self.windows).perplexity

    @torch.no_grad()
    def ratio(self, layers: Layers) -> float:
        saved = [p.clone() for b in self.blocks for p in self._parameters(b)]
        for block, experts in zip(self.blocks, layers, strict=True):
            tensors = block.assemble([ModuleExpert(e.matrices, e.biases) for e in experts])
            for name, tensor in tensors.items():
                block.module.get_parameter(name).copy_(tensor)
        found = self.perplexity(self.model)
        for parameter, before in zip(
            (p for b in self.blocks for p in self._parameters(b)), saved, strict=True
        ):
            parameter.copy_(before)
        return found / self.exact

    @staticmethod
    def _parameters(block) -> list[torch.nn.Parameter]:
        return [block.module.get_parameter(name) for name in block.parameter_names]


def coded(hidden: int, inter: int, bits: int) -> int:
    """Bytes of one gated expert."""
    up, down = (
        decompose.coded_bytes(inter, hidden, bits),
        decompose.coded_bytes(hidden, inter, bits),
    )
    return 2 * up + down


def whole(merge: merging.Merge) -> list[Expert]:
    return [merge.experts[g] for g in merge.groups]


def merges(statistics: list[LayerStatistics]) -> Iterator[tuple[str, float, list[merging.Merge]]]:
    """(method, share of bytes, merge of each layer)."""
    num = statistics[0].spec.num_experts
    outputs = [s.outputs() for s in statistics]
    by_output = [merging.hc_tree(merging.output_distance(o)) for o in outputs]
    use = [s.use for s in statistics]

    def hc(count: int, **how) -> list[merging.Merge]:
        return [
            merging.merge(s, merging.cut(tree, count), s.use, **how)
            for s, tree in zip(statistics, by_output, strict=True)
        ]

    for n in COUNTS:
        centres = merging.global_centres(use, n * len(statistics))
        m_smoe = [merging.m_smoe(s, c) for s, c in zip(statistics, centres, strict=True)]
        yield "m-smoe", n / num, m_smoe
        yield "hc-smoe, not aligned", n / num, hc(n, align=False)
        yield "hc-smoe", n / num, hc(n)
        yield "hc-smoe + least squares", n / num, hc(n, least_squares=True)
        yield "ream", n / num, [merging.ream(s, n) for s in statistics]
        plain = [merging.gated(s, n, least_squares=False) for s in statistics]
        yield "gated, average", n / num, plain
        yield "gated + least squares", n / num, [merging.gated(s, n) for s in statistics]


def decompositions(
    statistics: list[LayerStatistics], exact: Layers
) -> Iterator[tuple[str, float, Layers]]:
    """(method, share of bytes, experts)."""
    num, hidden = statistics[0].spec.num_experts, statistics[0].spec.hidden
    inter = statistics[0].spec.intermediate
    full = num * 3 * hidden * inter * 2
    for level, bits in enumerate(decompose.LEVEL_BITS):
        layers = [[decompose.coded(e, level) for e in layer] for layer in exact]
        yield f"plain {bits} bit", num * coded(hidden, inter, bits) / full, layers
        if bits == 2:
            lost = residuals(statistics, exact, layers, 16)
            nbytes = coded(hidden, inter, 2) + decompose.low_rank_bytes(hidden, inter, 3, 16)
            yield "2 bit + rank 16 of what it lost", num * nbytes / full, lost
    for rank in RANKS:
        zero = [[Expert(tuple(0 * m for m in e.matrices), e.biases) for e in x] for x in exact]
        nbytes = num * decompose.low_rank_bytes(hidden, inter, 3, rank)
        yield f"rank {rank}, no base", nbytes / full, residuals(statistics, exact, zero, rank)
    for n in (8, 4, 1):
        bases = [cluster_bases(s, n) for s in statistics]
        members = [[b.members[e] for e, b in enumerate(layer)] for layer in bases]
        base = [[b.expert for b in layer] for layer in bases]
        shared = n * coded(hidden, inter, 8)
        for level in (0, 1):
            bits = decompose.LEVEL_BITS[level]
            layers = [
                [
                    decompose.added(b, decompose.coded(decompose.residual(m, b), level))
                    for m, b in zip(ms, bs, strict=True)
                ]
                for ms, bs in zip(members, base, strict=True)
            ]
            nbytes = shared + num * coded(hidden, inter, bits)
            yield f"{n} bases + residual in {bits} bit", nbytes / full, layers
        for rank in (16, 32):
            nbytes = shared + num * decompose.low_rank_bytes(hidden, inter, 3, rank)
            layers = residuals(statistics, members, base, rank)
            yield f"{n} bases + rank {rank}", nbytes / full, layers
        layers = [
            [
                decompose.added(b, decompose.pruned(decompose.residual(m, b)))
                for m, b in zip(ms, bs, strict=True)
            ]
            for ms, bs in zip(members, base, strict=True)
        ]
        nbytes = shared + num * decompose.pruned_bytes(3 * hidden * inter)
        yield f"{n} bases + tenth of the delta (e-wemoe)", nbytes / full, layers


def cluster_bases(statistics: LayerStatistics, count: int) -> list[decompose.Base]:
    """The base of each expert; bases are held at 8 bits."""
    distance = merging.squared_distance(statistics.outputs(), statistics.sample_gates())
    groups = merging.cut(merging.gated_tree(statistics.gate_moments, distance), count)
    shares = np.diag(statistics.gate_moments)
    bases = []
    for group in merging.members(groups):
        base = decompose.base_of(statistics, group, shares[group])
        bases.append(decompose.Base(decompose.coded(base.expert, 3), base.members))
    return [bases[g] for g in groups]


def residuals(
    statistics: list[LayerStatistics], members: Layers, base: Layers, rank: int
) -> Layers:
    """base + low-rank part of what is missing."""
    return [
        [
            decompose.added(
                b,
                decompose.low_rank(decompose.residual(m, b), s.second_moments(e, m), rank).delta(
                    rank
                ),
            )
            for e, (m, b) in enumerate(zip(ms, bs, strict=True))
        ]
        for s, ms, bs in zip(statistics, members, base, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", action="append", metavar="NAME=FILE", help="calibration text")
    parser.add_argument("--tokens", type=int, default=32_768, help="of calibration")
    parser.add_argument("--text-bytes", type=int, default=24_000, help="of held-out text")
    parser.add_argument(
        "--write", action="store_true", help="append to bench/results/aggregate.csv"
    )
    args = parser.parse_args()
    texts = {name: Path(path) for name, _, path in (t.partition("=") for t in args.text or [])}
    texts = texts or {"library": library_text()}

    plain, rows = PlainModel(args.text_bytes), []
    with tempfile.TemporaryDirectory() as scratch:
        packed = comoe.pack(plain.folder, Path(scratch) / "packed")
        begin = time.perf_counter()
        calibration = calibrate(packed, texts, tokens=args.tokens, memory="100MB")
        print(
            f"calibration of {calibration.num_tokens} tokens: {time.perf_counter() - begin:.1f} s"
        )
        weights = ExpertWeights.open(packed)
        statistics = [LayerStatistics(weights, calibration, i) for i in range(weights.num_layers)]
        exact = [weights.layer(i) for i in range(weights.num_layers)]
        energy = sum(s.gated_energy(e) for s in statistics for e in range(s.spec.num_experts))
        print(f"exact: perplexity {plain.exact:.3f}, {len(plain.ids)} tokens of held-out text")

        def report(method: str, share: float, layers: Layers | None, ratio: float) -> None:
            error = None
            if layers is not None:
                pairs = zip(statistics, layers, strict=True)
                error = (
                    sum(s.gated_error(e, x[e]) for s, x in pairs for e in range(len(x))) / energy
                )
            shown = "n/a" if error is None else f"{error:.4f}"
            print(f"{method:42s} bytes {share:6.1%}  error {shown}  perplexity x{ratio:.4f}")
            row = {"calibration": "+".join(texts), "method": method, "bytes": round(share, 4)}
            rows.append(row | {"error": shown, "perplexity_ratio": round(ratio, 4)})

        for method, share, layers in decompositions(statistics, exact):
            report(method, share, layers, plain.ratio(layers))
        records = [s.record for s in statistics]
        for number, (method, share, found) in enumerate(merges(statistics)):
            layers = [whole(merge) for merge in found]
            report(method, share, layers, plain.ratio(layers))
            if method in ("hc-smoe", "gated + least squares"):
                out = export(packed, found, records, Path(scratch) / f"plain{number}")
                model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16).eval()
                ratio = plain.perplexity(model) / plain.exact
                report(f"{method}, exported", share, None, ratio)
    if args.write:
        print(write_rows("aggregate", rows))


if __name__ == "__main__":
    main()
