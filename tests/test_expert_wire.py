"""Messages between a device and a machine that computes experts for it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comoe.tiers import expert_wire as wire
from comoe.tiers.expert_wire import Call, Result, WireError

STORE = bytes(range(16))


def call_of(tokens=3, k=2, hidden=65, form="bf16", seed=0):
    rng = np.random.default_rng(seed)
    return Call(
        1,
        STORE,
        rng.integers(-1, 5, (tokens, k)).astype(np.int32),
        rng.random((tokens, k), np.float32),
        rng.standard_normal((tokens, hidden)).astype(np.float32),
        form,
    )


@pytest.mark.parametrize("form", wire.FORMATS)
@pytest.mark.parametrize("tokens, k, hidden", [(1, 1, 1), (3, 2, 65), (7, 8, 128), (1, 4, 63)])
def test_calls_and_results_come_back(form, tokens, k, hidden):
    call = call_of(tokens, k, hidden, form)
    data = wire.pack_call(call)
    assert len(data) == wire.call_bytes(tokens, k, hidden, form)
    got = wire.unpack_call(data)
    assert (got.layer_idx, got.store_id, got.wire) == (1, STORE, form)
    np.testing.assert_array_equal(got.expert_idx, call.expert_idx)
    np.testing.assert_array_equal(got.weights, call.weights)
    if form == "bf16":
        exact = torch.from_numpy(call.x).bfloat16().float().numpy()
        np.testing.assert_array_equal(got.x, exact)
    else:
        for i in range(0, hidden, wire.GROUP):
            group = slice(i, i + wire.GROUP)
            scale = np.abs(call.x[:, group]).max(1, keepdims=True) / 127
            assert (np.abs(got.x[:, group] - call.x[:, group]) <= 0.5001 * scale).all()
    result = Result(got.x, 0.25)
    data = wire.pack_result(result, form)
    assert len(data) == wire.result_bytes(tokens, hidden, form)
    back = wire.unpack_result(data, tokens, hidden, form)
    assert back.seconds == 0.25
    np.testing.assert_allclose(back.out, got.x, rtol=1e-6, atol=0)


def test_rows_of_zeros_and_extreme_numbers():
    x = np.array([[0.0, -0.0, 3e38, -3e38, 1e-38, 1e-45]], np.float32)
    assert np.isfinite(wire.unpacked_rows(wire.packed_rows(x, "int8"), 1, 6, "int8")).all()
    zeros = np.zeros((2, 70), np.float32)
    for form in wire.FORMATS:
        np.testing.assert_array_equal(
            wire.unpacked_rows(wire.packed_rows(zeros, form), 2, 70, form), zeros
        )


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_call_is_never_taken_for_another(data):
    """One byte changed, cut off, or added."""
    whole = wire.pack_call(call_of())
    at = data.draw(st.integers(0, len(whole) - 1))
    how = data.draw(st.sampled_from(["change", "cut", "add"]))
    if how == "change":
        byte = data.draw(st.integers(1, 255))
        broken = whole[:at] + bytes([whole[at] ^ byte]) + whole[at + 1 :]
    else:
        broken = whole[:at] if how == "cut" else whole + whole[: at + 1]
    try:
        got = wire.unpack_call(broken)
    except WireError:
        return
    # The header is not under the checksum: layer and store may be others, which the host then refuses.
    # The padding byte means nothing.
    assert how == "change" and (at == 5 or 8 <= at < 12 or 20 <= at < 36)
    np.testing.assert_array_equal(got.x, wire.unpack_call(whole).x)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_anything_else_is_refused(data):
    with pytest.raises(WireError):
        wire.unpack_call(data)
    with pytest.raises(WireError):
        wire.unpack_result(data, 1, 8, "bf16")


def test_infinite_numbers_are_refused():
    call = call_of()
    call.weights[0, 0] = np.inf
    with pytest.raises(WireError, match="finite"):
        wire.unpack_call(wire.pack_call(call))
    bad = wire.pack_result(Result(np.full((1, 4), np.inf, np.float32), 0.0), "bf16")
    with pytest.raises(WireError, match="finite"):
        wire.unpack_result(bad, 1, 4, "bf16")
