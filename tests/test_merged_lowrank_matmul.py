import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from triton_helpers import coded_matrices, error, runs_kernels

from comoe_kernels.merged_lowrank_matmul import (
    merged_lowrank_matmul,
    merged_lowrank_matmul_bytes,
    merged_lowrank_matmul_ref,
)


def ints(values):
    return torch.tensor(values, dtype=torch.int32)


# Rows sorted by cluster, then member: members 0..2 belong to cluster 0, 3 and 4 to cluster 2; 1 has no row.
MEMBER = [0, 0, 2, 2, 2, 3, 4]
CLUSTERS, MEMBERS = [0, 5, 5, 7], [0, 2, 2, 5, 6, 7]


def case(rng, rows, cols, rank, bits):
    base, bases, a = coded_matrices(rng, 3, rows, cols, bits)
    v, vs, b = coded_matrices(rng, 5, rank, cols, 8)
    u, us, c = coded_matrices(rng, 5, rows, rank, 8, down=True)
    return (base, v, u), (bases, vs, us), (a, b, c)


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "rows, cols, rank, bits",
    [(40, 200, 16, 2), (33, 129, 48, 4), (16, 300, 1, 8), (32, 64, 128, 3)],
)
def test_agrees_with_the_reference(rows, cols, rank, bits, dtype):
    rng = np.random.default_rng(rank + bits)
    coded, dense, _arenas = case(rng, rows, cols, rank, bits)
    x = torch.from_numpy(rng.standard_normal((4, cols)).astype(np.float32)).to(dtype)
    token, member = ints([0, 3, 1, 0, 2, 2, 0]), ints(MEMBER)
    out = merged_lowrank_matmul(x, *coded, token, member, ints(CLUSTERS), ints(MEMBERS))
    want = merged_lowrank_matmul_ref(x, *dense, token, member, ints(CLUSTERS))
    assert error(out, want) < 1e-5


@runs_kernels
def test_many_rows_of_one_cluster():
    rng = np.random.default_rng(3)
    coded, dense, _arenas = case(rng, 24, 96, 16, 4)
    x = torch.from_numpy(rng.standard_normal((40, 96)).astype(np.float32)).bfloat16()
    token, member = ints(range(40)), ints([0] * 19 + [1] * 21)
    clusters, members = ints([0, 40, 40, 40]), ints([0, 19, 40, 40, 40, 40])
    out = merged_lowrank_matmul(x, *coded, token, member, clusters, members)
    assert error(out, merged_lowrank_matmul_ref(x, *dense, token, member, clusters)) < 1e-5


def test_bytes_count_a_base_once_for_its_members():
    rng = np.random.default_rng(4)
    (base, v, u), _, _arenas = case(rng, 32, 64, 16, 4)
    got = merged_lowrank_matmul_bytes(base, v, u, clusters=1, members=2, num_rows=2)
    assert got == base.nbytes + 2 * (v.nbytes + u.nbytes) + 2 * (64 * 2 + 32 * 4)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"rank": 130}, "rank of at most 128"),
        ({"member": torch.zeros(6, dtype=torch.int32)}, "member: expected"),
        ({"swap": True}, "factors: expected V"),
        ({"out": torch.zeros(7, 15)}, "out: expected"),
    ],
)
def test_arguments_that_do_not_fit(change, text):
    rng = np.random.default_rng(9)
    (base, v, u), _, _arenas = case(rng, 16, 32, change.get("rank", 16), 2)
    if change.get("swap"):
        v, u = u, v
    x, token = torch.zeros(4, 32), ints([0] * 7)
    member = change.get("member", ints(MEMBER))
    with pytest.raises(ValueError, match=text):
        merged_lowrank_matmul(
            x, base, v, u, token, member, ints(CLUSTERS), ints(MEMBERS), out=change.get("out")
        )
