"""A figure to plan with: bad news is believed at once, good news when it has lasted."""

from __future__ import annotations

CALM = 2.0  # seconds that good news must last
LONGEST_CALM = 4.0  # where good news was wrong of late
FORGIVE = 60.0  # seconds after which a good news that was wrong is forgotten


class Cautious:
    """Follows a noisy figure of which more is better.

    It falls at once when the figure is below the value by more than `fall` of it, to `overshoot` below the
    figure, so that a figure that goes on falling slowly costs one change for every few per cent. It rises
    when the figure stayed above the value by more than `rise` of it for `calm` seconds, to the least that it
    was in that time; so a figure that swings faster than that costs one change in all. Where it fell within a
    minute of a rise, the next rise takes twice as long, up to 4 s.
    """

    def __init__(self, fall: float, rise: float, *, overshoot: float = 0.0, calm: float = CALM):
        self._fall, self._rise, self._overshoot, self.calm = fall, rise, overshoot, calm
        self.value: float | None = None
        self._least: float | None = None  # since `_since`, while the news is good
        self._since = 0.0
        self._risen: float | None = None  # when it last rose
        self._wait = calm

    def reset(self, value: float | None) -> None:
        """Starts again; None: from the next figure."""
        self.value, self._least, self._risen, self._wait = value, None, None, self.calm

    def update(self, time: float, figure: float, noise: float = 0.0) -> float:
        """The value to plan with now. time: seconds, never less than before.  noise: a difference up to
        this is no news."""
        if self.value is None:
            self.value = figure
        elif figure < self.value - max(self._fall * self.value, noise):
            self.value, self._least = (1.0 - self._overshoot) * figure, None
            if self._risen is not None and time - self._risen < FORGIVE:
                self._wait = min(2.0 * self._wait, max(LONGEST_CALM, self.calm))
        elif figure > self.value + max(self._rise * self.value, noise):
            if self._least is None:
                self._least, self._since = figure, time
            self._least = min(self._least, figure)
            if time - self._since >= self._wait:
                self.value, self._least, self._risen = self._least, None, time
        else:
            self._least = None
        if self._risen is not None and time - self._risen >= FORGIVE:
            self._risen, self._wait = None, self.calm
        return self.value
