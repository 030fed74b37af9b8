"""Who may use how much of `memory`: dense weights, KV cache, workspace, and the expert pool.

The pool gets what the others leave. The others are not known in advance (a prompt may be long, a KV
cache grows), so the governor compares the process with its promise before every forward pass and
takes from the pool what is missing, or gives back what is free again.
"""

from __future__ import annotations

from dataclasses import dataclass

from comoe.config import format_bytes
from comoe.policy.plan import BudgetError

# The promise is baseline + memory + max(3 %, 64 MB); the governor steers for half of that margin.
TOLERANCE_SHARE = 0.03
TOLERANCE_BYTES = 64_000_000
EXPERT_ROWS = 16_000_000  # bytes; more tokens than have room in it are computed in parts


def tolerance(memory: int) -> int:
    """Bytes by which the peak may exceed baseline + memory."""
    return max(int(TOLERANCE_SHARE * memory), TOLERANCE_BYTES)


@dataclass(frozen=True)
class ModelSizes:
    """What of a model's memory is not experts, in bytes.

    dense: parameters and buffers.  kv_per_token: one position of one sequence in the KV cache.
    activations_per_token: the widest point of a forward pass, per token of the batch.
    expert_rows_per_token: rows of the chosen experts, of which at most EXPERT_ROWS exist at once.
    logits_per_token: where logits of every position are asked for.
    scores_per_pair: attention scores per (token, token) pair if they are materialised.
    """

    dense: int
    kv_per_token: int = 0
    activations_per_token: int = 0
    expert_rows_per_token: int = 0
    logits_per_token: int = 0
    scores_per_pair: int = 0

    def workspace(self, batch: int, tokens: int, logits: int) -> int:
        """Bytes that a forward pass over [batch, tokens] needs while it runs, new KV included;
        `logits` positions of each sequence get logits."""
        per_token = self.kv_per_token + self.activations_per_token
        scores = self.scores_per_pair * batch * tokens * tokens
        rows = min(batch * tokens * self.expert_rows_per_token, EXPERT_ROWS)
        return batch * (tokens * per_token + logits * self.logits_per_token) + scores + rows


class Budget:
    """`memory` bytes beside `baseline`, and what the pool may have of them.

    pool_floor: the least the pool can work with.  fixed: staging and scratch of comoe itself.
    """

    def __init__(self, memory: int, baseline: int, sizes: ModelSizes, pool_floor: int, fixed: int):
        self.memory = memory
        self.baseline = baseline
        self.sizes = sizes
        self.pool_floor = pool_floor
        self.fixed = fixed

    def reserve(self, max_context: int) -> int:
        """Bytes kept from the pool from the start: one decode step and the stated context."""
        return self.fixed + self.sizes.workspace(1, 1, 1) + max_context * self.sizes.kv_per_token

    def least(self, max_context: int) -> int:
        return self.sizes.dense + self.reserve(max_context) + self.pool_floor

    def planned_pool(self, max_context: int) -> int:
        """Bytes of the pool when nothing unforeseen happens. Raises BudgetError if none are left."""
        pool = self.memory - self.sizes.dense - self.reserve(max_context)
        if pool < self.pool_floor:
            least = self.least(max_context)
            raise BudgetError(
                f"memory={format_bytes(self.memory)} is too small for this model: it needs at least "
                f"{format_bytes(least)} ({least} bytes): {format_bytes(self.sizes.dense)} dense weights, "
                f"{format_bytes(self.reserve(max_context))} workspace and KV cache, "
                f"{format_bytes(self.pool_floor)} for the experts of one layer in use"
            )
        return pool

    def allowed_pool(self, rss: int, pool_used: int, coming: int) -> int:
        """Bytes that the pool may have now that the process has `rss`, of which `pool_used` are the
        pool's, and `coming` bytes of workspace are about to be taken."""
        others = rss - pool_used
        return self.baseline + self.memory + tolerance(self.memory) // 2 - others - coming
