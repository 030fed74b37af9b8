"""Whether reading ahead saves time, found by trying: some steps with it, some without, next to each other.

A share of useful bytes does not tell: on a disk that idles while the dense part computes a wrong guess costs
nothing, on a saturated one it delays demand. What counts is how long steps take.

Steps come in blocks. While it is not clear which way is quicker, blocks take turns; once it is, one block
in PROBE_EVERY goes the other way, so that a change is found. A block is compared with the mean of the
two around it, which went the other way or belong to the better one: what drifts (a growing context, a
warming cache) cancels. The first steps of a block pay for the change and do not count.
"""

from __future__ import annotations

import math
from collections import deque

from comoe.policy.predictor import PrefetchGauge

BLOCK = 4  # steps
SETTLE = 1  # of them that do not count
PROBE_EVERY = 24  # blocks
SURE = 2.0  # standard errors from which it is clear
FIRST_PAIRS = 3  # comparisons before anything is clear
FADE = 0.25  # weight of a new comparison, once there are 1 / FADE of them
LEAST_SPREAD = (
    0.01  # relative; steps that repeat themselves to the microsecond are not that certain
)


class TimedGauge(PrefetchGauge):
    """Counts as PrefetchGauge does, but `useful` follows the seconds of the steps. Until there are any, reading
    ahead is on."""

    def __init__(self) -> None:
        super().__init__()
        self.saved = 0.0  # share of a step's time that reading ahead saves, smoothed
        self._variance = 0.0
        self._pairs = 0
        self._on = True  # in the present block
        self._seconds: list[float] = []  # of the present block
        self._blocks: deque[tuple[bool, float]] = deque(maxlen=3)  # on, log of a typical step
        self._since_probe = 0

    @property
    def useful(self) -> bool:
        return self._on

    @property
    def clear(self) -> bool:
        """Whether one way is known to be quicker."""
        if self._pairs < FIRST_PAIRS:
            return False
        error = math.sqrt(max(self._variance, LEAST_SPREAD**2) * FADE / (2.0 - FADE))
        return abs(self.saved) > SURE * error

    def note_seconds(self, seconds: float) -> None:
        """What a step took; only of steps alike: one token per sequence, with something to read."""
        if not 0 < seconds < math.inf:
            return
        self._seconds.append(seconds)
        if len(self._seconds) < BLOCK:
            return
        counted = sorted(self._seconds[SETTLE:])
        self._seconds = []
        # The middle: one step that the system interrupted tells nothing.
        self._blocks.append((self._on, math.log(counted[len(counted) // 2])))
        self._compare()
        self._choose()

    def _compare(self) -> None:
        """The last block but one with those around it, if they went the other way."""
        if len(self._blocks) < 3:
            return
        (a, before), (b, middle), (c, after) = self._blocks
        if a != c or a == b:
            return
        saved = 0.5 * (before + after) - middle
        saved = saved if b else -saved
        self._pairs += 1
        share = max(FADE, 1.0 / self._pairs)
        away = saved - self.saved
        self.saved += share * away
        self._variance = (1.0 - share) * (self._variance + share * away * away)

    def _choose(self) -> None:
        """Which way the next block goes."""
        if not self.clear:
            self._on, self._since_probe = not self._on, 0
            return
        best = self.saved > 0
        self._since_probe += 1
        probe = self._since_probe >= PROBE_EVERY and self._on == best
        if probe:
            self._since_probe = 0
        self._on = best != probe

    def stats(self) -> dict:
        return {**super().stats(), "time_saved": self.saved}
