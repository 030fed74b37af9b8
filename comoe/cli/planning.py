"""`comoe plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from comoe.cli import serving
from comoe.cli.common import count_bar, output, quiet_transformers
from comoe.config import CoMoEConfig, format_bytes, parse_bytes
from comoe.policy.devices import MEASURED, load_device


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
            help="Budget such as 2GB; may be repeated. Default: 3/4 of the device's. Of --replay: bytes for "
            "experts, by default 10, 20, 30 and 50% of all.",
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            "--device",
            help="A profile such as rpi5, jetson-orin-nano or laptop-4060; measured: this machine.",
        ),
    ] = "measured",
    quality: Annotated[
        str | None,
        typer.Option(
            "--quality", help="resident, high, balanced, fast, or nats per token to lose."
        ),
    ] = None,
    latency_target: Annotated[
        float | None,
        typer.Option("--latency-target", metavar="MS", help="Milliseconds that a token may take."),
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Use only the original weights, bit for bit.")
    ] = False,
    dense: Annotated[
        str, typer.Option("--dense", help="Dense layers: source, bits8 or bits4.")
    ] = "source",
    context: Annotated[
        int, typer.Option("--context", help="Tokens that the KV cache has room for.")
    ] = 0,
    explain: Annotated[
        bool, typer.Option("--explain", help="What went into the plan, and what would change it.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="PNG of speed and loss over memory to draw.")
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
    expert_server: serving.ExpertServer = None,
    expert_token_file: serving.ExpertTokenFile = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON, and nothing else, to stdout.")
    ] = False,
) -> None:
    """Say what to expect before running: speed, loss, and where each byte lies, on this or another device.

    With --replay: compare cache policies on a recorded text, against Belady.

    Example:  comoe plan ./qwen3-packed --memory 2GB --device rpi5
    Example:  comoe plan ./qwen3-packed --memory 4GB --quality balanced --explain --plot frontier.png
    Example:  comoe plan ./qwen3-packed --replay book.npz --memory 2GB
    """
    with output(as_json) as emit:
        if replay is not None:
            rows = replay_rows(path, replay, memory, bandwidth, latency, tokens, prefetch)
            emit(rows) if as_json else show_replay(rows)
            return
        if (expert_server is None) != (expert_token_file is None):
            raise typer.BadParameter("--expert-server and --expert-token-file belong together")
        budgets = [parse_bytes(size, "--memory") for size in memory or []]
        config = CoMoEConfig(
            exact=exact,
            quality=_number_or_name(quality),
            latency=None if latency_target is None else latency_target / 1e3,
            max_context=context,
            dense=dense,
        )
        found = forecasts(
            path,
            budgets,
            device,
            config,
            explain=explain,
            plot=plot,
            server=expert_server,
            token_file=expert_token_file,
        )
        emit(found) if as_json else show_forecasts(found)


def _number_or_name(quality: str | None) -> str | float | None:
    try:
        return None if quality is None else float(quality)
    except ValueError:
        return quality


def forecasts(
    path: Path,
    budgets: list[int],
    device: str,
    config: CoMoEConfig,
    *,
    explain: bool,
    plot: Path | None,
    server: str | None = None,
    token_file: str | None = None,
) -> dict[str, Any]:
    """{plans: a summary for each budget, frontier: rows if a plot is wanted, plot: its path}."""
    if device != MEASURED:
        load_device(device)  # a misspelt name should not take seconds to be refused
    if plot is not None and not plot.resolve().parent.is_dir():
        raise FileNotFoundError(f"--plot: the folder {plot.resolve().parent} does not exist")
    quiet_transformers()
    from comoe import forecast, memory

    model = forecast.Model.open(path, config.dense)
    there = server and forecast.server_of(model, server, token_file)
    forecaster = forecast.Forecaster(model, forecast.device_of(device, path), there)
    if not budgets:
        has = memory.available() if device == MEASURED else forecaster.device.compute_memory
        budgets = [int(0.75 * has)]
    outlooks = [forecaster.outlook(budget, config) for budget in budgets]
    found: dict[str, Any] = {
        "plans": [
            forecast.summary(forecaster, outlook, config, explain=explain) for outlook in outlooks
        ]
    }
    if plot is not None:
        found["frontier"] = forecaster.frontier(forecast.choices(config.max_context))
        title = f"{path.name} on {forecaster.device.title}"
        found["plot"] = str(forecast.plot(found["frontier"], outlooks, plot, title))
    return found


def show_forecasts(found: dict[str, Any]) -> None:
    console = Console()
    for plan in found["plans"]:
        show_forecast(plan, console)
    for note in found["plans"][0]["notes"]:
        console.print(f"note: {escape(note)}", highlight=False, soft_wrap=True)
    if "plot" in found:
        print(f"plot: {found['plot']}")


def show_forecast(plan: dict[str, Any], console: Console) -> None:
    ms, loss = plan["ms"], plan["loss"]
    loss = "loss unknown" if loss is None else f"loss {loss:.3g} nats per token"
    if plan["loss"] is not None and not plan["loss_measured"] and plan["loss"] > 0:
        loss += " (assumed)"
    console.print(
        f"[bold]{format_bytes(plan['memory'])} on {escape(plan['device'])}: "
        f"{plan['tokens_per_second']:.3g} tokens/s, {loss}[/bold]\n{escape(plan['plan'])}\n"
        f"a token: {ms['token']:.3g} ms = {ms['dense']:.3g} outside the experts + {ms['compute']:.3g} experts + "
        f"{ms['stall']:.3g} waiting for {format_bytes(plan['read_per_token'])}; "
        f"{plan['joules_per_token']:.3g} J",
        highlight=False,
        soft_wrap=True,
    )
    table = Table()
    for name in ("tier", "what", "level", "experts", "bytes"):
        table.add_column(name, justify="right" if name in ("experts", "bytes") else "left")
    for row in plan["where"]:
        experts = "" if row["experts"] is None else f"{row['experts']:,}"
        table.add_row(
            row["tier"], row["what"], row["level"] or "", experts, format_bytes(row["bytes"])
        )
    console.print(table)
    if "inputs" in plan:
        inputs = plan["inputs"]
        speeds = ", ".join(f"{name}: {us:.3g}" for name, us in inputs["expert_us"].items())
        console.print(
            f"what is missing comes from the {inputs['tier']} at {format_bytes(inputs['bandwidth'])}/s, "
            f"{inputs['latency_seconds'] * 1e6:.3g} us; an expert takes (us) {speeds}",
            highlight=False,
            soft_wrap=True,
        )
        console.print(
            "if memory were halved at 10 s and given back at 20 s, and reading took four times as long from "
            "30 s to 40 s:",
            highlight=False,
            soft_wrap=True,
        )
        for line in plan["rehearsal"]:
            console.print(escape(line), highlight=False, soft_wrap=True)


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
