import numpy as np
import pytest
import torch
from ladder_numpy import coded_expert, random_expert

from comoe import _C
from comoe_kernels.expert_ffn import use_isa
from comoe_kernels.unpack import paged_expert, unpack, unpack_bias, unpack_bytes

ISAS = _C.isa_names()
CODED = [torch.float8_e4m3fn, "mxfp4"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Primes reach every tail; the second shape has whole blocks, a part of a group, and several pages.
SHAPES = [(37, 53), (160, 96)]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("exact_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_numpy(isa, exact_dtype, shape):
    rng = np.random.default_rng(0)
    expert = random_expert(rng, *shape, exact_dtype=exact_dtype, biased=True)
    for level in range(5):
        paged = expert.paged(level, order=rng)
        for m, dense in enumerate(expert.dense[level]):
            for dtype in DTYPES:
                with use_isa(isa):
                    got = unpack(paged, m, dtype)
                if level == 4 and dtype == exact_dtype:
                    assert torch.equal(got.view(torch.uint8), dense.to(dtype).view(torch.uint8))
                else:
                    # scale = exp2(...) is good to a few units of float32, then one rounding to dtype
                    torch.testing.assert_close(
                        got, dense.to(dtype), rtol=max(1e-6, torch.finfo(dtype).eps), atol=1e-7
                    )
            assert torch.equal(unpack_bias(paged, m), expert.biases[level][m])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", CODED, ids=str)
@pytest.mark.parametrize("shape", [(38, 54), (160, 96), (288, 200)], ids=str)
def test_codes_are_decoded_bit_for_bit(isa, kind, shape):
    """Subnormal results too, which vector conversions to bf16 would flush."""
    rng = np.random.default_rng(6)
    expert = coded_expert(rng, *shape, kind, biased=True)
    paged = expert.paged(4, order=rng)
    for m, dense in enumerate(expert.dense[4]):
        for dtype in DTYPES:
            with use_isa(isa):
                got = unpack(paged, m, dtype)
            assert torch.equal(got.view(torch.uint8), dense.to(dtype).view(torch.uint8))
        assert torch.equal(unpack_bias(paged, m), expert.biases[4][m])


@pytest.mark.parametrize("isa", ISAS)
def test_exact_keeps_every_bit(isa):
    """NaN payloads, infinities, subnormals and -0 come back as they were."""
    rng = np.random.default_rng(1)
    for dtype in DTYPES:
        expert = random_expert(rng, 64, 32, exact_dtype=dtype)
        bits = rng.integers(0, 256, len(expert.payloads[4]), dtype=np.uint8)
        expert.payloads[4] = bits
        paged = expert.paged(4)
        with use_isa(isa):
            got = torch.cat([unpack(paged, m, dtype).flatten() for m in range(3)])
        number = np.uint32 if dtype.itemsize == 4 else np.uint16
        want = np.sort(bits.view(number))
        assert np.array_equal(np.sort(got.view(torch.uint8).numpy().view(number)), want)


@pytest.mark.parametrize("isa", ISAS)
def test_writes_only_the_matrix(isa):
    rng = np.random.default_rng(2)
    expert = random_expert(rng, 37, 53)
    for level in range(5):
        for dtype in DTYPES:
            big = torch.full((53 + 2, 37 + 9), 7.0, dtype=dtype)
            with use_isa(isa):
                unpack(expert.paged(level), 0, out=big[1:-1, 4 : 4 + 37])
            inside = torch.zeros_like(big, dtype=torch.bool)
            inside[1:-1, 4 : 4 + 37] = True
            assert (big[~inside] == 7).all()
            torch.testing.assert_close(
                big[1:-1, 4 : 4 + 37].float(), expert.dense[level][0], rtol=0.01, atol=1e-5
            )


def test_page_size_and_order_do_not_matter():
    rng = np.random.default_rng(3)
    expert = random_expert(rng, 288, 200)
    for level in range(5):
        want = unpack(expert.paged(level), 1, torch.float32)
        for page_bytes in (4096, 12288, 1 << 20):
            assert torch.equal(
                unpack(expert.paged(level, page_bytes=page_bytes, order=rng), 1, torch.float32),
                want,
            )


def test_bytes_count_what_is_stored():
    rng = np.random.default_rng(4)
    expert = random_expert(rng, 256, 128)
    stored = [sum(len(expert.payloads[r]) for r in range(level + 1)) for level in range(4)]
    stored.append(len(expert.payloads[4]))
    headers = [3 * 64] * 4 + [0]
    for level in range(5):
        counted = sum(
            unpack_bytes(expert.paged(level), m, torch.bfloat16) - 256 * 128 * 2 for m in range(3)
        )
        assert counted + headers[level] <= stored[level] < counted + headers[level] + 128


@pytest.mark.parametrize(
    ("kind", "bits"), [(torch.float8_e4m3fn, 8.0157), ("mxfp4", 4.25)], ids=str
)
def test_codes_are_stored_in_their_own_size(kind, bits):
    expert = coded_expert(np.random.default_rng(7), 1024, 512, kind)
    assert 8 * len(expert.payloads[4]) / (3 * 1024 * 512) == pytest.approx(bits, abs=1e-3)
    counted = sum(unpack_bytes(expert.paged(4), m, torch.bfloat16) for m in range(3))
    assert counted - 6 * 1024 * 512 <= len(expert.payloads[4]) < counted - 6 * 1024 * 512 + 512


def test_bad_arguments():
    rng = np.random.default_rng(5)
    expert = random_expert(rng, 64, 32).paged(2)
    with pytest.raises(ValueError, match=r"unpack: matrix: expected 0..2, got 3"):
        unpack(expert, 3)
    with pytest.raises(TypeError, match="unpack: dtype"):
        unpack(expert, 0, torch.float64)
    with pytest.raises(TypeError, match="unpack: out: expected dtype"):
        unpack(expert, 0, out=torch.empty(32, 64, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"unpack: out: expected shape \[32, 64\], got \[64, 32\]"):
        unpack(expert, 0, out=torch.empty(64, 32))
    with pytest.raises(ValueError, match="contiguous last dimension"):
        unpack(expert, 0, out=torch.empty(64, 32).T)
    with pytest.raises(ValueError, match="rows that do not overlap"):
        unpack(expert, 0, out=torch.empty(64).expand(32, 64))
    with pytest.raises(ValueError, match="has no bias 0"):
        unpack_bias(expert, 0)
    payloads = {0: np.zeros(100, np.uint8)}
    shape = {"gated": True, "biased": False, "exact_dtype": torch.bfloat16}
    with pytest.raises(ValueError, match="level 1 needs record 1"):
        paged_expert(64, 32, level=1, payloads={0: np.zeros(4096, np.uint8)}, **shape)
    with pytest.raises(ValueError, match="record 0 needs 9 pages, got 1"):
        paged_expert(256, 160, level=0, payloads=payloads, **shape)
    with pytest.raises(ValueError, match="page_bytes must be a multiple of 4096"):
        paged_expert(64, 32, level=0, payloads=payloads, page_bytes=1000, **shape)
