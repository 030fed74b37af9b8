"""A running model and the network: what its link allows now, and what to do while it changes.

Outside `exact` what is missing is waited for, computed with what is here, elsewhere, or left out, whichever costs least
(policy.misses.LeastCost) with the link as it is; it climbs when bytes come. Remote (remote.py) ends waits that take longer
than expected.
"""

from __future__ import annotations

import logging
import time

import numpy as np

from comoe import _C
from comoe.policy.elsewhere import Elsewhere
from comoe.policy.increments import by_value, nothing_loss
from comoe.policy.links import Links
from comoe.policy.misses import LeastCost
from comoe.policy.mobility import Path, PathWatch, carriers
from comoe.policy.plan import Plan, Sizes
from comoe.policy.snapshot import Estimate, Link
from comoe.runtime.elsewhere import ExpertsElsewhere
from comoe.runtime.engine import RESIDENT
from comoe.runtime.live import Live
from comoe.tiers.sources import Sources

DEADLINE = 0.05  # seconds: what should come later than that is not waited for
WAIT_PRICE = 1.0  # nats per second, where the plan waits for nothing once all has come
NO_LINK = Link(Estimate(1e3), Estimate(1.0))  # while no source may be asked
START_SECONDS = 10.0  # without a record, before the first pass begins all the same
LATE_REST = 0.25  # seconds without waiting after something was late; doubles up to
MOST_LATE_REST = 4.0
LOOK_SECONDS = 0.05  # between looks at the interfaces
log = logging.getLogger("comoe")


class Network:
    """Of one runtime. sources: of a remote store, None: the store is here.  away: a machine that computes
    experts, or None."""

    def __init__(
        self,
        engine: _C.Engine,
        sizes: Sizes,
        sources: Sources | None,
        away: ExpertsElsewhere | None,
    ):
        self._engine, self._sizes, self._sources, self.away = engine, sizes, sources, away
        self._links = None if sources is None else sources.links
        self.watch = PathWatch()
        self.rule: LeastCost | None = None
        self._looked = -np.inf
        self._interface = ""
        self._rest, self._no_wait_until = LATE_REST, -np.inf

    def link(self) -> Link:
        """The way that bytes come now."""
        return best_link(self._links)

    def look(self) -> str | None:
        """Once per step: what has changed of the path, for people; None: nothing."""
        if self.away is not None:
            self.away.tick()
        now = time.monotonic()
        before = self._interface
        if now - self._looked >= LOOK_SECONDS:
            self._looked, self._interface = now, carriers()
        best = None if self._links is None else self._links.best()
        name, link = best if best is not None else ("", None)
        losing = self.watch.losing
        reason = self.watch.look(Path(now, link, name, self._interface))
        if reason is None and self.watch.losing and not losing:
            reason = "the link is fading"
        if reason is not None:
            lost = set(before.split("+")) - set(self._interface.split("+"))
            self._path_changed(reason, bool(lost))
        self._refresh()
        return reason

    def _path_changed(self, reason: str, lost: bool) -> None:
        log.info("network: %s", reason)
        if reason.startswith("interface"):
            if self._sources is not None:
                self._sources.path_changed(lost)
            if self.away is not None:
                self.away.policy.path_changed()
        if reason.startswith(("interface", "link back")):
            self._rest, self._no_wait_until = LATE_REST, -np.inf

    def wait_for(self, records: np.ndarray, pool_bytes: int) -> None:
        """Before the first pass: until the records where bool [ids] is true are here, the coarsest of every expert,
        or no more of them comes. A prompt that is read without them would not be understood."""
        if self._links is None or self._sizes.record_bytes[records].sum() > pool_bytes:
            return
        missing, moved = -1, time.monotonic()
        while time.monotonic() - moved < START_SECONDS:
            left = int((self._engine.resident()[records] != RESIDENT).sum())
            if left == 0:
                return
            if left != missing:
                missing, moved = left, time.monotonic()
            time.sleep(0.005)
        log.warning(
            "comoe: %d records of the coarsest rungs have not come; starting without", missing
        )

    def late(self) -> None:
        """Something was waited for in vain: for a while nothing is."""
        self._no_wait_until = time.monotonic() + self._rest
        self._rest = min(2 * self._rest, MOST_LATE_REST)
        self._refresh()

    # ---- misses ---------------------------------------------------------------------------------

    def new_rule(self, live: Live, plan: Plan, loss: np.ndarray, use: np.ndarray) -> LeastCost:
        """What to do about misses under `plan`; arguments as of Live.rule."""
        price = WAIT_PRICE if plan.resident else plan.price
        self.rule = live.least_cost(
            plan, loss, use, price=price, skip_loss=nothing_loss(loss), elsewhere=self._policy()
        )
        self._refresh()
        return self.rule

    def _policy(self) -> Elsewhere | None:
        return None if self.away is None else self.away.policy

    def _refresh(self) -> None:
        """The rule decides by the link as it is now."""
        if self.rule is None or self._links is None:
            return
        link = self.link()
        self.rule.bandwidth, self.rule.latency = link.bandwidth.mean, link.latency.mean
        waits = time.monotonic() >= self._no_wait_until
        self.rule.deadline = DEADLINE if waits else 0.0

    def order(self, loss: np.ndarray, scale: np.ndarray, target: np.ndarray) -> np.ndarray:
        """Records to fetch for levels `target` int [X], the most valuable first."""
        here = self._engine.resident() == RESIDENT
        return by_value(self._sizes, loss, scale, here, target)

    def stats(self) -> dict:
        changes = [{"time": when, "what": what} for when, what in self.watch.log]
        found = {"changes": changes[-32:]}
        if self.away is not None:
            found["elsewhere"] = self.away.stats()
        return found

    def close(self) -> None:
        if self.away is not None:
            self.away.close()


def best_link(links: Links | None) -> Link:
    best = None if links is None else links.best()
    return NO_LINK if best is None else best[1]
