"""A user who moves: when the way to the sources has become another one, and when it is about to be lost.

    interface   the network interface that carries the default route, or any with a carrier, changed
    source      bytes come first from another source, and its figures are others
    step        bandwidth or latency is another by a factor that the smoothing calls a step
    lost, back  no source answers any more; one does again

numpy is not needed: a look takes microseconds, and happens once per step.
"""

from __future__ import annotations

import math
import os
from collections import deque
from dataclasses import dataclass

from comoe.policy.snapshot import Link

STEP = 2.0  # factor of bandwidth or latency that is another link
ALIKE = (
    1.25  # factor up to which another source is no other path: of two alike each is best by turns
)
SETTLED = 3  # looks for which a step must last
TREND_SECONDS = 6.0  # of bandwidths that a trend is fitted to
LEAST_TREND = 4  # different figures
SOON = 4.0  # seconds: a link that will be useless by then is about to be lost
USELESS = 0.1  # share of the trend's first bandwidth that is none
NOISY = 0.7  # correlation below which bandwidths show no trend


@dataclass(frozen=True)
class Path:
    """What is seen at one moment. link: None: no source may be asked.  source: the best one's name.
    interface: names of those with a carrier, joined; "" where that is not known."""

    time: float
    link: Link | None
    source: str = ""
    interface: str = ""


class PathWatch:
    """Tells changes of the path. `log`: (seconds, what), the newest 256."""

    def __init__(self) -> None:
        self._last: Path | None = None
        self._up: Link | None = None  # that the present figures are compared with
        self._source = ""  # from which `_up` is
        self._away = 0
        self._trend: deque[tuple[float, float]] = deque()
        self.log: deque[tuple[float, str]] = deque(maxlen=256)
        self.losing = False

    def look(self, path: Path) -> str | None:
        """What has changed since the last look, for people; None: nothing."""
        last, self._last = self._last, path
        reason = None if last is None else self._changed(last, path)
        if reason is not None:
            self._up, self._source, self._away = path.link, path.source, 0
            if not reason.startswith("bandwidth"):
                self._trend.clear()
            self.log.append((path.time, reason))
        elif self._up is None:
            self._up, self._source = path.link, path.source
        self.losing = self._will_be_lost(path)
        return reason

    def _changed(self, last: Path, path: Path) -> str | None:
        if last.interface != path.interface:
            return f"interface {last.interface or 'none'} -> {path.interface or 'none'}"
        if last.link is not None and path.link is None:
            return "link lost"
        if path.link is None:
            return None
        if last.link is None:
            return "link back"
        return self._stepped(path)

    def _stepped(self, path: Path) -> str | None:
        """Whether the figures are others for good."""
        was, link = self._up, path.link
        if was is None or not (was.bandwidth.samples and link.bandwidth.samples):
            self._up, self._source = link, path.source
            return None
        moved = path.source != self._source
        ratio = link.bandwidth.mean / max(was.bandwidth.mean, 1e-9)
        later = link.latency.mean / max(was.latency.mean, 1e-9)
        far = max(abs(math.log(max(ratio, 1e-9))), abs(math.log(max(later, 1e-9))))
        self._away = self._away + 1 if far > math.log(ALIKE if moved else STEP) else 0
        if self._away < SETTLED:
            return None
        if moved:
            return f"source {self._source} -> {path.source}"
        return f"bandwidth x {ratio:.2g}, latency x {later:.2g}"

    def _will_be_lost(self, path: Path) -> bool:
        """A line through the logarithms of the last bandwidths, carried on for SOON seconds."""
        if path.link is None or not path.link.bandwidth.samples:
            return False
        value = math.log(path.link.bandwidth.mean)
        if not self._trend or self._trend[-1][1] != value:
            self._trend.append((path.time, value))
        while self._trend and path.time - self._trend[0][0] > TREND_SECONDS:
            self._trend.popleft()
        if len(self._trend) < LEAST_TREND:
            return False
        times = [t for t, _ in self._trend]
        values = [v for _, v in self._trend]
        mean_t, mean_v = sum(times) / len(times), sum(values) / len(values)
        tt = sum((t - mean_t) ** 2 for t in times)
        vv = sum((v - mean_v) ** 2 for v in values)
        tv = sum((t - mean_t) * (v - mean_v) for t, v in self._trend)
        if tt <= 0 or vv <= 0 or tv >= 0 or -tv < NOISY * math.sqrt(tt * vv):
            return False
        slope = tv / tt
        then = mean_v + slope * (path.time + SOON - mean_t)
        return then < values[0] + math.log(USELESS)


def carriers(root: str = "/sys/class/net") -> str:
    """Interfaces other than loopback that have a carrier, joined; "" where the system does not say."""
    up = []
    try:
        for name in sorted(os.listdir(root)):
            if name == "lo":
                continue
            try:
                with open(f"{root}/{name}/carrier") as file:
                    if file.read(1) == "1":
                        up.append(name)
            except OSError:
                pass  # one that is down refuses to say
    except OSError:
        return ""
    return "+".join(up)
