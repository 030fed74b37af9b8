"""The encoder against the decoder of reference: exactness, error bounds, hostile values and shapes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from ladder_numpy import coded_expert, random_codes
from safetensors import safe_open

import comoe
from comoe import _C
from comoe_kernels import ladder_codec as codec
from comoe_kernels.ladder_codec import BF16, EXACT_LEVEL, FP8, FP16, FP32, MXFP4, Shape
from comoe_kernels.unpack import EXACT_DTYPES

SHAPES = [
    pytest.param(64, 96, True, id="gated"),
    pytest.param(8, 5, True, id="tiny"),
    pytest.param(1, 1, False, id="one-weight"),
    pytest.param(131, 37, True, id="primes-over-one-group"),
    pytest.param(256, 128, False, id="whole-groups-ungated"),
]


def to_source(values: np.ndarray, dtype: int) -> np.ndarray:
    """fp32 -> what `encode_expert` takes; bf16 by truncation."""
    if dtype == BF16:
        return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(np.float16).view(np.uint16) if dtype == FP16 else values.astype(np.float32)


def to_float(source: np.ndarray, dtype: int) -> np.ndarray:
    if dtype == BF16:
        return (source.astype(np.uint32) << 16).view(np.float32)
    return source.view(np.float16).astype(np.float32) if dtype == FP16 else source


def make_expert(shape: Shape, seed: int = 0):
    rng = np.random.default_rng(seed)
    draw = lambda size: to_source(0.02 * rng.standard_normal(size), shape.exact_dtype)  # noqa: E731
    biases = [draw(rows) for rows, _ in shape.matrices] if shape.biased else []
    return [draw(size) for size in shape.matrices], biases


def encode(shape: Shape, matrices, biases=()):
    return _C.encode_expert(list(matrices), list(biases), shape.exact_dtype, shape.gated)


def encode_matrix(up: np.ndarray) -> tuple[Shape, list[np.ndarray]]:
    """An ungated fp32 expert whose first matrix is `up`."""
    shape = Shape(up.shape[1], up.shape[0], gated=False, exact_dtype=FP32)
    return shape, encode(shape, [up.astype(np.float32), np.zeros(up.shape[::-1], np.float32)])


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    want = want.astype(np.float64)
    return float(((got - want) ** 2).sum() / (want**2).sum())


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("hidden,intermediate,gated", SHAPES)
def test_exact_is_the_source_bit_for_bit(hidden, intermediate, gated, biased, dtype):
    shape = Shape(hidden, intermediate, gated, biased, dtype)
    matrices, biases = make_expert(shape)
    payloads = encode(shape, matrices, biases)
    for m, source in enumerate(matrices):
        np.testing.assert_array_equal(codec.decode_ref(shape, payloads, EXACT_LEVEL, m), source)
    for m, bias in enumerate(biases):
        np.testing.assert_array_equal(codec.bias_ref(shape, payloads, EXACT_LEVEL, m), bias)
        np.testing.assert_array_equal(codec.bias_ref(shape, payloads, 0, m), to_float(bias, dtype))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("hidden,intermediate,gated", SHAPES)
def test_8_bits_stay_within_a_step(hidden, intermediate, gated, dtype):
    shape = Shape(hidden, intermediate, gated, exact_dtype=dtype)
    matrices, _ = make_expert(shape)
    payloads = encode(shape, matrices)
    for m, source in enumerate(matrices):
        want = to_float(source, dtype)
        # Half a step of a group that spans its row, its zero included, and whose scale is on the grid.
        span = np.maximum(want.max(1), 0) - np.minimum(want.min(1), 0)
        step = span[:, None] / 255 * 1.05
        assert (np.abs(codec.decode_ref(shape, payloads, 3, m) - want) <= 0.51 * step + 1e-30).all()


def test_error_falls_with_every_rung_and_beats_the_bounds_of_lloyd():
    rng = np.random.default_rng(1)
    up = rng.standard_normal((256, 512)).astype(np.float32)
    shape, payloads = encode_matrix(up)
    errors = [relative_error(codec.decode_ref(shape, payloads, level, 0), up) for level in range(4)]
    # Measured 0.1365, 0.0361, 0.00906, 3.5e-5 on a Gaussian; no scalar quantiser of 2 bits is under 0.1.
    assert np.all(errors < np.array([0.140, 0.038, 0.0095, 3.8e-5]))
    assert errors[0] > 0.1


def plain_error(values: np.ndarray, bits: int, int_zero: bool) -> float:
    """Mean squared error of min-max rounding in groups of 128; scale in fp16, zero in fp16 or `bits` bits."""
    x = values.reshape(-1, 128)
    low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
    if int_zero:
        low, high = np.minimum(low, 0), np.maximum(high, 0)
    scale = ((high - low) / (2**bits - 1)).astype(np.float16).astype(np.float32)
    low = np.rint(low / scale) * scale if int_zero else low.astype(np.float16).astype(np.float32)
    return float(
        np.mean((np.clip(np.rint((x - low) / scale), 0, 2**bits - 1) * scale + low - x) ** 2)
    )


@pytest.mark.parametrize("int_zero", [False, True])
@pytest.mark.parametrize("df", [None, 5, 4])
def test_error_against_plain_rounding_of_more_bits(df, int_zero):
    """Plain groups of 128 cost 0.14 to 0.25 bit of parameters, ours 0.125: the stronger side is the rival."""
    rng = np.random.default_rng(2)
    size = (256, 2048)
    up = (rng.standard_t(df, size) if df else rng.standard_normal(size)).astype(np.float32)
    shape, payloads = encode_matrix(up)
    for level, (bits, bound) in enumerate([(2, 0.75), (3, 0.9), (4, 1.0), (8, 1.1)]):
        ours = np.mean((codec.decode_ref(shape, payloads, level, 0) - up) ** 2)
        assert ours <= bound * plain_error(up, bits, int_zero), f"{bits} bits"


def test_error_against_plain_rounding_on_the_bundled_model():
    """Trained weights. Plain parameters cost 0.25 bit, ours 0.2 on such small matrices, headers included."""
    path = Path(comoe.__file__).parent / "demo_model" / "model.safetensors"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    ours, plain = np.zeros(4), np.zeros(4)
    with safe_open(path, "pt") as file:
        names = [name for name in file.keys() if ".experts." in name]  # noqa: SIM118
        for name in names[::7]:
            up = file.get_tensor(name).float().numpy()
            shape, payloads = encode_matrix(up)
            for level, bits in enumerate((2, 3, 4, 8)):
                ours[level] += ((codec.decode_ref(shape, payloads, level, 0) - up) ** 2).sum()
                plain[level] += up.size * plain_error(up, bits, int_zero=False)
    assert np.all(ours <= np.array([0.75, 0.9, 1.0, 1.1]) * plain), ours / plain


def test_planes_nest():
    """Each level's codes are the upper bits of the next one's: a rung adds, it never rewrites."""
    shape = Shape(131, 37)
    payloads = encode(shape, make_expert(shape)[0])
    full = codec.codes_ref(shape, payloads, 3, 0)
    for level, bits in enumerate((2, 3, 4)):
        np.testing.assert_array_equal(
            codec.codes_ref(shape, payloads, level, 0), full >> (8 - bits)
        )


def test_geometry_agrees_with_the_native_one():
    for hidden, intermediate, gated, biased, dtype in [
        (8, 5, True, True, FP32),
        (131, 37, False, True, BF16),
        (2048, 768, True, False, FP16),
    ]:
        shape = Shape(hidden, intermediate, gated, biased, dtype)
        native = _C.Geometry(hidden, intermediate, gated, biased, dtype)
        assert native.num_weights == shape.num_weights
        for m in range(len(shape.matrices)):
            assert native.params_offset(m) == shape.params_offset(m)
            assert native.bias_offset(m) == shape.bias_offset(m)
            assert native.exact_bias_offset(m) == shape.exact_bias_offset(m)
            for r in range(codec.NUM_RECORDS):
                assert native.blocks_offset(r, m) == shape.blocks_offset(r, m)
        sizes = [shape.record_bytes(r) for r in range(codec.NUM_RECORDS)]
        assert [native.record_bytes(r) for r in range(codec.NUM_RECORDS)] == sizes
        assert [p.size for p in encode(shape, *make_expert(shape))] == sizes
        assert codec.expert_bytes(shape, 2) == sum(sizes[:3])
        assert codec.expert_bytes(shape, EXACT_LEVEL) == sizes[4]


def test_bits_per_weight_include_all_parameters():
    shape = Shape(2048, 768)
    bits = [8 * codec.expert_bytes(shape, level) / shape.num_weights for level in range(4)]
    np.testing.assert_allclose(bits, [2.125, 3.125, 4.125, 8.125], rtol=3e-4)


def test_the_same_bytes_every_time_and_whatever_lay_in_memory():
    shape = Shape(72, 40, biased=True, exact_dtype=BF16)
    expert = make_expert(shape)
    first = [p.tobytes() for p in encode(shape, *expert)]
    for _ in range(3):
        junk = [np.full(p.size, 0xA5, np.uint8) for p in encode(shape, *expert)]
        del junk  # freed memory that a payload may get again
        assert [p.tobytes() for p in encode(shape, *expert)] == first


def test_strided_sources():
    shape = Shape(40, 24, gated=False, exact_dtype=FP32)
    (up, down), _ = make_expert(shape)
    whole = [p.tobytes() for p in encode(shape, [up, down])]
    spread = np.full((24, 80), np.nan, np.float32)
    spread[:, ::2] = up
    assert [p.tobytes() for p in encode(shape, [spread[:, ::2], np.asfortranarray(down)])] == whole


def test_encoding_into_given_arrays():
    shape = Shape(40, 24)
    expert = make_expert(shape)
    want = encode(shape, *expert)
    out = [np.full(p.size, 0xA5, np.uint8) for p in want]
    got = _C.encode_expert(*expert, BF16, True, out)
    assert all(a is b for a, b in zip(got, out, strict=True))
    for a, b in zip(out, want, strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match=r"out\[2\] must be a contiguous uint8 array of"):
        _C.encode_expert(*expert, BF16, True, [*out[:2], out[2][:-1], *out[3:]])
    with pytest.raises(ValueError, match="out must hold 5 arrays, got 2"):
        _C.encode_expert(*expert, BF16, True, out[:2])
    for p in out:
        p.flags.writeable = False
    with pytest.raises(ValueError, match="writeable"):
        _C.encode_expert(*expert, BF16, True, out)


# ---- hostile values -------------------------------------------------------------------------------


def test_all_zero_expert_is_zero_at_every_level():
    shape, payloads = encode_matrix(np.zeros((33, 130)))
    for level in range(4):
        assert np.abs(codec.decode_ref(shape, payloads, level, 0)).max() < 1e-30
    assert not codec.decode_ref(shape, payloads, EXACT_LEVEL, 0).any()


@pytest.mark.parametrize("level", range(4))
def test_zero_groups_beside_others_vanish(level):
    rng = np.random.default_rng(3)
    up = rng.standard_normal((32, 256)).astype(np.float32)
    up[5] = 0
    up[:, 128:][::2] = 0
    shape, payloads = encode_matrix(up)
    got = codec.decode_ref(shape, payloads, level, 0)
    assert np.abs(got[5]).max() < 1e-4 and np.abs(got[::2, 128:]).max() < 1e-4


@pytest.mark.parametrize("constant", [0.5, -3.0])
def test_constant_groups_are_kept(constant):
    up = np.full((20, 200), constant, np.float32)
    shape, payloads = encode_matrix(up)
    for level in range(4):
        np.testing.assert_allclose(codec.decode_ref(shape, payloads, level, 0), up, rtol=1e-5)


def test_subnormal_weights_round_to_nothing_much():
    up = np.full((16, 32), 1e-40, np.float32)
    up[0, 0] = -3e-42
    shape, payloads = encode_matrix(up)
    for level in range(4):
        assert np.abs(codec.decode_ref(shape, payloads, level, 0)).max() < 1e-30
    np.testing.assert_array_equal(codec.decode_ref(shape, payloads, EXACT_LEVEL, 0), up)


def test_huge_weights_stay_finite():
    rng = np.random.default_rng(4)
    up = rng.choice(np.array([3.4e38, -3.4e38, 1e30, 0], np.float32), (32, 256))
    shape, payloads = encode_matrix(up)
    for level in range(4):
        got = codec.decode_ref(shape, payloads, level, 0)
        assert np.isfinite(got).all()
    assert relative_error(got / 1e38, up / 1e38) < 0.02
    np.testing.assert_array_equal(codec.decode_ref(shape, payloads, EXACT_LEVEL, 0), up)


def test_one_outlier_spoils_only_its_group():
    rng = np.random.default_rng(5)
    up = rng.standard_normal((64, 256)).astype(np.float32)
    up[7, 3] = 3000.0
    shape, payloads = encode_matrix(up)
    got = codec.decode_ref(shape, payloads, 2, 0)
    others = np.delete(np.arange(64), 7)
    assert relative_error(got[others], up[others]) < 0.012
    assert abs(got[7, 3] - 3000) < 120


@pytest.mark.parametrize(
    "dtype,bits", [(FP32, None), (BF16, 0x7FC0), (BF16, 0xFF80), (FP16, 0x7C00), (FP16, 0x7E01)]
)
def test_nan_and_infinity_are_refused_by_name(dtype, bits):
    shape = Shape(40, 24, exact_dtype=dtype)
    matrices, _ = make_expert(shape)
    matrices[2][39, 23] = np.nan if bits is None else bits
    with pytest.raises(
        ValueError, match=r"matrix down \[40, 24\] must be finite.*row 39, column 23"
    ):
        encode(shape, matrices)


def test_nan_in_a_bias_is_refused():
    shape = Shape(40, 24, biased=True, exact_dtype=FP32)
    matrices, biases = make_expert(shape)
    biases[1][3] = np.inf
    with pytest.raises(ValueError, match=r"bias of matrix up .*infinity at row 3"):
        encode(shape, matrices, biases)


def test_fp16_subnormals_and_extremes_convert_exactly():
    every = np.arange(1 << 16, dtype=np.uint16)
    every = every[np.isfinite(every.view(np.float16))]
    shape = Shape(1, every.size, gated=False, biased=True, exact_dtype=FP16)
    payloads = encode(
        shape,
        [every[:, None], np.zeros((1, every.size), np.uint16)],
        [every, np.zeros(1, np.uint16)],
    )
    np.testing.assert_array_equal(
        codec.bias_ref(shape, payloads, 0, 0), every.view(np.float16).astype(np.float32)
    )
    np.testing.assert_array_equal(codec.decode_ref(shape, payloads, EXACT_LEVEL, 0), every[:, None])


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, "mxfp4"], ids=str)
@pytest.mark.parametrize("size", [(38, 54), (288, 160)])
def test_codes_come_back_and_levels_follow_them(kind, size):
    expert = coded_expert(np.random.default_rng(0), *size, kind, biased=True, extremes=0)
    shape = Shape(*size, biased=True, exact_dtype=EXACT_DTYPES[kind])
    for m, weight in enumerate(expert.dense[4]):
        got = codec.decode_ref(shape, expert.payloads, EXACT_LEVEL, m)
        np.testing.assert_array_equal(got, weight.numpy())
        bias = expert.biases[4][m].numpy()
        for level in (0, EXACT_LEVEL):
            np.testing.assert_array_equal(codec.bias_ref(shape, expert.payloads, level, m), bias)
        close = codec.decode_ref(shape, expert.payloads, 3, m)
        assert np.square(close - got).mean() < 1e-3 * np.square(got).mean()


@pytest.mark.parametrize(
    ("kind", "place", "value", "message"),
    [
        (FP8, "codes", 0x7F, r"matrix up \[32, 64\] must be finite, got NaN at row 3, column 5"),
        (FP8, "codes", 0xFF, "got NaN"),
        (FP8, "scales", np.float32(np.nan), r"must be finite, got NaN at row 0, column 0"),
        (FP8, "scales", np.float32(np.inf), "must be finite"),
        (MXFP4, "scales", 255, r"matrix up \[32, 64\] must be finite, got .* at row 3, column 32"),
    ],
)
def test_codes_that_are_no_numbers_are_refused(kind, place, value, message):
    rng, name = np.random.default_rng(0), {FP8: torch.float8_e4m3fn, MXFP4: "mxfp4"}[kind]
    drawn = [random_codes(rng, *shape, name) for shape in ((32, 64), (32, 64), (64, 32))]
    codes, scales = ([d[i] for d in drawn] for i in range(2))
    at = (3, 5) if place == "codes" else (0, 0) if kind == FP8 else (3, 1)
    {"codes": codes, "scales": scales}[place][1][at] = value
    with pytest.raises(ValueError, match=message):
        _C.encode_expert(codes, [], kind, True, None, scales)


def test_scales_are_checked():
    codes, scales, _ = random_codes(np.random.default_rng(0), 64, 64, "mxfp4")
    with pytest.raises(ValueError, match=r"scales must be one per matrix of codes \(2\), got 0"):
        _C.encode_expert([codes] * 2, [], MXFP4, False)
    with pytest.raises(ValueError, match=r"scales 0 must be \[64, 2\] \(32 columns each\), got"):
        _C.encode_expert([codes] * 2, [], MXFP4, False, None, [scales[:, :1]] * 2)
    with pytest.raises(TypeError, match="scales must be uint8"):
        _C.encode_expert([codes] * 2, [], MXFP4, False, None, [scales.astype(np.float32)] * 2)
    with pytest.raises(ValueError, match="even intermediate size, got 63"):
        _C.encode_expert([codes[:63]] * 2, [], MXFP4, False, None, [scales] * 2)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (([np.zeros((4, 8), np.float32)], [], 0, True), r"\[gate, up, down\], got 1"),
        (([np.zeros((4, 8), np.float32)] * 2, [], 0, False), r"matrix 1 must be \[8, 4\]"),
        (
            ([np.zeros((4, 8), np.float32), np.zeros((8, 4), np.float32)], [], 7, False),
            "exact_dtype must be 0",
        ),
        (
            ([np.zeros((0, 8), np.float32), np.zeros((8, 0), np.float32)], [], 0, False),
            r"1\.\.2\*\*24",
        ),
        (([np.zeros(8, np.float32), np.zeros(8, np.float32)], [], 0, False), r"\[rows, cols\]"),
    ],
)
def test_wrong_shapes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        _C.encode_expert(*arguments)


def test_wrong_dtype_is_named():
    with pytest.raises(TypeError, match=r"uint16 .*got float32"):
        _C.encode_expert([np.zeros((4, 8), np.float32)] * 3, [], BF16, True)


def test_crc32c_known_values():
    assert _C.crc32c(b"") == 0
    assert _C.crc32c(b"123456789") == 0xE3069283  # RFC 3720
    assert _C.crc32c(bytes(32)) == 0x8A9136AA
    data = np.random.default_rng(0).integers(0, 256, 1000, np.uint8)
    for cut in (0, 1, 7, 8, 513):
        assert _C.crc32c(data[cut:], _C.crc32c(data[:cut])) == _C.crc32c(data)
