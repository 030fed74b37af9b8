"""Computing where it lies: what it takes to send activations to a machine that has the experts.

    seconds of a layer call = round trip + bytes both ways / bandwidth + the server's seconds

Round trip and bandwidth come from the calls themselves (LinkEstimate); the server says how long the experts took. A
call that fails or is late puts the server aside, for a time that doubles with every failure, so that a lost link
costs one wait and not one per layer. numpy only; from any thread.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable

import numpy as np

from comoe.policy.smoothing import LinkEstimate, Smoothed
from comoe.policy.snapshot import Estimate, Link

FIRST_LINK = Link(Estimate(1e6), Estimate(0.05))  # until calls have told more
FIRST_SECONDS = 1e-3  # of the experts of one call
BACK_OFF, MOST_BACK_OFF = 0.25, 30.0  # seconds
LATE = 3.0  # times what it should take
LEAST_PATIENCE, MOST_PATIENCE = 0.02, 0.2  # seconds on top of what a call should take


def calls_per_token(away: np.ndarray, use: np.ndarray, num_experts: np.ndarray) -> float:
    """Expected calls: a layer sends all that it sends in one. away: bool [X].  use: [X], probability that a token
    uses the expert.  num_experts: int [layers]."""
    ends = np.cumsum(num_experts)[:-1]
    none = [np.prod(1.0 - sent) for sent in np.split(np.where(away, use, 0.0), ends)]
    return float(np.sum(1.0 - np.array(none)))


class Elsewhere:
    """One server.

    level: int [X], at which it computes each expert, -1: it does not.  row_bytes: of one token's activations on
    the wire.  patience: seconds that a call may be late at most.
    """

    def __init__(
        self,
        level: np.ndarray,
        row_bytes: int,
        *,
        prior: Link = FIRST_LINK,
        patience: float = MOST_PATIENCE,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ):
        self.level, self._row_bytes, self._patience = level, row_bytes, patience
        self._clock, self._rng = clock, rng or random.Random()
        self._lock = threading.Lock()
        self._prior = prior
        self._link, self._server = LinkEstimate(prior), Smoothed()
        self._not_before = -math.inf
        self._failures = 0
        self.calls = self.failed = 0

    @property
    def available(self) -> bool:
        """Whether it may be asked now."""
        return self._clock() >= self._not_before

    @property
    def link(self) -> Link:
        with self._lock:
            return self._link.link

    def seconds(self, tokens: int) -> float:
        """Expected for a layer's call over `tokens` tokens; inf while it is put aside."""
        if not self.available:
            return math.inf
        with self._lock:
            server = self._server.estimate
            experts = server.mean if server.samples else FIRST_SECONDS
            return self._link.expected(2.0 * tokens * self._row_bytes, 1.0) + experts

    def timeout(self, tokens: int) -> float:
        """Seconds after which a call is given up: late, and not by the usual spread."""
        expected = self.seconds(tokens)
        if math.isinf(expected):
            return self._patience
        return expected + min(max((LATE - 1.0) * expected, LEAST_PATIENCE), self._patience)

    def succeeded(self, tokens: int, seconds: float, server_seconds: float) -> None:
        """A call over `tokens` tokens took `seconds` in all, of which the experts took `server_seconds`."""
        with self._lock:
            self.calls += 1
            self._failures = 0
            self._not_before = -math.inf
            if server_seconds > 0:
                self._server.add(server_seconds)
            way = seconds - server_seconds
            if way > 0:
                self._link.add(2.0 * tokens * self._row_bytes, way, 1.0)

    def failed_call(self, retry_after: float | None = None) -> float:
        """Returns the seconds for which it is put aside; the server's own wish counts if it is longer."""
        with self._lock:
            self.calls += 1
            self.failed += 1
            self._failures += 1
            rest = min(BACK_OFF * 2.0 ** (self._failures - 1), MOST_BACK_OFF)
            rest = max(rest * self._rng.uniform(0.75, 1.25), retry_after or 0.0)
            self._not_before = self._clock() + rest
            return rest

    def path_changed(self) -> None:
        """Another way leads there now: what was learnt of the old one is worth nothing."""
        with self._lock:
            self._link = LinkEstimate(self._prior)
            self._failures = 0
            self._not_before = -math.inf
