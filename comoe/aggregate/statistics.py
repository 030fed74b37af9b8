"""What calibration says of one layer's experts: how often and how strongly they are used, on which inputs,
and how large an error of an approximation is where it matters.

Letters: N rows that reached the layer, T tokens of text, E experts, K per row, D domains, S sampled rows.
A reservoir bounds memory: of an expert's routed rows at most `limit` are used, drawn once without
replacement, and sums over them are scaled up.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch

from comoe.aggregate.calibration import Calibration
from comoe.aggregate.errors import AggregateError
from comoe.aggregate.experts import Expert, ExpertWeights, expert_forward, intermediate

LIMIT = 1024  # rows of an expert, calibration and held-out each
PROXY_ROWS = 64  # for an expert that no token chose
UNSEEN_USES = 0.5  # how often such an expert is taken to be used in T tokens (a rule of succession)


@dataclass(frozen=True)
class Routed:
    """Sampled rows of one expert. `scale`: uses per sampled row, so scale * sum(...) is over all uses."""

    rows: torch.Tensor  # int64 [S]
    gate: torch.Tensor  # fp32 [S]
    scale: float


class LayerStatistics:
    """Statistics of one layer; everything is computed when first asked for."""

    def __init__(
        self,
        weights: ExpertWeights,
        calibration: Calibration,
        layer: int,
        *,
        limit: int = LIMIT,
        seed: int = 0,
    ) -> None:
        if calibration.fingerprint != weights.fingerprint:
            raise AggregateError(
                f"{calibration.folder}: calibration of another checkpoint than the packed one; calibrate again"
            )
        self.weights, self.calibration, self.layer_idx = weights, calibration, layer
        self.spec = weights.specs[layer]
        self.record = calibration.layer(layer)
        self.limit = limit
        self._seed = seed
        self._last: tuple = (None, None)
        self.tokens_held_out = int(calibration.held_out.sum())
        self.tokens_fitted = calibration.num_tokens - self.tokens_held_out
        self._fitted = self._split(held_out=False)
        self._held_out = self._split(held_out=True)

    # ---- routing --------------------------------------------------------------------------------

    def _split(self, *, held_out: bool) -> list[Routed]:
        """Pairs of a row and an expert, by expert."""
        kept = self.record.held_out == held_out
        rows = kept.nonzero()[:, 0]
        experts = self.record.experts[rows].long()
        k = experts.shape[1] if experts.dim() == 2 else 1
        flat, order = experts.reshape(-1).sort(stable=True)
        bounds = torch.searchsorted(flat, torch.arange(self.spec.num_experts + 1)).tolist()
        gates = self.record.weights[rows].reshape(-1)
        generator = torch.Generator().manual_seed(self._seed)
        found = []
        for begin, end in zip(bounds, bounds[1:], strict=False):
            pairs, uses = order[begin:end], end - begin
            if uses > self.limit:
                chosen = torch.randperm(uses, generator=generator)[: self.limit]
                pairs = pairs[chosen.sort().values]
            found.append(Routed(rows[pairs // k], gates[pairs], uses / max(len(pairs), 1)))
        return found

    def routed(self, expert: int, *, held_out: bool) -> Routed:
        return (self._held_out if held_out else self._fitted)[expert]

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """int64 [D, E]: uses of each expert in each domain, held-out rows included."""
        return self._per_domain(np.ones(self.record.experts.shape)).round().astype(np.int64)

    @functools.cached_property
    def gate_sums(self) -> np.ndarray:
        """float64 [D, E]: sums of gate weights."""
        return self._per_domain(self.record.weights.double().numpy())

    def _per_domain(self, values: np.ndarray) -> np.ndarray:
        experts, num = self.record.experts.numpy().astype(np.int64), self.spec.num_experts
        domains = len(self.calibration.domains)
        index = self.record.domain.numpy().astype(np.int64)[:, None] * num + experts
        real = experts >= 0
        sums = np.bincount(index[real], values[real], minlength=domains * num)
        return sums.reshape(domains, num)

    @functools.cached_property
    def use(self) -> np.ndarray:
        """float64 [E]: probability that a token of the text uses the expert."""
        return self.counts.sum(0) / self.calibration.num_tokens

    # ---- inputs ---------------------------------------------------------------------------------

    def inputs(self, expert: int, *, held_out: bool) -> torch.Tensor:
        """float32 [S, H]: the rows of `routed`."""
        return self.record.inputs[self.routed(expert, held_out=held_out).rows].float()

    def proxy_rows(self) -> torch.Tensor:
        """int64 [S]: rows of the layer, whoever they were routed to; for experts that no token chose."""
        count = self.record.inputs.shape[0]
        generator = torch.Generator().manual_seed(self._seed)
        return torch.randperm(count, generator=generator)[:PROXY_ROWS].sort().values

    def evidence(self, expert: int) -> str:
        """On which rows an error of this expert is measured: "held-out", else "fitted", else "proxy"."""
        for held_out, name in ((True, "held-out"), (False, "fitted")):
            if len(self.routed(expert, held_out=held_out).rows):
                return name
        return "proxy"

    def evidence_rows(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(inputs [S, H], weight [S] float64): the mean over tokens of a squared gated quantity q is
        sum(weight * q), where q is that of one row without its gate."""
        kind = self.evidence(expert)
        if kind == "proxy":
            rows = self.proxy_rows()
            gates = self.record.weights[self.record.experts >= 0]
            mean = float(gates.double().square().mean()) if len(gates) else 1.0
            weight = mean * UNSEEN_USES / self.calibration.num_tokens / max(len(rows), 1)
            inputs = self.record.inputs[rows].float()
            return inputs, torch.full((len(rows),), weight, dtype=torch.float64)
        held_out = kind == "held-out"
        routed = self.routed(expert, held_out=held_out)
        tokens = self.tokens_held_out if held_out else self.tokens_fitted
        weight = routed.gate.double().square() * (routed.scale / tokens)
        return self.record.inputs[routed.rows].float(), weight

    # ---- errors ---------------------------------------------------------------------------------

    def _reference(self, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Inputs, weights and exact outputs; those of the last expert asked for are kept."""
        if self._last[0] != expert:
            inputs, weight = self.evidence_rows(expert)
            exact = self.weights.expert(self.layer_idx, expert)
            self._last = expert, (inputs, weight, expert_forward(inputs, exact, self.spec))
        return self._last[1]

    def gated_error(self, expert: int, approximation: Expert | torch.Tensor) -> float:
        """Mean over held-out tokens of g^2 ||f(x) - f'(x)||^2, 0 for a token that does not use the expert.

        approximation: an Expert, or a vector [H] that stands for every output. Where no held-out token
        used the expert, `evidence` says on which rows the error was measured instead.
        """
        inputs, weight, exact = self._reference(expert)
        if isinstance(approximation, Expert):
            approximation = expert_forward(inputs, approximation, self.spec)
        squared = (exact - approximation).double().square().sum(-1)
        error = float((weight * squared).sum())
        if not np.isfinite(error):
            raise AggregateError(
                f"{self.spec.name}: the error of an approximation of expert {expert} is not finite; its weights "
                "or outputs overflow"
            )
        return error

    def gated_energy(self, expert: int) -> float:
        """Mean over tokens of g^2 ||f(x)||^2: the error of leaving the expert out."""
        return self.gated_error(expert, torch.zeros(self.spec.hidden))

    # ---- second moments -------------------------------------------------------------------------

    def second_moments(
        self, expert: int, *, gated: bool = True, damp: float = 0.01
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(of the expert's inputs [H, H], of what its down projection reads [I, I]), float32: mean over its
        calibration rows of g^2 x x^T (g = 1 unless `gated`), plus `damp` times the mean of the diagonal.

        An expert without calibration rows gets those of `proxy_rows`.
        """
        routed = self.routed(expert, held_out=False)
        rows, gate = routed.rows, routed.gate
        if not len(rows):
            rows = self.proxy_rows()
            gate = torch.ones(len(rows))
        x = self.record.inputs[rows].float()
        a = intermediate(x, self.weights.expert(self.layer_idx, expert), self.spec)
        if gated:
            x, a = x * gate[:, None], a * gate[:, None]
        return _moment(x, damp), _moment(a, damp)


def _moment(x: torch.Tensor, damp: float) -> torch.Tensor:
    found = x.T @ x / max(len(x), 1)
    # Something must remain where the inputs were all zero, since the matrix is going to be inverted.
    mean = float(found.diagonal().mean()) or 1.0
    found.diagonal().add_(damp * mean)
    return found


def data_free_error(exact: Expert, approximation: Expert) -> float:
    """Sum over matrices of ||W - W'||^2 / ||W||^2: what is known of an error without calibration. To first
    order it is the output's relative squared error when the inputs are white."""
    pairs = zip(exact.matrices, approximation.matrices, strict=True)
    return sum(float((w - a).square().sum() / w.square().sum().clamp_min(1e-30)) for w, a in pairs)
