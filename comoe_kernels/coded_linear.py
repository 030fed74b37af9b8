"""A dense layer with its weights in 8 (or 4, 3, 2) bits, on the CPU.

    y = x @ W.T + bias

    x       [..., cols] float32, bfloat16 or float16
    record  int8 [coded_linear_bytes]: W [rows, cols] coded as the experts' increments are, with a
            scale and a zero per 128 columns (docs/codec.md); one record, all planes in it
    bias    [rows] float32, bfloat16 or float16, or None
    y       [..., rows] like x

Bytes moved: `coded_linear_bytes`, the record once for up to 8 rows of x, and x and y. From
UNPACK_ROWS rows on W is unpacked, a piece at a time, to the type of x and multiplied by torch.
Runs in the threads of comoe_kernels.threads, returns when done, releases the GIL. The op is known to
torch.compile as torch.ops.comoe.coded_linear.

Rounding as in expert_ffn: at 8 bits activations are 15-bit integers with one scale per 128 columns,
below int8 with one per 64; sums are exact per scale, then in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from comoe import _C
from comoe_kernels.unpack import BITS, DTYPES

# Rows of x from which unpacking pays (bench/bench_dense.py).
UNPACK_ROWS = 256
PIECE_BYTES = 4_000_000  # of W unpacked at once


def coded_linear_bytes(rows: int, cols: int, bits: int) -> int:
    """Bytes of the record."""
    return _C.coded_matrix_bytes(rows, cols, bits)


def _check_record(op: str, record: torch.Tensor, bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"{op}: bits: expected one of {BITS}, got {bits}")
    if record.dtype != torch.int8 or record.device.type != "cpu" or not record.is_contiguous():
        raise ValueError(
            f"{op}: record: expected contiguous int8 on the CPU, got {record.dtype} on {record.device}"
        )


def _check_dtype(op: str, name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in DTYPES or tensor.device.type != "cpu":
        raise ValueError(
            f"{op}: {name}: expected float32, bfloat16 or float16 on the CPU, got {tensor.dtype} on "
            f"{tensor.device}"
        )


def encode_linear(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """The record of W [rows, cols] of any of the types above; no copy of W in another type is made.

    Raises ValueError if a weight is NaN or infinite.
    """
    _check_dtype("encode_linear", "weight", weight)
    if bits not in BITS:
        raise ValueError(f"encode_linear: bits: expected one of {BITS}, got {bits}")
    if weight.dim() != 2:
        raise ValueError(f"encode_linear: weight: expected [rows, cols], got {list(weight.shape)}")
    weight = weight.detach().contiguous()
    rows, cols = weight.shape
    record = torch.empty(coded_linear_bytes(rows, cols, bits), dtype=torch.int8)
    _C.encode_coded_matrix(
        weight.data_ptr(), DTYPES[weight.dtype], rows, cols, bits, record.data_ptr(), len(record)
    )
    return record


def unpack_rows(
    record: torch.Tensor,
    rows: int,
    cols: int,
    bits: int,
    dtype: torch.dtype,
    first: int = 0,
    count: int | None = None,
) -> torch.Tensor:
    """Rows first .. first + count of W, [count, cols] of `dtype`; rounded to nearest even."""
    _check_record("unpack_rows", record, bits)
    count = rows - first if count is None else count
    out = torch.empty((count, cols), dtype=dtype)
    _C.coded_rows(
        record.data_ptr(),
        len(record),
        rows,
        cols,
        bits,
        first,
        count,
        out.data_ptr(),
        DTYPES[dtype],
    )
    return out


def coded_linear_ref(
    x: torch.Tensor, record: torch.Tensor, bias: torch.Tensor | None, rows: int, bits: int
) -> torch.Tensor:
    """In float32, with nothing rounded but the weights."""
    weight = unpack_rows(record, rows, x.shape[-1], bits, torch.float32)
    return F.linear(x.float(), weight, None if bias is None else bias.float())


def _unpacked(
    x: torch.Tensor, record: torch.Tensor, bias: torch.Tensor | None, rows: int, bits: int
) -> torch.Tensor:
    cols = x.shape[-1]
    step = max(PIECE_BYTES // (cols * x.element_size()) // 16, 1) * 16
    out = x.new_empty((len(x), rows))
    for first in range(0, rows, step):
        count = min(step, rows - first)
        weight = unpack_rows(record, rows, cols, bits, x.dtype, first, count)
        piece = None if bias is None else bias[first : first + count].to(x.dtype)
        out[:, first : first + count] = F.linear(x, weight, piece)
    return out


def coded_linear(
    x: torch.Tensor, record: torch.Tensor, bias: torch.Tensor | None, rows: int, bits: int
) -> torch.Tensor:
    """y [..., rows] for x [..., cols]; see the head of this file."""
    return torch.ops.comoe.coded_linear(x, record, bias, rows, bits)


def coded_linears(
    x: torch.Tensor,
    records: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    rows: Sequence[int],
    bits: int,
) -> list[torch.Tensor]:
    """coded_linear of one x with several matrices at once: x is prepared once, and the threads meet once."""
    return torch.ops.comoe.coded_linears(x, records, biases, rows, bits)


def _coded_linears_cpu(
    x: torch.Tensor,
    records: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    rows: Sequence[int],
    bits: int,
) -> list[torch.Tensor]:
    _check_dtype("coded_linear", "x", x)
    cols = x.shape[-1]
    flat = x.reshape(-1, cols)
    if flat.stride(-1) != 1:
        flat = flat.contiguous()
    for record, bias, num_rows in zip(records, biases, rows, strict=True):
        _check_record("coded_linear", record, bits)
        if bias is None:
            continue
        _check_dtype("coded_linear", "bias", bias)
        if bias.shape != (num_rows,) or not bias.is_contiguous():
            raise ValueError(f"coded_linear: bias: expected [{num_rows}], got {list(bias.shape)}")
    tokens, leading = len(flat), x.shape[:-1]
    if tokens >= UNPACK_ROWS:
        return [
            _unpacked(flat, record, bias, num_rows, bits).view(*leading, num_rows)
            for record, bias, num_rows in zip(records, biases, rows, strict=True)
        ]
    out = [x.new_empty((*leading, num_rows)) for num_rows in rows]
    targets = [
        (
            record.data_ptr(),
            record.numel(),
            num_rows,
            0 if bias is None else bias.data_ptr(),
            0 if bias is None else DTYPES[bias.dtype],
            y.data_ptr(),
        )
        for record, bias, num_rows, y in zip(records, biases, rows, out, strict=True)
    ]
    _C.coded_linear(targets, cols, bits, flat.data_ptr(), DTYPES[x.dtype], tokens, flat.stride(0))
    return out


def _coded_linear_cpu(
    x: torch.Tensor, record: torch.Tensor, bias: torch.Tensor | None, rows: int, bits: int
) -> torch.Tensor:
    return _coded_linears_cpu(x, [record], [bias], [rows], bits)[0]


def coded_embedding(
    ids: torch.Tensor, record: torch.Tensor, rows: int, cols: int, bits: int, dtype: torch.dtype
) -> torch.Tensor:
    """Rows `ids` int64 [...] of W [rows, cols] as [..., cols] of `dtype`."""
    return torch.ops.comoe.coded_embedding(ids, record, rows, cols, bits, dtype)


def _coded_embedding_cpu(
    ids: torch.Tensor, record: torch.Tensor, rows: int, cols: int, bits: int, dtype: torch.dtype
) -> torch.Tensor:
    _check_record("coded_embedding", record, bits)
    ids = ids.to(torch.int64).contiguous()
    out = torch.empty((*ids.shape, cols), dtype=dtype)
    _C.coded_gather(
        record.data_ptr(),
        record.numel(),
        rows,
        cols,
        bits,
        ids.data_ptr(),
        ids.numel(),
        out.data_ptr(),
        DTYPES[dtype],
    )
    return out


# A plain Library: torch.library.custom_op wraps the same call in 15 us more of Python.
_LIBRARY = torch.library.Library("comoe", "FRAGMENT")
_LIBRARY.define("coded_linear(Tensor x, Tensor record, Tensor? bias, int rows, int bits) -> Tensor")
_LIBRARY.impl("coded_linear", _coded_linear_cpu, "CPU")
_LIBRARY.define(
    "coded_linears(Tensor x, Tensor[] records, Tensor?[] biases, int[] rows, int bits) -> Tensor[]"
)
_LIBRARY.impl("coded_linears", _coded_linears_cpu, "CPU")
_LIBRARY.define(
    "coded_embedding(Tensor ids, Tensor record, int rows, int cols, int bits, ScalarType dtype) -> Tensor"
)
_LIBRARY.impl("coded_embedding", _coded_embedding_cpu, "CPU")


@torch.library.register_fake("comoe::coded_linear", lib=_LIBRARY)
def _(x, record, bias, rows, bits):
    return x.new_empty((*x.shape[:-1], rows))


@torch.library.register_fake("comoe::coded_linears", lib=_LIBRARY)
def _(x, records, biases, rows, bits):
    return [x.new_empty((*x.shape[:-1], num_rows)) for num_rows in rows]


@torch.library.register_fake("comoe::coded_embedding", lib=_LIBRARY)
def _(ids, record, rows, cols, bits, dtype):
    return ids.new_empty((*ids.shape, cols), dtype=dtype)
