"""The commands that make experts coarser: calibrate, aggregate, and `eval --sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from comoe.cli import tables
from comoe.cli.common import count_bar, output, quiet_transformers, stage_bar

Json = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON, and nothing else, to stdout.")
]
Packed = Annotated[Path, typer.Argument(metavar="DST", help="A packed folder (comoe pack).")]
Texts = Annotated[
    list[Path] | None,
    typer.Option(
        "--text", "-t", help="A text to calibrate on (UTF-8); each is a domain of its own."
    ),
]
Memory = Annotated[
    str | None,
    typer.Option("--memory", "-m", help="Budget such as 8GB. Default: what is free now."),
]
Tokens = Annotated[int, typer.Option("--tokens", help="Tokens to read, of all texts together.")]


def domains_of(texts: list[Path]) -> dict[str, Path]:
    """Name of each text's domain: its file name without the ending, made unique."""
    domains: dict[str, Path] = {}
    for path in texts:
        if not path.is_file():
            raise FileNotFoundError(f"--text: {path} is not a file")
        name, number = path.stem, 2
        while name in domains:
            name, number = f"{path.stem}-{number}", number + 1
        domains[name] = path
    return domains


def calibrate(
    path: Packed,
    text: Texts = None,
    memory: Memory = None,
    tokens: Tokens = 49_152,
    as_json: Json = False,
) -> None:
    """Read text with a packed model and keep what its experts were given, for `comoe aggregate`.

    Example:  comoe calibrate ./qwen3-packed --text book.txt --text code.py --memory 8GB
    """
    if not text:
        raise typer.BadParameter(
            "give at least one text that is like what the model will read", param_hint="--text"
        )
    with output(as_json) as emit:
        quiet_transformers()
        from comoe.aggregate.calibrate import calibrate as run

        with count_bar("calibrating") as update:
            found = run(path, domains_of(text), memory=memory, tokens=tokens, progress=update)
        counts = [found.counts(layer) for layer in range(found.num_layers)]
        summary = {
            "folder": str(found.folder),
            "tokens": found.num_tokens,
            "held_out": int(found.held_out.sum()),
            "domains": list(found.domains),
            "least_rows": [int(c.min()) for c in counts],
            "rows": [c.tolist() for c in counts],
            "unseen_experts": int(sum((c == 0).sum() for c in counts)),
        }
        if as_json:
            emit(summary)
        else:
            tables.show_calibration(summary)


def aggregate(
    path: Packed,
    text: Texts = None,
    memory: Memory = None,
    tokens: Tokens = 49_152,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            help="Write a plain checkpoint with fewer experts instead: hc-smoe, m-smoe, ream or gated.",
        ),
    ] = None,
    experts: Annotated[
        int | None, typer.Option("--experts", help="Experts per layer that --method keeps.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for the checkpoint of --method.")
    ] = None,
    distil: Annotated[
        int,
        typer.Option(
            "--distil",
            metavar="STEPS",
            min=0,
            help="Tune the 2-bit codes for this many steps, towards what the exact model predicts (0: no).",
        ),
    ] = 0,
    nested: Annotated[
        bool,
        typer.Option(
            "--nested",
            help="Make 3 and 4 bits planes of one set: half the bytes to read when memory changes, for a little loss.",
        ),
    ] = False,
    refine: Annotated[
        bool,
        typer.Option(
            "--refine",
            help="Measure each layer again at the whole choice; keep the new losses where they choose better.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Give a packed model more rungs, measure what each costs in quality, and choose for every budget.

    Calibrates on the texts (or uses the calibration that is there), rounds, merges, measures, and writes
    the rungs, their losses and the curve of best choices into DST.

    Example:  comoe aggregate ./qwen3-packed --text book.txt --text code.py --memory 8GB
    Example:  comoe aggregate ./qwen3-packed --text book.txt --distil 60
    Example:  comoe aggregate ./qwen3-packed --method hc-smoe --experts 32 --out ./qwen3-32
    """
    if (method is None) != (experts is None) or (method is not None and out is None):
        raise typer.BadParameter("--method, --experts and --out belong together")
    for option, given in (("--distil", distil), ("--nested", nested), ("--refine", refine)):
        if method is not None and given:
            raise typer.BadParameter(
                "is about the rungs of a packed model; a checkpoint made by --method has none, so leave it out",
                param_hint=option,
            )
    with output(as_json) as emit:
        quiet_transformers()
        texts = domains_of(text) if text else None
        if method is not None:
            from comoe.aggregate.fewer import write_fewer

            with stage_bar() as update:
                summary = write_fewer(
                    path,
                    texts,
                    method,
                    experts,
                    out,
                    memory=memory,
                    tokens=tokens,
                    progress=update,
                )
            emit(summary) if as_json else print(f"wrote {summary['folder']}")
            return
        from dataclasses import asdict

        from comoe.aggregate.build import NESTED, SOURCES
        from comoe.aggregate.build import aggregate as run

        with stage_bar() as update:
            report = run(
                path,
                texts,
                memory=memory,
                tokens=tokens,
                sources=NESTED if nested else SOURCES,
                refine=refine,
                distil=distil,
                progress=update,
            )
        summary = asdict(report)
        if as_json:
            emit(summary)
        else:
            tables.show_aggregation(summary)


def sweep(
    path: Path,
    texts: dict[str, str],
    *,
    memory: str | None,
    max_tokens: int | None,
    window: int,
    methods: list[str] | None,
    plot: Path | None,
) -> list[dict[str, Any]]:
    """Rows of `comoe eval --sweep`: every method at every fraction, on each text."""
    import comoe
    from comoe.aggregate.build import Workshop
    from comoe.aggregate.judge import Judge
    from comoe.aggregate.sweep import Sweep, plot_rows, run_sweep
    from comoe.evaluate import encode, plan_windows

    rows = []
    tokenizer = comoe.load_tokenizer(path)
    with Workshop(path, memory=memory) as shop, count_bar("sweeping") as update:
        found = Sweep(shop)
        for domain, text in texts.items():
            ids, _ = encode(tokenizer, text, max_tokens)
            windows = plan_windows(len(ids), window, min(128, window // 4))
            with Judge(shop.model, shop.weights, ids, windows) as judge:
                rows += run_sweep(found, judge, methods=methods, progress=update, domain=domain)
    if plot is not None:
        plot_rows(rows, plot)
    return rows
