"""Finds the MoE blocks of a transformers model, also of one on the meta device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from comoe.hf.layouts import Expert, Layout, find_layout
from comoe.runtime.spec import ExpertsSpec


class UnsupportedModelError(ValueError):
    """The model has no experts that comoe can take over; the message says which class and why."""


@dataclass(frozen=True)
class MoEBlock:
    """One experts module: its place in the model, its arithmetic, and how its tensors are kept."""

    name: str
    module: nn.Module = field(repr=False)
    spec: ExpertsSpec = field(repr=False)
    layout: Layout = field(repr=False)

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the expert tensors, relative to the module."""
        return self.layout.parameter_names(self.module)

    def experts(self, tensors: Mapping[str, torch.Tensor] | None = None) -> Iterator[Expert]:
        """Canonical matrices, expert by expert, from `tensors` or the module's own parameters."""
        if tensors is None:
            tensors = {n: self.module.get_parameter(n).detach() for n in self.parameter_names}
        return self.layout.experts(self.spec, self.module, tensors)

    def assemble(self, experts: Sequence[Expert]) -> dict[str, torch.Tensor]:
        """The module's own tensors from canonical matrices."""
        return self.layout.assemble(self.spec, self.module, experts)

    def strip(self) -> None:
        """Drop the expert tensors. The names stay, as None, so that attributes can still be asked."""
        for name in self.parameter_names:
            path, _, leaf = name.rpartition(".")
            self.module.get_submodule(path)._parameters[leaf] = None


def discover(model: nn.Module) -> list[MoEBlock]:
    """Every MoE block of `model`, in order of appearance.

    Raises UnsupportedModelError if there is none.
    """
    blocks = []
    for name, module in model.named_modules():
        layout = find_layout(module)
        if layout is not None:
            blocks.append(MoEBlock(name, module, layout.spec(name, module), layout))
    if not blocks:
        raise UnsupportedModelError(_why_none(model))
    return blocks


def _why_none(model: nn.Module) -> str:
    kinds = {type(m).__name__ for m in model.modules()}
    experts = sorted(k for k in kinds if "Expert" in k or k.endswith(("MoE", "Moe", "MoeMLP")))
    if not experts:
        return (
            f"discover: {type(model).__name__} is not a Mixture-of-Experts model: none of its modules "
            "holds experts. comoe only helps models with experts; run this one with transformers."
        )
    return (
        f"discover: {type(model).__name__} keeps its experts in {', '.join(experts)}, which "
        "transformers' ExpertsInterface does not cover and comoe has no adapter for. "
        "docs/families.md lists the families that work."
    )
