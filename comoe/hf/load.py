"""Loads a packed folder with transformers and puts a runtime under its experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from comoe.config import CoMoEConfig
from comoe.hf.attach import attach, detach
from comoe.hf.blocks import MoEBlock
from comoe.hf.checkpoint import model_class, read_config
from comoe.hf.kv_cache import bytes_of, coming_positions, positions
from comoe.hf.routers import NextGate
from comoe.hf.sizes import experts_per_token, model_sizes
from comoe.hf.switch_block import shorten
from comoe.runtime.budget import Step
from comoe.runtime.runtime import Runtime
from comoe.store import Store
from comoe.tiers.remote_store import RemoteStore

# Layers ahead: with two the disk idles 9 ms a token where with one it idles 14, of 80 (random text, a third of the
# experts resident); three and four measured the same.
DEPTH = 2


def load_packed(folder: Path, config: CoMoEConfig, dtype: str | torch.dtype = "auto") -> nn.Module:
    """A packed folder as a model of transformers' own class, with `config` for this load."""
    hf_config = read_config(folder)
    hf_config.quantization_config["options"] = asdict(config)
    return model_class(hf_config).from_pretrained(folder, config=hf_config, dtype=dtype)


def start_runtime(
    model: nn.Module,
    blocks: list[MoEBlock],
    store: Store,
    config: CoMoEConfig,
    baseline: int,
    on_close: Callable[[], None] = lambda: None,
    remote: RemoteStore | None = None,
) -> Runtime:
    """Binds `blocks`, whose weights lie in `store`, to a new Runtime and hangs it on the model. remote: what
    `store` is the local copy of; it is closed with the Runtime."""

    def close() -> None:
        detach(blocks)
        on_close()

    k = experts_per_token(model)
    intermediate = max(block.spec.intermediate for block in blocks)
    runtime = Runtime(
        store,
        [block.spec for block in blocks],
        config,
        model_sizes(model, k, intermediate),
        baseline=baseline,
        experts_per_token=k,
        predictor=NextGate(model, blocks, k, DEPTH),
        remote=remote,
        on_close=close,
    )
    attach(blocks, runtime)
    shorten(model, blocks)
    if config.dense != "source":
        # The weights that were rounded are mapped until from_pretrained returns: the pool lends their room.
        runtime.set_memory(runtime.budget.memory)
    model.comoe = runtime
    model.register_forward_pre_hook(_begin_step, with_kwargs=True)
    model.register_forward_hook(_end_step, always_call=True)
    if config.compile:
        from comoe.hf.compiled import compile_decode  # torch's compiler: 2 s and 100 MB

        compile_decode(model)
    return runtime


def _begin_step(model: nn.Module, args: tuple, kwargs: dict) -> None:
    """Before every forward pass: how many tokens come after how many, and how many want logits."""
    names = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")
    inputs = [kwargs.get(name) for name in names] + list(args[:1])
    shapes = [t.shape for t in inputs if isinstance(t, torch.Tensor) and t.dim() >= 2]
    if not shapes:
        return
    batch = max(shape[0] for shape in shapes)
    tokens = max(shape[1] for shape in shapes)
    keep = kwargs.get("logits_to_keep", 0)
    logits = keep if isinstance(keep, int) and 0 < keep < tokens else tokens
    cache = kwargs.get("past_key_values")
    past = positions(cache)
    mask = kwargs.get("attention_mask")
    masked = (
        (past > 0 and tokens > 1)
        or 0 < model.comoe.budget.sizes.window < past + tokens
        or (isinstance(mask, torch.Tensor) and (mask.dim() > 2 or not bool(mask.all())))
    )
    # A static cache is taken whole by its first pass, of which the step itself counts what is new.
    sizes, whole = model.comoe.budget.sizes, coming_positions(cache)
    coming = batch * (sizes.kv(whole) - sizes.kv(tokens)) if whole > tokens else 0
    model.comoe.begin_step(Step(batch, tokens, logits, past, masked), bytes_of(cache, coming))


def _end_step(model: nn.Module, args: tuple, output: object) -> None:
    model.comoe.end_step()
