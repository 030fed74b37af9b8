"""The router of one token, natively: logits of all experts, weights cold, against torch's matrix product."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel import Kernel, memory_read

from comoe import _C
from comoe_kernels import threads
from comoe_kernels.unpack import DTYPES

LAYERS = 64  # routers in turn, so that each is cold


@pytest.mark.parametrize("experts, hidden", [(64, 2048), (128, 2048), (512, 2048)])
def test_router_logits(bench, experts, hidden):
    threads.use_own_threads()
    torch.manual_seed(0)
    weights = torch.randn(LAYERS, experts, hidden).bfloat16()
    x = torch.randn(1, hidden).bfloat16()
    code = DTYPES[torch.bfloat16]

    def one(layer):
        return _C.router_logits(
            weights[layer].data_ptr(), 0, code, experts, hidden, x.data_ptr(), code
        )

    want = weights[0].double() @ x[0].double()
    low = (weights[0] @ x[0]).double()
    error = float((torch.from_numpy(np.array(one(0))).double() - want).norm())
    error /= float((low - want).norm())
    assert error <= 1
    bench(
        Kernel(
            "router_logits",
            f"E={experts} H={hidden} bf16",
            lambda: [one(layer) for layer in range(LAYERS)],
            weights.numel() * 2,
            ceiling=memory_read(),
            rival_name="torch bf16",
            rival=lambda: [x @ weights[layer].T for layer in range(LAYERS)],
            error=error,
            error_of="of torch's bf16 product",
        )
    )
