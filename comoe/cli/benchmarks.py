"""`comoe bench`: what benchmarks need and users may want. Heavy imports are inside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from comoe.cli.common import bytes_bar, output, quiet_transformers
from comoe.config import format_bytes

Json = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON, and nothing else, to stdout.")
]


def Size(text: str):
    return Annotated[int | None, typer.Option(help=text)]


app = typer.Typer(
    name="bench", help="Models for benchmarks.", no_args_is_help=True, rich_markup_mode=None
)


@app.callback()
def group() -> None:
    """Models for benchmarks."""


@app.command("make-model")
def make_model(
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The folder to make.")],
    like: Annotated[
        str,
        typer.Option(
            "--like",
            help="switch-base-8, switch-base-128, qwen3-30b-a3b, qwen1.5-moe-a2.7b, olmoe-1b-7b or mixtral-8x7b.",
        ),
    ],
    popularity: Annotated[
        str,
        typer.Option(
            "--popularity",
            help="How often experts are chosen: uniform, zipf, zipf:EXPONENT, or a trace's file (comoe trace).",
        ),
    ] = "zipf",
    layers: Size("Fewer or more layers (of the encoder and the decoder each).") = None,
    hidden: Size("Hidden size H.") = None,
    intermediate: Size("Intermediate size I of an expert.") = None,
    experts: Size("Experts per layer.") = None,
    top_k: Size("Experts per token.") = None,
    heads: Size("Attention heads.") = None,
    kv_heads: Size("Heads of keys and values.") = None,
    vocab: Size("Vocabulary.") = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the weights.")] = 0,
    as_json: Json = False,
) -> None:
    """Write a checkpoint of a published model's true shape, with random weights: for timing, without a download.

    Streams to disk: two tensors are in memory. Random weights would route evenly, which no real model does; these route
    as --popularity says, for tokens drawn evenly from the vocabulary (comoe/synthetic.py says how, and its limits). There
    is no tokenizer: feed token ids.

    Example:  comoe bench make-model ./switch --like switch-base-128
    Example:  comoe bench make-model ./small --like qwen3-30b-a3b --layers 4 --popularity zipf:0.7
    """
    from comoe import synthetic

    with output(as_json) as emit:
        quiet_transformers()
        config = synthetic.config_of(
            like,
            layers=layers,
            hidden=hidden,
            intermediate=intermediate,
            experts=experts,
            top_k=top_k,
            heads=heads,
            kv_heads=kv_heads,
            vocab=vocab,
        )
        with bytes_bar(f"making {like}") as update:
            folder = synthetic.make_model(
                destination, config, popularity=popularity, seed=seed, progress=update
            )
        nbytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        if as_json:
            emit({"folder": str(folder), "like": like, "popularity": popularity, "bytes": nbytes})
        else:
            print(
                f"{folder}: {like} in bfloat16, {format_bytes(nbytes)}; pack it with "
                f"`comoe pack {folder} {folder}-packed`"
            )
