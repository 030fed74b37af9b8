"""Who may use how much of `memory`: dense weights, KV cache, workspace, and the expert pool.

The pool gets what the others leave. The others are not known in advance (a prompt may be long, a KV
cache grows), so the governor compares the process with its promise before every forward pass, and
during long ones before every layer, and takes from the pool what is missing, or gives back what is
free again. A pass for which even the least pool leaves no room is refused before it begins.
"""

from __future__ import annotations

from dataclasses import dataclass

from comoe.config import format_bytes
from comoe.policy.plan import BudgetError

# The promise is baseline + memory + max(3 %, 64 MB); the governor steers for half of that margin.
TOLERANCE_SHARE = 0.03
TOLERANCE_BYTES = 64_000_000
EXPERT_ROWS = 16_000_000  # bytes; more tokens than have room in it are computed in parts
LONG_STEP = 8_000_000  # bytes of workspace of a layer from which a pass is governed layer by layer


def tolerance(memory: int) -> int:
    """Bytes by which the peak may exceed baseline + memory."""
    return max(int(TOLERANCE_SHARE * memory), TOLERANCE_BYTES)


def memory_within(available: int) -> int:
    """The largest `memory` that keeps its promise, tolerance included, in `available` bytes."""
    return max(available - tolerance(available), 1)


@dataclass(frozen=True)
class Step:
    """One forward pass: `tokens` new positions of each of `batch` sequences, after `past` that are in
    the KV cache. logits: positions of each sequence that get logits. masked: attention gets an
    explicit mask (padding, a window, or several tokens after others)."""

    batch: int
    tokens: int
    logits: int = 1
    past: int = 0
    masked: bool = False


@dataclass(frozen=True)
class ModelSizes:
    """What of a model's memory is not experts, in bytes.

    dense: parameters and buffers.  kv_per_token: one position of one sequence in the KV cache, of
    the layers that keep all; kv_windowed: of those that keep the last `window` positions.
    kv_layer: one position in one layer, of which an appended cache exists twice for a moment.
    activations_per_token: the widest point of a forward pass, per token of the batch.
    expert_rows_per_token: rows of the chosen experts, of which at most EXPERT_ROWS exist at once.
    logits_per_token: where logits of every position are asked for.
    scores_per_pair: attention scores per (query, key) pair of a sequence, if they are materialised.
    mask_per_pair, repeat_per_position: an explicit mask, and with it one layer's keys and values
    repeated for all query heads.
    """

    dense: int
    kv_per_token: int = 0
    kv_windowed: int = 0
    window: int = 0
    kv_layer: int = 0
    activations_per_token: int = 0
    expert_rows_per_token: int = 0
    logits_per_token: int = 0
    scores_per_pair: int = 0
    mask_per_pair: int = 0
    repeat_per_position: int = 0

    def kv(self, positions: int) -> int:
        """Bytes of the KV cache of one sequence."""
        return positions * self.kv_per_token + min(positions, self.window) * self.kv_windowed

    def new_kv(self, step: Step) -> int:
        """Bytes that a pass adds to the KV cache."""
        return step.batch * (self.kv(step.past + step.tokens) - self.kv(step.past))

    def workspace(self, step: Step) -> int:
        """Bytes that a pass needs while it runs, beside the KV cache before it; new KV included."""
        context = step.past + step.tokens
        per_pair = self.scores_per_pair + step.masked * self.mask_per_pair
        per_position = step.masked * self.repeat_per_position + bool(step.past) * self.kv_layer
        per_sequence = (
            step.tokens * self.activations_per_token
            + step.tokens * context * per_pair
            + context * per_position
            + step.logits * self.logits_per_token
        )
        rows = min(step.batch * step.tokens * self.expert_rows_per_token, EXPERT_ROWS)
        return self.new_kv(step) + step.batch * per_sequence + rows


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
        return self.fixed + self.sizes.workspace(Step(1, 1)) + self.sizes.kv(max_context)

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

    def require(self, max_context: int, kv_held: int) -> None:
        """BudgetError unless `memory` holds the model and, with `kv_held` bytes of KV cache, one more
        token; the least that it names is enough for both."""
        if self._least_for(Step(1, 1), kv_held) > self.least(max_context):
            self.check(Step(1, 1), kv_held)
        else:
            self.planned_pool(max_context)

    def _needed(self, step: Step, kv_held: int) -> int:
        workspace = self.sizes.workspace(step)
        return self.sizes.dense + self.fixed + self.pool_floor + kv_held + workspace

    def _least_for(self, step: Step, kv_held: int) -> int:
        """Bytes of `memory` with which `step` keeps the promise."""
        needed = self._needed(step, kv_held)
        return min(needed - TOLERANCE_BYTES, int(needed / (1 + TOLERANCE_SHARE)) + 1)

    def check(self, step: Step, kv_held: int) -> None:
        """Raises BudgetError if `step`, with `kv_held` bytes of KV cache before it, cannot be kept
        within the promise even with the least pool."""
        workspace = self.sizes.workspace(step)
        if self._needed(step, kv_held) <= self.memory + tolerance(self.memory):
            return
        least = self._least_for(step, kv_held)
        raise BudgetError(
            f"memory={format_bytes(self.memory)} is too small for a forward pass over {step.batch} x "
            f"{step.tokens} tokens after {step.past}: it needs at least {format_bytes(least)} ({least} "
            f"bytes) for {format_bytes(self.sizes.dense)} dense weights, {format_bytes(kv_held)} KV "
            f"cache, {format_bytes(workspace)} workspace and {format_bytes(self.pool_floor)} for the "
            "experts of one layer. Raise it with model.comoe.set_memory, or use fewer tokens at once: "
            "a smaller batch, a shorter prompt, or generate(..., prefill_chunk_size=256)"
        )

    def allowed_pool(self, rss: int, pool_used: int, coming: int) -> int:
        """Bytes that the pool may have now that the process has `rss`, of which `pool_used` are the
        pool's, and `coming` bytes of workspace are about to be taken."""
        others = rss - pool_used
        return self.baseline + self.memory + tolerance(self.memory) // 2 - others - coming
