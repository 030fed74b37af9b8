"""Experts that another machine computes for a running model: sends activations, and brings back the sums."""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout

import numpy as np
import torch

from comoe.policy.elsewhere import Elsewhere
from comoe.policy.plan import Levels
from comoe.runtime.spec import ExpertsSpec
from comoe.tiers.expert_client import ExpertClient, ExpertServerError, Refused
from comoe.tiers.expert_wire import Call, row_bytes

CONNECT_SECONDS = 5.0
log = logging.getLogger("comoe")


class ExpertsElsewhere:
    """Of one runtime. `policy` says what a call takes and whether the server may be asked.

    A server with another store, or other levels, is not asked; one that is away is asked again later.
    """

    def __init__(
        self, client: ExpertClient, store_id: bytes, specs: list[ExpertsSpec], levels: Levels
    ):
        self._client, self._store_id, self._specs, self._levels = client, store_id, specs, levels
        count = sum(spec.num_experts for spec in specs)
        widest = max(spec.hidden for spec in specs)
        self.policy = Elsewhere(np.full(count, -1), row_bytes(widest, client.wire))
        self._threads = ThreadPoolExecutor(2, "comoe-elsewhere")
        self._connecting: Future | None = None
        self._known = self._never = False
        self.last_error: str | None = None

    def tick(self) -> None:
        """Once per step: asks what the server has, until it has said so."""
        if self._known or self._never or self._connecting is not None or not self.policy.available:
            return
        self._connecting = self._threads.submit(self._connect)

    def _connect(self) -> None:
        try:
            info = self._client.info(CONNECT_SECONDS)
            counts = [len(layer) for layer in info.levels]
            if info.store_id != self._store_id or info.level_names != self._levels.names:
                raise Refused(f"{self._client.url}: it serves another store")
            if counts != [spec.num_experts for spec in self._specs]:
                raise Refused(f"{self._client.url}: it serves another model")
            level = np.concatenate(info.levels).astype(np.int64)
            if level.max() >= len(self._levels):
                raise Refused(f"{self._client.url}: it serves levels that this store has not")
            # What needs the model's own code cannot be computed from a store alone.
            torch_only = [np.full(s.num_experts, s.runs_in_torch) for s in self._specs]
            level[np.concatenate(torch_only)] = -1
            self.policy.level[:] = level
            self._known = True
        except ExpertServerError as error:
            self._note(error)
            self._never = isinstance(error, Refused)
        finally:
            self._connecting = None

    def send(
        self,
        layer_idx: int,
        hidden: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        experts: np.ndarray,
    ) -> Future:
        """Has `experts` int64 [n] of a layer computed; the rest of index [T, K] counts as no expert."""
        mine = np.where(np.isin(index.numpy(), experts), index.numpy(), -1).astype(np.int32)
        gates = weights.detach().to(torch.float32).numpy()
        x = hidden.detach().to(torch.float32).numpy()
        timeout = self.policy.timeout(len(x))
        call = Call(layer_idx, self._store_id, mine, gates, x, self._client.wire)
        return self._threads.submit(self._compute, call, timeout)

    def _compute(self, call: Call, timeout: float) -> np.ndarray | None:
        begin = time.perf_counter()
        try:
            result = self._client.compute(call, timeout)
        except (ExpertServerError, ValueError) as error:
            self._note(error)
            return None
        self.policy.succeeded(len(call.x), time.perf_counter() - begin, result.seconds)
        return result.out

    def result(self, future: Future, tokens: int) -> torch.Tensor | None:
        """float32 [T, H], or None: it failed, or is late."""
        try:
            out = future.result(self.policy.timeout(tokens))
        except FutureTimeout:
            return None  # `_compute` says so to the policy, at about the same time
        return None if out is None else torch.from_numpy(out)

    def _note(self, error: Exception) -> None:
        rest = self.policy.failed_call(getattr(error, "retry_after", None))
        self.last_error = str(error)
        log.info("experts elsewhere: %s; left alone for %.1f s", error, rest)

    def stats(self) -> dict:
        link = self.policy.link
        return {
            "server": self._client.url,
            "calls": self.policy.calls,
            "failed": self.policy.failed,
            "seconds": link.latency.mean,
            "bandwidth": link.bandwidth.mean,
            "last_error": self.last_error,
        }

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._client.close()
