"""The experts of a layer as one op that torch.compile does not look into: torch.ops.comoe.experts."""

from __future__ import annotations

import itertools
import weakref
from typing import Protocol

import torch


class Bound(Protocol):
    """See comoe.hf.attach."""

    def run(
        self, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor: ...


_numbers = itertools.count()
_bound: weakref.WeakValueDictionary[int, Bound] = weakref.WeakValueDictionary()


def handle_of(bound: Bound) -> int:
    """A number for `bound`, which an op can take; it holds nothing."""
    handle = next(_numbers)
    _bound[handle] = bound
    return handle


def _experts_cpu(
    hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, bound: int
) -> torch.Tensor:
    return _bound[bound].run(hidden, top_k_index, top_k_weights)


_LIBRARY = torch.library.Library("comoe", "FRAGMENT")
_LIBRARY.define(
    "experts(Tensor hidden, Tensor top_k_index, Tensor top_k_weights, int bound) -> Tensor"
)
_LIBRARY.impl("experts", _experts_cpu, "CPU")


@torch.library.register_fake("comoe::experts", lib=_LIBRARY)
def _(hidden, top_k_index, top_k_weights, bound):
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)
