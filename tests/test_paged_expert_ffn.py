"""The GPU's expert FFN over pages: in Triton's interpreter where there is no GPU, on it where there is one."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from triton_helpers import bf16_bits, error, runs_kernels

from comoe import _C
from comoe_kernels.ladder_codec import BF16, FP16, Shape, decode_ref
from comoe_kernels.paged_expert_ffn import (
    PageTables,
    paged_expert_ffn,
    paged_expert_ffn_bytes,
    paged_expert_ffn_ref,
    sort_pairs,
)

PAGE = 4096
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def ints(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def as_floats(matrix, dtype):
    """fp32 of what decode_ref returns, which is bits at the exact level."""
    matrix = torch.from_numpy(np.ascontiguousarray(matrix))
    if matrix.dtype == torch.uint16:
        matrix = matrix.view(torch.bfloat16 if dtype == BF16 else torch.float16)
    return matrix.float()


class Layer:
    """Experts with all five records in pages of random order; pages of records that a level does not
    need are NaN, so that reading them shows."""

    def __init__(self, rng, num, hidden, inter, gated, levels, dtype=BF16):
        self.shape = Shape(hidden, inter, gated=gated, exact_dtype=dtype)
        self.levels = levels  # of each expert, -1: none of its records are here
        self.dense, payloads = {}, []
        for e in range(num):
            matrices = []
            for s in self.shape.matrices:
                w = (rng.standard_normal(s) * rng.uniform(0.5, 2) / s[1] ** 0.5).astype(np.float32)
                matrices.append(
                    bf16_bits(w) if dtype == BF16 else w.astype(np.float16).view(np.uint16)
                )
            buffers = [np.zeros(self.shape.record_bytes(r), np.uint8) for r in range(5)]
            _C.encode_expert(matrices, [], dtype, gated, buffers)
            if levels[e] >= 0:
                self.dense[e] = [
                    as_floats(decode_ref(self.shape, buffers, levels[e], m), dtype)
                    for m in range(len(matrices))
                ]
            payloads += buffers
        counts = [-(-len(p) // PAGE) for p in payloads]
        total = sum(counts)
        self.arena = torch.full(((total + 1) * PAGE,), 0xFF, dtype=torch.uint8, device=DEVICE)
        base = -self.arena.data_ptr() % 64
        slots = iter(rng.permutation(total))
        table, first = [], []
        for record, (payload, count) in enumerate(zip(payloads, counts, strict=True)):
            first.append(len(table))
            level = levels[record // 5]
            needed = record % 5 == 4 if level == 4 else record % 5 <= level
            for n in range(count):
                at = base + int(next(slots)) * PAGE
                table.append(self.arena.data_ptr() + at)
                piece = torch.from_numpy(payload[n * PAGE : (n + 1) * PAGE])
                if needed:
                    self.arena[at : at + piece.numel()] = piece.to(DEVICE)
        records = torch.arange(num * 5, dtype=torch.int32, device=DEVICE).view(num, 5)
        self.tables = PageTables(
            torch.tensor(table, dtype=torch.int64, device=DEVICE),
            torch.tensor(first, dtype=torch.int64, device=DEVICE),
            records,
            PAGE,
        )

    def run(self, x, chosen, weights, items=None, **options):
        if items is None:
            items = sorted({int(e) for e in chosen.flatten() if 0 <= e < len(self.levels)})
            items += [-1] * (chosen.numel() - len(items))
            if len(x) > 16:
                items = list(range(len(self.levels)))
        levels = [self.levels[e] if e >= 0 else -1 for e in items]
        return paged_expert_ffn(
            x, self.shape, self.tables, chosen, weights, ints(items), ints(levels), **options
        )


def draw(rng, T, K, E, hidden, dtype):
    x = torch.from_numpy(rng.standard_normal((T, hidden + 3)).astype(np.float32)).to(dtype)
    chosen = np.stack([rng.permutation(E)[:K] for _ in range(T)]) if T else np.zeros((0, K))
    weights = torch.from_numpy(rng.random((T, K), dtype=np.float32)).to(DEVICE)
    return x.to(DEVICE)[:, :hidden], ints(chosen.tolist()).view(T, K), weights


def check(layer, x, chosen, weights, activation="silu", **options):
    out = layer.run(x, chosen, weights, activation=activation, **options)
    want = paged_expert_ffn_ref(x.cpu(), layer.dense, chosen.cpu(), weights.cpu(), activation)
    assert out.shape == x.shape and out.dtype == x.dtype
    low = 2e-6 if x.dtype == torch.float32 else 8e-3 if x.dtype == torch.bfloat16 else 1.5e-3
    assert error(out.float().cpu(), want) < low
    return out


@runs_kernels
@pytest.mark.parametrize(
    "T, K, E, hidden, inter, gated, dtype, activation",
    [
        (1, 2, 6, 128, 64, True, torch.bfloat16, "silu"),  # decode, one token
        (2, 5, 5, 136, 20, True, torch.float32, "gelu"),  # K == E, no whole groups
        (16, 1, 5, 33, 129, False, torch.bfloat16, "relu"),  # Switch, odd sizes
        (5, 3, 6, 96, 17, True, torch.float16, "gelu_tanh"),
        (2, 2, 6, 1, 1, False, torch.float32, "relu2"),
        (20, 2, 6, 72, 48, True, torch.bfloat16, "quick_gelu"),  # prefill
    ],
)
def test_mixed_levels_in_one_launch(T, K, E, hidden, inter, gated, dtype, activation):
    rng = np.random.default_rng(T * hidden + inter)
    layer = Layer(rng, E, hidden, inter, gated, [e % 5 for e in range(E)])
    x, chosen, weights = draw(rng, T, K, E, hidden, dtype)
    check(layer, x, chosen, weights, activation)


@runs_kernels
@pytest.mark.parametrize("T", [2, 18])
def test_what_is_not_here_adds_nothing(T):
    rng = np.random.default_rng(1)
    layer = Layer(rng, 4, 40, 32, True, [2, -1, 4, 0])
    x, chosen, weights = draw(rng, T, 3, 4, 40, torch.float32)
    chosen[0] = ints([1, 4, -1])  # not here, the sentinel, none: exactly zero
    out = check(layer, x, chosen, weights)
    assert (out[0] == 0).all()


@runs_kernels
@pytest.mark.parametrize("T", [16, 70])
def test_all_tokens_to_one_expert(T):
    rng = np.random.default_rng(2)
    layer = Layer(rng, 3, 40, 32, True, [3, 1, 4])
    x, _, weights = draw(rng, T, 1, 3, 40, torch.float32)
    check(layer, x, torch.full((T, 1), 2, dtype=torch.int32, device=DEVICE), weights)


@runs_kernels
def test_exact_half_weights():
    rng = np.random.default_rng(3)
    layer = Layer(rng, 3, 24, 16, True, [4, 4, 2], dtype=FP16)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        check(layer, *draw(rng, 2, 2, 3, 24, dtype))


@runs_kernels
def test_the_same_twice_and_however_items_are_split():
    rng = np.random.default_rng(4)
    layer = Layer(rng, 5, 32, 16, True, [0, 1, 2, 3, 4])
    x, chosen, weights = draw(rng, 3, 3, 5, 32, torch.float32)
    one = check(layer, x, chosen, weights)
    assert torch.equal(one, layer.run(x, chosen, weights))
    check(layer, x, chosen, weights, split=2)
    # A token's result does not depend on the others.
    alone = layer.run(x[1:2], chosen[1:2], weights[1:2], items=[0, 1, 2, 3, 4])
    torch.testing.assert_close(alone[0], one[1], rtol=1e-6, atol=1e-7)


@runs_kernels
def test_no_tokens_and_untouched_memory():
    rng = np.random.default_rng(5)
    layer = Layer(rng, 2, 32, 16, True, [2, 2])
    x, chosen, weights = draw(rng, 0, 2, 2, 32, torch.float32)
    assert layer.run(x, chosen, weights, items=[0, 1]).shape == (0, 32)
    x, chosen, weights = draw(rng, 2, 2, 2, 32, torch.float32)
    guarded = torch.full((4, 32), 7.0, device=DEVICE)
    layer.run(x, chosen, weights, out=guarded[1:3])
    assert (guarded[0] == 7).all() and (guarded[3] == 7).all()


def test_sorted_pairs():
    pairs, offsets = sort_pairs(torch.tensor([[2, 0], [3, 2], [-1, 0]], dtype=torch.int32), 3)
    assert offsets.tolist() == [0, 2, 2, 4]
    assert pairs.tolist() == [1, 5, 0, 3, 2, 4]


def test_bytes():
    shape = Shape(32, 16)
    exact, two = shape.record_bytes(4), shape.record_bytes(0) + shape.record_bytes(1)
    assert paged_expert_ffn_bytes(shape, [4, 1, -1], 2, 3) == exact + two + 2 * 32 * 4 + 2 * 6 * 32


@pytest.mark.parametrize(
    "change, text",
    [
        ({"x": torch.zeros(2, 31)}, "x: expected"),
        ({"activation": "swish"}, "activation: expected"),
        ({"shape": Shape(32, 16, biased=True)}, "without biases"),
        ({"shape": Shape(32, 16, exact_dtype=0)}, "bfloat16 or float16"),
        ({"chosen": torch.zeros(2, 2, dtype=torch.int64)}, "chosen: expected"),
        ({"weights": torch.zeros(2, 3)}, "weights: expected"),
        ({"levels": torch.zeros(3, dtype=torch.int32)}, "levels: expected"),
        ({"split": 0}, "split: expected"),
        ({"out": torch.zeros(2, 31)}, "out: expected"),
        (
            {
                "x": torch.zeros(17, 32),
                "chosen": torch.zeros(17, 2, dtype=torch.int32),
                "weights": torch.zeros(17, 2),
            },
            "items: expected all 3 experts",
        ),
    ],
)
def test_arguments_that_do_not_fit(change, text):
    tables = PageTables(
        torch.zeros(15, dtype=torch.int64),
        torch.zeros(15, dtype=torch.int64),
        torch.zeros(3, 5, dtype=torch.int32),
        PAGE,
    )
    given = {
        "x": torch.zeros(2, 32),
        "shape": Shape(32, 16),
        "tables": tables,
        "chosen": torch.zeros(2, 2, dtype=torch.int32),
        "weights": torch.zeros(2, 2),
        "items": torch.zeros(2, dtype=torch.int32),
        "levels": torch.zeros(2, dtype=torch.int32),
        **change,
    }
    with pytest.raises(ValueError, match=text):
        paged_expert_ffn(**given)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"page_table": torch.zeros(4)}, "page_table: expected"),
        ({"records": torch.zeros(3, 4, dtype=torch.int32)}, "at least 5"),
        ({"page_bytes": 100}, "page_bytes: expected"),
    ],
)
def test_tables_that_do_not_fit(change, text):
    given = {
        "page_table": torch.zeros(4, dtype=torch.int64),
        "first_page": torch.zeros(4, dtype=torch.int64),
        "records": torch.zeros(3, 5, dtype=torch.int32),
        "page_bytes": PAGE,
    }
    with pytest.raises(ValueError, match=text):
        PageTables(**{**given, **change})
