"""A bounded queue in front of one computing thread: what waits for the same layer is computed together."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from comoe.tiers.expert_wire import Call, Result


class Full(Exception):
    """As many calls as may wait do; `retry_after`: whole seconds until most of them should be done."""

    def __init__(self, retry_after: int):
        super().__init__(f"{retry_after} s")
        self.retry_after = retry_after


@dataclass
class Figures:
    """Since the start. busy: seconds of computing."""

    calls: int = 0
    batches: int = 0
    tokens: int = 0
    busy: float = 0.0
    shed: int = 0
    refused: int = 0
    failed: int = 0


class Batches:
    """compute: as ExpertHost.compute, called in a thread of its own, one call at a time.
    most_calls: that may be here at once, from before their body is read until they are answered.
    most_tokens: of a batch with more than one call."""

    def __init__(
        self,
        compute: Callable[[Sequence[Call]], tuple[list[np.ndarray], float]],
        *,
        most_calls: int = 32,
        most_tokens: int = 256,
    ):
        self._compute, self._most_calls, self._most_tokens = compute, most_calls, most_tokens
        self._waiting: deque[tuple[Call, asyncio.Future]] = deque()
        self._work = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "experts")
        self._task: asyncio.Task | None = None
        self._here = 0
        self.figures = Figures()

    # ---- who may come in ----------------------------------------------------------------------

    def enter(self) -> None:
        """Takes a place, before anything of the call is kept. Raises Full."""
        if self._here >= self._most_calls:
            self.figures.shed += 1
            per_call = self.figures.busy / max(self.figures.calls, 1)
            raise Full(max(1, math.ceil(self._here * per_call)))
        self._here += 1

    def leave(self) -> None:
        self._here -= 1

    async def result(self, call: Call) -> Result:
        """Of a call that has a place and that the host has checked."""
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        done = asyncio.get_running_loop().create_future()
        self._waiting.append((call, done))
        self._work.set()
        return await done

    # ---- computing ----------------------------------------------------------------------------

    def _next(self) -> list[tuple[Call, asyncio.Future]]:
        """The first that waits, and others of its layer in their order. Who has gone is left out."""
        batch: list[tuple[Call, asyncio.Future]] = []
        rest: deque[tuple[Call, asyncio.Future]] = deque()
        tokens = 0
        for call, done in self._waiting:
            if done.cancelled():
                continue
            alike = not batch or call.layer_idx == batch[0][0].layer_idx
            if alike and (not batch or tokens + len(call.x) <= self._most_tokens):
                batch.append((call, done))
                tokens += len(call.x)
            else:
                rest.append((call, done))
        self._waiting = rest
        return batch

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._work.wait()
            batch = self._next()
            if not batch:
                self._work.clear()
                continue
            calls = [call for call, _ in batch]
            try:
                outs, seconds = await loop.run_in_executor(self._thread, self._compute, calls)
            except Exception as error:
                self.figures.failed += len(batch)
                for _, done in batch:
                    if not done.done():
                        done.set_exception(error)
                continue
            self.figures.calls += len(batch)
            self.figures.batches += 1
            self.figures.tokens += sum(len(call.x) for call in calls)
            self.figures.busy += seconds
            for (_, done), out in zip(batch, outs, strict=True):
                if not done.done():
                    done.set_result(Result(out, seconds))

    async def close(self) -> None:
        """Ends the task; what waits is cancelled, and the computing thread is waited for."""
        if self._task is not None:
            self._task.cancel()
        for _, done in self._waiting:
            done.cancel()
        self._waiting.clear()
        await asyncio.get_running_loop().run_in_executor(None, self._thread.shutdown)
