"""Records that aggregation adds to the ladder, and the record table of a layer that has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from comoe.store import format as fmt
from comoe.store.format import LayerSpec, StoreError

Payload = np.ndarray | bytes


@dataclass(frozen=True)
class AddedRecord:
    """One record of one expert beyond the ladder.

    kind: fmt.PLANE, REPLACEMENT, SHARED_BASE (payload: planes of codes), LOW_RANK, MEAN or ALIAS.
    bits: that a coded record adds per weight; of low-rank factors their bits; of a mean 0.
    parent: record of the same expert to which it adds, or -1; a coded record of -1 begins a code set.
    replaces: bit set of the records that it makes superfluous.
    shared_id: records with the same one are one record; its payload is asked for once.
    ranks: of a low-rank record, one per matrix.
    payload: the bytes, or a function that makes them when they are written.
    alias_of: (expert, record) whose bytes these are, for fmt.ALIAS; bits and parent must be alike.
    """

    kind: int
    bits: int = 0
    parent: int = -1
    replaces: int = 0
    shared_id: int = -1
    ranks: tuple[int, ...] = ()
    payload: Payload | Callable[[], Payload] | None = None
    alias_of: tuple[int, int] | None = None


def check_payload(
    payload: Payload | Callable[[], Payload] | None, nbytes: int, where: str
) -> np.ndarray:
    """uint8 [nbytes], or a StoreError."""
    if callable(payload):
        payload = payload()
    array = np.frombuffer(payload, np.uint8) if isinstance(payload, bytes) else payload
    if (
        not isinstance(array, np.ndarray)
        or array.dtype != np.uint8
        or not array.flags.c_contiguous
        or array.shape != (nbytes,)
    ):
        got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else f"{payload!r}"
        raise StoreError(
            f"{where}: expected a payload of {nbytes:,} bytes (contiguous uint8), got {got}"
        )
    return array


def record_table(
    name: str, spec: LayerSpec, added: Sequence[Sequence[AddedRecord | None]]
) -> np.ndarray:
    """RECORD [E, R]: the ladder and what is added, without places and checksums. Whether it makes sense
    is checked when it is read back, by the same rules as any file."""
    if len(added) != spec.num_experts:
        raise StoreError(
            f"layer {name!r}: added: expected one list of records per expert ({spec.num_experts}), "
            f"got {len(added)}"
        )
    num_records = fmt.NUM_RECORDS + max((len(own) for own in added), default=0)
    if num_records > fmt.MAX_RECORDS:
        raise StoreError(
            f"layer {name!r}: added: an expert may have {fmt.MAX_RECORDS} records, got {num_records}"
        )
    records = np.zeros((spec.num_experts, num_records), fmt.RECORD)
    records["parent"] = records["shared_id"] = -1
    records[:, : fmt.NUM_RECORDS] = fmt.ladder_records(spec.geometry)
    known = np.zeros(records.shape, np.int64)  # bits of a code after each coded record
    known[:, : len(fmt.KNOWN_BITS)] = fmt.KNOWN_BITS
    aliases = {}
    for expert, own in enumerate(added):
        for r, record in enumerate(own, fmt.NUM_RECORDS):
            if record is None:
                continue
            where = f"layer {name!r}, expert {expert}, record {r}"
            if not -1 <= record.parent < r:
                raise StoreError(
                    f"{where}: parent must be -1 or an earlier record: {record.parent}"
                )
            before = int(known[expert, record.parent]) if record.parent >= 0 else 0
            _fill(records[expert, r], record, before, spec, where)
            if record.kind in fmt.CODED:
                known[expert, r] = before + record.bits
            if (record.kind == fmt.ALIAS) != (record.alias_of is not None):
                raise StoreError(f"{where}: an alias, and only an alias, needs alias_of")
            if record.alias_of is not None:
                aliases[expert, r] = record.alias_of
    _link(records, aliases, name)
    return records


def _fill(to: np.ndarray, record: AddedRecord, before: int, spec: LayerSpec, where: str) -> None:
    geometry = spec.geometry
    to["kind"], to["bits"], to["parent"] = record.kind, record.bits, record.parent
    to["replaces"], to["shared_id"] = record.replaces, record.shared_id
    to["flags"] = fmt.REQUIRED
    try:
        if record.kind in fmt.CODED:
            to["nbytes"] = geometry.coded_bytes(before, before + record.bits)
            to["params_nbytes"] = geometry.blocks_offset(0, 0) if before == 0 else 0
        elif record.kind == fmt.LOW_RANK:
            to["ranks"][: len(record.ranks)] = record.ranks
            to["nbytes"] = geometry.low_rank_bytes(record.ranks, record.bits)
            to["params_nbytes"] = geometry.low_rank_params_bytes(record.ranks)
        elif record.kind == fmt.MEAN:
            to["nbytes"] = geometry.mean_bytes
        else:
            raise ValueError(f"kind {record.kind} is unknown")
    except (ValueError, OverflowError) as error:
        raise StoreError(f"{where}: {error}") from error


def _link(records: np.ndarray, aliases: dict[tuple[int, int], tuple[int, int]], name: str) -> None:
    """Gives each alias and its original one shared id."""
    unused = int(records["shared_id"].max()) + 1
    for (expert, r), (other, s) in aliases.items():
        where = f"layer {name!r}, expert {expert}, record {r}"
        if not (0 <= other < records.shape[0] and 0 <= s < records.shape[1]) or other == expert:
            raise StoreError(
                f"{where}: alias_of must name a record of another expert: {(other, s)}"
            )
        original = records[other, s]
        if original["kind"] == fmt.ALIAS or original["nbytes"] != records[expert, r]["nbytes"]:
            raise StoreError(
                f"{where}: record {s} of expert {other} is {original['nbytes']} bytes of kind "
                f"{original['kind']}: an alias must be of a record like itself that is none"
            )
        if original["shared_id"] < 0:
            original["shared_id"] = unused
            unused += 1
        records[expert, r]["shared_id"] = original["shared_id"]
