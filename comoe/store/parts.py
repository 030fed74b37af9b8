"""What a level makes of an expert's records: the parts whose sum the expert is.

A *coded* part is a chain of planes, from a record that begins a code set up to the last one of the
level; a *low-rank* part adds U V to each matrix; a *mean* part adds a vector to the output; the
*exact* part is the source itself and stands alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from comoe.store import format as fmt

CODED_PART, LOW_RANK_PART, MEAN_PART, EXACT_PART = "coded", "low_rank", "mean", "exact"


@dataclass(frozen=True)
class Part:
    """records: of a coded part the chain, from the beginning of its code set; else one record."""

    kind: str
    records: tuple[int, ...]


def records_of(mask: int) -> list[int]:
    return [r for r in range(fmt.MAX_RECORDS) if mask >> r & 1]


def parts_of(rows: np.ndarray, mask: int) -> list[Part]:
    """Parts of an expert at a level: rows RECORD [R], all records of `mask` present.

    ValueError, without the file's name, if the level makes no sense for these records.
    """
    wanted = records_of(mask)
    if fmt.EXACT_RECORD in wanted:
        if len(wanted) > 1:
            raise ValueError(f"record {fmt.EXACT_RECORD} (exact) must be the level's only record")
        return [Part(EXACT_PART, (fmt.EXACT_RECORD,))]
    parts, last_of = [], {}  # root of a chain -> its last record so far
    for r in wanted:  # parents come before what adds to them
        kind, parent = int(rows[r]["kind"]), int(rows[r]["parent"])
        if parent >= 0 and parent not in wanted:
            raise ValueError(f"record {r} adds to record {parent}, which the level lacks")
        if kind == fmt.MEAN:
            parts.append(Part(MEAN_PART, (r,)))
        elif kind == fmt.LOW_RANK:
            parts.append(Part(LOW_RANK_PART, (r,)))
        elif parent < 0:
            last_of[r] = (r,)
        else:
            root = next((k for k, chain in last_of.items() if chain[-1] == parent), None)
            if root is None:
                raise ValueError(f"two records of the level add to record {parent}")
            last_of[root] += (r,)
    return [Part(CODED_PART, chain) for chain in last_of.values()] + parts
