"""Ladders whose rungs nest against sets of codes that do not: quality, and bytes that a change re-reads.

    OMP_NUM_THREADS=1 python bench/bench_nested.py [--tokens 49152] [--write]

Not nested: 2c, 3c, 4c, each an expert's own codes. Nested candidates, all made with the same moments:

    2n 3n 4n   one set of 4 bits and its truncations, with tables of their own
    2m 3m      the same of one set of 3 bits
    2c+r       2c, and what it lost in 2 more bits: nests upward from 2c, without a rung of 3 bits

For each menu, with the mean, 8 bits and exact, the allocator chooses within the same bytes; the choice is
measured in the whole model on held-out modules. Conditions are those of bench/results/sweep.json, except that
nothing is written to a store and nothing is merged.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from bench_aggregate import library_text
from harness import RESULTS, conditions

import comoe
from comoe.aggregate import decompose
from comoe.aggregate.allocate import Losses, losses_of, measure_errors, measure_sensitivity
from comoe.aggregate.build import Workshop
from comoe.aggregate.calibrate import calibrate
from comoe.aggregate.candidates import (
    PLANES,
    LayerMenu,
    Mean,
    Packed,
    Rounded,
    Rung,
    coded_set,
    expert_at,
    layer_menu,
    mask_of,
    place,
    rounded_matrices,
    set_of,
)
from comoe.aggregate.experts import Expert
from comoe.aggregate.judge import Judge, Verdict
from comoe.aggregate.statistics import LayerStatistics, super_experts
from comoe.demo import CONTEXT, WINDOW, model_folder
from comoe.evaluate import encode, plan_windows
from comoe.heldout import held_out_text
from comoe.store import format as fmt

FRACTIONS = (0.3, 0.2, 0.14)
CHANGES = ((0.3, 0.2), (0.2, 0.3), (0.3, 0.14), (0.14, 0.3))
REST = ("mean", "8", "exact")  # in every menu
MENUS = {
    "own sets (2c 3c 4c)": ("2c", "3c", "4c"),
    "packer's planes (2 3 4)": ("2", "3", "4"),
    "truncated from 4 (2n 3n 4n)": ("2n", "3n", "4n"),
    "truncated from 3, own 4c (2m 3m)": ("2m", "3m", "4c"),
    "own 2c, truncated above (2c 3n 4n)": ("2c", "3n", "4n"),
    "own 2c and rest of it (2c 2c+r)": ("2c", "2c+r"),
}


@dataclass(frozen=True)
class Anchored:
    """One set of `bits`, and all coarser rungs by truncation, as `<bits><mark>`."""

    bits: int
    mark: str

    @property
    def places(self) -> int:
        return len(PLANES[self.bits])

    def add(self, menu: LayerMenu, statistics: LayerStatistics, first: int) -> None:
        rungs = range(2, self.bits + 1)
        found: dict[int, list[Expert]] = {bits: [] for bits in rungs}
        sizes = []
        for expert in range(statistics.spec.num_experts):
            exact = statistics.weights.expert(statistics.layer_idx, expert)
            coded = rounded_matrices(exact, statistics.second_moments(expert), self.bits)
            held = set_of(exact, coded, self.bits)
            place(menu, expert, first, held, self.bits)
            sizes.append(np.cumsum([len(p) for p in held.payloads]))
            for bits in rungs:
                found[bits].append(expert_at(exact, coded, bits))
        for number, bits in enumerate(rungs):
            own = np.array([size[number] for size in sizes], np.int64)
            mask = mask_of(first, number + 1)
            menu.rungs.append(Rung(f"{bits}{self.mark}", mask, own, found[bits].__getitem__))


class Rest:
    """On the set `2c`: 2 more bits for what it lost."""

    places = 1

    def add(self, menu: LayerMenu, statistics: LayerStatistics, first: int) -> None:
        below = menu.rung("2c")
        held, own = [], []
        for expert in range(statistics.spec.num_experts):
            exact = statistics.weights.expert(statistics.layer_idx, expert)
            lost = decompose.residual(exact, below.stand_in(expert))
            found = coded_set(lost, statistics.second_moments(expert), 2)
            place(menu, expert, first, found, 2)
            held.append(decompose.added(below.stand_in(expert), found.expert))
            own.append(below.own[expert] + found.nbytes)
        mask = below.mask | mask_of(first, 1)
        menu.rungs.append(Rung("2c+r", mask, np.array(own), held.__getitem__, kind="residual"))


OWN = (Packed(), Mean(), Rounded(2), Rounded(3), Rounded(4))
SOURCES = (*OWN, Anchored(4, "n"), Anchored(3, "m"), Rest())


def needed(menus: list[LayerMenu], losses: Losses, shop: Workshop, choice: np.ndarray) -> dict:
    """Sizes of the records that a choice needs, shared ones once."""
    found = {}
    for menu in menus:
        packed = shop.weights.store.layers[menu.layer].records["nbytes"].astype(int)
        for expert, level in enumerate(choice[losses.layer == menu.layer].tolist()):
            mask = menu.rung(losses.levels[level]).mask
            for r in range(fmt.NUM_RECORDS):
                if mask >> r & 1:
                    found[menu.layer, expert, r] = int(packed[expert, r])
            for i, record in enumerate(menu.records[expert], fmt.NUM_RECORDS):
                if mask >> i & 1 and record is not None:
                    who = ("shared", record.shared_id) if record.shared_id >= 0 else expert
                    found[menu.layer, who, i] = len(record.payload)
    return found


def judged(judge: Judge, menus: list[LayerMenu], losses: Losses, choice: np.ndarray) -> Verdict:
    layers = {}
    for menu in menus:
        mine = choice[losses.layer == menu.layer].tolist()
        experts = [menu.rung(losses.levels[x]).stand_in(e) for e, x in enumerate(mine)]
        layers[menu.layer] = experts.__getitem__
    return judge.measure(layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=49_152, help="of calibration")
    parser.add_argument("--max-tokens", type=int, help="of held-out text; all if not given")
    parser.add_argument("--write", action="store_true", help="bench/results/nested.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        packed = comoe.pack(model_folder(), Path(scratch) / "packed")
        calibrate(packed, {"library": library_text()}, tokens=args.tokens, memory="200MB")
        rows: list[dict] = []
        with Workshop(packed, memory="200MB") as shop:
            for row in measure(shop, packed, args.max_tokens):
                rows.append(row)
                if args.write:  # at once: it takes a quarter of an hour
                    known = {"conditions": conditions(), "calibration_tokens": args.tokens}
                    text = json.dumps({**known, "rows": rows}, indent=1) + "\n"
                    (RESULTS / "nested.json").write_text(text)


def measure(shop: Workshop, packed: Path, max_tokens: int | None) -> Iterator[dict]:
    """A row of each menu."""
    menus, errors, sensitivities = [], [], []
    with shop.judge() as judge:
        for statistics in shop.statistics:
            menus.append(layer_menu(statistics, SOURCES))
            errors.append(measure_errors(statistics, menus[-1]))
            sensitivities.append(measure_sensitivity(judge, menus[-1], *errors[-1]))
    supers = super_experts([s.peaks for s in shop.statistics])
    losses = losses_of(menus, shop.statistics, errors, sensitivities, supers, shop.full_bytes)
    energy = losses.energy.sum()
    for number, name in enumerate(losses.levels):
        print(
            f"{name:10s} error {np.nansum(losses.error[:, number]) / energy:.5f}  "
            f"loss of all {np.nansum(losses.loss[:, number]):.5f}"
        )
    ids, _ = encode(comoe.load_tokenizer(packed), held_out_text(), max_tokens)
    windows = plan_windows(len(ids), WINDOW, CONTEXT)
    with Judge(shop.model, shop.weights, ids, windows) as judge:
        for name, levels in MENUS.items():
            choices = {f: losses.solve(f, levels=(*levels, *REST)).choice for f in FRACTIONS}
            needs = {f: needed(menus, losses, shop, c) for f, c in choices.items()}
            read = {
                f"{a:g}->{b:g}": sum(n for k, n in needs[b].items() if k not in needs[a])
                for a, b in CHANGES
            }
            row = {"menu": name, "tokens": len(ids), "bytes_read": read}
            for fraction, choice in choices.items():
                verdict = judged(judge, menus, losses, choice)
                over = verdict.perplexity / verdict.perplexity_exact - 1
                row[f"{fraction:g}"] = {"over_exact": round(over, 4), "kl": round(verdict.kl, 4)}
                print(f"{name} {fraction:.0%}: {over:+.2%} / {verdict.kl:.4f}", flush=True)
            print(f"{name} bytes read: {read}", flush=True)
            yield row


if __name__ == "__main__":
    main()
