"""What the solver may choose for each expert: records that stay in memory, and the level computed at.

An option is a pair (held, used). What `used` needs and `held` lacks is read at each use:

    (l, l)        all of level l is held                                     no reads
    (h, u)        level h is held, a part of u: planes of 2 bits held, the planes up to 4 bits read
    (SHARED, u)   only what u shares with other experts is held, such as a base
    (NOTHING, u)  plain offloading
    (ELSEWHERE, u)  nothing is held or read: another machine computes it, at its level u (with_elsewhere)

Pairs whose held records are no part of what is used would only waste memory, and are not made; nor is kept
what another option of the same expert beats in everything. numpy only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from comoe.policy.plan import Levels, Sizes
from comoe.policy.shared_costs import Sharing
from comoe.policy.solver import Problem

NOTHING, SHARED, ELSEWHERE = -1, -2, -3  # in `held`, beside the numbers of levels


@dataclass(frozen=True)
class Options:
    """X experts of all layers in order with at most O options each.

    held: int8 [X, O], a level, NOTHING, SHARED or ELSEWHERE.  used: int8 [X, O], a level.
    held_bytes: int64 [X, O] of pool pages, of the expert's own records that are held; what is held and shared
        is in `shared`: int32 [X, O, M], indices into shared_bytes int64 [S], -1 for none.
    missing: int64 [X, O] bytes to read at each use, of its own and shared ones alike: what two experts of a
        step both read is counted twice.
    loss: float64 [X, O] nats per token, of the used level; inf where the expert has no such option (held and
        used are then those of its first option).  use: float64 [X], probability that a step uses the expert.
    """

    levels: Levels
    held: np.ndarray
    used: np.ndarray
    held_bytes: np.ndarray
    shared: np.ndarray
    shared_bytes: np.ndarray
    missing: np.ndarray
    loss: np.ndarray
    use: np.ndarray

    @cached_property
    def sharing(self) -> Sharing:
        """`shared` for the solver, which keeps there what it learns of it."""
        return Sharing(self.shared)

    @cached_property
    def away(self) -> np.ndarray:
        """bool [X, O]: another machine computes it."""
        return self.held == ELSEWHERE

    def with_elsewhere(self, level: np.ndarray, loss: np.ndarray) -> Options:
        """These, and for every expert that another machine has, at level int [X] (-1: it has not), that one.
        loss: float [X, L] as in expert_options."""
        rows = np.arange(len(level))
        there = np.asarray(level) >= 0
        used = np.where(there, level, self.used[:, 0]).astype(np.int8)
        nats = np.where(there, loss[rows, used], np.inf)
        added = {
            "held": np.where(there, ELSEWHERE, self.held[:, 0]).astype(np.int8)[:, None],
            "used": used[:, None],
            "held_bytes": np.zeros((len(rows), 1), np.int64),
            "missing": np.zeros((len(rows), 1), np.int64),
            "shared": np.full((len(rows), 1, self.shared.shape[2]), -1, self.shared.dtype),
            "loss": np.where(np.isfinite(nats), nats, np.inf)[:, None],
        }
        return replace(
            self, **{n: np.concatenate([getattr(self, n), new], 1) for n, new in added.items()}
        )

    @property
    def reads(self) -> np.ndarray:
        """float64 [X, O]: bytes that a step is expected to read."""
        return self.use[:, None] * self.missing

    def problem(
        self, memory: float, reads: float | None = None, penalty: np.ndarray | None = None
    ) -> Problem:
        """For the solver: at most `memory` bytes held, and at most `reads` bytes expected per step, if given.

        penalty: float [X, O] in nats, as in Problem.
        """
        cost, shared_cost = [self.held_bytes], [self.shared_bytes]
        limits, names = [memory], ("expert bytes in memory",)
        if reads is not None:
            cost.append(self.reads)
            shared_cost.append(np.zeros(len(self.shared_bytes)))
            limits.append(reads)
            names += ("expected bytes read per step",)
        return Problem(
            self.loss,
            np.stack(cost).astype(np.float64),
            np.array(limits, np.float64),
            names,
            penalty,
            self.sharing,
            np.stack(shared_cost).astype(np.float64),
        )


def expert_options(
    sizes: Sizes, loss: np.ndarray, use: np.ndarray, *, floor: np.ndarray | None = None
) -> Options:
    """All options worth having.

    loss: float [X, L] nats per token at each level (nan: no such level).  use: float [X], the probability
    that a step uses the expert; for a step of T tokens 1 - (1 - p)^T.  floor: int [X], least level used.
    All as in experts/losses.npz (comoe/store/losses.py). Raises ValueError for arrays that do not fit.
    """
    loss, use = _checked(sizes, loss, use, floor)
    needs, pages = sizes.needs, np.where(sizes.records >= 0, sizes.record_bytes[sizes.records], 0)
    is_shared, bundle, bundle_bytes = _bundles(sizes)
    own_pages = np.where(is_shared, 0, pages)
    offered = sizes.has & np.isfinite(loss)
    if floor is not None:
        offered &= np.arange(len(sizes.levels)) >= np.asarray(floor)[:, None]
    held, used, held_bytes, missing, shared, allowed = [], [], [], [], [], []
    for h, u in _pairs(needs):
        # bool [R] or [X, R]: which of the records of u stay.
        stays = (
            needs[h] if h >= 0 else needs[u] & is_shared if h == SHARED else np.zeros_like(needs[u])
        )
        good = offered[:, u]
        if h == SHARED:  # else it is one of the others
            mine = needs[u] & (pages > 0)
            good = good & (mine & is_shared).any(1) & (mine & ~is_shared).any(1)
        if not good.any():
            continue
        held.append(h)
        used.append(u)
        held_bytes.append((own_pages * stays).sum(1))
        missing.append((pages * (needs[u] & ~stays)).sum(1))
        shared.append(np.where(stays, bundle, -1))
        allowed.append(good)
    per_option = {
        "held_bytes": np.stack(held_bytes, 1),
        "missing": np.stack(missing, 1),
        "shared": _packed(np.stack(shared, 1)),
        "loss": np.where(np.stack(allowed, 1), loss[:, used], np.inf),
    }
    kept = ~_beaten(**per_option)
    # Options that are kept come first, in their order; the rest of a row is its first one, not offered.
    order = np.argsort(~kept, axis=1, kind="stable")[:, : int(kept.sum(1).max())]
    real = np.take_along_axis(kept, order, 1)
    order = np.where(real, order, order[:, :1])
    rows = np.arange(len(order))[:, None]
    table = {name: values[rows, order] for name, values in per_option.items()}
    table["loss"] = np.where(real, table["loss"], np.inf)
    return Options(
        sizes.levels,
        np.array(held, np.int8)[order],
        np.array(used, np.int8)[order],
        shared_bytes=bundle_bytes,
        use=use,
        **table,
    )


def _checked(
    sizes: Sizes, loss: np.ndarray, use: np.ndarray, floor: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    loss, use = np.asarray(loss, np.float64), np.asarray(use, np.float64)
    for name, array, shape in (
        ("loss", loss, sizes.has.shape),
        ("use", use, sizes.has.shape[:1]),
        ("floor", floor, sizes.has.shape[:1]),
    ):
        if array is not None and np.shape(array) != shape:
            raise ValueError(
                f"expert_options: {name}: expected shape {shape} (experts, levels of the store), got "
                f"{np.shape(array)}; these are figures of another store"
            )
    if not ((use >= 0) & (use <= 1)).all():
        raise ValueError("expert_options: use: expected probabilities, got values outside 0..1")
    at_least = 0 if floor is None else np.asarray(floor)[:, None]
    good = sizes.has & np.isfinite(loss) & (np.arange(loss.shape[1]) >= at_least)
    if not good.any(1).all():
        raise ValueError(
            f"expert_options: expert {int(good.any(1).argmin())} has no level at or above its floor with a "
            "known loss; run `comoe aggregate` again"
        )
    return loss, use


def _pairs(needs: np.ndarray) -> list[tuple[int, int]]:
    """(held, used) for every level, needs bool [L, R]: all, a level that is a part of it, shared, nothing."""
    found = []
    for u, mine in enumerate(needs):
        parts = [h for h, part in enumerate(needs) if h != u and not (part & ~mine).any()]
        found += [(h, u) for h in (u, *parts, SHARED, NOTHING)]
    return found


def _bundles(sizes: Sizes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(bool [X, R] which records several experts share; int32 [X, R] the bundle of each, or -1; bytes [S]).

    Records that the same experts need at the same levels, such as the planes of a base, are one bundle: the
    solver asks of each by itself whether it is worth its bytes.
    """
    flat = sizes.records.reshape(-1)
    users = np.bincount(np.maximum(flat, 0), flat >= 0, len(sizes.record_bytes))
    entries = np.flatnonzero((flat >= 0) & (users[flat] > 1))
    entries = entries[np.argsort(flat[entries], kind="stable")]
    bundle = np.full(flat.size, -1, np.int32)
    known: dict[bytes, int] = {}
    nbytes: list[int] = []
    for mine in (
        np.split(entries, np.flatnonzero(np.diff(flat[entries])) + 1) if len(entries) else ()
    ):
        experts, at = np.divmod(mine, sizes.records.shape[1])
        number = known.setdefault(experts.tobytes() + sizes.needs[:, at].tobytes(), len(known))
        if number == len(nbytes):
            nbytes.append(0)
        nbytes[number] += int(sizes.record_bytes[flat[mine[0]]])
        bundle[mine] = number
    bundle = bundle.reshape(sizes.records.shape)
    return bundle >= 0, bundle, np.array(nbytes, np.int64)


def _packed(ids: np.ndarray) -> np.ndarray:
    """ids [X, O, R] with each one once per option, and no more columns than are needed."""
    ids = -np.sort(-ids, axis=2)
    ids[:, :, 1:][ids[:, :, 1:] == ids[:, :, :-1]] = -1
    ids = -np.sort(-ids, axis=2)
    return ids[:, :, : max(int((ids >= 0).sum(2).max()), 1)]


def _beaten(
    held_bytes: np.ndarray, missing: np.ndarray, shared: np.ndarray, loss: np.ndarray
) -> np.ndarray:
    """bool [X, O]: not offered, or another option is as good in everything, and better or earlier."""
    beaten = ~np.isfinite(loss)
    has_shared = (shared >= 0).any(2)
    values = (held_bytes, missing, loss)
    for b in range(loss.shape[1]):
        for a in range(loss.shape[1]):
            if a == b:
                continue
            no_worse = ~has_shared[:, a] | (shared[:, a] == shared[:, b]).all(1)
            better = has_shared[:, b] & ~has_shared[:, a]
            for value in values:
                no_worse &= value[:, a] <= value[:, b]
                better |= value[:, a] < value[:, b]
            beaten[:, b] |= no_worse & (better if a > b else True)
    return beaten
