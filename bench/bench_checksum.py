"""CRC-32C of what was read from disk, on one thread, against zlib's CRC-32 and a read of the same memory."""

from __future__ import annotations

import zlib

import numpy as np
from kernel import Ceiling, Kernel

from comoe import _C

RECORD = 9_437_184  # an expert of Switch-Base-128 in bf16
RECORDS = 24


def one_thread_sum(block: np.ndarray) -> Ceiling:
    words = block.view(np.uint64)
    return Ceiling("numpy's bitwise or", lambda: np.bitwise_or.reduce(words), block.size)


def test_crc32c(bench):
    assert _C.crc32c(np.frombuffer(b"123456789", np.uint8)) == 0xE3069283  # RFC 3720, B.4
    block = np.random.default_rng(0).integers(0, 256, RECORDS * RECORD, dtype=np.uint8)
    records = block.reshape(RECORDS, RECORD)
    bench(
        Kernel(
            "crc32c",
            f"{RECORD} bytes, {_C.crc32c_isa()}",
            lambda: [_C.crc32c(record) for record in records],
            block.size,
            ceiling=one_thread_sum(block),
            rival_name="zlib.crc32",
            rival=lambda: zlib.crc32(records[0]),
            rival_share=1 / RECORDS,
            error=0.0,
            error_of="(bits, RFC 3720)",
        )
    )
