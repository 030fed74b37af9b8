"""Errors of aggregation."""

from __future__ import annotations


class AggregateError(ValueError):
    """Aggregation cannot start or go on; the message says what to do."""


class CalibrationError(AggregateError):
    """Calibration records are missing, damaged, or of another model, or text cannot give any."""
