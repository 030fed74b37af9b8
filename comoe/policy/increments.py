"""Which increments are worth most per byte: the order in which a link that may be lost brings them.

An expert climbs from level to level; a step saves (loss before - loss after) nats per token for the bytes of the records
that it lacks. An expert of which nothing is here loses NOTHING_HERE times what its coarsest level does.
"""

from __future__ import annotations

import numpy as np

from comoe.policy.assumed import RELATIVE_ERROR
from comoe.policy.plan import Sizes

NOTHING_HERE = (
    1.0 / RELATIVE_ERROR[0]
)  # all of an expert's output is lost, and not that share of it


def nothing_loss(loss: np.ndarray) -> np.ndarray:
    """float [X]: nats per token if the expert is always left out. loss: float [X, L], nan: no such level."""
    return NOTHING_HERE * np.nanmax(np.where(np.isfinite(loss), loss, np.nan), axis=1, initial=0.0)


def by_value(
    sizes: Sizes, loss: np.ndarray, scale: np.ndarray, here: np.ndarray, target: np.ndarray
) -> np.ndarray:
    """int32 ids of the records that experts lack of their levels `target` int [X], the most valuable first; an
    expert's own in the order in which it climbs.

    loss: float [X, L] nats per token.  scale: float [X], present use over that of the losses.  here: bool [ids].
    """
    loss = np.where(np.isfinite(loss), loss, np.inf) * scale[:, None]
    experts = np.arange(len(target))
    records = sizes.records
    lacks = (records >= 0) & ~here[np.maximum(records, 0)]
    nbytes = np.where(records >= 0, sizes.record_bytes[np.maximum(records, 0)], 0)
    value = np.full(records.shape, -np.inf)
    before = nothing_loss(loss) * 1.0
    density = np.full(len(target), np.inf)
    final = sizes.needs[target]  # [X, R]
    for level in range(len(sizes.levels)):
        # A level on the way has no record that the target does without.
        need = sizes.needs[level] & (records >= 0)
        on_way = sizes.has[:, level] & (level <= target) & np.isfinite(loss[experts, level])
        on_way &= ~(need & ~final).any(1)
        new = need & lacks & (value == -np.inf) & on_way[:, None]
        cost = (nbytes * new).sum(1)
        gain = np.maximum(before - loss[:, level], 0.0)
        step = np.where(cost > 0, gain / np.maximum(cost, 1), density)
        density = np.where(on_way & (cost > 0), np.minimum(density, step), density)
        value = np.where(new, density[:, None], value)
        before = np.where(on_way, np.minimum(before, loss[:, level]), before)
    wanted = np.isfinite(value) & lacks & final
    best = np.full(len(sizes.record_bytes), -np.inf)
    np.maximum.at(best, records[wanted], value[wanted])
    ids = np.flatnonzero(np.isfinite(best))
    # Of equal value the earlier record of the ladder first.
    column = np.zeros(len(best), np.int64)
    column[records[wanted]] = np.nonzero(wanted)[1]
    order = np.lexsort((column[ids], -best[ids]))
    return ids[order].astype(np.int32)
