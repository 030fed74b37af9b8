"""Many rows per expert, or experts whose arithmetic runs in torch: unpack, then torch's matmul."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from comoe_kernels.expert_ffn import Workspace, expert_ffn_prefill

if TYPE_CHECKING:
    from comoe import _C
    from comoe.runtime.spec import ExpertsSpec


def forward_unpacked(
    op: _C.MoeOp,
    layer_idx: int,
    spec: ExpertsSpec,
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    used: np.ndarray,
    ahead: np.ndarray,
) -> torch.Tensor:
    """Weighted sum of the chosen experts, expert by expert as they become resident.

    hidden [T, H]; index int64 [T, K], indices outside [0, E) count as no expert; weights fp32 [T, K].
    used: uint8 [E], set to the level used + 1.  ahead: records to read while this layer computes.

    Experts arrive in the order the disk delivers them, so sums are kept in float64: with K terms of
    24 bits each the order then does not show, and equal inputs give equal outputs.
    """
    tokens, k = index.shape
    flat = index.reshape(-1)
    order = flat.argsort(stable=True)
    bounds = torch.searchsorted(flat[order], torch.arange(spec.num_experts + 1)).tolist()
    experts = np.array(
        [e for e in range(spec.num_experts) if bounds[e] < bounds[e + 1]], np.int32
    )
    total = torch.zeros((tokens, spec.hidden), dtype=torch.float64)
    flat_weights = weights.reshape(-1)
    workspace = Workspace()
    session = op.session(layer_idx, experts, ahead)
    try:
        while (ready := session.next()) is not None:
            for need, level in ready:
                expert = int(experts[need])
                pairs = order[bounds[expert] : bounds[expert + 1]]
                rows = pairs // k
                result = expert_ffn_prefill(
                    hidden[rows],
                    op.expert(layer_idx, expert, level),
                    activation=spec.activation,
                    alpha=spec.alpha,
                    limit=spec.limit,
                    apply_gate=spec.apply_gate if spec.activation is None else None,
                    post_norm=spec.post_norm,
                    workspace=workspace,
                )
                session.done(need)
                used[expert] = level + 1
                total.index_add_(0, rows, result.double() * flat_weights[pairs, None].double())
    finally:
        session.close()
    return total.to(hidden.dtype)
