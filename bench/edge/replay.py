"""Plays a series on a testbed: rates, round trips, and handovers that switch the path."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from bench.edge.hosts import Testbed
from bench.edge.series import Moment


class Replay:
    """A thread that follows a series once. At a handover the old cell's interface loses its carrier and the next
    cell has it; without a serving cell the present one is a black hole. `log`: (second, event).

    events: (second, what to do), such as killing a server; done in order beside the series.
    """

    def __init__(
        self,
        bed: Testbed,
        moments: list[Moment],
        events: list[tuple[float, str, Callable[[], object]]] | None = None,
    ):
        self._bed, self._moments = bed, moments
        self._events = sorted(events or [], key=lambda event: event[0])
        self._stop = threading.Event()
        self.path = 0  # which cell of the testbed serves
        self.now = moments[0]
        self.log: list[tuple[float, str]] = []
        self.failed: BaseException | None = None
        self._cell = next((m.cell for m in moments if m.cell >= 0), 0)
        for cell in bed.cells:
            cell.set(moments[0].mbps, moments[0].rtt)
            cell.carrier(cell.idx == self.path)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> Replay:
        self.began = time.monotonic()
        self._thread.start()
        return self

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        if self.failed is not None:
            raise self.failed

    def _run(self) -> None:
        try:
            steps = [(m.second, 0, self._apply, m) for m in self._moments]
            steps += [(s, 1, self._event, (name, act)) for s, name, act in self._events]
            for second, _, act, what in sorted(steps, key=lambda step: step[:2]):
                if self._stop.wait(max(self.began + second - time.monotonic(), 0.0)):
                    return
                act(second, what)
        except BaseException as error:
            self.failed = error

    def _event(self, second: float, what: tuple[str, Callable[[], object]]) -> None:
        self.log.append((second, what[0]))
        what[1]()

    def _apply(self, second: float, moment: Moment) -> None:
        self.now = moment
        if moment.cell >= 0 and moment.cell != self._cell:
            self._cell = moment.cell
            old, self.path = self.path, (self.path + 1) % len(self._bed.cells)
            self.log.append((second, f"handover to cell {moment.cell}"))
            if old != self.path:
                self._bed.cells[old].carrier(False)
                self._bed.cells[self.path].carrier(True)
        cell = self._bed.cells[self.path]
        cell.set(moment.mbps, moment.rtt)
        gone = moment.cell < 0 or moment.mbps <= 0
        if gone == cell.passes:
            self.log.append((second, "link lost" if gone else "link back"))
        cell.black_hole(gone)
