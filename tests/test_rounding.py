"""Rounding under second moments: against the packer's, by the error that the moments measure."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from comoe import _C
from comoe.aggregate.coded import CodedMatrix, from_payloads, scale_grid, scale_of, to_payloads
from comoe.aggregate.experts import Expert, expert_forward, intermediate
from comoe.aggregate.rounding import (
    moment_error,
    round_expert,
    round_matrices,
    round_routed,
    shape_of,
)
from comoe.runtime.spec import ExpertsSpec
from comoe_kernels.ladder_codec import LEVEL_BITS, Shape, decode_ref

HIDDEN, INTER = 160, 72  # a whole group and a narrow one; rows and columns that fill no block


def correlated(rows: int, cols: int, generator: torch.Generator) -> torch.Tensor:
    """Inputs of few strong directions, as activations are."""
    mix = torch.randn(cols, cols, generator=generator) * torch.logspace(0, -2, cols)[:, None]
    return torch.randn(rows, cols, generator=generator) @ mix


def make_expert(seed: int = 0, hidden: int = HIDDEN, intermediate: int = INTER, gated: bool = True):
    generator = torch.Generator().manual_seed(seed)
    shapes = Shape(hidden, intermediate, gated).matrices
    matrices = [torch.randn(s, generator=generator) / s[1] ** 0.5 for s in shapes]
    moments = {}
    for rows, cols in shapes:
        x = correlated(500, cols, generator)
        moments[rows, cols] = x.T @ x / len(x)
    return matrices, [moments[s] for s in shapes]


def packed(matrices: list[torch.Tensor]) -> list[np.ndarray]:
    """The packer's own payloads."""
    return _C.encode_expert([m.numpy() for m in matrices], [], 0, len(matrices) == 3)


def errors(matrices, moments, payloads, level: int) -> list[float]:
    shape = shape_of(matrices)
    return [
        moment_error(w, torch.from_numpy(decode_ref(shape, payloads, level, m)), moment)
        for m, (w, moment) in enumerate(zip(matrices, moments, strict=True))
    ]


@pytest.mark.parametrize("anchor", [2, 3, 4])
@pytest.mark.parametrize("gated", [True, False])
def test_anchor_beats_data_free_rounding(anchor: int, gated: bool):
    matrices, moments = make_expert(gated=gated)
    level = anchor - 2
    ours = errors(matrices, moments, round_expert(matrices, moments, anchor=anchor), level)
    theirs = errors(matrices, moments, packed(matrices), level)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine < 0.6 * other, (ours, theirs)


@pytest.mark.parametrize("anchor", [3, 4])
def test_truncation_to_two_bits_is_no_worse_than_plain(anchor: int):
    matrices, moments = make_expert(seed=1)
    payloads = round_expert(matrices, moments, anchor=anchor)
    for mine, other in zip(
        errors(matrices, moments, payloads, 0),
        errors(matrices, moments, packed(matrices), 0),
        strict=True,
    ):
        assert mine < other


def test_more_bits_are_better_and_eight_are_near():
    matrices, moments = make_expert(seed=2)
    payloads = round_expert(matrices, moments, anchor=4, bits=8)
    assert [p.nbytes for p in payloads] == [p.nbytes for p in packed(matrices)[:4]]
    by_level = [max(errors(matrices, moments, payloads, level)) for level in range(4)]
    assert by_level == sorted(by_level, reverse=True)


@pytest.mark.parametrize("bits", LEVEL_BITS)
def test_payloads_decode_to_what_was_coded(bits: int):
    rng = np.random.default_rng(bits)
    shape = Shape(HIDDEN, INTER, biased=True)
    coded, biases = [], []
    for m, (rows, cols) in enumerate(shape.matrices):
        groups = (rows, shape.tiles(m)[2])
        tables = {b: np.sort(rng.integers(0, 256, 2**b)).astype(np.uint8) for b in (2, 3, 4)}
        parts = [rng.integers(0, 256, s).astype(np.uint8) for s in ((rows, cols), groups, groups)]
        coded.append(CodedMatrix(*parts, -9.5, 0.03125, tables))
        biases.append(rng.standard_normal(rows).astype(np.float32))
    payloads = to_payloads(shape, coded, biases, bits=bits)
    level = LEVEL_BITS.index(bits)
    back = from_payloads(shape, payloads, bits=bits)
    for m, matrix in enumerate(coded):
        for b in LEVEL_BITS[: level + 1]:
            np.testing.assert_array_equal(
                decode_ref(shape, payloads, LEVEL_BITS.index(b), m), matrix.decode(b)
            )
        np.testing.assert_array_equal(back[m].decode(bits), matrix.decode(bits))
    again = to_payloads(shape, back, biases, bits=bits)
    for one, other in zip(payloads, again, strict=True):
        np.testing.assert_array_equal(one, other)


def test_payloads_are_the_packers_for_its_codes():
    matrices, _ = make_expert(seed=3)
    theirs = packed(matrices)
    shape = Shape(HIDDEN, INTER, exact_dtype=0)
    ours = to_payloads(shape, from_payloads(shape, theirs, bits=8), bits=8)
    for record in range(4):
        np.testing.assert_array_equal(ours[record], theirs[record])


def test_never_routed_falls_back_to_white_inputs():
    matrices, moments = make_expert(seed=4)
    white = [torch.eye(m.shape[1]) for m in matrices]
    ours = errors(matrices, white, round_expert(matrices, [None] * 3, anchor=2), 0)
    zero = errors(
        matrices, white, round_expert(matrices, [torch.zeros_like(m) for m in moments], anchor=2), 0
    )
    theirs = errors(matrices, white, packed(matrices), 0)
    for mine, same, other in zip(ours, zero, theirs, strict=True):
        assert mine < 1.05 * other and same == mine


def test_singular_moments():
    matrices, _ = make_expert(seed=5)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(3, m.shape[1], generator=generator) for m in matrices]
    for x in rows:
        x[:, : x.shape[1] // 2] = 0  # neurons that never fire
    moments = [x.T @ x for x in rows]
    ours = errors(matrices, moments, round_expert(matrices, moments, anchor=2), 0)
    theirs = errors(matrices, moments, packed(matrices), 0)
    for mine, other in zip(ours, theirs, strict=True):
        assert np.isfinite(mine) and mine < 0.3 * other


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(bad: float):
    matrices, moments = make_expert(seed=6)
    broken = moments[2].clone()
    broken[3, 4] = bad
    with pytest.raises(ValueError, match="moment 2 has NaN or infinity"):
        round_expert(matrices, [*moments[:2], broken])
    weight = matrices[1].clone()
    weight[0, 0] = bad
    with pytest.raises(ValueError, match="matrix 1 must be .* finite"):
        round_expert([matrices[0], weight, matrices[2]], moments)


def test_wrong_arguments():
    matrices, moments = make_expert(seed=7)
    with pytest.raises(ValueError, match="anchor: expected one of"):
        round_expert(matrices, moments, anchor=8)
    with pytest.raises(ValueError, match="bits: expected at most the anchor's 3"):
        round_expert(matrices, moments, anchor=3, bits=4)
    with pytest.raises(ValueError, match="moments: expected one"):
        round_expert(matrices, moments[:2])
    with pytest.raises(ValueError, match="moment 2: expected shape"):
        round_expert(matrices, [*moments[:2], moments[0]])
    with pytest.raises(ValueError, match="matrices: expected shapes"):
        round_expert([matrices[2], *matrices[:2]], [moments[2], *moments[:2]])


@pytest.mark.parametrize("value", [0.0, 1e-38, 1e30])
def test_degenerate_weights(value: float):
    matrices, moments = make_expert(seed=8, hidden=40, intermediate=24)
    matrices[0][:] = value
    matrices[1][3] = 0
    payloads = round_expert(matrices, moments, anchor=3)
    decoded = decode_ref(Shape(40, 24), payloads, 1, 0)
    assert np.isfinite(decoded).all() and np.abs(decoded - value).max() <= 0.1 * value + 1e-34


def test_scale_grid_covers_what_it_is_given():
    scale = np.exp2(np.linspace(-20, -1, 50)).reshape(10, 5)
    found = scale_of(*scale_grid(scale))
    near = scale >= 2.0**-17
    assert np.abs(np.log2(found[near] / scale[near])).max() <= 16 / 255 / 2 + 1e-4
    assert found.min() >= 2.0**-17.1


def test_routed_rounding_is_better_at_the_output():
    """Fitting down to coarse gate and up must beat the three matrices rounded on their own."""
    matrices, _ = make_expert(seed=9, hidden=128, intermediate=64)
    spec = ExpertsSpec("experts", 1, 128, 64)
    generator = torch.Generator().manual_seed(1)
    inputs = correlated(2500, 128, generator)
    gate = torch.rand(2500, generator=generator)
    expert = Expert(tuple(matrices))
    exact = expert_forward(inputs, expert, spec) * gate[:, None]

    def error(coded, rows: slice) -> float:
        level = Expert(tuple(torch.from_numpy(c.decode(2)) for c in coded))
        ours = expert_forward(inputs[rows], level, spec) * gate[rows, None]
        return float((ours - exact[rows]).square().sum() / exact[rows].square().sum())

    seen, fresh = slice(0, 1500), slice(1500, None)
    x = inputs[seen] * gate[seen, None]
    h = intermediate(inputs[seen], expert, spec) * gate[seen, None]
    alone = round_matrices(matrices, [x.T @ x, x.T @ x, h.T @ h], anchor=2)
    routed = round_routed(expert, spec, inputs[seen], gate[seen], anchor=2)
    free = round_matrices(matrices, [None] * 3, anchor=2)
    assert error(routed, seen) < 0.98 * error(alone, seen)
    assert error(routed, fresh) < 0.5 * error(free, fresh)
    none = round_routed(expert, spec, inputs[:0], gate[:0], anchor=2)
    assert error(none, fresh) == error(free, fresh)


def test_codes_do_not_depend_on_the_scale_of_the_moments():
    matrices, moments = make_expert(seed=10)
    one = round_expert(matrices, moments, anchor=2)
    # Powers of two, so that not even rounding differs.
    two = round_expert(matrices, [m * 1024 for m in moments], anchor=2)
    np.testing.assert_array_equal(one[0], two[0])


@pytest.mark.parametrize("entries", [4, 16])
@pytest.mark.parametrize("shape", [(7, 131), (33, 256), (1, 5)])
def test_native_parts_against_torch(shape, entries):
    """Errors of groups, sums of bins and decoding, on groups of 128 columns of which the last may be narrow."""
    torch.manual_seed(entries)
    rows, cols = shape
    groups = -(-cols // 128)
    weight = torch.randn(shape)
    scale, zero = torch.rand(rows, groups) / 30 + 0.01, torch.rand(rows, groups) * 255
    table, diagonal = (torch.rand(entries) * 255).sort().values, torch.rand(cols)
    grouping = (128, scale.numpy(), zero.numpy(), table.numpy())
    of = torch.arange(cols) // 128
    place = weight / scale[:, of] + zero[:, of]
    code = torch.bucketize(place, (table[1:] + table[:-1]) / 2)
    decoded = scale[:, of] * (table[code] - zero[:, of])
    found = _C.decode_codes(code.to(torch.uint8).numpy(), *grouping)
    assert np.array_equal(found, decoded.numpy())
    error = ((weight - decoded).square() * diagonal).double()
    want = torch.zeros(rows, groups).double().index_add_(1, of, error)
    found = _C.group_errors(weight.numpy(), *grouping, diagonal.numpy())
    np.testing.assert_allclose(found, want.numpy(), rtol=1e-5)
    code = torch.bucketize(place.clamp(0, 255), (table[1:] + table[:-1]) / 2).reshape(-1)
    mass = ((scale[:, of] * 3).square() * diagonal).double().reshape(-1)
    count, total = _C.bin_sums(weight.numpy(), *grouping, diagonal.numpy(), 3.0)
    want = torch.zeros(entries).double().index_add_(0, code, mass)
    np.testing.assert_allclose(count, want.numpy(), rtol=1e-5)
    want.zero_().index_add_(0, code, mass * place.clamp(0, 255).double().reshape(-1))
    np.testing.assert_allclose(total, want.numpy(), rtol=1e-5)
    with pytest.raises(ValueError, match=r"diagonal must have shape"):
        _C.group_errors(weight.numpy(), *grouping, diagonal[:-1].numpy())
    with pytest.raises(ValueError, match="2 to 16 table entries"):
        _C.group_errors(weight.numpy(), *grouping[:3], np.zeros(17, np.float32), diagonal.numpy())
