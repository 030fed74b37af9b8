"""Which of several network sources brings bytes first: what each has shown so far, and how long to leave
one alone that fails.

    seconds expected = time to the first byte + (bytes under way + bytes) / bandwidth

Bandwidth is that of all of a source's transfers together while answers come in, so that parallel ones do
not make each other look slow. A failed source is tried again after a back-off that doubles with every
failure, times a random factor, so that many clients do not come back at one moment.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

from comoe.policy.smoothing import Smoothed
from comoe.policy.snapshot import Estimate, Link

FIRST_BANDWIDTH = 10e6  # bytes/s and seconds, of a source that has not been used
FIRST_WAIT = 0.05
SAMPLE_BYTES = 256 << 10  # that make one sample of bandwidth, or
SAMPLE_SECONDS = 0.05  # that long
LEAST_SAMPLE = 16 << 10  # fewer bytes tell nothing of bandwidth: they came in one piece
BACK_OFF = 0.05  # seconds after the first failure
MOST_BACK_OFF = 30.0
LASTING_BACK_OFF = 60.0  # of what is not mended soon: gone, refused, another version
DOWN_FAILURES = 3  # in a row, after which a source counts as out of reach
PERCENTILE = 0.95
FEW = 16  # transfers; with fewer the percentile is not known
FIRST_RATIO = 3.0  # of the seconds expected, until then
MOST_RATIO = 20.0
LEAST_HEDGE = 0.02  # seconds: less is noise of the machine
HEDGED_SHARE = 0.15  # of all bytes that may be asked for a second time, beside
FREE_HEDGES = 1 << 20  # bytes, or one request
FIRST_SILENCE, LEAST_SILENCE = 3.0, 0.25  # seconds; the first of a source that never answered
SILENT_WAITS = 4.0  # times to the first byte
STALLED_SECONDS = 0.1  # until it is worth asking whether a stalled source has recovered
PROBE_SHARE = 0.02  # of choices that go to a source that was not asked for long


class _State:
    def __init__(self) -> None:
        self.wait, self.bandwidth = Smoothed(0.2), Smoothed(0.2)
        self.ratios: deque[float] = deque(maxlen=128)
        self.bodies = 0  # answers coming in
        self.outstanding = 0  # bytes asked for that are not here
        self.busy = self.since = 0.0
        self.busy_bytes = 0
        self.failures = 0  # in a row
        self.all_failures = 0
        self.not_before = 0.0
        self.lasting = False  # the last failure is one that trying again does not mend
        self.stalled = False
        self.last_used = -math.inf
        self.total_bytes = 0
        self.transfers = 0

    def may_be_asked(self, now: float) -> bool:
        return self.not_before <= now and not self.stalled

    def seconds(self, nbytes: float) -> float:
        wait, bandwidth = self.wait.estimate, self.bandwidth.estimate
        rate = bandwidth.mean if bandwidth.samples else FIRST_BANDWIDTH
        first = wait.mean if wait.samples else FIRST_WAIT
        return first + (self.outstanding + nbytes) / rate


class Links:
    """Of sources by name, in the order of preference where nothing else is known. From any thread."""

    def __init__(
        self,
        names: Iterable[str],
        *,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ):
        self._states = {name: _State() for name in names}
        self._clock = clock
        self._rng = rng or random.Random()
        self._lock = threading.Lock()
        self._asked = self._hedged = 0.0  # bytes

    # ---- what transfers tell --------------------------------------------------------------------

    def began(self, name: str, nbytes: int, *, hedge: bool = False) -> float:
        """A request goes out. Returns the seconds that it should take."""
        with self._lock:
            state = self._states[name]
            expected = state.seconds(nbytes)
            state.outstanding += nbytes
            state.last_used = self._clock()
            self._asked += nbytes
            if hedge:
                self._hedged += nbytes
            return expected

    def answered(self, name: str, seconds: float) -> None:
        """The first byte of an answer came that long after the request."""
        with self._lock:
            state = self._states[name]
            if seconds > 0:
                state.wait.add(seconds)
            self._advance(state)
            state.bodies += 1

    def received(self, name: str, nbytes: int) -> None:
        with self._lock:
            state = self._states[name]
            self._advance(state)
            state.outstanding = max(state.outstanding - nbytes, 0)
            state.busy_bytes += nbytes
            state.total_bytes += nbytes
            self._sample(state)

    def ended(self, name: str, missing: int, answered: bool, ratio: float | None = None) -> None:
        """A request is over. missing: bytes that did not come.  answered: a first byte came.  ratio: seconds
        over those expected, of one that went well; it is one that counts as no failure."""
        with self._lock:
            state = self._states[name]
            self._advance(state)
            state.outstanding = max(state.outstanding - missing, 0)
            if answered:
                state.bodies = max(state.bodies - 1, 0)
            if ratio is not None:
                state.ratios.append(min(max(ratio, 0.0), MOST_RATIO))
                state.failures, state.not_before, state.stalled = 0, 0.0, False
                state.transfers += 1

    def failed(self, name: str, *, lasting: bool = False, retry_after: float = 0.0) -> float:
        """Returns the seconds for which the source is left alone."""
        with self._lock:
            state = self._states[name]
            state.failures += 1
            state.all_failures += 1
            state.lasting = lasting
            base = LASTING_BACK_OFF if lasting else BACK_OFF * 2.0 ** min(state.failures - 1, 16)
            rest = min(base, LASTING_BACK_OFF if lasting else MOST_BACK_OFF)
            rest = max(rest * self._rng.uniform(0.5, 1.5), retry_after)
            state.not_before = self._clock() + rest
            return rest

    def stalled(self, name: str) -> None:
        """Nothing comes from it, though much is under way: it is not asked until it has recovered."""
        with self._lock:
            self._states[name].stalled = True

    def recovered(self, name: str) -> None:
        """It answers again."""
        with self._lock:
            state = self._states[name]
            state.stalled, state.failures, state.not_before = False, 0, 0.0

    def silence(self, name: str) -> float:
        """Seconds without any byte after which a source that was asked is stalled."""
        with self._lock:
            wait = self._states[name].wait.estimate
            if not wait.samples:
                return FIRST_SILENCE
            return max(LEAST_SILENCE, SILENT_WAITS * (wait.mean + wait.std))

    def to_probe(self) -> list[str]:
        """Sources that are left alone, for reasons that may pass."""
        with self._lock:
            return [
                name
                for name, s in self._states.items()
                if s.stalled or (s.failures > 0 and not s.lasting)
            ]

    def _advance(self, state: _State) -> None:
        now = self._clock()
        if state.bodies > 0:
            state.busy += max(now - state.since, 0.0)
        state.since = now

    @staticmethod
    def _sample(state: _State) -> None:
        if state.busy_bytes < LEAST_SAMPLE or state.busy <= 0:
            return
        if state.busy_bytes >= SAMPLE_BYTES or state.busy >= SAMPLE_SECONDS:
            state.bandwidth.add(state.busy_bytes / state.busy)
            state.busy, state.busy_bytes = 0.0, 0

    # ---- what follows from it -------------------------------------------------------------------

    def order(self, nbytes: int, without: Iterable[str] = ()) -> list[str]:
        """The sources that may be asked now, the one from which `nbytes` should be here first in front. Now
        and then one that was not asked for long, since its link may be better by now."""
        with self._lock:
            now = self._clock()
            left_out = set(without)
            usable = [
                name
                for name, state in self._states.items()
                if name not in left_out and state.may_be_asked(now)
            ]
            usable.sort(key=lambda name: self._states[name].seconds(nbytes))
            if len(usable) > 1 and self._rng.random() < PROBE_SHARE:
                oldest = min(usable, key=lambda name: self._states[name].last_used)
                usable.remove(oldest)
                usable.insert(0, oldest)
            return usable

    def retry_in(self, without: Iterable[str] = ()) -> float:
        """Seconds until some source may be asked again; 0: one may now; inf: there is none."""
        with self._lock:
            now, left_out = self._clock(), set(without)
            return min(
                (
                    max(s.not_before - now, 0.0)
                    for n, s in self._states.items()
                    if n not in left_out
                ),
                default=math.inf,
            )

    def expected(self, nbytes: int) -> float:
        """Seconds until `nbytes` should be here from the best source; inf while none may be asked."""
        with self._lock:
            now = self._clock()
            usable = [s.seconds(nbytes) for s in self._states.values() if s.may_be_asked(now)]
            return min(usable, default=math.inf)

    def hedge_after(self, name: str, nbytes: int, expected: float) -> float:
        """Seconds after which a request that should take `expected` is late: the percentile of what
        requests to this source took. inf where too much was asked for twice already."""
        with self._lock:
            if self._hedged + nbytes > HEDGED_SHARE * self._asked + max(nbytes, FREE_HEDGES):
                return math.inf
            ratios = sorted(self._states[name].ratios)
            known = len(ratios) >= FEW
            ratio = ratios[int(PERCENTILE * len(ratios))] if known else FIRST_RATIO
            return max(LEAST_HEDGE, expected * max(ratio, 1.0))

    def best(self) -> tuple[str, Link] | None:
        """The source from which a small record should be here first, and its link; None while none may be
        asked."""
        with self._lock:
            now = self._clock()
            usable = [n for n, s in self._states.items() if s.may_be_asked(now)]
            if not usable:
                return None
            name = min(usable, key=lambda n: self._states[n].seconds(SAMPLE_BYTES))
        return name, self.link(name)

    def path_changed(self) -> None:
        """The way to the sources is another one now: those that failed may be asked at once."""
        with self._lock:
            for state in self._states.values():
                state.stalled, state.failures, state.not_before = False, 0, 0.0

    def is_up(self) -> bool:
        """Whether some source neither fails again and again nor has fallen silent."""
        with self._lock:
            return any(
                s.failures < DOWN_FAILURES and not s.stalled and not (s.failures and s.lasting)
                for s in self._states.values()
            )

    def link(self, name: str) -> Link:
        """Bandwidth and latency as the monitor has them; with 0 samples they are assumptions."""
        with self._lock:
            state = self._states[name]
            wait, bandwidth = state.wait.estimate, state.bandwidth.estimate
            return Link(
                bandwidth if bandwidth.samples else Estimate(FIRST_BANDWIDTH),
                wait if wait.samples else Estimate(FIRST_WAIT),
            )

    def stats(self) -> dict[str, dict[str, float | int | None]]:
        """By source: bytes/s and seconds to the first byte (None until known), bytes, transfers, failures,
        and seconds for which it is left alone."""
        with self._lock:
            now = self._clock()
            found = {}
            for name, state in self._states.items():
                wait, bandwidth = state.wait.estimate, state.bandwidth.estimate
                found[name] = {
                    "bandwidth": bandwidth.mean if bandwidth.samples else None,
                    "first_byte": wait.mean if wait.samples else None,
                    "bytes": state.total_bytes,
                    "transfers": state.transfers,
                    "failures": state.all_failures,
                    "left_alone": max(state.not_before - now, 0.0),
                }
            return found
