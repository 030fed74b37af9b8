"""Many rows per expert, or experts whose arithmetic runs in torch: unpack, then torch's matmul."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from comoe.runtime.budget import EXPERT_ROWS
from comoe_kernels.expert_ffn import Workspace, expert_ffn, expert_ffn_prefill

if TYPE_CHECKING:
    from comoe import _C
    from comoe.runtime.spec import ExpertsSpec


def padded_rows(rows: int) -> int:
    """Rows that a matmul of `rows` rows is padded to, so that few distinct sizes occur.

    The CPU library compiles a kernel for every new size and keeps it: 0.6 MB and four times the
    time of the product each (measured: bf16, 512 x 512, 100 to 163 rows). At most 1/8 is wasted above 512.
    """
    if rows <= 64:
        return max(16, 1 << (rows - 1).bit_length())
    step = max(64, 1 << (rows.bit_length() - 4))
    return -(-rows // step) * step


# Fewer rows at once, and unpacking the weights again for each part begins to show.
LEAST_PART = 512
SUM_ROWS = 256  # rows that are added up at once in float64


def rows_at_once(spec: ExpertsSpec, element: int) -> int:
    """Rows of one expert that are computed at once: inputs, results, and four times I between them
    stay within EXPERT_ROWS, or are LEAST_PART."""
    return max(EXPERT_ROWS // (element * (2 * spec.hidden + 4 * spec.intermediate)), LEAST_PART)


def _by_kernel(spec: ExpertsSpec, expert: _C.PagedExpert, x: torch.Tensor) -> torch.Tensor:
    """All rows of x [S, H] through one expert: float32 [S, H]."""
    every = np.arange(len(x), dtype=np.int32)
    form = {"activation": spec.activation or "silu", "alpha": spec.alpha, "limit": spec.limit}
    return expert_ffn(x, [expert], [every], [every], len(x), **form)


def forward_unpacked(
    op: _C.MoeOp,
    layer_idx: int,
    spec: ExpertsSpec,
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    used: np.ndarray,
    ahead: _C.AheadList,
    low: np.ndarray | None = None,
    *,
    by_kernel: bool = False,
) -> torch.Tensor:
    """Weighted sum of the chosen experts, expert by expert as they become resident.

    hidden [T, H]; index int64 [T, K], indices outside [0, E) count as no expert; weights [T, K] of any float dtype.
    used: uint8 [E], set to the level used + 1.  ahead: what to read while this layer computes.
    low: uint8 [E], levels to start at; None: the planned ones.  by_kernel: nothing is unpacked; the decode
    kernel computes, and the results are bit for bit those of all experts at once.

    Experts arrive in the order the disk delivers them, so sums are kept in float64: with K terms of
    24 bits each the order then does not show, and equal inputs give equal outputs.
    """
    tokens, k = index.shape
    flat = index.reshape(-1)
    order = flat.argsort(stable=True)
    bounds = torch.searchsorted(flat[order], torch.arange(spec.num_experts + 1)).tolist()
    experts = np.array([e for e in range(spec.num_experts) if bounds[e] < bounds[e + 1]], np.int32)
    total = torch.zeros((tokens, spec.hidden), dtype=torch.float64)
    flat_weights = weights.reshape(-1)
    rounds = weights.dtype == hidden.dtype  # products, as transformers' own experts do
    workspace = Workspace()
    at_once = rows_at_once(spec, hidden.element_size())
    session = op.session(layer_idx, experts, ahead, low)
    try:
        while (ready := session.next()) is not None:
            for need, level in ready:
                expert = int(experts[need])
                pairs = order[bounds[expert] : bounds[expert + 1]]
                weights_paged = op.expert(layer_idx, expert, level)
                for part in pairs.split(at_once):
                    rows = part // k
                    if by_kernel:
                        result = _by_kernel(spec, weights_paged, hidden[rows])
                        weighted = result * flat_weights[part, None].float()
                        weighted = weighted.to(hidden.dtype) if rounds else weighted
                        total.index_add_(0, rows, weighted.double())
                        continue
                    x = hidden.new_zeros((padded_rows(rows.numel()), spec.hidden))
                    torch.index_select(hidden, 0, rows, out=x[: rows.numel()])
                    result = expert_ffn_prefill(
                        x,
                        weights_paged,
                        activation=spec.activation,
                        alpha=spec.alpha,
                        limit=spec.limit,
                        apply_gate=spec.apply_gate if spec.activation is None else None,
                        post_norm=spec.post_norm,
                        workspace=workspace,
                    )
                    for i in range(0, rows.numel(), SUM_ROWS):
                        some = slice(i, min(i + SUM_ROWS, rows.numel()))
                        # In the dtype that torch gives the product, as in transformers' own experts.
                        weighted = result[some] * flat_weights[part[some], None]
                        total.index_add_(0, rows[some], weighted.double())
                session.done(need)
                used[expert] = level + 1
    finally:
        session.close()
    return total.to(hidden.dtype)
