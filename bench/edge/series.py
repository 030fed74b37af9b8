"""Links over time: reading them, and making those that are shipped.

A series is a CSV with the columns second, download_mbps, ping_ms (may be empty), cell (may be empty): what a
user's device gets from the cell that serves it. Other columns are ignored, so recordings that were reduced
to these can be replayed (`--series FILE`).

    python -m bench.edge.series        writes bench/edge/series/*.csv again, the same each time

The shipped ones are made up, from published parameters where there are some:

- Attenuation by distance, shadowing (standard deviation and correlation distance): street canyon without line of
  sight, 3GPP TR 38.901, tables 7.4.1-1 (35.3 dB per decade, 7.82 dB) and 7.5-6 (13 m); correlation falls
  exponentially with the distance walked (Gudmundson, Electronics Letters 27, 1991).
- Rate from the signal: 0.6 of Shannon's bound, at most 4.4 bit/s/Hz, none below -10 dB: 3GPP TR 36.942, annex A.
- Bad and good periods of congested Wi-Fi: two states with exponential stays (Gilbert, BSTJ 39, 1960).
- Assumed: cells 200 m apart, 40 MHz of which a user has a tenth to a half, 15 dB at 100 m, pings of 20 to 70 ms.
"""

from __future__ import annotations

import csv
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).with_name("series")
DEFAULT_PING = 0.05  # seconds, where a recording has none yet
MAX_BITS_PER_HZ, SHANNON_SHARE, LEAST_DB = 4.4, 0.6, -10.0
DB_PER_DECADE, SHADOW_DB, SHADOW_METRES = 35.3, 7.82, 13.0
DB_AT_100_M = 15.0


@dataclass(frozen=True)
class Moment:
    """second: since the start.  mbps: towards the device.  rtt: seconds.  cell: which one serves; -1: none."""

    second: float
    mbps: float
    rtt: float
    cell: int


def read(path: Path) -> list[Moment]:
    """Moments by time. An empty ping is the last one seen; an empty cell is none (no service)."""
    moments, rtt = [], DEFAULT_PING
    with open(path, newline="") as file:
        for line, row in enumerate(csv.DictReader(file), 2):
            try:
                rtt = float(row["ping_ms"]) / 1e3 if row["ping_ms"] else rtt
                cell = int(row["cell"]) if row["cell"] else -1
                moment = Moment(float(row["second"]), float(row["download_mbps"]), rtt, cell)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{path}, line {line}: expected the columns second, download_mbps, ping_ms and cell with "
                    f"numbers, got {row}"
                ) from error
            moments.append(moment)
    if not moments:
        raise ValueError(f"{path}: expected at least one line of figures, got none")
    if any(b.second <= a.second for a, b in itertools.pairwise(moments)):
        raise ValueError(f"{path}: expected seconds that rise from line to line")
    return moments


def window(moments: list[Moment], begin: float, seconds: float) -> list[Moment]:
    """The part from `begin` on, with seconds that start at 0."""
    before = [m for m in moments if m.second <= begin][-1:]
    after = [m for m in moments if begin < m.second < begin + seconds]
    return [Moment(max(m.second - begin, 0.0), m.mbps, m.rtt, m.cell) for m in before + after]


def busiest(moments: list[Moment], seconds: float) -> float:
    """Where the window with most handovers begins, the first of equals; a rule that looks at nothing else."""
    times = [b.second for a, b in itertools.pairwise(moments) if a.cell != b.cell]
    starts = [0.0, *(max(t - seconds / 2, 0.0) for t in times)]
    starts = [min(s, max(moments[-1].second - seconds, 0.0)) for s in starts]
    return max(starts, key=lambda s: (sum(s <= t < s + seconds for t in times), -s))


# ---- making them ------------------------------------------------------------------------------


def shadowing(rng: np.random.Generator, steps: int, metres: float) -> np.ndarray:
    """dB [steps], of a device that moves `metres` per step."""
    keep = np.exp(-metres / SHADOW_METRES)
    values = np.empty(steps)
    values[0] = rng.normal(0, SHADOW_DB)
    for i in range(1, steps):
        values[i] = keep * values[i - 1] + np.sqrt(1 - keep**2) * rng.normal(0, SHADOW_DB)
    return values


def rate(snr_db: np.ndarray, hertz: np.ndarray | float) -> np.ndarray:
    """Mbit/s at a signal-to-noise ratio in dB over a bandwidth."""
    bits = np.minimum(SHANNON_SHARE * np.log2(1 + 10 ** (snr_db / 10)), MAX_BITS_PER_HZ)
    return np.where(snr_db < LEAST_DB, 0.0, bits) * hertz / 1e6


def moving(
    rng: np.random.Generator,
    seconds: int,
    speed: float,
    spacing: float,
    gap: tuple[float, float] | None,
    hysteresis_db: float = 3.0,
) -> list[Moment]:
    """Along a street of cells: the strongest serves, once it is stronger by the hysteresis. gap: metres from
    and to where no cell is heard (an underpass)."""
    position = speed * np.arange(seconds)
    count = int(position[-1] // spacing) + 2
    distance = np.hypot(position[:, None] - spacing * np.arange(count), 20.0)
    shadow = np.stack([shadowing(rng, seconds, speed) for _ in range(count)], 1)
    snr = DB_AT_100_M - DB_PER_DECADE * np.log10(distance / 100.0) + shadow
    share = np.clip(shadowing(rng, seconds, 2.0) / (4 * SHADOW_DB) + 0.3, 0.1, 0.5)
    moments, cell = [], int(snr[0].argmax())
    for i in range(seconds):
        best = int(snr[i].argmax())
        if snr[i, best] > snr[i, cell] + hysteresis_db:
            cell = best
        lost = gap is not None and gap[0] <= position[i] < gap[1]
        mbps = 0.0 if lost else float(rate(snr[i, cell], 40e6 * share[i]))
        rtt = 0.02 + 0.03 / (1 + 10 ** (snr[i, cell] / 20))  # repeats where the signal is weak
        moments.append(Moment(i, mbps, float(rtt), -1 if lost else cell))
    return moments


def steady_5g(rng: np.random.Generator) -> list[Moment]:
    """Standing still near a cell."""
    snr = DB_AT_100_M + 3.0 + 0.2 * shadowing(rng, 60, 1.0)
    mbps = rate(snr, 40e6)
    return [Moment(i, float(mbps[i]), 0.02, 0) for i in range(60)]


def congested_wifi(rng: np.random.Generator) -> list[Moment]:
    """Good for 6 s on average, bad for 4."""
    moments, good, left = [], True, 0.0
    for i in range(60):
        if left <= 0:
            good = not good if i else True
            left = rng.exponential(6.0 if good else 4.0)
        left -= 1.0
        mbps = rng.lognormal(np.log(25.0 if good else 2.0), 0.3)
        moments.append(Moment(i, float(mbps), 0.008 if good else 0.060, 0))
    return moments


def walking(rng: np.random.Generator) -> list[Moment]:
    """From one cell to the next at 1.4 m/s, 10 s of nothing between: the middle 90 s of the way."""
    middle = 200.0 / 2
    way = moving(rng, 143, 1.4, 200.0, (middle - 7.0, middle + 7.0))
    return window(way, 27.0, 90.0)


def car(rng: np.random.Generator) -> list[Moment]:
    """At 50 km/h past a cell every 14 s."""
    return moving(rng, 90, 50 / 3.6, 200.0, None)


SHIPPED = {
    "steady-5g": steady_5g,
    "congested-wifi": congested_wifi,
    "walking": walking,
    "car": car,
}


def text_of(moments: list[Moment]) -> str:
    lines = ["second,download_mbps,ping_ms,cell"]
    for m in moments:
        cell = "" if m.cell < 0 else str(m.cell)
        lines.append(f"{m.second:g},{m.mbps:.3f},{m.rtt * 1e3:.1f},{cell}")
    return "\n".join(lines) + "\n"


def made(name: str) -> list[Moment]:
    """A shipped series, made anew."""
    return SHIPPED[name](np.random.default_rng([2026, sorted(SHIPPED).index(name)]))


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in SHIPPED:
        (FOLDER / f"{name}.csv").write_text(text_of(made(name)))
