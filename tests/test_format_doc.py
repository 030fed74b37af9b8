"""A reader and a writer made from docs/format.md alone, with `struct`: the page is enough, and it is true."""

from __future__ import annotations

import json
import struct
from dataclasses import replace

import numpy as np
import pytest
from store_helpers import SPEC, tiny_expert, write_tiny_store

from comoe import _C
from comoe.store import Store
from comoe_kernels import ladder_codec as codec


def up(a, b):
    return -(-a // b) * b


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


class PlainReader:
    """One layer file, read as the page says, one weight at a time."""

    def __init__(self, raw: bytes):
        self.raw = raw
        assert crc32c(b"123456789") == 0xE3069283
        (magic, version, header_bytes, file_bytes, crc, self.E, self.R, record_bytes, self.H, self.I,
         gated, self.biased, self.activation, self.dtype, self.alpha, self.limit, self.layer_idx,
         self.records_offset, name_offset, name_bytes, block_rows, block_cols, group_cols) = struct.unpack_from(
            "<8sIIQIIIIQQBBBBffIIIIHHI", raw, 0)  # fmt: skip
        assert magic == b"COMOELYR" and version == 1 and file_bytes == len(raw)
        assert record_bytes == 64 and (block_rows, block_cols, group_cols) == (16, 32, 128)
        assert crc32c(raw[:24] + bytes(4) + raw[28:header_bytes]) == crc
        self.name = raw[name_offset : name_offset + name_bytes].decode()
        first, last = (self.I, self.H), (self.H, self.I)
        self.shapes = [first, first, last] if gated else [first, last]
        self.exact_bits = [32, 16, 16, 8, 4][self.dtype]
        self.item = 2 if self.exact_bits == 16 else 4  # of a bias

    def record(self, e, r):
        entry = self.records_offset + 64 * (e * self.R + r)
        kind, bits, flags, parent, replaces, shared, crc, offset, nbytes, *_ = struct.unpack_from(
            "<HBBiQiIQQII", self.raw, entry
        )
        assert (kind, bits, parent, replaces) == [
            (0, 2, -1, 0), (0, 1, 0, 0), (0, 1, 1, 0), (0, 4, 2, 0), (1, self.exact_bits, -1, 15),
        ][r]  # fmt: skip
        assert flags & 1 and offset % 4096 == 0 and shared == -1
        payload = self.raw[offset : offset + nbytes]
        assert crc32c(payload) == crc
        return payload

    def counts(self, m):
        rows, cols = self.shapes[m]
        return up(rows, 16) // 16, up(cols, 32) // 32, up(cols, 128) // 128

    def block_at(self, r, m, tile, k):
        size = [128, 64, 64, 256, 64 * self.exact_bits][r]
        start = 0
        if r == 0:
            start = up(self.params_at(len(self.shapes)), 128)
        if r == 4:
            start = up(self.scales_at(len(self.shapes)), size)
        before = sum(self.counts(i)[0] * self.counts(i)[1] for i in range(m))
        return start + size * (before + tile * self.counts(m)[1] + k)

    def scales_at(self, m):
        at = sum(up(rows * self.item, 64) for rows, _ in self.shapes) if self.biased else 0
        for tiles, blocks, groups in map(self.counts, range(m)):
            at += tiles * {3: 4 * groups, 4: 16 * blocks}.get(self.dtype, 0)
        return at

    def code(self, payload, m, row, col):
        """(code, scale) of a weight."""
        tile, k, r, c = row // 16, col // 32, row % 16, col % 32
        at = self.block_at(4, m, tile, k)
        if self.dtype == 3:
            scale = self.scales_at(m) + 4 * (tile * self.counts(m)[2] + col // 128)
            code = payload[at + 32 * (c // 2) + 2 * r + c % 2]
            return code, struct.unpack_from("<f", payload, scale)[0]
        (word,) = struct.unpack_from("<H", payload, at + 64 * (c // 8) + 2 * (2 * r + c % 2))
        scale = self.scales_at(m) + 16 * (tile * self.counts(m)[1] + k) + r
        return word >> 4 * (c % 8 // 2) & 15, payload[scale]

    def params_at(self, m):
        at = 64 * len(self.shapes)
        if self.biased:
            at += sum(up(4 * rows, 64) for rows, _ in self.shapes)
        return at + sum(32 * self.counts(i)[0] * self.counts(i)[2] for i in range(m))

    def weight(self, payloads, m, row, col, b):
        tile, k, r, c = row // 16, col // 32, row % 16, col % 32
        q, lane = c // 4, 4 * r + c % 4

        def byte(record, v):
            return payloads[record][self.block_at(record, m, tile, k) + 64 * v + lane]

        code = (byte(0, q // 4) >> 2 * (q % 4) & 3) << 6
        if b >= 3:
            code |= (byte(1, 0) >> q & 1) << 5
        if b >= 4:
            code |= (byte(2, 0) >> q & 1) << 4
        if b == 8:
            code |= byte(3, q // 2) >> 4 * (q % 2) & 15
        log2_min, log2_step, *tables = struct.unpack_from("<ff4B8B16B", payloads[0], 64 * m)
        table = {2: tables[:4], 3: tables[4:12], 4: tables[12:], 8: range(256)}[b]
        params = self.params_at(m) + 32 * (tile * self.counts(m)[2] + col // 128)
        scale_q, zero = payloads[0][params + r], payloads[0][params + 16 + r]
        return 2.0 ** (log2_min + log2_step * scale_q) * (table[code >> (8 - b)] - zero)

    def element(self, payload, m, row, col):
        if self.dtype >= 3:
            return self.code(payload, m, row, col)
        r, c = row % 16, col % 32
        number = 16 * c + r if self.item == 4 else 32 * (c // 2) + 2 * r + c % 2
        at = self.block_at(4, m, row // 16, col // 32) + self.item * number
        return struct.unpack_from("<f" if self.item == 4 else "<H", payload, at)[0]


@pytest.mark.parametrize(
    "spec",
    [
        replace(SPEC, num_experts=2),
        replace(
            SPEC, num_experts=1, biased=True, exact_dtype="float32", hidden=17, intermediate=150
        ),
        replace(
            SPEC,
            num_experts=1,
            gated=False,
            biased=True,
            activation="swigluoai",
            alpha=1.5,
            limit=7.0,
        ),
        replace(SPEC, num_experts=1, biased=True, exact_dtype="float8_e4m3fn", hidden=150),
        replace(SPEC, num_experts=1, biased=True, exact_dtype="mxfp4", hidden=150),
        replace(SPEC, num_experts=1, gated=False, exact_dtype="mxfp4", hidden=64),
    ],
)
def test_a_reader_made_from_the_page_gets_the_same_weights(tmp_path, spec):
    write_tiny_store(tmp_path, [spec])
    manifest = json.loads((tmp_path / "experts/manifest.json").read_text())
    (entry,) = manifest["layers"]
    raw = (tmp_path / "experts" / entry["file"]).read_bytes()
    reader = PlainReader(raw)
    assert (spec.num_experts, spec.hidden, spec.intermediate) == (reader.E, reader.H, reader.I)
    assert reader.name == entry["name"] and len(raw) == entry["bytes"]
    assert f"{struct.unpack_from('<I', raw, 24)[0]:08x}" == entry["header_crc32c"]
    assert (reader.alpha, reader.limit) == (spec.alpha, spec.limit)
    shape = codec.Shape(
        spec.hidden, spec.intermediate, spec.gated, spec.biased, spec.exact_dtype_code
    )
    rng = np.random.default_rng(0)
    for e in range(spec.num_experts):
        matrices, biases, *scales = tiny_expert(spec, e)
        payloads = [reader.record(e, r) for r in range(5)]
        arrays = [np.frombuffer(p, np.uint8) for p in payloads]
        for m, (rows, cols) in enumerate(reader.shapes):
            wanted = [codec.decode_ref(shape, arrays, level, m) for level in range(4)]
            places = [(0, 0), (rows - 1, cols - 1)] + [
                (int(rng.integers(rows)), int(rng.integers(cols))) for _ in range(60)
            ]
            for row, col in places:
                element = reader.element(payloads[4], m, row, col)
                if spec.exact_dtype == "mxfp4":
                    code = matrices[m][row, col // 2] >> 4 * (col % 2) & 15
                    assert element == (code, scales[0][m][row, col // 32])
                elif scales:
                    assert element == (matrices[m][row, col], scales[0][m][row // 16, col // 128])
                else:
                    assert element == matrices[m][row, col]
                for level, b in enumerate((2, 3, 4, 8)):
                    got = reader.weight(payloads, m, row, col, b)
                    assert got == pytest.approx(wanted[level][row, col], rel=1e-5, abs=1e-7)
        if biases:
            at = 64 * len(reader.shapes)
            first = struct.unpack_from(f"<{spec.intermediate}f", payloads[0], at)
            np.testing.assert_array_equal(np.float32(first), codec.bias_ref(shape, arrays, 0, 0))


class PlainSet:
    """One record that begins a code set, over any list of matrices, read as the page says."""

    def __init__(self, payload, shapes, bits, biases=()):
        self.payload, self.shapes = bytes(payload), shapes
        self.bits, self.biases = bits, biases
        self.counts = [(up(r, 16) // 16, up(c, 32) // 32, up(c, 128) // 128) for r, c in shapes]

    def params_at(self, m):
        at = 64 * len(self.shapes) + sum(up(4 * rows, 64) for rows in self.biases)
        return at + sum(32 * tiles * groups for tiles, _, groups in self.counts[:m])

    def blocks_at(self, plane):
        blocks = sum(tiles * cols for tiles, cols, _ in self.counts)
        at = up(self.params_at(len(self.shapes)), 128)
        for size, following in ((128, 64), (64, 64), (64, 256))[:plane]:
            at = up(at + blocks * size, following)
        return at

    def weight(self, m, row, col):
        lane, q = 4 * (row % 16) + col % 4, col % 32 // 4
        _, cols, groups = self.counts[m]
        before = sum(t * c for t, c, _ in self.counts[:m]) + row // 16 * cols + col // 32

        def byte(plane, v):
            size = (128, 64, 64, 256)[plane]
            return self.payload[self.blocks_at(plane) + size * before + 64 * v + lane]

        code = (byte(0, q // 4) >> 2 * (q % 4) & 3) << 6
        if self.bits >= 3:
            code |= (byte(1, 0) >> q & 1) << 5
        if self.bits >= 4:
            code |= (byte(2, 0) >> q & 1) << 4
        if self.bits == 8:
            code |= byte(3, q // 2) >> 4 * (q % 2) & 15
        log2_min, log2_step, *tables = struct.unpack_from("<ff4B8B16B", self.payload, 64 * m)
        table = {2: tables[:4], 3: tables[4:12], 4: tables[12:], 8: range(256)}[self.bits]
        params = self.params_at(m) + 32 * (row // 16 * groups + col // 128)
        scale_q, zero = (self.payload[params + 16 * i + row % 16] for i in (0, 1))
        return 2.0 ** (log2_min + log2_step * scale_q) * (table[code >> (8 - self.bits)] - zero)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_code_set_and_low_rank_factors_read_as_the_page_says(bits):
    rng = np.random.default_rng(bits)
    shapes = [(37, 131), (131, 37)]  # ungated: up, down
    sources = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    biases = [rng.standard_normal(rows).astype(np.float32) for rows, _ in shapes]
    coded = PlainSet(_C.encode_coded(sources, biases, bits), shapes, bits, [37, 131])
    factors = [(rng.standard_normal((r, 5)), rng.standard_normal((5, c))) for r, c in shapes]
    payload, ranks = codec.encode_low_rank(factors, bits)
    low = PlainSet(payload, [(5, 131), (37, 5), (5, 37), (131, 5)], bits)
    shape = codec.Shape(131, 37, gated=False, biased=True)
    chain = [(np.frombuffer(coded.payload, np.uint8), bits)]
    for m, (rows, cols) in enumerate(shapes):
        wanted = codec.decode_coded_ref(shape.coded, codec.chain_planes(chain), m)
        delta = codec.low_rank_ref(shape, payload, ranks, m, bits)
        for row, col in [(0, 0), (rows - 1, cols - 1)] + [
            (int(rng.integers(rows)), int(rng.integers(cols))) for _ in range(30)
        ]:
            assert coded.weight(m, row, col) == pytest.approx(wanted[row, col], rel=1e-5, abs=1e-7)
            got = sum(low.weight(2 * m + 1, row, k) * low.weight(2 * m, k, col) for k in range(5))
            assert got == pytest.approx(delta[row, col], rel=1e-4, abs=1e-5)


def test_a_store_made_by_hand_from_the_page_is_read(tmp_path):
    """One ungated fp32 expert of H = 2, I = 3 whose up matrix has chosen codes; the rest is zero."""
    codes = [[0, 255], [64, 100], [200, 7]]  # [I, H]
    zero, tables = 9, [*range(4), *range(8), *range(16)]
    header = struct.pack("<ff28B28x", -3.0, 0.5, *tables)  # scale = 2 ** (-3 + 0.5 * 4) = 0.5
    params = bytes([4] * 3 + [0] * 13 + [zero] * 3 + [0] * 13)
    planes = [bytearray(2 * size) for size in (128, 64, 64, 256)]  # two matrices of one block
    for row, pair in enumerate(codes):
        for col, code in enumerate(pair):
            lane = 4 * row + col  # quad 0
            planes[0][lane] |= code >> 6
            planes[1][lane] |= code >> 5 & 1
            planes[2][lane] |= code >> 4 & 1
            planes[3][lane] |= code & 15
    record0 = header * 2 + params * 2
    record0 += bytes(up(len(record0), 128) - len(record0))
    params_nbytes = len(record0)
    exact = bytearray(2 * 2048)
    for row in range(3):
        for col in range(2):
            struct.pack_into("<f", exact, 4 * (16 * col + row), 10 * row + col)
    payloads = [record0 + planes[0], planes[1], planes[2], planes[3], exact]

    name, table, extents, at = b"up.down", b"", b"", 4096
    ladder = [(0, 2, -1, 0), (0, 1, 0, 0), (0, 1, 1, 0), (0, 4, 2, 0), (1, 32, -1, 15)]
    for r, (kind, bits, parent, replaces) in enumerate(ladder):
        p = bytes(payloads[r])
        table += struct.pack("<HBBiQiIQQII16x", kind, bits, 1, parent, replaces, -1, crc32c(p), at,
                             len(p), 0, params_nbytes if r == 0 else 0)  # fmt: skip
        extents += p + bytes(up(len(p), 4096) - len(p))
        at += up(len(p), 4096)

    def head(crc):
        return struct.pack(
            "<8sIIQIIIIQQBBBBffIIIIHHI164x", b"COMOELYR", 1, 256 + 320 + len(name), at, crc, 1, 5, 64,
            2, 3, 0, 0, 3, 0, 0.0, 0.0, 0, 256, 256 + 320, len(name), 16, 32, 128)  # fmt: skip

    crc = crc32c(head(0) + table + name)
    front = head(crc) + table + name
    folder = tmp_path / "experts"
    folder.mkdir()
    (folder / "weights.bin").write_bytes(front + bytes(4096 - len(front)) + extents)
    text = (
        '{"crc32c": "00000000", "format": "comoe-store", "version": 1, "comoe_version": "by hand", "model_type": "x",'
        '"source": "", "page_bytes": 4096, "dense_bytes": 0, "levels": [{"name": "2", "mask": 1}, {"name": "3", "mask": 3},'
        '{"name": "4", "mask": 7}, {"name": "8", "mask": 15}, {"name": "exact", "mask": 16}], "layers": [{"name": "up.down",'
        f'"file": "weights.bin", "bytes": {at}, "header_crc32c": "{crc:08x}"}}]}}'
    )
    text = text.replace("00000000", f"{crc32c(text.encode()):08x}", 1)
    (folder / "manifest.json").write_text(text)

    store = Store.open(tmp_path)
    (layer,) = store.layers
    assert (layer.activation, layer.exact_dtype, layer.gated) == ("relu", "float32", False)
    shape = codec.Shape(2, 3, gated=False, exact_dtype=codec.FP32)
    read = [np.frombuffer(store.payload(0, 0, r), np.uint8) for r in range(5)]
    for level, b in enumerate((2, 3, 4, 8)):  # each table entry is its own index
        expected = 0.5 * ((np.array(codes) >> (8 - b)) - zero)
        np.testing.assert_allclose(codec.decode_ref(shape, read, level, 0), expected, rtol=1e-6)
    exact_up = codec.decode_ref(shape, read, codec.EXACT_LEVEL, 0)
    np.testing.assert_array_equal(exact_up, [[0, 1], [10, 11], [20, 21]])
