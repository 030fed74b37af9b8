"""The commands themselves. Heavy imports are inside: `comoe --help` must not load torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from comoe.cli import aggregation, benchmarks, planning, remote, serving, tables
from comoe.cli.common import bytes_bar, count_bar, output, quiet_transformers
from comoe.config import CoMoEConfig, parse_bytes
from comoe.tiers.urls import is_url, redacted

Json = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON, and nothing else, to stdout.")
]
Model = Annotated[
    str,
    typer.Argument(
        metavar="DST",
        help="A packed folder (comoe pack), its URL (https://..., hf://..., s3://...), an unpacked one, or a hub id.",
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        "-m",
        help="Budget such as 1.2GB or 900MiB, beside the interpreter's baseline. Default: what is free now.",
    ),
]
Exact = Annotated[bool, typer.Option("--exact", help="Use only the original weights, bit for bit.")]
Threads = Annotated[
    int, typer.Option("--threads", help="Threads for computing; 0: as many as torch takes.")
]
Quality = Annotated[
    str | None,
    typer.Option(
        "--quality",
        help="resident, high, balanced, fast, or nats per token to lose: what is not held finely enough is "
        "then read when that pays. Default: nothing is waited for.",
    ),
]
LatencyTarget = Annotated[
    float | None,
    typer.Option("--latency-target", metavar="MS", help="Milliseconds that a token may take."),
]
RoutingTolerance = Annotated[
    float,
    typer.Option(
        "--routing-tolerance",
        help="Cache-aware routing: experts in memory are taken for missing ones whose router logit is at most so "
        "much higher. 0: never.",
    ),
]
Dense = Annotated[
    str,
    typer.Option(
        "--dense",
        help="Attention, embeddings and other dense layers: source (as they are), bits8 or bits4.",
    ),
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="Compile decode steps (torch.compile): faster tokens after half a minute, or a few seconds when "
        "compiled before.",
    ),
]
NoVerify = Annotated[
    bool,
    typer.Option(
        "--no-verify", help="Do not check the store's checksums while reading (trusted files)."
    ),
]


def add_to(app: typer.Typer) -> None:
    app.callback()(callback)
    for command in (
        demo,
        pack,
        aggregation.calibrate,
        aggregation.aggregate,
        run,
        evaluate,
        inspect,
        remote.pull,
        remote.cache,
        planning.plan,
        trace,
        doctor,
    ):
        app.command("eval" if command is evaluate else command.__name__)(command)
    app.command("serve-experts")(serving.serve_experts)
    app.add_typer(benchmarks.app)


def show_version(wanted: bool) -> None:
    if wanted:
        from comoe import __version__

        print(__version__)
        raise typer.Exit()


def callback(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    # --debug is looked at where errors are caught: it must hold before a command is found.
    pass


def load(
    path: str,
    memory: str | None,
    exact: bool,
    threads: int = 0,
    verify: bool = True,
    quality: str | None = None,
    latency_target: float | None = None,
    source: list[str] | None = None,
    **more: Any,
) -> tuple[Any, Any]:
    """The model and its tokenizer; says in one line (stderr) what was decided. source: URLs of other places
    that have the same store as the URL `path`.  more: fields of CoMoEConfig."""
    quiet_transformers()
    # Checked before torch is loaded: a misspelt size should not take seconds to be refused.
    budget = None if memory is None else parse_bytes(memory, "--memory")
    options = {
        "exact": exact,
        "threads": threads,
        "verify": verify,
        "quality": quality,
        "latency": None if latency_target is None else latency_target / 1e3,
        **more,
    }
    CoMoEConfig.create(**options)
    import comoe
    from comoe.baseline import warm_up

    if threads:
        import torch

        torch.set_num_threads(threads)
    warm_up()
    if source and not is_url(path):
        raise ValueError(f"--source: expected none beside a folder; {path} is not a URL")
    opened = remote.open_remote(path, source) if is_url(path) else None
    try:
        tokenizer = comoe.load_tokenizer(opened.folder if opened else path)
        model = comoe.load(opened or path, memory=budget, **options)
    except BaseException:
        if opened:
            opened.close()
        raise
    print(f"comoe: {model.comoe.describe()}", file=sys.stderr)
    return model, tokenizer


def demo(
    out: Annotated[
        Path, typer.Option("--out", help="Folder for the packed model and the plot.")
    ] = Path("demo-out"),
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Text to continue.")] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", help="Tokens to generate per budget.")
    ] = 64,
    quick: Annotated[
        bool, typer.Option("--quick", help="Two budgets and little text: for tests.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run the bundled model in less and less memory, next to plain transformers.

    Packs it, and for a falling series of budgets, each in a process of its own, generates text and
    measures peak memory, tokens per second and perplexity on text that the model has never seen.

    Example:  comoe demo --out demo-out
    """
    from comoe import demo as demonstration

    with output(as_json) as emit:
        rows = demonstration.run(
            out,
            prompt=demonstration.PROMPT if prompt is None else prompt,
            max_tokens=max_tokens,
            quick=quick,
            say=lambda text: print(text, file=sys.stderr),
        )
        if as_json:
            emit(rows)
        else:
            tables.show_demo(rows)
            print(f"plot: {demonstration.plot(rows, out / 'demo.png')}")


def pack(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A Hugging Face checkpoint folder.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The packed folder to make.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at DST.")] = False,
    as_json: Json = False,
) -> None:
    """Pack a checkpoint into a store that serves every memory budget.

    An interrupted pack is taken up where it stopped by the same command.

    Example:  comoe pack ./Qwen3-30B-A3B ./qwen3-packed
    """
    import time

    import comoe
    from comoe.store import inspect as inspect_store

    with output(as_json) as emit:
        quiet_transformers()
        begin = time.perf_counter()
        with bytes_bar(f"packing {Path(source).name}") as update:
            comoe.pack(source, destination, progress=update, overwrite=overwrite)
        summary = inspect_store(destination)
        summary["seconds"] = time.perf_counter() - begin
        if as_json:
            emit(summary)
        else:
            tables.show_store(destination, summary)


def run(
    path: Model,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="Text to continue; - reads standard input.")
    ],
    memory: Memory = None,
    exact: Exact = False,
    quality: Quality = None,
    latency_target: LatencyTarget = None,
    routing_tolerance: RoutingTolerance = 0.0,
    dense: Dense = "source",
    compile: Compile = False,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", help="Most new tokens.")] = 128,
    temperature: Annotated[
        float, typer.Option("--temperature", help="0: the likeliest token each time.")
    ] = 0.0,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the sampling.")] = None,
    threads: Threads = 0,
    no_verify: NoVerify = False,
    source: remote.Sources = None,
    expert_server: serving.ExpertServer = None,
    expert_token_file: serving.ExpertTokenFile = None,
    as_json: Json = False,
) -> None:
    """Continue a text, keeping within a memory budget.

    Example:  comoe run ./qwen3-packed -p "The ladder has" --memory 4.7GB
    Example:  comoe run https://host/models/qwen3-packed -p "The ladder has" --memory 2GB
    Example:  comoe run ./qwen3-packed -p "The ladder has" --memory 3GB --quality high
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    with output(as_json) as emit:
        model, tokenizer = load(
            path,
            memory,
            exact,
            threads,
            not no_verify,
            quality,
            latency_target,
            source,
            routing_tolerance=routing_tolerance,
            dense=dense,
            compile=compile,
            expert_server=expert_server,
            expert_token_file=expert_token_file,
        )
        from comoe.generate import generate_text

        def show(piece: str) -> None:
            sys.stdout.write(piece)
            sys.stdout.flush()

        if not as_json:
            show(text)
        figures = generate_text(
            model,
            tokenizer,
            text,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            on_text=None if as_json else show,
        )
        stats = model.comoe.stats()
        names = (
            "memory",
            "peak",
            "baseline",
            "bytes_read",
            "hits",
            "misses",
            "bits_per_weight",
            "plan",
        )
        figures |= {name: stats[name] for name in names}
        figures |= {name: stats[name] for name in ("remote", "network") if name in stats}
        model.comoe.close()
        if as_json:
            emit(figures)
        else:
            print("\n" + tables.run_line(figures))


def evaluate(
    path: Model,
    text: Annotated[
        list[Path],
        typer.Option(
            "--text", "-t", help="A text file (UTF-8); with --sweep there may be several."
        ),
    ],
    memory: Memory = None,
    exact: Exact = False,
    quality: Quality = None,
    dense: Dense = "source",
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", help="Use only the text's first tokens.")
    ] = None,
    window: Annotated[int, typer.Option("--window", help="Tokens per window.")] = 512,
    reference: Annotated[
        bool,
        typer.Option(
            "--reference/--no-reference", help="Compare with the exact model (KL, agreement)."
        ),
    ] = True,
    sweep: Annotated[
        bool,
        typer.Option(
            "--sweep", help="Every method of making experts smaller at 50, 30, 20, 14 and 10%."
        ),
    ] = False,
    method: Annotated[
        list[str] | None, typer.Option("--method", help="Of --sweep: only this; may be repeated.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Of --sweep: the PNG to draw.")
    ] = None,
    threads: Threads = 0,
    source: remote.Sources = None,
    as_json: Json = False,
) -> None:
    """Measure what a budget costs: perplexity, bits per byte, KL and top-1 agreement against exact.

    With --sweep, of a folder that `comoe aggregate` has been over: perplexity and KL of every method
    at equal bytes.

    Example:  comoe eval ./qwen3-packed --text book.txt --memory 4.7GB
    Example:  comoe eval ./qwen3-packed --text book.txt --sweep --plot sweep.png
    """
    from comoe.evaluate import evaluate as measure

    if not sweep and (len(text) > 1 or method or plot):
        raise typer.BadParameter("several texts, --method and --plot need --sweep")
    with output(as_json) as emit:
        quiet_transformers()
        if sweep:
            names = aggregation.domains_of(text)
            rows = aggregation.sweep(
                Path(path),
                {name: read_text(file) for name, file in names.items()},
                memory=memory,
                max_tokens=max_tokens,
                window=window,
                methods=method,
                plot=plot,
            )
            emit(rows) if as_json else tables.show_sweep(rows)
            return
        content = read_text(text[0])
        import comoe

        if is_url(path):  # what is beside the experts, once for all that is loaded below
            remote.open_remote(path, source).close()
        tokenizer = comoe.load_tokenizer(path)

        def load_for(use_exact: bool) -> Any:
            # The reference may have what is free: its memory is not reported.
            if use_exact != exact:
                return load(path, None, use_exact, threads, source=source)[0]
            return load(path, memory, exact, threads, quality=quality, source=source, dense=dense)[
                0
            ]

        with count_bar("evaluating") as update:
            result = measure(
                load_for,
                tokenizer,
                content,
                exact=exact,
                window=window,
                context=min(128, window // 4),
                max_tokens=max_tokens,
                reference=reference,
                progress=update,
            )
        stats = result.pop("stats")
        names = (
            "expert_bytes",
            "expert_bytes_exact",
            "bits_per_weight",
            "memory",
            "peak",
            "baseline",
            "bytes_read",
        )
        result |= {name: stats[name] for name in names}
        if as_json:
            emit(result)
        else:
            tables.show_evaluation(result)


def inspect(
    path: Annotated[str, typer.Argument(metavar="DST", help="A packed folder, or its URL.")],
    as_json: Json = False,
) -> None:
    """Show what is inside a packed folder, and the bytes of each rung.

    Example:  comoe inspect ./qwen3-packed
    Example:  comoe inspect https://host/models/qwen3-packed
    """
    from comoe.store import inspect as inspect_store

    with output(as_json) as emit:
        shown = Path(path)
        if is_url(path):
            opened = remote.open_remote(path, None, dense=False)
            shown = opened.folder
            opened.close()
        summary = inspect_store(shown)
        if as_json:
            emit(summary)
        else:
            tables.show_store(redacted(path) if is_url(path) else path, summary)


def trace(
    path: Model,
    text: Annotated[Path, typer.Option("--text", "-t", help="A text file (UTF-8) to read.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The trace to write (npz).")] = Path(
        "trace.npz"
    ),
    memory: Memory = None,
    exact: Exact = False,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", help="Use only the text's first tokens.")
    ] = None,
    window: Annotated[int, typer.Option("--window", help="Tokens per sequence.")] = 512,
    depth: Annotated[
        int,
        typer.Option(
            "--depth",
            min=0,
            help="Record too what the routers of this many next layers would choose (0: do not).",
        ),
    ] = 1,
    as_json: Json = False,
) -> None:
    """Record which experts a model chooses for a text, for replay (format: docs/trace.md).

    Example:  comoe trace ./qwen3-packed --text book.txt --out book.npz
    """
    from comoe.evaluate import encode
    from comoe.trace import record_text, trace_of

    with output(as_json) as emit:
        content = read_text(text)
        if not out.resolve().parent.is_dir():
            raise FileNotFoundError(f"--out: the folder {out.resolve().parent} does not exist")
        model, tokenizer = load(path, memory, exact)
        ids, _ = encode(tokenizer, content, max_tokens)
        with count_bar("tracing") as update:
            recorder = record_text(model, ids, window, progress=update, depth=depth)
        recorded = trace_of(model, recorder, Path(path).name)
        model.comoe.close()
        recorded.write(out)
        summary = {"file": str(out), **recorded.summary()}
        if as_json:
            emit(summary)
        else:
            tables.show_trace(summary)


def doctor(
    folder: Annotated[
        Path, typer.Argument(help="Where your stores are: this disk is measured.")
    ] = Path("."),
    as_json: Json = False,
) -> None:
    """Show this machine's device, versions and measured bandwidths, and how to mend what is slow.

    Example:  comoe doctor /data/models
    """
    from comoe.doctor import examine

    with output(as_json) as emit:
        report = examine(folder)
        if as_json:
            emit(report)
        else:
            tables.show_doctor(report)


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--text: {path} is not UTF-8 text (byte {error.start}); convert it first"
        ) from error
