"""Moves the experts of a model that is in memory into a store, and runs them from there."""

from __future__ import annotations

import shutil
import tempfile
import uuid
import weakref
from pathlib import Path

from torch import nn

from comoe import memory
from comoe.config import DENSE_BITS, CoMoEConfig
from comoe.hf.attach import refuse_saving
from comoe.hf.blocks import MoEBlock, discover
from comoe.hf.checkpoint import common_dtype
from comoe.hf.convert import EXACT_DTYPES, layer_spec, to_arrays
from comoe.hf.dense import code_dense
from comoe.hf.load import start_runtime
from comoe.store import Store, StoreWriter


def offload_model(model: nn.Module, config: CoMoEConfig, folder: Path | None = None) -> nn.Module:
    """`folder`: where the store goes; None: a temporary folder, removed when the runtime closes.

    Nothing of the model changes until the whole store is written, so a full disk costs nothing.
    """
    if any(hasattr(module, "_comoe") for module in model.modules()):
        raise ValueError(
            "offload: the model's experts are already in a comoe store; use model.comoe.set_memory to "
            "change its budget"
        )
    blocks = discover(model)
    for block in blocks:
        for name in block.parameter_names:
            device = block.module.get_parameter(name).device
            if device.type != "cpu":
                raise ValueError(
                    f"offload: {block.name}.{name} is on {device}; expected a model on the CPU. Move it there "
                    'with model.to("cpu"), or load it with comoe.load.'
                )
    baseline = max(memory.rss() - sum(p.nbytes for p in model.parameters()), 0)
    temporary = folder is None
    if temporary:
        folder = Path(tempfile.mkdtemp(prefix="comoe-"))
    remove = (
        weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True) if temporary else None
    )
    try:
        _write_store(model, blocks, folder)
    except BaseException:
        if remove is not None:
            remove()
        raise
    for block in blocks:
        block.strip()
    if config.dense != "source":
        code_dense(model, blocks, DENSE_BITS[config.dense])
    store = Store.open(folder, verify=config.verify)
    start_runtime(model, blocks, store, config, baseline, on_close=remove or (lambda: None))
    refuse_saving(model, "save the model before comoe.offload")
    return model


def _write_store(model: nn.Module, blocks: list[MoEBlock], folder: Path) -> None:
    writer = StoreWriter(folder)
    fingerprint = uuid.uuid4().hex  # never resumed: weights in memory may change
    for block in blocks:
        parameters = [block.module.get_parameter(name) for name in block.parameter_names]
        dtype = common_dtype(block.name, [p.dtype for p in parameters])
        tensors = {
            name: p.detach().to(dtype)
            for name, p in zip(block.parameter_names, parameters, strict=True)
        }
        writer.add_layer(
            block.name,
            layer_spec(block.spec, EXACT_DTYPES[dtype]),
            to_arrays(block.experts(tensors)),
            fingerprint=fingerprint,
        )
    writer.finish(
        model_type=model.config.model_type,
        source=model.config.name_or_path or type(model).__name__,
        dense_bytes=sum(p.nbytes for p in model.parameters())
        - sum(
            block.module.get_parameter(n).nbytes for block in blocks for n in block.parameter_names
        ),
    )
