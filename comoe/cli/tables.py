"""How results look in a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from comoe.config import format_bytes


def _console() -> Console:
    return Console()


def _number(value: float | None, form: str = ".2f") -> str:
    return "n/a" if value is None else format(value, form)


def run_line(figures: dict[str, Any]) -> str:
    """The line of figures that ends `comoe run`."""
    read = ", ".join(f"{tier} {format_bytes(n)}" for tier, n in figures["bytes_read"].items())
    return (
        f"[{len(figures['tokens'])} tokens, {figures['tokens_per_second']:.1f} tok/s | "
        f"peak {format_bytes(figures['peak'])} = baseline {format_bytes(figures['baseline'])} + "
        f"{format_bytes(max(figures['peak'] - figures['baseline'], 0))} of {format_bytes(figures['memory'])} | "
        f"read: {read} | hits {figures['hits']}, misses {figures['misses']}]"
    )


def show_store(path: Path | str, summary: dict[str, Any]) -> None:
    console = _console()
    table = Table(
        title=f"{escape(str(path))} (store version {summary['version']})", title_justify="left"
    )
    for name in ("rung", "bits per weight", "bytes of all experts", "experts that have it"):
        table.add_column(name, justify="left" if name == "rung" else "right")
    for rung in summary["rungs"]:
        table.add_row(
            rung["name"],
            f"{rung['bits']:.3f}",
            format_bytes(rung["bytes"]),
            f"{rung['experts']:,}",
        )
    console.print(table)
    console.print(
        f"{summary['layers']} MoE layers, {summary['experts']} experts in all, "
        f"dense weights {format_bytes(summary['dense_bytes'])}",
        highlight=False,
    )


def show_evaluation(result: dict[str, Any]) -> None:
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    rows = (
        ("tokens", str(result["tokens"])),
        ("perplexity", _number(result["perplexity"], ".4f")),
        ("perplexity, exact", _number(result["perplexity_exact"], ".4f")),
        ("bits per byte", _number(result["bits_per_byte"], ".4f")),
        ("KL(exact || this), nats per token", _number(result["kl"], ".5f")),
        ("top-1 agreement with exact", _number(result["top1_agreement"], ".2%")),
        ("bits per expert weight", _number(result["bits_per_weight"], ".2f")),
        (
            "expert bytes held",
            f"{format_bytes(result['expert_bytes'])} of {format_bytes(result['expert_bytes_exact'])}",
        ),
        ("memory asked", format_bytes(result["memory"])),
        ("peak", f"{format_bytes(result['peak'])} (baseline {format_bytes(result['baseline'])})"),
    )
    for row in rows:
        table.add_row(*row)
    _console().print(table)


def show_trace(summary: dict[str, Any]) -> None:
    print(
        f"{summary['file']}: {summary['tokens']} tokens in {summary['sequences']} sequences, {summary['layers']} "
        f"layers, {summary['experts_per_token']} experts per token; routing entropy "
        f"{summary['entropy_share']:.2f} of the largest possible (least even layer {summary['least_entropy_share']:.2f})"
    )


def show_doctor(report: dict[str, Any]) -> None:
    console = _console()
    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    cpu, ram, disk = report["cpu"], report["memory"], report["bandwidth"]["disk"]
    limit = (
        ""
        if ram["cgroup_limit"] is None
        else f", container limit {format_bytes(ram['cgroup_limit'])}"
    )
    table.add_row(
        "versions", ", ".join(f"{k} {v or 'missing'}" for k, v in report["versions"].items())
    )
    table.add_row("CPU", f"{escape(cpu['model'])}, {cpu['cores']} cores, load {cpu['load']:.1f}")
    table.add_row("kernels", cpu["isa"] or "native module missing")
    table.add_row(
        "memory", f"{format_bytes(ram['total'])}, {format_bytes(ram['available'])} available{limit}"
    )
    read = report["bandwidth"]["memory_read"]
    table.add_row("memory read", "n/a" if read is None else f"{format_bytes(read)}/s")
    how = "O_DIRECT" if disk["direct"] else "through the page cache"
    table.add_row(
        "disk read", f"{format_bytes(disk['bytes_per_second'])}/s, {how}, {escape(disk['folder'])}"
    )
    for gpu in report["gpus"]:
        unified = ", unified memory" if gpu["unified_memory"] else ""
        capability = ".".join(map(str, gpu["capability"]))
        table.add_row(
            f"GPU {gpu['index']}",
            f"{escape(gpu['name'])} ({capability}), {format_bytes(gpu['total_bytes'])}{unified}, "
            f"from pinned host memory {format_bytes(gpu['host_to_device'])}/s",
        )
    if not report["gpus"]:
        table.add_row("GPU", f"none: {escape(report['why_no_gpu'])}")
    console.print(table)
    for item in report["advice"]:
        console.print(f"[bold]- {escape(item['what'])}[/bold]\n  {escape(item['fix'])}")
    if not report["advice"]:
        console.print("Nothing is missing.")


def show_demo(rows: list[dict[str, Any]]) -> None:
    console = _console()
    plain = rows[0]["plain"]
    table = Table(
        title="One packed file, less and less memory (bundled model)", title_justify="left"
    )
    for name in ("memory", "peak", "above baseline", "bits/weight", "tokens/s", "perplexity"):
        table.add_column(name, justify="right")
    table.add_row(
        "transformers",
        format_bytes(plain["peak"]),
        format_bytes(max(plain["peak"] - plain["baseline"], 0)),
        _number(plain["bits_per_weight"], ".2f"),
        _number(plain["tokens_per_second"], ".1f"),
        _number(plain["perplexity"], ".3f"),
    )
    for row in rows:
        table.add_row(
            format_bytes(row["memory"]),
            format_bytes(row["peak"]),
            format_bytes(max(row["peak"] - row["baseline"], 0)),
            _number(row["bits_per_weight"], ".2f"),
            _number(row["tokens_per_second"], ".1f"),
            _number(row["perplexity"], ".3f"),
        )
    console.print(table)
    console.print(
        f"Perplexity on {plain['tokens']} tokens of standard-library modules that the model was not trained on. "
        f"Interpreter's baseline: {format_bytes(rows[0]['baseline'])}.",
        highlight=False,
    )
    for name, row in [
        ("transformers", plain),
        *((format_bytes(row["memory"]), row) for row in rows),
    ]:
        console.rule(f"{name}: {row['plan']}" if "plan" in row else name, align="left")
        console.print(row["prompt"] + row["text"], markup=False, highlight=False)


def show_calibration(summary: dict[str, Any]) -> None:
    console = _console()
    console.print(
        f"{summary['tokens']:,} tokens of {', '.join(summary['domains'])}, {summary['held_out']:,} of them held out",
        highlight=False,
    )
    console.print(
        f"the expert seen least has {min(summary['least_rows'])} rows; {summary['unseen_experts']} were never used",
        highlight=False,
    )
    console.print(f"in {summary['folder']}", highlight=False)


def show_aggregation(summary: dict[str, Any]) -> None:
    console = _console()
    console.print(f"levels, coarsest first: {', '.join(summary['levels'])}", highlight=False)
    if summary["unused"]:
        unused = ", ".join(summary["unused"])
        console.print(
            f"not written, since no point of the curve uses them: {unused}", highlight=False
        )
    if summary["distilled"]:
        found = summary["distilled"]
        verdict = "kept" if found["kept"] else "not kept, since it is not better"
        console.print(
            f"distillation of {found['level']}, {found['steps']} steps: held-out KL {found['before']:.5f} -> "
            f"{found['after']:.5f} ({verdict})",
            highlight=False,
        )
    if summary["super_experts"]:
        names = ", ".join(f"{e} of layer {layer}" for layer, e in summary["super_experts"])
        console.print(f"super experts, never below 8 bits: {names}", highlight=False)
    if summary["refined"]:
        found = summary["refined"]
        verdict = "kept" if found["kept"] else "not kept, since their choices are no better"
        scales = ", ".join(f"{scale:.2f}" for scale in found["scale"])
        console.print(
            f"losses of layers at the whole choice, over those alone: {scales} ({verdict})",
            highlight=False,
        )
    if summary["predicted"]:
        table = Table(title="held-out calibration text", title_justify="left")
        for name in ("bytes kept", "KL predicted", "KL measured", "perplexity", "exact"):
            table.add_column(name, justify="right")
        for row in summary["predicted"]:
            table.add_row(
                f"{row['fraction']:.1%}",
                f"{row['predicted']:.4f}",
                f"{row['measured']:.4f}",
                f"{row['perplexity']:.3f}",
                f"{row['perplexity_exact']:.3f}",
            )
        console.print(table)
    stages = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in summary["seconds"].items())
    console.print(stages, highlight=False)


def show_sweep(rows: list[dict[str, Any]]) -> None:
    """One table per text: methods down, fractions across, perplexity over exact."""
    for domain in dict.fromkeys(row["domain"] for row in rows):
        mine = [row for row in rows if row["domain"] == domain]
        fractions = sorted({row["fraction"] for row in mine}, reverse=True)
        exact = mine[0]["perplexity_exact"]
        table = Table(
            title=f"{escape(domain)}: perplexity over exact ({exact:.3f}), KL in nats per token",
            title_justify="left",
        )
        table.add_column("method")
        for fraction in fractions:
            table.add_column(f"{fraction:.0%}", justify="right")
        for method in dict.fromkeys(row["method"] for row in mine):
            cells = {row["fraction"]: row for row in mine if row["method"] == method}
            table.add_row(
                method,
                *(
                    f"{cells[f]['perplexity'] / exact - 1:+.2%}  {cells[f]['kl']:.4f}"
                    if f in cells
                    else "n/a"
                    for f in fractions
                ),
            )
        _console().print(table)
