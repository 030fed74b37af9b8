"""The experts of one layer at work: what to wait for, what to read ahead, and which kernels compute."""

from __future__ import annotations

import numpy as np
import torch

from comoe.policy.predictor import Predictor, PrefetchGauge
from comoe.runtime.budget import EXPERT_ROWS
from comoe.runtime.parts import Parts
from comoe.runtime.placement import Placement
from comoe.runtime.prefill import forward_unpacked
from comoe_kernels.unpack import DTYPES

NATIVE_GATE_TOKENS = 8  # more are a product for torch
GIVING_UP = 5  # times that a layer is computed anew because what it waited for did not come
_NONE = np.empty(0, np.int64)


class Compute:
    """Computes experts where `placement` says they are, and tells the policy what was used.

    used: views [layers] of uint8 [E], level used + 1 in this step.
    """

    def __init__(
        self,
        parts: Parts,
        placement: Placement,
        predictor: Predictor,
        gauge: PrefetchGauge,
        used: list[np.ndarray],
    ):
        self.parts, self.placement = parts, placement
        self.predictor, self.gauge = predictor, gauge
        self._used = used
        self.routes = parts.config.routing_tolerance > 0  # by what is resident

    def forward(
        self,
        layer_idx: int,
        hidden: torch.Tensor,
        index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Weighted sum of the chosen experts. hidden: [T, H] with columns side by side.  index: int64 [T, K],
        contiguous.  top_k_weights: [T, K].  Returns [T, H] like `hidden`."""
        parts = self.parts
        local, low, sent = self._face_misses(layer_idx, index, top_k_weights)
        call = None
        if sent.size:
            call = parts.network.away.send(layer_idx, hidden, index, top_k_weights, sent)
        if parts.remote is None or parts.config.exact or self.placement.complete:
            out = self._here(layer_idx, hidden, local, top_k_weights, low)
        else:
            out = self._from_afar(layer_idx, hidden, local, top_k_weights, low)
        if call is not None:
            other = parts.network.away.result(call, len(index))
            if other is None:
                out += self._without_waiting(layer_idx, hidden, index, top_k_weights, sent)
            else:
                out = (out.float() + other).to(out.dtype)
        return out

    def _from_afar(
        self,
        layer_idx: int,
        hidden: torch.Tensor,
        index: torch.Tensor,
        top_k_weights: torch.Tensor,
        low: np.ndarray | None,
    ) -> torch.Tensor:
        """As `_here`, without waiting for what cannot come in time."""
        remote, placement = self.parts.remote, self.placement
        want = placement.want_level[layer_idx]
        rule = low is not None
        low = placement.low[layer_idx] if low is None else low
        for left in reversed(range(GIVING_UP)):
            faced = remote.face(layer_idx, index.numpy(), low, want, rule=rule)
            if faced is None:
                return self._here(layer_idx, hidden, index, top_k_weights, low)
            try:
                with remote.waiting(faced[2]):
                    chosen = torch.from_numpy(faced[0])
                    return self._here(layer_idx, hidden, chosen, top_k_weights, faced[1])
            except OSError as error:
                if not left or not remote.gave_up(error):
                    raise
                self.parts.network.late()
                rule = False

    def _without_waiting(
        self,
        layer_idx: int,
        hidden: torch.Tensor,
        index: torch.Tensor,
        top_k_weights: torch.Tensor,
        only: np.ndarray,
    ) -> torch.Tensor:
        """Of experts `only` int64 [n], with nothing but what is here."""
        parts = self.parts
        want = self.placement.want_level[layer_idx]
        found, low = parts.missing.without_waiting(layer_idx, index.numpy(), only, want)
        index = torch.from_numpy(found)
        if parts.remote is None:
            return self._here(layer_idx, hidden, index, top_k_weights, low)
        return self._from_afar(layer_idx, hidden, index, top_k_weights, low)

    def _here(
        self,
        layer_idx: int,
        hidden: torch.Tensor,
        index: torch.Tensor,
        top_k_weights: torch.Tensor,
        low: np.ndarray | None,
    ) -> torch.Tensor:
        """On this machine. low: uint8 [E] where compute may start; None: as the plan's rule decides."""
        parts, placement = self.parts, self.placement
        policy, spec = parts.policy, parts.specs[layer_idx]
        tokens, k = index.shape
        weights = top_k_weights.to(torch.float32).contiguous()
        routing = (index.data_ptr(), weights.data_ptr(), tokens, k)
        guesses = self._guess(layer_idx, hidden)
        rows = tokens * k / min(spec.num_experts, max(tokens * k, 1))
        part = max(EXPERT_ROWS // (4 * k * (spec.hidden + spec.intermediate)), 1)
        unpacked = spec.runs_in_torch or rows >= placement.prefill_rows[layer_idx]
        # Parts would read missing experts again, so there all tokens go through one expert at a time: by the
        # same kernel, since outputs must not depend on what is resident.
        at_once = tokens <= part or placement.plan.resident
        if unpacked or not at_once:
            policy.note_routing(layer_idx, *routing)
            if low is None:
                decided = policy.decide(layer_idx, *routing)
                index, low = (
                    (torch.from_numpy(decided[0]), decided[1]) if decided else (index, None)
                )
            if any(gate for _, _, gate in guesses):
                guesses = self._predict(layer_idx, hidden)
            ahead = policy.read_ahead(layer_idx, guesses)
            used = np.zeros(spec.num_experts, np.uint8)
            out = forward_unpacked(
                parts.op, layer_idx, spec, hidden, index, top_k_weights, used, ahead, low,
                by_kernel=not unpacked,
            )  # fmt: skip
            policy.ran(layer_idx, used)
        else:
            out = torch.empty((tokens, spec.hidden), dtype=hidden.dtype)
            policy.step(
                parts.op,
                layer_idx,
                hidden.data_ptr(),
                DTYPES[hidden.dtype],
                hidden.stride(0),
                index.data_ptr(),
                weights.data_ptr(),
                tokens,
                k,
                out.data_ptr(),
                hidden.dtype != torch.float32 and top_k_weights.dtype == hidden.dtype,
                part,
                low,
                guesses,
                self._own_gate(layer_idx, tokens),
            )
        if parts.kept.watches and not placement.plan.resident:
            parts.kept.note(layer_idx, self._used[layer_idx])
        return out

    def _face_misses(
        self, layer_idx: int, index: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, np.ndarray | None, np.ndarray]:
        """The indices to compute here, the levels to start at, and the experts that another machine computes, if
        a rule in Python decides what not to wait for; else all of them, None and none."""
        placement = self.placement
        rule = placement.network_rule
        if placement.own_rule is not None:
            rule = None if placement.plan.resident else placement.own_rule
        if rule is None:
            return index, None, _NONE
        low, want = placement.min_level[layer_idx], placement.want_level[layer_idx]
        gates = weights.detach().to(torch.float32).numpy()
        decided = self.parts.missing.decide(rule, layer_idx, index.numpy(), gates, low, want)
        if decided is None:
            return index, low, _NONE
        return torch.from_numpy(decided[0]), decided[1], decided[2]

    def _own_gate(self, layer_idx: int, tokens: int) -> tuple | None:
        """The layer's router for the native half, if routing goes by what is resident."""
        if not self.routes or tokens > NATIVE_GATE_TOKENS:
            return None
        return self.predictor.own_gate(layer_idx)

    def _guess(self, layer_idx: int, hidden: torch.Tensor) -> list[tuple]:
        """What to read ahead while this layer computes: (later layer, its likely experts, None), or its
        gate for the native half to ask: (later layer, None, gate)."""
        last = layer_idx + 1 == len(self.parts.specs)
        if last or self.placement.plan.resident or not self.gauge.useful:
            return []
        if len(hidden) <= NATIVE_GATE_TOKENS and not self.parts.kept.watches:
            gates = self.predictor.linear_gates(layer_idx)
            if gates:
                return [(later, None, gate) for later, gate in gates]
        return self._predict(layer_idx, hidden)

    def _predict(self, layer_idx: int, hidden: torch.Tensor) -> list[tuple]:
        guesses = []
        for later, experts in self.predictor.predict(layer_idx, hidden):
            if self.parts.kept.watches:
                self.parts.kept.predicted(layer_idx, later, experts)
            guesses.append((later, np.asarray(experts, np.int64), None))
        return guesses
