"""What is: sensors sampled now and then, speeds learnt from the work itself, in one frozen Snapshot.

Sampling is limited to a share of the time: after a sample that took c seconds the next one comes no
sooner than c / share later. Between two samples a few notes of the work are enough. Absurd readings are ignored and counted; the fallbacks:

    memory      the last good reading; None until there is one
    pressure    0
    power       "mains" where there is no battery, "unknown" where its driver says nothing of the plug
    tiers       the prior (a device profile); without one a tier is unknown until its first transfer
    clock       if it runs backwards, time stands still for that moment and goes on from there
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping

from comoe.policy.sensors import Readings, Sensors, SystemSensors
from comoe.policy.smoothing import LinkEstimate, Smoothed
from comoe.policy.snapshot import Estimate, Link, Snapshot

SHARE = 0.002  # of the run time that sampling may take; with the note_ methods below 0.5 %
INTERVAL = 0.1  # seconds between samples at least
SLOW_EVERY = 100  # samples between looks at the battery
FASTEST = 1e14  # bytes/s, and weights/s; above it a clock was wrong
SLOWEST = 1.0
MOST_NOTES = 32  # between two samples; a link or a kernel does not change faster
TIER, SOURCE, COMPUTE, DENSE = "tier", "source", "compute", "dense"
UNKNOWN_LATENCY = 1e-4  # seconds, of a link that no profile describes


class Monitor:
    """Call `poll` from one thread, as often as you like, and the note_ methods from any.

    prior: links by tier as a device profile has them.  share: of run time that sampling may take.
    clock: seconds, for when to sample.  timer: seconds, for what a sample takes.
    """

    def __init__(
        self,
        sensors: Sensors | None = None,
        *,
        prior: Mapping[str, Link] | None = None,
        share: float = SHARE,
        interval: float = INTERVAL,
        clock: Callable[[], float] = time.monotonic,
        timer: Callable[[], float] = time.perf_counter,
    ):
        self._sensors = SystemSensors() if sensors is None else sensors
        self._share, self._interval = share, interval
        self._clock, self._timer = clock, timer
        # Appending to a deque is safe from any thread. With several, a few notes too many are kept.
        self._noted: deque[tuple[str, str, float, float, float]] = deque()
        self._tiers = {name: LinkEstimate(link) for name, link in (prior or {}).items()}
        self._sources: dict[str, LinkEstimate] = {}
        self._compute: dict[str, Smoothed] = {}
        self._dense = Smoothed()
        self._raw_time = self._time = 0.0
        self._started = False
        self._due = 0.0
        self._stalled: tuple[float, float] | None = None  # when, seconds stalled since the start
        self._snapshot = Snapshot(0.0)
        self.listening = True  # whether notes are kept; a caller may spare itself what makes them
        self.samples = 0
        self.seconds = 0.0  # that sampling took
        self.ignored: Counter[str] = Counter()  # absurd readings, by what they were of

    # ---- what the work tells ------------------------------------------------------------------
    # Only kept here: calls lie between other work, with cold caches. The next sample learns from them. Until
    # then the first MOST_NOTES are enough, and the rest are not listened to.

    def note_transfer(self, tier: str, num_bytes: float, seconds: float, requests: int = 1) -> None:
        """`num_bytes` came from a tier in `seconds` of its working time. requests: how many came one after
        the other, each with the tier's latency; what was in flight together counts once."""
        if self.listening:
            self._keep(TIER, tier, num_bytes, seconds, requests)

    def note_network(
        self, source: str, num_bytes: float, seconds: float, requests: int = 1
    ) -> None:
        """The same of a network source."""
        if self.listening:
            self._keep(SOURCE, source, num_bytes, seconds, requests)

    def note_compute(self, level: str, weights: float, seconds: float) -> None:
        """One token went through `weights` weights, all at one level, with nothing waited for."""
        if self.listening:
            self._keep(COMPUTE, level, weights, seconds, 1)

    def note_dense(self, seconds: float, tokens: int = 1) -> None:
        """What one decoding step spent outside the experts."""
        if self.listening:
            self._keep(DENSE, DENSE, tokens, seconds, 1)

    def _keep(self, *note) -> None:
        self._noted.append(note)
        self.listening = len(self._noted) < MOST_NOTES

    def _learn(self) -> None:
        """From what was noted since the last sample."""
        while self._noted:
            kind, name, amount, seconds, requests = self._noted.popleft()
            least = 0.0 if kind == DENSE else SLOWEST
            if not _speed(amount, seconds, least) or not 0 < requests < math.inf:
                self.ignored[name] += 1
            elif kind in (TIER, SOURCE):
                links = self._tiers if kind == TIER else self._sources
                if name not in links:
                    first = Link(Estimate(amount / seconds), Estimate(UNKNOWN_LATENCY))
                    links[name] = LinkEstimate(first)
                links[name].add(amount, seconds, requests)
            elif kind == COMPUTE:
                self._compute.setdefault(name, Smoothed()).add(seconds / amount)
            else:
                self._dense.add(seconds / amount)
        self.listening = True

    # ---- what the sensors tell ----------------------------------------------------------------

    def poll(self) -> Snapshot:
        """The present snapshot; a new one if it is time for it."""
        now = self._now()
        if self._started and now < self._due:
            return self._snapshot
        return self.sample()

    def sample(self) -> Snapshot:
        """A new snapshot at once."""
        begin = self._timer()
        now = self._now()
        readings = self._sensors.read(slow=self.samples % SLOW_EVERY == 0)
        self._learn()
        self._snapshot = self._judge(now, readings)
        self._started = True
        self.samples += 1
        took = self._timer() - begin
        took = took if 0 <= took < math.inf else 0.0
        self.seconds += took
        self._due = now + max(self._interval, took / self._share)
        return self._snapshot

    def _now(self) -> float:
        """Seconds that never run backwards."""
        raw = self._clock()
        if not math.isfinite(raw):
            self.ignored["clock"] += 1
            return self._time
        if self.samples:
            if raw < self._raw_time:
                self.ignored["clock"] += 1
            self._time += max(raw - self._raw_time, 0.0)
        self._raw_time = raw
        return self._time

    def _judge(self, now: float, readings: Readings) -> Snapshot:
        last = self._snapshot
        free, total = readings.host_free, readings.host_total
        if not (_within(total, 1, math.inf) and _within(free, 0, total)):
            self.ignored["host memory"] += 1
            free, total = last.host_free, last.host_total
        device = readings.device_free
        if device is not None and not _within(device, 0, math.inf):
            self.ignored["device memory"] += 1
            device = last.device_free
        power, battery = last.power, last.battery
        if self.samples % SLOW_EVERY == 0:
            power, battery = self._judge_power(readings)
        return Snapshot(
            now,
            None if free is None else int(free),
            None if total is None else int(total),
            None if device is None else int(device),
            self._judge_pressure(now, readings.stalled),
            {name: link.link for name, link in self._tiers.items()},
            {name: speed.estimate for name, speed in self._compute.items()},
            self._dense.estimate if self._dense.estimate.samples else None,
            power,
            battery,
            {name: link.link for name, link in self._sources.items()},
        )

    def _judge_pressure(self, now: float, stalled: float | None) -> float:
        before, self._stalled = self._stalled, None if stalled is None else (now, stalled)
        if before is None or stalled is None or now <= before[0]:
            return 0.0
        share = (stalled - before[1]) / (now - before[0])
        if not 0 <= share < math.inf:
            self.ignored["pressure"] += 1
            return 0.0
        return min(share, 1.0)

    def _judge_power(self, readings: Readings) -> tuple[str, float | None]:
        battery = readings.battery
        if battery is None:
            return "mains", None
        if not _within(battery, 0, 1.01):
            self.ignored["battery"] += 1
            battery = None
        if readings.plugged is None:
            return "unknown", battery
        return "mains" if readings.plugged else "battery", battery


def _within(value: float | None, low: float, high: float) -> bool:
    return value is not None and low <= value <= high and value < math.inf


def _speed(amount: float, seconds: float, least: float) -> bool:
    """Whether both are numbers above 0 with a speed that can be."""
    return 0 < amount < math.inf and 0 < seconds < math.inf and least <= amount / seconds <= FASTEST
