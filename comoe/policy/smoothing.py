"""Smoothed estimates of what is measured again and again: means that follow steps, and links.

Plain floats, no numpy: an update takes a few microseconds, and happens for every transfer.
"""

from __future__ import annotations

import math

from comoe.policy.snapshot import Estimate, Link

OUTLIER = 4.0  # standard deviations from which a sample is not noise
PATIENCE = 3  # samples in a row on the same side that are a step and no outliers
LEAST_NOISE = 0.02  # relative; a sensor that repeats itself is not taken to be exact
FEW = 5  # samples; with fewer the spread is not known well enough to call anything an outlier


class _Steps:
    """Tells noise, single outliers and steps apart by the standardised distance of each sample."""

    def __init__(self) -> None:
        self.found = 0
        self._run = 0

    def judge(self, z: float) -> tuple[float, bool]:
        """The distance to count (an outlier only up to OUTLIER), and whether a step is certain now."""
        if abs(z) <= OUTLIER:
            self._run = 0
            return z, False
        side = 1 if z > 0 else -1
        self._run = self._run + side if self._run * side > 0 else side
        if abs(self._run) < PATIENCE:
            return side * OUTLIER, False
        self._run = 0
        self.found += 1
        return z, True


class Smoothed:
    """Exponentially smoothed mean and variance of samples > 0, of their logarithms: half as much is as far
    from the mean as twice as much. After a step both start again.

    alpha: weight of a new sample once there are 1 / alpha of them.
    """

    def __init__(self, alpha: float = 0.1):
        self._alpha = alpha
        self._mean = self._variance = 0.0
        self._weight = 0  # samples since the last step
        self._samples = 0
        self._steps = _Steps()

    @property
    def steps(self) -> int:
        """Steps that were found."""
        return self._steps.found

    @property
    def estimate(self) -> Estimate:
        """The geometric mean."""
        if not self._samples:
            return Estimate(0.0)
        mean = math.exp(self._mean)
        return Estimate(mean, math.sqrt(self._variance) * mean, self._samples)

    def add(self, sample: float) -> bool:
        """One more sample. Returns whether it made a step certain."""
        self._samples += 1
        step, value = False, math.log(sample)
        away = value - self._mean
        if self._weight >= FEW:
            noise = max(math.sqrt(self._variance), LEAST_NOISE)
            z, step = self._steps.judge(away / noise)
            away = z * noise
        if step or self._weight == 0:
            self._mean, self._variance, self._weight = value, 0.0, 1
            return step
        self._weight += 1
        share = max(self._alpha, 1.0 / self._weight)
        self._mean += share * away
        self._variance = (1.0 - share) * (self._variance + share * away * away)
        return False


class LinkEstimate:
    """Bandwidth and latency of a link, learnt from its transfers.

        seconds = requests * latency + bytes / bandwidth

    The logarithms of both unknowns are tracked by an extended Kalman filter that forgets. While all
    transfers are of one size they cannot be told apart: both scale together then, as at a step.
    """

    DRIFT = 0.03  # variance that is added with every sample, in units of the noise
    UNSURE = 1.0  # standard deviation of the prior's logarithms
    NOISE = 0.3  # that of one sample, before any was seen
    ALIKE = 0.2  # standard deviation of the logarithms of sizes below which they are of one size

    def __init__(self, prior: Link):
        self._bandwidth, self._latency = prior.bandwidth.mean, prior.latency.mean
        self._noise = self.NOISE**2
        self._samples = 0
        self._size = self._size_variance = 0.0  # of log(bytes per request)
        self._steps = _Steps()
        self._doubt()

    def _doubt(self) -> None:
        # Covariance of the errors of log(1 / bandwidth) and log(latency).
        self._p = (self.UNSURE**2, 0.0, self.UNSURE**2)

    @property
    def steps(self) -> int:
        return self._steps.found

    @property
    def link(self) -> Link:
        spread = math.sqrt(self._noise)
        return Link(
            Estimate(self._bandwidth, spread * self._bandwidth, self._samples),
            Estimate(self._latency, spread * self._latency, self._samples),
        )

    def expected(self, num_bytes: float, requests: float) -> float:
        """Seconds that a transfer should take."""
        return requests * self._latency + num_bytes / self._bandwidth

    def add(self, num_bytes: float, seconds: float, requests: float) -> bool:
        """One transfer, all three above 0. Returns whether it made a step certain."""
        self._samples += 1
        expected = self.expected(num_bytes, requests)
        # Derivatives of log(expected): the shares of the two in it.
        h0 = num_bytes / self._bandwidth / expected
        h1 = 1.0 - h0
        away = math.log(seconds / expected)
        p00, p01, p11 = self._p
        g0, g1 = p00 * h0 + p01 * h1, p01 * h0 + p11 * h1
        spread = math.sqrt(g0 * h0 + g1 * h1 + self._noise)
        if self._samples > FEW:
            z, step = self._steps.judge(away / spread)
            if step:
                self._move(away, away)
                self._doubt()
                return True
            away = z * spread
        k0, k1 = g0 / spread**2, g1 / spread**2
        if self._alike(math.log(num_bytes / requests)):
            both = (k0 * h0 + k1 * h1) * away
            self._move(both, both)
        else:
            self._move(k0 * away, k1 * away)
        # Only what this sample tells of is forgotten: otherwise noise walks off with the rest.
        drift = self.DRIFT * self._noise / (h0 * h0 + h1 * h1)
        self._p = (
            p00 - k0 * g0 + drift * h0 * h0,
            p01 - k0 * g1 + drift * h0 * h1,
            p11 - k1 * g1 + drift * h1 * h1,
        )
        share = max(0.1, 1.0 / (self._samples + 1))
        self._noise += share * (max(away * away, LEAST_NOISE**2) - self._noise)
        return False

    def _alike(self, size: float) -> bool:
        """Whether the transfers so far are of one size, as far as is still remembered."""
        share = max(0.05, 1.0 / self._samples)
        apart = size - self._size
        self._size += share * apart
        self._size_variance = (1.0 - share) * (self._size_variance + share * apart * apart)
        return self._size_variance < self.ALIKE**2

    def _move(self, slower: float, later: float) -> None:
        self._bandwidth *= math.exp(-slower)
        self._latency *= math.exp(later)
