"""Straight lines through measurements: a slope with its confidence, and the exponent of a growth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Slope:
    """value, and the ends of its 95% interval; nan where the points are too few to tell."""

    value: float
    low: float
    high: float


def slope(x: Sequence[float], y: Sequence[float]) -> Slope:
    """Least squares. Neighbours in time resemble each other, so that n points tell less than n
    independent ones: the interval counts n (1 - r) / (1 + r) of them, r the lag-1 autocorrelation of the
    residuals if it is positive (Santer et al. 2000, doi:10.1029/1999JD901105)."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    if len(x) < 4 or np.ptp(x) == 0:
        return Slope(float("nan"), float("nan"), float("nan"))
    fit = stats.linregress(x, y)
    rest = y - (fit.intercept + fit.slope * x)
    power = (rest**2).sum()
    if power <= 1e-18 * max((y**2).sum(), 1e-300):  # a line exactly
        return Slope(fit.slope, fit.slope, fit.slope)
    r = max(float((rest[1:] * rest[:-1]).sum() / power), 0.0)
    independent = max(len(x) * (1 - r) / (1 + r), 2.5)
    error = np.sqrt(power / (independent - 2) / ((x - x.mean()) ** 2).sum())
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, independent - 2) * error)
    return Slope(float(fit.slope), float(fit.slope) - half, float(fit.slope) + half)


def exponent(x: Sequence[float], y: Sequence[float]) -> Slope:
    """p of y ~ x^p: the slope of log y over log x."""
    return slope(np.log(x), np.log(y))
