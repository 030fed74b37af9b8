"""Feed-forward networks of the experts, straight from the ladder's packed pages, on the CPU.

    a = act(gate @ x + b_gate) * (up @ x + b_up)      gated;    a = act(up @ x + b_up)      ungated
    pair_out[p] = down @ a + b_down                   for each pair p of a token and one of its experts

    x         [T, H] float32, bfloat16 or float16; row stride free, columns contiguous
    gate, up  [I, H], down [H, I]: at 2, 3, 4, 8 bits or exact, in pages (csrc/ladder/layout.h)
    pair_out  [num_pairs, H] float32, not yet times the router's weight; `combine_pairs` sums it over K

A matrix may be a sum (csrc/cpu/expert_ffn.h): of several code sets, each multiplied with x rounded as
its own level demands, and of low-rank deltas U V, computed as t = V x, then U t. A mean vector is added
to `down @ a + b_down`; an expert may be nothing but its mean.

Bytes moved: `expert_ffn_bytes`, each chosen expert's planes once, whatever the number of its rows up
to 8 (from cache beyond). Runs in the threads of comoe_kernels.threads, returns when done, releases the
GIL. A row's result depends neither on the other rows nor on the number of threads.

Rounding. Levels 2, 3, 4: activations (x, and a) as int8 with one scale per 64 columns; level 8: as
15-bit integers with one scale per 128; products are summed exactly in int32 per scale, then in
float32. Exact bfloat16 weights and x: bfloat16 products, float32 sums, a rounded to bfloat16 (where
the CPU has no such instruction: all in float32). Other exact weights: all in float32; codes are
decoded to the type of x first. Where x has 16 bits, the results of each product and activation of exact
experts are rounded to its dtype, as transformers' own experts do, so that greedy decoding seldom falls
on another side of a near tie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F

from comoe import _C
from comoe_kernels.unpack import (
    DTYPES,
    EXACT_DTYPES,
    check_tensor,
    packed_bytes,
    row_stride,
    unpack,
    unpack_bias,
    unpack_mean,
)

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "quick_gelu", "swigluoai")


def activate_ref(
    gate: torch.Tensor | None,
    up: torch.Tensor,
    activation: str,
    alpha: float = 0.0,
    limit: float = 0.0,
) -> torch.Tensor:
    """act(gate) * up, or act(up) without a gate."""
    if activation == "swigluoai":  # GPT-OSS: clamped, with alpha in the sigmoid and up + 1
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return gate * torch.sigmoid(alpha * gate) * (up + 1)
    act = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
        "relu": F.relu,
        "relu2": lambda v: F.relu(v) ** 2,
        "quick_gelu": lambda v: v * torch.sigmoid(1.702 * v),
    }[activation]
    return act(up) if gate is None else act(gate) * up


def expert_ffn_ref(
    x: torch.Tensor,
    matrices: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor] | None = None,
    *,
    activation: str = "silu",
    alpha: float = 0.0,
    limit: float = 0.0,
    round_activations: Callable[[torch.Tensor], torch.Tensor] = lambda v: v,
    round_results: Callable[[torch.Tensor], torch.Tensor] = lambda v: v,
) -> torch.Tensor:
    """One expert on all rows of x [S, H], in float32 on dense matrices; `round_activations` is applied
    to the inputs of each matrix product (see `rounding`), `round_results` to what comes out of each
    product and activation (see `rounding_of_results`)."""
    biases = [b.float() for b in biases] if biases else [None] * len(matrices)
    x = round_activations(x.float())
    *hidden, up = (
        round_results(F.linear(x, w.float(), b))
        for w, b in zip(matrices[:-1], biases[:-1], strict=True)
    )
    if hidden and activation != "swigluoai":
        a = round_results(activate_ref(None, hidden[0], activation)) * up
    else:
        a = activate_ref(hidden[0] if hidden else None, up, activation, alpha, limit)
    a = round_activations(round_results(a))
    return round_results(F.linear(a, matrices[-1].float(), biases[-1]))


def rounding_of_results(level: int, x_dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """Exact experts of a 16-bit model round to its dtype wherever transformers' own experts do."""
    if level == 4 and x_dtype != torch.float32:
        return lambda v: v.to(x_dtype).float()
    return lambda v: v


def rounding(level: int, exact_bf16: bool = False) -> Callable[[torch.Tensor], torch.Tensor]:
    """How the kernel rounds activations at a level: the reference that states which error is its own
    choice of format and which is a fault. int8 in groups of 64 is 0.6% of the norm of normal values and
    1.1% of silu(normal) * normal (in groups of 32: 0.5% and 0.9%), a tenth of the error of 4-bit
    weights; at 8 bits it would be as large as the weights' error, so two int8 planes are used there
    (0.003%)."""
    if level == 4:
        return (lambda v: v.bfloat16().float()) if exact_bf16 else (lambda v: v)
    width, top = (128, 32512.0) if level == 3 else (64, 127.0)

    def round_groups(v: torch.Tensor) -> torch.Tensor:
        columns = v.shape[-1]
        groups = F.pad(v, (0, -columns % width)).unflatten(-1, (-1, width))
        scale = groups.abs().amax(-1, keepdim=True) / top
        rounded = torch.where(scale > 0, (groups / scale).round() * scale, torch.zeros(()))
        return rounded.flatten(-2)[..., :columns]

    return round_groups


def expert_ffn_bytes(
    hidden: int,
    intermediate: int,
    *,
    gated: bool,
    level: int,
    exact_dtype: torch.dtype | str = torch.bfloat16,
    num_experts: int = 1,
    num_rows: int = 0,
    x_dtype: torch.dtype = torch.bfloat16,
) -> int:
    """Bytes that must be read and written: weights of the chosen experts, rows of x and of the result."""
    exact = EXACT_DTYPES[exact_dtype]
    up = packed_bytes(intermediate, hidden, level, exact)
    down = packed_bytes(hidden, intermediate, level, exact)
    rows = num_rows * hidden * (x_dtype.itemsize + 4)
    return num_experts * (up * (2 if gated else 1) + down) + rows


# From how many rows per expert `expert_ffn_prefill` beats `expert_ffn`, for levels 2 to 4, 8 and exact.
# Measured in bf16 with bench/bench_unpack.py on a Zen 4 (2 threads, H=2048, I=768), whose torch has
# AVX-512 BF16 but no AMX; with int8 products the kernel stays 1.3x ahead of torch at 1024 rows.
PREFILL_ROWS = {
    "avx512_vnni_bf16": (1 << 30, 192, 512),
    "avx512": (56, 56, 64),
    "avx2": (26, 26, 36),
    "portable": (5, 5, 1),
}


def prefill_rows(level: int) -> int:
    """Rows of one expert from which `expert_ffn_prefill` is the faster way, with the present ISA."""
    return PREFILL_ROWS[_C.isa_name()][max(level - 2, 0)]


@contextmanager
def use_isa(isa: str | None):
    """Inside, kernels use this instruction set: "portable", "avx2", "avx512", "avx512_vnni_bf16"."""
    before = _C.isa_name()
    if isa is not None:
        _C.force_isa(isa)
    try:
        yield
    finally:
        _C.force_isa(before)


def expert_ffn(
    x: torch.Tensor,
    experts: Sequence[_C.PagedExpert],
    tokens: Sequence[np.ndarray],
    pairs: Sequence[np.ndarray],
    num_pairs: int,
    *,
    activation: str = "silu",
    alpha: float = 0.0,
    limit: float = 0.0,
    out: torch.Tensor | None = None,
    isa: str | None = None,
) -> torch.Tensor:
    """Row i of expert e reads x[tokens[e][i]] and writes out[pairs[e][i]]; other rows of `out` stay."""
    hidden = experts[0].hidden if experts else None
    check_tensor("expert_ffn", "x", x, (None, hidden))
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"expert_ffn: activation: expected one of {ACTIVATIONS}, got {activation!r}"
        )
    if out is None:
        out = torch.zeros(num_pairs, x.shape[1])
    check_tensor("expert_ffn", "out", out, (num_pairs, x.shape[1]), (torch.float32,))
    if not out.is_contiguous():
        raise ValueError(
            f"expert_ffn: out: expected a contiguous tensor, got strides {out.stride()}"
        )
    with use_isa(isa):
        _C.expert_ffn(
            list(experts),
            [np.ascontiguousarray(t, np.int32) for t in tokens],
            [np.ascontiguousarray(p, np.int32) for p in pairs],
            ACTIVATIONS.index(activation),
            alpha,
            limit,
            x.data_ptr(),
            DTYPES[x.dtype],
            x.shape[0],
            row_stride(x),
            out.data_ptr(),
            num_pairs,
        )
    return out


def combine_pairs_ref(
    pair_out: torch.Tensor, weights: torch.Tensor, expert_idx: torch.Tensor, num_experts: int
) -> torch.Tensor:
    """sum over k of weights[t, k] * pair_out[t * K + k], without pairs whose expert is not in [0, E)."""
    T, K = weights.shape
    valid = (expert_idx >= 0) & (expert_idx < num_experts)
    rows = torch.where(
        valid[..., None], pair_out.float().view(T, K, pair_out.shape[1]), torch.zeros(())
    )
    return (rows * torch.where(valid, weights.float(), torch.zeros(()))[..., None]).sum(1)


def combine_pairs(
    pair_out: torch.Tensor,
    weights: torch.Tensor,
    expert_idx: torch.Tensor,
    num_experts: int,
    dtype: torch.dtype,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """[T, H] of `dtype` from pair_out [T * K, H] float32, weights [T, K], expert_idx [T, K] int64."""
    check_tensor("combine_pairs", "weights", weights, (None, None))
    T, K = weights.shape
    check_tensor("combine_pairs", "expert_idx", expert_idx, (T, K), (torch.int64,))
    check_tensor("combine_pairs", "pair_out", pair_out, (T * K, None), (torch.float32,))
    hidden = pair_out.shape[1]
    if out is None:
        out = torch.empty(T, hidden, dtype=dtype)
    check_tensor("combine_pairs", "out", out, (T, hidden), (dtype,))
    for name, tensor in (("pair_out", pair_out), ("out", out)):
        if not tensor.is_contiguous():
            raise ValueError(
                f"combine_pairs: {name}: expected a contiguous tensor, got strides {tensor.stride()}"
            )
    weights, expert_idx = weights.float().contiguous(), expert_idx.contiguous()
    _C.combine_pairs(
        pair_out.data_ptr(),
        weights.data_ptr(),
        expert_idx.data_ptr(),
        num_experts,
        T,
        K,
        hidden,
        out.data_ptr(),
        DTYPES[out.dtype],
    )
    return out


class Workspace:
    """One reusable buffer that holds one dense matrix at a time."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def matrix(self, rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
        nbytes = rows * cols * dtype.itemsize
        if self._buffer.numel() < nbytes:
            self._buffer = torch.empty(nbytes, dtype=torch.uint8)
        return self._buffer[:nbytes].view(dtype).view(rows, cols)

    @property
    def nbytes(self) -> int:
        return self._buffer.numel()


def expert_ffn_prefill(
    x: torch.Tensor,
    expert: _C.PagedExpert,
    *,
    activation: str | None = "silu",
    alpha: float = 0.0,
    limit: float = 0.0,
    apply_gate: Callable[[torch.Tensor], torch.Tensor] | None = None,
    post_norm: Callable[[torch.Tensor], torch.Tensor] | None = None,
    workspace: Workspace | None = None,
) -> torch.Tensor:
    """One expert on many rows x [S, H] -> [S, H]: unpack a matrix, multiply with torch, next matrix.

    `apply_gate` replaces the activation: it takes [gate | up] [S, 2I] (or [S, I] when ungated) and
    returns [S, I]. `post_norm` is applied to the expert's output.
    """
    check_tensor("expert_ffn_prefill", "x", x, (None, expert.hidden))
    workspace = workspace or Workspace()

    def linear(
        v: torch.Tensor, matrix: int, rows: int, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        weight = unpack(expert, matrix, out=workspace.matrix(rows, v.shape[1], v.dtype))
        result = torch.matmul(v, weight.T, out=out)
        return result.add_(unpack_bias(expert, matrix).to(v.dtype)) if expert.biased else result

    inter, last = expert.intermediate, expert.num_matrices - 1
    if not expert.has_matrices:  # a mean alone
        result = x.new_zeros(x.shape)
    else:
        if apply_gate is not None:
            hidden = apply_gate(torch.cat([linear(x, m, inter) for m in range(last)], dim=-1))
        else:
            gate = linear(x, 0, inter) if expert.gated else None
            hidden = activate_ref(gate, linear(x, last - 1, inter), activation, alpha, limit)
        result = linear(hidden.to(x.dtype), last, expert.hidden)
    if expert.has_mean:
        result = result + unpack_mean(expert).to(x.dtype)
    return result if post_norm is None else post_norm(result)
