"""comoe serve-experts, and the options of those who use it."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from comoe.config import parse_bytes

ExpertServer = Annotated[
    str | None,
    typer.Option(
        "--expert-server",
        metavar="URL",
        help="A machine that runs `comoe serve-experts` on the same store: computes missing experts.",
    ),
]
ExpertTokenFile = Annotated[
    str | None, typer.Option("--expert-token-file", metavar="FILE", help="Its token.")
]


def serve_experts(
    path: Annotated[
        Path | None,
        typer.Argument(metavar="DST", help="A packed folder (comoe pack), or its experts alone."),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option("--token-file", help="A file with the token that callers must send."),
    ] = None,
    make_token: Annotated[
        Path | None,
        typer.Option("--make-token", metavar="FILE", help="Write a new token to FILE, and stop."),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option("--memory", "-m", help="Budget for experts. Default: what is free now."),
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Use only the original weights, bit for bit.")
    ] = False,
    address: Annotated[
        str, typer.Option("--address", help="Address to listen on; 0.0.0.0: all.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="0: any that is free.")] = 8790,
    tls_cert: Annotated[
        str | None, typer.Option("--tls-cert", help="Certificate chain, PEM.")
    ] = None,
    tls_key: Annotated[str | None, typer.Option("--tls-key", help="Its private key, PEM.")] = None,
    threads: Annotated[
        int, typer.Option("--threads", help="Threads for computing; 0: as many as torch takes.")
    ] = 0,
    max_request: Annotated[
        str, typer.Option("--max-request", help="The largest call that is read.")
    ] = "4MiB",
    queue: Annotated[
        int, typer.Option("--queue", help="Calls that may be here at once; more get 503.")
    ] = 32,
) -> None:
    """Compute the experts of a packed model for other machines.

    Activations come in, outputs go back (docs/edge.md). Needs no dense weights and no transformers.

    Example:  comoe serve-experts ./qwen3-packed --token-file token --memory 16GB
    """
    from comoe.tiers import expert_token

    try:
        from comoe.serve import server
    except ImportError as error:
        raise ValueError(
            f"serve-experts needs {error.name}; install it with: pip install 'comoe[serve]'"
        ) from error
    if make_token is not None:
        expert_token.make_token(make_token)
        print(f"token written to {make_token}", file=sys.stderr)
        return
    if path is None or token_file is None:
        raise typer.BadParameter("DST and --token-file are needed (or --make-token FILE)")
    if queue < 1:
        raise typer.BadParameter(f"--queue: expected at least 1, got {queue}")
    budget = None if memory is None else parse_bytes(memory, "--memory")
    max_bytes = parse_bytes(max_request, "--max-request")
    token = expert_token.read_token(token_file)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("comoe.serve").setLevel(logging.INFO)
    server.serve(
        path,
        token,
        memory=budget,
        exact=exact,
        threads=threads,
        address=address,
        port=port,
        tls_cert=tls_cert,
        tls_key=tls_key,
        max_bytes=max_bytes,
        most_calls=queue,
    )
