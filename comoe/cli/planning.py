"""`comoe plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from comoe.cli.common import count_bar, output
from comoe.config import format_bytes, parse_bytes


def plan(
    path: Annotated[Path, typer.Argument(metavar="DST", help="A packed folder (comoe pack).")],
    replay: Annotated[
        Path | None,
        typer.Option("--replay", metavar="TRACE", help="Compare cache policies on a trace."),
    ] = None,
    memory: Annotated[
        list[str] | None,
        typer.Option(
            "--memory",
            "-m",
            help="Of --replay: bytes for experts; may be repeated. Default: 10, 20, 30 and 50% of all.",
        ),
    ] = None,
    bandwidth: Annotated[
        str, typer.Option("--bandwidth", help="Of --replay: bytes/s of the disk.")
    ] = "1.1GB",
    latency: Annotated[
        float, typer.Option("--latency", help="Of --replay: seconds until a read begins to flow.")
    ] = 100e-6,
    tokens: Annotated[
        int, typer.Option("--tokens", help="Of --replay: only the trace's first tokens.")
    ] = 2048,
    prefetch: Annotated[
        bool, typer.Option("--prefetch", help="Of --replay: all policies read ahead.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON, and nothing else, to stdout.")
    ] = False,
) -> None:
    """Compare cache policies on a recorded text: hit rate and stall time of each against Belady.

    Example:  comoe plan ./qwen3-packed --replay book.npz --memory 2GB
    """
    if replay is None:
        raise typer.BadParameter("give a trace (comoe trace)", param_hint="--replay")
    with output(as_json) as emit:
        rows = replay_rows(path, replay, memory, bandwidth, latency, tokens, prefetch)
        emit(rows) if as_json else show_replay(rows)


def replay_rows(
    path: Path,
    trace: Path,
    memory: list[str] | None,
    bandwidth: str,
    latency: float,
    tokens: int,
    prefetch: bool,
) -> list[dict[str, Any]]:
    """Rows of `comoe plan --replay`."""
    budgets = [parse_bytes(size, "--memory") for size in memory or []]
    speed = parse_bytes(bandwidth, "--bandwidth")
    from comoe.replay import replay as run

    with count_bar("replaying") as update:
        return run(
            path,
            trace,
            memory=budgets,
            bandwidth=speed,
            latency=latency,
            tokens=tokens,
            prefetch=prefetch,
            progress=update,
        )


def show_replay(rows: list[dict[str, Any]]) -> None:
    """closed: share of the stall between LRU and Belady that a policy avoids."""
    table = Table(title="stall per token, each policy against Belady", title_justify="left")
    for name in ("experts in", "policy", "hits", "stall", "token", "read", "closed"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    before = None
    for row in rows:
        if before not in (None, row["memory"]):
            table.add_section()
        closed = "n/a" if row["closed"] is None else f"{row['closed']:.0%}"
        table.add_row(
            f"{format_bytes(row['memory'])} ({row['share']:.0%})",
            row["policy"],
            f"{row['hit_rate']:.1%}",
            f"{row['stall_ms']:.3f} ms",
            f"{row['token_ms']:.3f} ms",
            format_bytes(int(row["bytes_per_token"])),
            closed,
        )
        before = row["memory"]
    Console().print(table)
