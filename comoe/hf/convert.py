"""Experts as the store takes them: numpy arrays of the checkpoint's own bits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from comoe.hf.layouts import Expert
from comoe.runtime.spec import ExpertsSpec
from comoe.store import LayerSpec

EXACT_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
Arrays = tuple[list[np.ndarray], ...]


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """float32 and codes as such; bf16 and fp16 as uint16 of the same bits, since numpy has no bf16."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype in (torch.float32, torch.uint8):
        return tensor.numpy()
    return tensor.view(torch.uint16).numpy()


def to_arrays(experts: Iterable[Expert]) -> Iterator[Arrays]:
    """(matrices, biases, scales) of each expert, contiguous, one expert at a time."""
    for expert in experts:
        parts = (expert.matrices, expert.biases, expert.scales)
        yield tuple([to_numpy(tensor) for tensor in part] for part in parts)


def layer_spec(spec: ExpertsSpec, exact_dtype: str) -> LayerSpec:
    """What the store writes down of a layer; exact_dtype as the store names it."""
    return LayerSpec(
        num_experts=spec.num_experts,
        hidden=spec.hidden,
        intermediate=spec.intermediate,
        gated=spec.gated,
        biased=spec.biased,
        activation=spec.activation,
        alpha=spec.alpha,
        limit=spec.limit,
        exact_dtype=exact_dtype,
    )
