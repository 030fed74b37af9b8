"""`make bench`: one table of all kernels at the end, and with --write rows in bench/results/kernels.csv."""

from __future__ import annotations

import pytest
import torch
from harness import write_rows
from kernel import ROUNDS, measure
from rich.console import Console
from rich.markup import escape
from rich.table import Table

_rows = pytest.StashKey[list]()


def pytest_addoption(parser):
    group = parser.getgroup("comoe benchmarks")
    group.addoption("--write", action="store_true", help="rows to bench/results/kernels.csv")
    group.addoption("--rounds", type=int, default=ROUNDS, help="timed calls of each kernel")


def pytest_configure(config):
    config.stash[_rows] = []


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def bench(request, benchmark):
    """measure(benchmark, kernel), noted for the table."""

    def run(kernel):
        row = measure(benchmark, kernel, request.config.getoption("--rounds"))
        request.config.stash[_rows].append(row)
        if request.config.getoption("--write"):
            write_rows("kernels", [row])
        return row

    return run


def pytest_terminal_summary(config):
    rows = config.stash[_rows]
    if not rows:
        return
    table = Table("kernel", "case", "time", "rate", "of its ceiling", "against", "error")
    for row in rows:
        ceiling, rival = row["ceiling"], row["rival"]
        if ceiling:
            ceiling = f"{row['share']:.0%} of {ceiling} ({row['ceiling_rate']:.4g})"
        if rival:
            rival = escape(f"{row['times_rival']:.2f}x {rival}")
        table.add_row(
            row["op"],
            row["case"],
            f"{row['us']:.1f} us ({row['us_p20']:.1f}-{row['us_p80']:.1f})",
            f"{row['rate']:.4g} {row['unit']}",
            ceiling or "n/a",
            rival or "n/a",
            f"{row['error']:g} {row['error_of']}" if row["error"] != "" else "n/a",
        )
    Console(width=200).print(table)
