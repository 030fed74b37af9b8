"""What may stand for an expert: the rungs of one layer, each with its bytes, its records and its matrices.

A *source* makes one family of rungs for a layer. Its records take the same places in every layer, so that
one list of levels (name, record mask) serves the whole store:

    Packed        2, 3, 4, 8: the planes that packing wrote                       no new records
    Rounded(b)    2c, 3c, 4c: codes chosen with second moments of the inputs      planes of b bits
    Truncated()   3n, 4n: such a set of 4 bits, and its upper 3                   planes of 4 bits
    Tuned(b)      the same sets after distillation (comoe/aggregate/tuning.py)    planes of b bits
    Merged(n, b)  E/n groups, each one expert for all its members, in b bits      planes, shared
    Based         a layer's base and a residual, or a low-rank delta (based.py)   shared planes, both deltas
    Mean          a vector: the expert's mean output                              one record

A coded set is made for the error of the output (comoe/aggregate/rounding.py), of exact experts and of
merged ones alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from comoe.aggregate import merging
from comoe.aggregate.coded import CodedMatrix, to_payloads
from comoe.aggregate.experts import Expert, ExpertWeights
from comoe.aggregate.judge import Approximation
from comoe.aggregate.rounding import round_matrices, shape_of
from comoe.aggregate.statistics import LayerStatistics
from comoe.store import AddedRecord
from comoe.store import format as fmt
from comoe_kernels.ladder_codec import LEVEL_BITS, encode_mean
from comoe_kernels.unpack import paged_expert, unpack, unpack_bias

FIRST_ADDED = fmt.NUM_RECORDS
PLANES = {2: (2,), 3: (2, 1), 4: (2, 1, 1), 8: (2, 1, 1, 4)}  # bits of the records of a set


@dataclass
class Rung:
    """One level of one layer.

    own: int64 [E] bytes of the expert's own records, -1 where it has no such level.  shared: int64 [E],
    which entry of `shared_bytes` it needs beside them, or -1; rungs on the same records have the same array
    object as `shared_bytes`.  kind: rungs of one kind err alike, so one may tell the sensitivity of another.  probe: whether this rung's damage is measured in the whole model.
    """

    name: str
    mask: int
    own: np.ndarray
    stand_in: Callable[[int], Approximation]
    shared: np.ndarray | None = None
    shared_bytes: np.ndarray | None = None
    kind: str = "coded"
    probe: bool = True


@dataclass
class LayerMenu:
    """All rungs of one layer, and the records to write: records[e][place - FIRST_ADDED]."""

    layer: int
    rungs: list[Rung] = field(default_factory=list)
    records: list[list[AddedRecord | None]] = field(default_factory=list)

    def rung(self, name: str) -> Rung:
        return next(rung for rung in self.rungs if rung.name == name)


class Source(Protocol):
    """places: how many records it adds to an expert."""

    places: int

    def add(self, menu: LayerMenu, statistics: LayerStatistics, first: int) -> None:
        """Appends rungs; its records go to places first, first + 1, ..."""
        ...


def layer_menu(statistics: LayerStatistics, sources: Sequence[Source]) -> LayerMenu:
    """Everything that may stand for the experts of one layer; the exact expert comes last."""
    num_experts = statistics.spec.num_experts
    places = sum(source.places for source in sources)
    menu = LayerMenu(statistics.layer_idx, [], [[None] * places for _ in range(num_experts)])
    first = FIRST_ADDED
    for source in sources:
        source.add(menu, statistics, first)
        first += source.places
    sizes = statistics.weights.store.layers[statistics.layer_idx].records["nbytes"]
    exact = sizes[:, fmt.NUM_RECORDS - 1].astype(np.int64)
    menu.rungs.append(Rung("exact", 1 << (fmt.NUM_RECORDS - 1), exact, lambda expert: None))
    return menu


def packed_expert(weights: ExpertWeights, layer: int, expert: int, level: int) -> Expert:
    """An expert at level 0..3 of the ladder that packing wrote, float32."""
    info = weights.store.layers[layer]
    payloads = {
        r: np.frombuffer(weights.store.payload(layer, expert, r), np.uint8)
        for r in range(level + 1)
    }
    paged = paged_expert(
        info.hidden,
        info.intermediate,
        gated=info.gated,
        biased=info.biased,
        exact_dtype=weights.dtype(layer),
        level=level,
        payloads=payloads,
    )
    count = range(3 if info.gated else 2)
    return Expert(
        tuple(unpack(paged, m, torch.float32) for m in count),
        tuple(unpack_bias(paged, m) for m in count) if info.biased else (),
    )


class Packed:
    """The rungs that are in every store."""

    places = 0

    def add(self, menu: LayerMenu, statistics: LayerStatistics, first: int) -> None:
        weights, layer = statistics.weights, statistics.layer_idx
        sizes = weights.store.layers[layer].records["nbytes"].astype(np.int64)
        for level, bits in enumerate(LEVEL_BITS):
            own = sizes[:, : level + 1].sum(1)
            menu.rungs.append(
                Rung(
                    str(bits),
                    (1 << (level + 1)) - 1,
                    own,
                    lambda e, level=level: packed_expert(weights, layer, e, level),
                    probe=False,
                )
            )


@dataclass(frozen=True)
class CodedSet:
    """An expert in codes of some bits, and its records."""

    expert: Expert
    payloads: list[np.ndarray]

    @property
    def nbytes(self) -> int:
        return sum(len(p) for p in self.payloads)


def coded_set(
    expert: Expert, moments: tuple[torch.Tensor, torch.Tensor] | None, bits: int
) -> CodedSet:
    """Codes that move the output least, for the given second moments (of inputs, of intermediates)."""
    return set_of(expert, rounded_matrices(expert, moments, bits), bits)


def rounded_matrices(
    expert: Expert, moments: tuple[torch.Tensor, torch.Tensor] | None, bits: int
) -> list[CodedMatrix]:
    count = len(expert.matrices)
    each = [None] * count if moments is None else [moments[0]] * (count - 1) + [moments[1]]
    return round_matrices(expert.matrices, each, anchor=bits)


def set_of(expert: Expert, coded: Sequence[CodedMatrix], bits: int) -> CodedSet:
    """Coded matrices of an expert as records; its biases stay as they are."""
    shape = shape_of(expert.matrices, biased=bool(expert.biases))
    payloads = to_payloads(shape, coded, [b.float().numpy() for b in expert.biases], bits=bits)
    return CodedSet(expert_at(expert, coded, bits), payloads)


def expert_at(expert: Expert, coded: Sequence[CodedMatrix], bits: int) -> Expert:
    """What coded matrices of an expert stand for at their upper `bits`."""
    matrices = tuple(torch.from_numpy(np.ascontiguousarray(m.decode(bits))) for m in coded)
    return Expert(matrices, expert.biases)


def place(
    menu: LayerMenu, expert: int, at: int, found: CodedSet, bits: int, group: int = -1
) -> None:
    """Writes a set's records to places `at`, `at` + 1, ... of an expert; those of a group are shared."""
    for i, (payload, add) in enumerate(zip(found.payloads, PLANES[bits], strict=True)):
        # One number for each place and group: every record of a shared set is one record.
        shared_id = -1 if group < 0 else (at + i) * len(menu.records) + group
        menu.records[expert][at + i - FIRST_ADDED] = AddedRecord(
            fmt.PLANE if group < 0 else fmt.SHARED_BASE,
            add,
            parent=at + i - 1 if i else -1,
            shared_id=shared_id,
            payload=payload,
        )


def mask_of(first: int, count: int) -> int:
    return ((1 << count) - 1) << first


@dataclass(frozen=True)
class Rounded:
    """Every expert in its own codes of `bits`, rounded with calibration."""

    bits: int

    @property
    def places(self) -> int:
        return len(PLANES[self.bits])

    @property
    def name(self) -> str:
        return f"{self.bits}c"

    def add(self, menu: LayerMenu, statistics: LayerStatistics, first: int) -> None:
        found = self.sets(statistics)
        for expert, own_set in enumerate(found):
            place(menu, expert, first, own_set, self.bits)
        own = np.array([f.nbytes for f in found], np.int64)
        mask = mask_of(first, self.places)
        menu.rungs.append(Rung(self.name, mask, own, lambda e: found[e].expert))

    def sets(self, statistics: LayerStatistics) -> list[CodedSet]:
        """One set per expert."""
        found = []
        for expert in range(statistics.spec.num_experts):
            exact = statistics.weights.expert(statistics.layer_idx, expert)
            found.append(coded_set(exact, statistics.second_moments(expert), self.bits))
        return found


@dataclass(frozen=True)
class Tuned(Rounded):
    """Sets that were made before: known[layer][expert]."""

    known: Sequence[Sequence[CodedSet]] = ()

    def sets(self, statistics: LayerStatistics) -> list[CodedSet]:
        return list(self.known[statistics.layer_idx])


@dataclass(frozen=True)
class Truncated:
    """One set of 4 bits, rounded with calibration, and its upper 3 bits: to go from one to the other the runtime
    reads or drops a single plane. Its upper 2 bits lose too much (docs/aggregation.md)."""

    places = len(PLANES[4])

    def add(self, menu: LayerMenu, statistics: LayerStatistics, first: int) -> None:
        held: dict[int, list[Expert]] = {3: [], 4: []}
        own: dict[int, list[int]] = {3: [], 4: []}
        for expert in range(statistics.spec.num_experts):
            exact = statistics.weights.expert(statistics.layer_idx, expert)
            coded = rounded_matrices(exact, statistics.second_moments(expert), 4)
            found = set_of(exact, coded, 4)
            place(menu, expert, first, found, 4)
            for bits in held:
                planes = len(PLANES[bits])
                held[bits].append(expert_at(exact, coded, bits))
                own[bits].append(sum(len(p) for p in found.payloads[:planes]))
        for bits in held:
            mask = mask_of(first, len(PLANES[bits]))
            sizes = np.array(own[bits], np.int64)
            menu.rungs.append(Rung(f"{bits}n", mask, sizes, held[bits].__getitem__))


class Mean:
    """The expert's mean output, in fp32."""

    places = 1

    def add(self, menu: LayerMenu, statistics: LayerStatistics, first: int) -> None:
        vectors = [statistics.mean_output(e) for e in range(statistics.spec.num_experts)]
        for expert, vector in enumerate(vectors):
            payload = encode_mean(vector.numpy())
            menu.records[expert][first - FIRST_ADDED] = AddedRecord(fmt.MEAN, payload=payload)
        own = np.full(len(vectors), len(payload))
        menu.rungs.append(Rung("mean", 1 << first, own, lambda e: vectors[e], kind="mean"))


def group_moments(
    statistics: LayerStatistics, group: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Second moments of a merged expert's inputs: those of its members, weighted by their use."""
    uses = np.maximum(statistics.use[list(group)], 1e-9)
    pairs = [statistics.second_moments(e) for e in group]
    return tuple(
        sum(float(u) * pair[i] for u, pair in zip(uses / uses.sum(), pairs, strict=True))
        for i in range(2)
    )


@dataclass(frozen=True)
class Merged:
    """One expert for about `size` members, in codes of `bits`: groups by gated output error."""

    size: int
    bits: int

    @property
    def places(self) -> int:
        return len(PLANES[self.bits])

    @property
    def name(self) -> str:
        return f"merge{self.size}.{self.bits}c"

    def add(self, menu: LayerMenu, statistics: LayerStatistics, first: int) -> None:
        num_experts = statistics.spec.num_experts
        count = max(num_experts // self.size, 1)
        merge = merging.gated(statistics, count)
        sets = []
        for number, group in enumerate(merging.members(merge.groups)):
            moments = group_moments(statistics, group)
            sets.append(coded_set(merge.experts[number], moments, self.bits))
            for expert in group:
                place(menu, expert, first, sets[-1], self.bits, group=number)
        groups = np.asarray(merge.groups)
        menu.rungs.append(
            Rung(
                self.name,
                mask_of(first, self.places),
                np.zeros(num_experts, np.int64),
                lambda e: sets[groups[e]].expert,
                groups.astype(np.int64),
                np.array([s.nbytes for s in sets], np.int64),
                kind="merged",
            )
        )
