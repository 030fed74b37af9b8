import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
import triton
from triton_helpers import coded_matrices, error, runs_kernels

from comoe_kernels.coded_matrix import CodedMatrix
from comoe_kernels.dequant_matmul import dequant_matmul, dequant_matmul_bytes, dequant_matmul_ref

ROWS_OF = [0, 3, 3, 6, 1, 5]  # row 6 of x has no matrix, matrix 1 no row
OFFSETS = [0, 4, 4, 6]


def ints(values):
    return torch.tensor(values, dtype=torch.int32)


@runs_kernels
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    "rows, cols, down, dtype",
    [
        (40, 200, False, torch.bfloat16),
        (16, 32, True, torch.float16),
        (33, 129, True, torch.float32),
        (1, 1, False, torch.bfloat16),
    ],
)
def test_agrees_with_the_reference(bits, rows, cols, down, dtype):
    rng = np.random.default_rng(rows * bits)
    matrix, dense, _arena = coded_matrices(rng, 3, rows, cols, bits, down=down)
    x = torch.from_numpy(rng.standard_normal((7, cols + 3)).astype(np.float32)).to(dtype)[:, :cols]
    token, offsets = ints(ROWS_OF), ints(OFFSETS)
    out = dequant_matmul(x, matrix, token, offsets)
    want = dequant_matmul_ref(x, dense, token, offsets)
    assert error(out, want) < 1e-5
    parts = dequant_matmul(x, matrix, token, offsets, split_k=3)
    assert parts.shape == (3, 6, rows)
    assert error(parts.sum(0), want) < 1e-5


@runs_kernels
def test_pages_larger_than_one_block_row_and_many_rows():
    rng = np.random.default_rng(5)
    matrix, dense, _arena = coded_matrices(rng, 2, 48, 160, 4, page_bytes=8192, down=True)
    x = torch.from_numpy(rng.standard_normal((40, 160)).astype(np.float32)).bfloat16()
    token, offsets = ints(rng.permutation(40)), ints([0, 35, 40])  # two blocks of rows: prefill
    want = dequant_matmul_ref(x, dense, token, offsets)
    out = torch.full((40, 48), torch.nan)
    assert dequant_matmul(x, matrix, token, offsets, out=out) is out
    assert error(out, want) < 1e-5


@runs_kernels
def test_a_row_does_not_depend_on_the_others():
    rng = np.random.default_rng(6)
    matrix, _, _arena = coded_matrices(rng, 1, 48, 160, 3)
    x = torch.from_numpy(rng.standard_normal((20, 160)).astype(np.float32)).bfloat16()
    together = dequant_matmul(x, matrix, ints(range(20)), ints([0, 20]))
    for row in (0, 7, 19):
        alone = dequant_matmul(x, matrix, ints([row]), ints([0, 1]))
        assert torch.equal(alone[0], together[row])


@runs_kernels
def test_no_rows_and_untouched_output():
    rng = np.random.default_rng(7)
    matrix, _, _arena = coded_matrices(rng, 1, 16, 32, 2)
    x = torch.zeros(1, 32)
    assert dequant_matmul(x, matrix, ints([]), ints([0, 0])).shape == (0, 16)
    out = torch.full((2, 16), 3.0)
    dequant_matmul(x, matrix, ints([0, 0]), ints([0, 1]), out=out)
    assert (out[0] == 0).all() and (out[1] == 3).all()


def test_bytes():
    pages = torch.zeros(1, 3, 1, dtype=torch.int64)
    matrix = CodedMatrix(32, 128, 4, pages, 4096, 0, 64, (128, 0, 0))
    assert matrix.nbytes == 32 * 128 // 2 + 2 * 32 + 64
    assert dequant_matmul_bytes(matrix, 1, 2) == matrix.nbytes + 2 * (128 * 2 + 32 * 4)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"x": torch.zeros(2, 31)}, "x: expected"),
        ({"x": torch.zeros(2, 32, dtype=torch.float64)}, "x: expected"),
        ({"x": torch.zeros(32, 2).T}, "contiguous columns"),
        ({"token": torch.zeros(2, dtype=torch.int64)}, "token: expected"),
        ({"offsets": torch.zeros(3, dtype=torch.int32)}, "offsets: expected 2"),
        ({"out": torch.zeros(2, 15)}, "out: expected"),
    ],
)
def test_arguments_that_do_not_fit(change, text):
    rng = np.random.default_rng(8)
    matrix, _, _arena = coded_matrices(rng, 1, 16, 32, 2)
    given = {"x": torch.zeros(2, 32), "token": ints([0, 1]), "offsets": ints([0, 2]), **change}
    out = given.pop("out", None)
    with pytest.raises(ValueError, match=text):
        dequant_matmul(given["x"], matrix, given["token"], given["offsets"], out=out)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"bits": 5}, "bits: expected"),
        ({"pages": torch.zeros(1, 1, 1, dtype=torch.int64)}, "pages: expected"),
        ({"pages": torch.zeros(1, 2, 1)}, "pages: expected"),
        ({"page_bytes": 1000}, "page_bytes: expected"),
        ({"page_bytes": 1 << 31}, "under 2 GiB"),
        ({"block_offsets": (0,)}, "block_offsets: expected 2"),
    ],
)
def test_matrices_that_do_not_fit(change, text):
    given = {
        "rows": 16,
        "cols": 32,
        "bits": 3,
        "pages": torch.zeros(1, 2, 1, dtype=torch.int64),
        "page_bytes": 4096,
        "header_offset": 0,
        "params_offset": 64,
        "block_offsets": (128, 0),
    }
    with pytest.raises(ValueError, match=text):
        CodedMatrix(**{**given, **change})


def test_kernels_compile_for_gpus_without_spilling():
    """Ahead of time for sm_80 and sm_90, with the blocks that the wrappers choose."""
    script = Path(__file__).parent / "compile_triton.py"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(script.parent.parent)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), "80", "90"],
        env=env,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert len(rows) == 28
    spilled = [row for row in rows if row["stack"] or row["registers"] > 255]
    if spilled and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        pytest.skip(f"triton {triton.__version__}, older than the pinned one, spills: {spilled}")
    assert spilled == []
