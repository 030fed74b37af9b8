"""The dense layers' kernels: coded and plain products, rows of a coded matrix, attention of one token."""

import numpy as np
import pytest
import torch

from comoe import _C
from comoe_kernels import coded_linear as coded
from comoe_kernels.attend import attend, attend_ref
from comoe_kernels.coded_linear import (
    coded_embedding,
    coded_linear,
    coded_linear_bytes,
    coded_linear_ref,
    coded_linears,
    encode_linear,
    unpack_rows,
)
from comoe_kernels.dense_linear import dense_linear, dense_linear_ref
from comoe_kernels.expert_ffn import rounding, use_isa

ISAS = _C.isa_names()
# One block, primes with tails in rows, columns and groups, one row, several items for each thread.
SHAPES = ((16, 32), (67, 131), (1, 200), (1040, 256))


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_product_is_that_of_the_decoded_matrix(isa, bits, rows, cols):
    torch.manual_seed(0)
    record = encode_linear(torch.randn(rows, cols), bits)
    bias = torch.randn(rows)
    with use_isa(isa):
        for tokens in (1, 3, 19):
            x = torch.randn(tokens, cols)
            want = coded_linear_ref(x, record, bias, rows, bits)
            rounded = rounding({2: 0, 3: 1, 4: 2, 8: 3}[bits], True)(x)
            allowed = error(coded_linear_ref(rounded, record, bias, rows, bits), want)
            got = coded_linear(x, record, bias, rows, bits)
            assert error(got, want) <= 2 * allowed + 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_types_leading_dimensions_and_strides(dtype):
    torch.manual_seed(1)
    record = encode_linear(torch.randn(40, 128).to(dtype), 8)
    wide = torch.full((2, 3, 256), torch.nan, dtype=dtype)
    wide[..., 64:192] = torch.randn(2, 3, 128).to(dtype)
    x = wide[..., 64:192]
    bias = torch.randn(40).to(dtype)
    got = coded_linear(x, record, bias, 40, 8)
    assert got.shape == (2, 3, 40) and got.dtype == dtype
    want = coded_linear_ref(x, record, bias, 40, 8)
    limit = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 1e-4}[dtype]
    assert error(got, want) <= limit
    assert coded_linear(x[:0], record, bias, 40, 8).shape == (0, 3, 40)


def test_rows_do_not_depend_on_each_other_nor_on_threads():
    torch.manual_seed(2)
    record = encode_linear(torch.randn(300, 256), 4)
    x = torch.randn(9, 256)
    together = coded_linear(x, record, None, 300, 4)
    alone = torch.cat([coded_linear(row[None], record, None, 300, 4) for row in x])
    assert torch.equal(together, alone)
    before = _C.num_threads()
    _C.set_num_threads(1)
    try:
        assert torch.equal(together, coded_linear(x, record, None, 300, 4))
    finally:
        _C.set_num_threads(before)


def test_several_matrices_at_once_are_those_alone():
    torch.manual_seed(3)
    rows, biases = (48, 17, 160), (torch.randn(48), None, torch.randn(160))
    records = [encode_linear(torch.randn(n, 96), 8) for n in rows]
    x = torch.randn(1, 5, 96)
    for got, record, bias, n in zip(
        coded_linears(x, records, biases, rows, 8), records, biases, rows, strict=True
    ):
        assert torch.equal(got, coded_linear(x, record, bias, n, 8))


def test_many_rows_are_unpacked(monkeypatch):
    torch.manual_seed(4)
    record, bias = encode_linear(torch.randn(100, 64), 8), torch.randn(100)
    x = torch.randn(30, 64)
    want = coded_linear_ref(x, record, bias, 100, 8)
    monkeypatch.setattr(coded, "UNPACK_ROWS", 30)
    monkeypatch.setattr(coded, "PIECE_BYTES", 40 * 64 * 4)  # three pieces, the last shorter
    assert error(coded_linear(x, record, bias, 100, 8), want) <= 1e-6


@pytest.mark.parametrize("isa", ISAS)
def test_rows_of_a_matrix(isa):
    torch.manual_seed(5)
    weight = torch.randn(70, 40)
    record = encode_linear(weight, 8)
    with use_isa(isa):
        whole = unpack_rows(record, 70, 40, 8, torch.float32)
        assert error(whole, weight) < 0.01
        assert torch.equal(unpack_rows(record, 70, 40, 8, torch.float32, 13, 41), whole[13:54])
        ids = torch.tensor([[69, 0, 17], [17, 16, 15]])
        got = coded_embedding(ids, record, 70, 40, 8, torch.bfloat16)
    assert torch.equal(got, whole[ids].bfloat16())
    with pytest.raises(IndexError, match=r"row 70 is outside 0\.\.69"):
        coded_embedding(torch.tensor([70]), record, 70, 40, 8, torch.float32)


def test_record_of_half_precision_weights_is_that_of_the_same_numbers():
    weight = torch.randn(33, 130).bfloat16()
    assert torch.equal(encode_linear(weight, 8), encode_linear(weight.float(), 8))
    whole = np.asarray(_C.encode_coded([weight.float().numpy()], [], 8))
    assert np.array_equal(encode_linear(weight, 8).numpy().view(np.uint8), whole)


def test_errors_say_what_to_do():
    record = encode_linear(torch.randn(32, 64), 8)
    with pytest.raises(ValueError, match="bits: expected one of"):
        encode_linear(torch.randn(4, 4), 5)
    with pytest.raises(ValueError, match=r"weight: expected \[rows, cols\]"):
        encode_linear(torch.randn(4), 8)
    with pytest.raises(ValueError, match="NaN or infinite"):
        encode_linear(torch.tensor([[1.0, torch.nan]]), 8)
    with pytest.raises(ValueError, match="x: expected float32"):
        coded_linear(torch.ones(1, 64, dtype=torch.float64), record, None, 32, 8)
    with pytest.raises(ValueError, match=rf"expected {coded_linear_bytes(33, 64, 8)} bytes"):
        coded_linear(torch.ones(1, 64), record, None, 33, 8)
    with pytest.raises(ValueError, match=r"bias: expected \[32\]"):
        coded_linear(torch.ones(1, 64), record, torch.ones(31), 32, 8)
    with pytest.raises(ValueError, match="record: expected contiguous int8"):
        coded_linear(torch.ones(1, 64), record.float(), None, 32, 8)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_plain_product(isa, dtype):
    torch.manual_seed(6)
    weight, x = torch.randn(1031, 67).to(dtype), torch.randn(3, 200).to(dtype)[:, 5:72]
    bias = torch.randn(1031).to(dtype)
    with use_isa(isa):
        got = dense_linear(x, weight, bias)
    want = dense_linear_ref(x, weight, bias)
    assert got.dtype == dtype and error(got, want) <= (4e-3 if dtype == torch.bfloat16 else 1e-6)
    with pytest.raises(ValueError, match=r"expected x \[T, cols\]"):
        dense_linear(x[:, :5], weight, None)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 4, 16), (6, 2, 33), (8, 1, 128)])
def test_attention_of_one_token(isa, dtype, heads, kv_heads, size):
    torch.manual_seed(7)
    q = torch.randn(2, 1, heads, size).to(dtype).transpose(1, 2)
    k, v = (torch.randn(2, kv_heads, 37, size).to(dtype) for _ in "kv")
    mask = torch.arange(37) < torch.tensor([5, 30])[:, None]
    mask[1, :3] = False  # padding on the left
    # What is masked is not read, as the unused end of a cache may hold anything.
    for cache in (k, v):
        cache.masked_fill_(~mask[:, None, :, None], torch.nan)
    clean = [cache.nan_to_num(0.0) for cache in (k, v)]
    with use_isa(isa):
        got = attend(q, k, v, mask[:, None, None], 0.2)
        everything = attend(q, *clean, None, 0.2)
    want = attend_ref(q, *clean, mask[:, None, None], 0.2)
    limit = 5e-3 if dtype == torch.bfloat16 else 2e-6
    assert got.dtype == dtype and error(got, want) <= limit
    assert error(everything, attend_ref(q, *clean, None, 0.2)) <= limit


def test_attention_without_any_position_is_zero_and_refuses_other_masks():
    q, k = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 5, 16)
    nothing = torch.zeros(1, 1, 1, 5, dtype=torch.bool)
    assert attend(q, k, k, nothing, 1.0).abs().max() == 0
    with pytest.raises(ValueError, match="mask: expected bool"):
        attend(q, k, k, nothing.float(), 1.0)
