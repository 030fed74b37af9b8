"""What goes over the wire when experts are computed on another machine: one message each way per layer call.

    call      header | expert_idx int32 [T, K] | weights float32 [T, K] | activations
    result    header | outputs, of the call's wire format

    out[t, :] = sum over k of weights[t, k] * expert(expert_idx[t, k])(x[t, :])      -1: no expert

Activations and outputs [T, H] are bfloat16, or int8 with one float32 scale per 64 columns of a row (H + H / 16 bytes
a row). Headers carry the sizes and a CRC-32C of the rest, so that a damaged message is noticed; a call also
names the store that it means. All little-endian. numpy only.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from comoe import _C

GROUP = 64  # columns per scale of int8
FORMATS = ("bf16", "int8")
STORE_ID_BYTES = 16
# magic, wire format, K, layer, T, H, store, crc
_CALL = struct.Struct("<4sBxHIII16sI")
# magic, wire format, T, H, seconds that the experts took, crc
_RESULT = struct.Struct("<4sBxxxIIdI")
_CALL_MAGIC, _RESULT_MAGIC = b"CMX1", b"CMR1"
CALL_HEADER, RESULT_HEADER = _CALL.size, _RESULT.size


class WireError(ValueError):
    """A message that is not one, or is damaged; the text says what was expected."""


@dataclass(frozen=True)
class Call:
    """layer_idx: of the store.  store_id: 16 bytes, see store_id().  expert_idx: int32 [T, K], -1: none.
    weights: float32 [T, K].  x: float32 [T, H].  wire: one of FORMATS."""

    layer_idx: int
    store_id: bytes
    expert_idx: np.ndarray
    weights: np.ndarray
    x: np.ndarray
    wire: str = "bf16"


@dataclass(frozen=True)
class Result:
    """out: float32 [T, H].  seconds: that the experts took on the server."""

    out: np.ndarray
    seconds: float


# ---- rows of numbers --------------------------------------------------------------------------


def row_bytes(hidden: int, wire: str) -> int:
    """Bytes of one row of activations."""
    return 2 * hidden if wire == "bf16" else hidden + 4 * -(-hidden // GROUP)


def call_bytes(tokens: int, k: int, hidden: int, wire: str) -> int:
    return CALL_HEADER + tokens * (8 * k + row_bytes(hidden, wire))


def result_bytes(tokens: int, hidden: int, wire: str) -> int:
    return RESULT_HEADER + tokens * row_bytes(hidden, wire)


def packed_rows(x: np.ndarray, wire: str) -> bytes:
    """x: float32 [T, H], finite."""
    if wire == "bf16":
        bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
        # To nearest, ties to even.
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
    tokens, hidden = x.shape
    groups = -(-hidden // GROUP)
    padded = np.zeros((tokens, groups * GROUP), np.float32)
    padded[:, :hidden] = x
    padded = padded.reshape(tokens, groups, GROUP)
    scale = np.abs(padded).max(2) / 127.0
    codes = np.rint(padded / np.maximum(scale, np.float32(1e-30))[..., None]).astype(np.int8)
    codes = codes.reshape(tokens, -1)[:, :hidden]
    return scale.astype("<f4").tobytes() + codes.tobytes()


def unpacked_rows(data: memoryview, tokens: int, hidden: int, wire: str) -> np.ndarray:
    """float32 [T, H]; `data` has the right size."""
    if wire == "bf16":
        bits = np.frombuffer(data, "<u2").astype(np.uint32) << 16
        return bits.view(np.float32).reshape(tokens, hidden)
    groups = -(-hidden // GROUP)
    scale = np.frombuffer(data, "<f4", tokens * groups).reshape(tokens, groups)
    codes = np.frombuffer(data, np.int8, offset=4 * tokens * groups).reshape(tokens, hidden)
    return codes * np.repeat(scale, GROUP, axis=1)[:, :hidden]


# ---- messages ---------------------------------------------------------------------------------


def pack_call(call: Call) -> bytes:
    tokens, k = call.expert_idx.shape
    rest = b"".join(
        (
            np.ascontiguousarray(call.expert_idx, "<i4").tobytes(),
            np.ascontiguousarray(call.weights, "<f4").tobytes(),
            packed_rows(call.x, call.wire),
        )
    )
    header = _CALL.pack(
        _CALL_MAGIC,
        FORMATS.index(call.wire),
        k,
        call.layer_idx,
        tokens,
        call.x.shape[1],
        call.store_id,
        _C.crc32c(rest),
    )
    return header + rest


def unpack_call(data: bytes) -> Call:
    """Raises WireError unless `data` is exactly one call with finite numbers."""
    if len(data) < CALL_HEADER:
        raise WireError(f"a call has at least {CALL_HEADER} bytes, got {len(data)}")
    magic, code, k, layer_idx, tokens, hidden, store_id, crc = _CALL.unpack_from(data)
    if magic != _CALL_MAGIC or code >= len(FORMATS):
        raise WireError("expected a call of comoe's expert protocol, version 1")
    wire = FORMATS[code]
    if not (tokens and k and hidden):
        raise WireError(f"T, K and H must be at least 1, got {tokens}, {k}, {hidden}")
    expected = call_bytes(tokens, k, hidden, wire)
    if len(data) != expected:
        raise WireError(f"T={tokens} K={k} H={hidden} {wire} is {expected} bytes, got {len(data)}")
    rest = memoryview(data)[CALL_HEADER:]
    if _C.crc32c(rest) != crc:
        raise WireError("the checksum does not match: the call was damaged on its way")
    pairs = tokens * k
    expert_idx = np.frombuffer(rest, "<i4", pairs).reshape(tokens, k)
    weights = np.frombuffer(rest, "<f4", pairs, 4 * pairs).reshape(tokens, k)
    x = unpacked_rows(rest[8 * pairs :], tokens, hidden, wire)
    if not (np.isfinite(weights).all() and np.isfinite(x).all()):
        raise WireError("weights and activations must be finite")
    return Call(layer_idx, store_id, expert_idx, weights, x, wire)


def pack_result(result: Result, wire: str) -> bytes:
    tokens, hidden = result.out.shape
    rest = packed_rows(result.out, wire)
    header = _RESULT.pack(
        _RESULT_MAGIC, FORMATS.index(wire), tokens, hidden, result.seconds, _C.crc32c(rest)
    )
    return header + rest


def unpack_result(data: bytes, tokens: int, hidden: int, wire: str) -> Result:
    """Raises WireError unless `data` is the result of such a call, undamaged and finite."""
    expected = result_bytes(tokens, hidden, wire)
    if len(data) != expected:
        raise WireError(f"expected a result of {expected} bytes, got {len(data)}")
    magic, code, t, h, seconds, crc = _RESULT.unpack_from(data)
    if (magic, code, t, h) != (_RESULT_MAGIC, FORMATS.index(wire), tokens, hidden):
        raise WireError("expected the result of a call of comoe's expert protocol, version 1")
    rest = memoryview(data)[RESULT_HEADER:]
    if _C.crc32c(rest) != crc:
        raise WireError("the checksum does not match: the result was damaged on its way")
    out = unpacked_rows(rest, tokens, hidden, wire)
    if not np.isfinite(out).all():
        raise WireError("expected finite outputs")
    return Result(out, seconds)
