"""What calibration says of one layer's experts: how often and how strongly they are used, on which inputs,
and how large an error of an approximation is where it matters.

Letters: N rows that reached the layer, T tokens of text, E experts, K per row, D domains, S sampled rows.
A reservoir bounds memory: of an expert's routed rows at most `limit` are used, drawn once without
replacement, and sums over them are scaled up.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from comoe.aggregate.calibration import Calibration
from comoe.aggregate.errors import AggregateError
from comoe.aggregate.experts import Expert, ExpertWeights, expert_forward, intermediate

LIMIT = 1024  # rows of an expert, calibration and held-out each
SAMPLE_ROWS = 1024  # of a layer, on which all experts are compared
SAMPLE_BYTES = 256_000_000  # of their outputs
PEAK_ROWS = 64  # inputs of largest magnitude, looked at for super experts beside the sampled ones
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
        for begin, end in itertools.pairwise(bounds):
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

    @functools.cached_property
    def gate_moments(self) -> np.ndarray:
        """float64 [E, E]: mean over calibration tokens of g_i g_j, 0 where a token does not use an expert.
        From rows that carry one expert each (see calibration.py) only the diagonal is known."""
        return self._pairs(self.record.weights.double()) / self.tokens_fitted

    @functools.cached_property
    def co_activation(self) -> np.ndarray:
        """int64 [E, E]: calibration tokens that use both experts; on the diagonal, that use one."""
        used = torch.ones(self.record.experts.shape, dtype=torch.float64)
        return self._pairs(used).round().astype(np.int64)

    def _pairs(self, values: torch.Tensor) -> np.ndarray:
        num, total = self.spec.num_experts, 0
        kept = (~self.record.held_out).nonzero()[:, 0]
        for rows in kept.split(8192):
            # Column E takes what is no expert.
            dense = torch.zeros(len(rows), num + 1, dtype=torch.float64)
            index = self.record.experts[rows].long()
            dense.scatter_add_(1, torch.where(index < 0, num, index), values[rows])
            total = total + dense[:, :num].T @ dense[:, :num]
        return total.numpy() if len(kept) else np.zeros((num, num))

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

    def mean_output(self, expert: int) -> torch.Tensor:
        """float32 [H]: mean of f(x) over calibration rows, weighted by g^2, which is the constant of least
        gated error. As in MoNE (arXiv 2507.00390), where a pruned expert becomes its mean output."""
        routed = self.routed(expert, held_out=False)
        rows, gate = routed.rows, routed.gate.square()
        if not len(rows) or not gate.any():
            rows = self.proxy_rows()
            gate = torch.ones(len(rows))
        out = self._forward(expert, rows)
        return (gate[:, None] * out).sum(0) / gate.sum()

    def _forward(self, expert: int, rows: torch.Tensor) -> torch.Tensor:
        weights = self.weights.expert(self.layer_idx, expert)
        return expert_forward(self.record.inputs[rows].float(), weights, self.spec)

    # ---- importance -----------------------------------------------------------------------------

    @functools.cached_property
    def saliency(self) -> np.ndarray:
        """float64 [E]: mean of g ||f(x)|| over the tokens that use the expert, as in REAP; 0 if none does."""
        return self._importance[0]

    @functools.cached_property
    def peaks(self) -> np.ndarray:
        """float64 [E]: largest magnitude in the expert's output; see `super_experts`."""
        return self._importance[1]

    @functools.cached_property
    def _importance(self) -> tuple[np.ndarray, np.ndarray]:
        saliency, peaks = np.zeros((2, self.spec.num_experts))
        extreme = self._extreme_rows()
        for expert in range(self.spec.num_experts):
            routed = self.routed(expert, held_out=False)
            used = (self.record.experts[extreme] == expert).any(1)
            rows = torch.cat([routed.rows, extreme[used]])
            if not len(rows):
                continue
            out = self._forward(expert, rows)
            peaks[expert] = float(out.abs().max())
            if len(routed.rows):
                norms = out[: len(routed.rows)].norm(dim=-1)
                saliency[expert] = float((routed.gate * norms).mean())
        return saliency, peaks

    def _extreme_rows(self) -> torch.Tensor:
        """Calibration rows with the largest inputs, and each sequence's first token: super experts answer to
        such tokens, which a sample would miss."""
        fitted = (~self.record.held_out).nonzero()[:, 0]
        size = torch.cat([self.record.inputs[r].float().abs().amax(1) for r in fitted.split(8192)])
        rows = fitted[size.topk(min(PEAK_ROWS, len(fitted))).indices]
        sequence = torch.from_numpy(self.calibration.sequence)
        if len(sequence) == len(self.record.held_out):
            first = torch.cat([torch.ones(1, dtype=torch.bool), sequence.diff() != 0])
            rows = torch.cat([rows, (first & ~self.record.held_out).nonzero()[:, 0]])
        return rows.unique()

    # ---- comparing experts ----------------------------------------------------------------------

    @functools.cached_property
    def sample(self) -> torch.Tensor:
        """int64 [S]: calibration rows on which experts are compared, whoever they were routed to."""
        fitted = (~self.record.held_out).nonzero()[:, 0]
        per_row = 4 * self.spec.num_experts * self.spec.hidden
        count = max(1, min(len(fitted), SAMPLE_ROWS, SAMPLE_BYTES // per_row))
        generator = torch.Generator().manual_seed(self._seed)
        return fitted[torch.randperm(len(fitted), generator=generator)[:count].sort().values]

    def outputs(self) -> torch.Tensor:
        """float32 [E, S, H]: what every expert gives on `sample`; at most SAMPLE_BYTES, not kept."""
        experts = range(self.spec.num_experts)
        return torch.stack([self._forward(e, self.sample) for e in experts])

    def sample_gates(self) -> torch.Tensor:
        """float32 [S, E]: gates of the experts on `sample`, 0 where a token does not use one."""
        num = self.spec.num_experts
        index = self.record.experts[self.sample].long()
        dense = torch.zeros(len(self.sample), num + 1)
        dense.scatter_add_(1, torch.where(index < 0, num, index), self.record.weights[self.sample])
        return dense[:, :num]

    # ---- second moments -------------------------------------------------------------------------

    def second_moments(
        self,
        expert: int,
        weights: Expert | None = None,
        *,
        gated: bool = True,
        damp: float = 0.01,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(of the expert's inputs [H, H], of what its down projection reads [I, I]), float32: mean over its
        calibration rows of g^2 x x^T (g = 1 unless `gated`), plus `damp` times the mean of the diagonal.

        weights: of the expert, where they are not the store's own (neurons in another order, a base).
        An expert without calibration rows gets those of `proxy_rows`.
        """
        routed = self.routed(expert, held_out=False)
        rows, gate = routed.rows, routed.gate
        if not len(rows):
            rows = self.proxy_rows()
            gate = torch.ones(len(rows))
        x = self.record.inputs[rows].float()
        if weights is None:
            weights = self.weights.expert(self.layer_idx, expert)
        a = intermediate(x, weights, self.spec)
        if gated:
            x, a = x * gate[:, None], a * gate[:, None]
        return _moment(x, damp), _moment(a, damp)


def _moment(x: torch.Tensor, damp: float) -> torch.Tensor:
    found = x.T @ x / max(len(x), 1)
    # Something must remain where the inputs were all zero, since the matrix is going to be inverted.
    mean = float(found.diagonal().mean()) or 1.0
    found.diagonal().add_(damp * mean)
    return found


SUPER_PERCENTILE, SUPER_SHARE, SUPER_TIMES = 99.5, 0.1, 8.0


def super_experts(peaks: Sequence[np.ndarray]) -> list[np.ndarray]:
    """bool [E] per layer: experts without which the model breaks, and which are never to be taken below 8 bits.

    peaks: LayerStatistics.peaks of every layer. As in "Unveiling Super Experts in Mixture-of-Experts Large
    Language Models" (arXiv 2507.23279), what counts is rare but extreme magnitude at the output of the down
    projection: above the 99.5th percentile of all experts and above a tenth of the largest. Some expert always
    is, so ours must also be 8 times the median, which in a model without such experts none is.
    """
    every = np.concatenate(list(peaks))
    least = max(
        np.percentile(every, SUPER_PERCENTILE),
        SUPER_SHARE * every.max(),
        SUPER_TIMES * np.median(every[every > 0]) if (every > 0).any() else np.inf,
    )
    return [layer >= least for layer in peaks]
