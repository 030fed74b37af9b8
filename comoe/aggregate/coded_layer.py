"""The experts of one layer in ladder codes, as a torch module whose codes can be learned.

Per group of 128 columns of a row there is a scale and a zero, per matrix and level a table, and per
weight a *latent* in code units; its code is that of the anchor's table entry nearest to it. Forward
gives exactly what the payloads decode to. Backward passes straight through the three roundings (codes;
scales to their grid; zeros and tables to integers):

    W = s (t[code] - z)    dW/dlatent = s (within half a bin of the ends)    dW/dz = -s
                           dW/dlog2 s = ln 2 W    dW/dt_k = s where code = k

The grid of scales stays as it was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from comoe.aggregate.coded import CodedMatrix
from comoe.aggregate.experts import Expert, intermediate
from comoe.runtime.spec import ExpertsSpec
from comoe_kernels.ladder_codec import GROUP_COLS

MARGIN = 0.1  # of a bin: how far from its bounds a latent starts at least


class CodedStack(nn.Module):
    """One matrix of each of E experts, [E, rows, cols], coded at `anchor` bits; `bits` <= anchor are its levels."""

    def __init__(
        self,
        coded: Sequence[CodedMatrix],
        exact: Sequence[torch.Tensor],
        anchor: int,
        bits: Sequence[int],
    ) -> None:
        super().__init__()
        self.anchor, self.cols = anchor, coded[0].codes.shape[1]
        rows, groups = coded[0].scale_q.shape
        padding = groups * GROUP_COLS - self.cols
        if groups == 1:  # a narrow matrix needs no padding
            padding = 0
        self.grid = [(c.log2_min, c.log2_step) for c in coded]
        low, step = torch.tensor(self.grid).T[:, :, None, None].float()
        self.register_buffer("low", low, persistent=False)
        self.register_buffer("step", step, persistent=False)

        def stack(arrays) -> torch.Tensor:
            return torch.from_numpy(np.stack(list(arrays)).astype(np.float32))

        self.scale_q = nn.Parameter(stack(c.scale_q for c in coded))
        self.zero = nn.Parameter(stack(c.zero for c in coded))
        self.tables = nn.ParameterDict(
            {str(b): nn.Parameter(stack(c.tables[b] for c in coded)) for b in {*bits, anchor}}
        )
        codes = stack(c.codes >> (8 - anchor) for c in coded).long()
        codes = nn.functional.pad(codes, (0, padding)).view(len(coded), rows, groups, -1)
        weight = nn.functional.pad(torch.stack(list(exact)).float(), (0, padding)).view(codes.shape)
        self.latent = nn.Parameter(self._start(weight, codes))

    def _scale(self) -> torch.Tensor:
        q = self.scale_q.detach().round().clamp(0, 255)
        return torch.exp2(self.low + self.step * q)

    def _table(self, bits: int) -> torch.Tensor:
        return self.tables[str(bits)].detach().round().clamp(0, 255)

    def _bounds(self) -> torch.Tensor:
        """[E, 2**anchor - 1] between neighbouring entries, in order."""
        table = self._table(self.anchor).sort(1).values
        return (table[:, 1:] + table[:, :-1]) / 2

    @torch.no_grad()
    def _start(self, weight: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """The exact weights in code units, moved into the bins of their codes."""
        units = weight / self._scale()[..., None] + self.zero.detach()[..., None]
        bounds = self._bounds()
        half = 128.0 / 2**self.anchor
        ends = bounds[:, :1] - 2 * half, bounds[:, -1:] + 2 * half
        edges = torch.cat([ends[0], bounds, ends[1]], 1)
        flat = codes.flatten(1)
        low, high = (edges.gather(1, flat + i).view(units.shape) for i in (0, 1))
        inset = MARGIN * (high - low)
        return units.clamp(low + inset, high - inset)

    @torch.no_grad()
    def codes(self) -> torch.Tensor:
        """int64 [E, rows, groups, columns of a group]: anchor codes now."""
        bounds = self._bounds()
        if self.anchor == 2:
            index = torch.zeros(self.latent.shape, dtype=torch.int64)
            for k in range(3):
                index += self.latent > bounds[:, k, None, None, None]
            return index
        return torch.stack(
            [
                torch.bucketize(x.contiguous(), b.contiguous())
                for x, b in zip(self.latent, bounds, strict=True)
            ]
        )

    def forward(self, bits: int) -> torch.Tensor:
        """The matrices at `bits`, float32 [E, rows, cols]."""
        out = _Decode.apply(
            self.latent, self.scale_q, self.zero, self.tables[str(bits)],
            self.codes() >> (self.anchor - bits), self._scale(), self._table(bits), self.step,
        )  # fmt: skip
        return out.flatten(2)[..., : self.cols]

    def coded(self) -> list[CodedMatrix]:
        """What has been learned, as codes again."""
        half = 128 >> self.anchor
        codes = (self.codes() << (8 - self.anchor)) + half
        codes = codes.flatten(2)[..., : self.cols].to(torch.uint8).numpy()
        scale_q, zero = (
            p.detach().round().clamp(0, 255).to(torch.uint8).numpy()
            for p in (self.scale_q, self.zero)
        )
        found = []
        for e, grid in enumerate(self.grid):
            tables = {}
            for name in self.tables:
                table = self._table(int(name))[e]
                if int(name) == self.anchor:
                    table = table.sort().values
                tables[int(name)] = table.to(torch.uint8).numpy()
            for bits in (b for b in (2, 3, 4) if b not in tables):  # should one ask
                part, known = 2 ** abs(bits - self.anchor), tables[self.anchor]
                finer = bits > self.anchor
                tables[bits] = np.repeat(known, part) if finer else known[part // 2 :: part]
            found.append(CodedMatrix(codes[e], scale_q[e], zero[e], *grid, tables))
        return found


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, latent, scale_q, zero, table, index, scale, entries, step):
        flat = index.flatten(1)
        value = entries.gather(1, flat).view(index.shape)
        value -= zero.round().clamp(0, 255)[..., None]
        ctx.save_for_backward(latent, index, scale, value, entries, step)
        return value * scale[..., None]

    @staticmethod
    def backward(ctx, grad):
        latent, index, scale, value, entries, step = ctx.saved_tensors
        inner = grad.view(value.shape)
        per_group = (inner * value).sum(-1) * scale
        grad_scale_q = per_group * (math.log(2) * step)
        scaled = inner * scale[..., None]
        grad_zero = -scaled.sum(-1)
        experts, count = entries.shape
        offsets = torch.arange(experts)[:, None] * count
        grad_table = torch.zeros(experts * count).index_add_(
            0, (index.flatten(1) + offsets).flatten(), scaled.flatten()
        )
        half = 128.0 / count
        ordered = entries.sort(1).values
        low, high = (ordered[:, i, None, None, None] for i in (0, -1))
        inside = (latent > low - half) & (latent < high + half)
        return (
            scaled * inside,
            grad_scale_q,
            grad_zero,
            grad_table.view(experts, count),
            *(None,) * 4,
        )


class CodedLayer(nn.Module):
    """All experts of a layer in one code set. `slot[e]`: which of the coded experts e uses, for experts that share."""

    def __init__(
        self,
        spec: ExpertsSpec,
        coded: Sequence[Sequence[CodedMatrix]],
        exact: Sequence[Expert],
        *,
        anchor: int,
        bits: Sequence[int] | None = None,
        slot: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.bits = spec, tuple(bits or (anchor,))
        self.slot = list(range(len(coded))) if slot is None else [int(s) for s in slot]
        self.biases = [tuple(b.float() for b in expert.biases) for expert in exact]
        self.stacks = nn.ModuleList(
            CodedStack(
                [expert[m] for expert in coded],
                [expert.matrices[m] for expert in exact],
                anchor,
                self.bits,
            )
            for m in range(len(coded[0]))
        )

    def experts(self, bits: int) -> list[Expert]:
        """The experts at `bits`, with gradients."""
        # unbind, since the gradient of one index is a whole stack of zeros.
        matrices = [stack(bits).unbind(0) for stack in self.stacks]
        return [
            Expert(found, biases)
            for found, biases in zip(zip(*matrices, strict=True), self.biases, strict=True)
        ]

    def coded(self) -> list[list[CodedMatrix]]:
        """By coded expert, then matrix."""
        return [
            list(found) for found in zip(*(stack.coded() for stack in self.stacks), strict=True)
        ]

    def forward(
        self,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        bits: int,
    ) -> torch.Tensor:
        """hidden [N, H], top_k_index [N, K] (below 0 or from E on: none), top_k_weights [N, K] -> [N, H]."""
        return run_experts(
            self.experts(bits), self.spec, hidden, top_k_index, top_k_weights, self.slot
        )


def run_experts(
    experts: Sequence[Expert],
    spec: ExpertsSpec,
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    slot: Sequence[int] | None = None,
) -> torch.Tensor:
    """sum_k weight_k expert_k(x) in float32, differentiable: pairs are sorted by expert, then cut."""
    num, k = len(slot or experts), top_k_index.shape[1]
    slot = torch.tensor([*(range(num) if slot is None else slot), len(experts)])
    index = top_k_index.reshape(-1).long()
    index = slot[torch.where((index < 0) | (index >= num), num, index)]
    order = index.argsort(stable=True)
    counts = torch.bincount(index, minlength=len(experts) + 1)[: len(experts)].tolist()
    order = order[: sum(counts)]
    rows = order // k
    x, gate = hidden.float().index_select(0, rows), top_k_weights.reshape(-1).float()[order]
    parts, begin = [], 0
    for expert, count in zip(experts, counts, strict=True):
        if count:
            some = slice(begin, begin + count)
            inner = intermediate(x[some], expert, spec)
            bias = expert.biases[-1] if expert.biases else None
            out = nn.functional.linear(inner, expert.matrices[-1], bias)
            if spec.post_norm is not None:
                out = spec.post_norm(out)
            parts.append(out * gate[some, None])
            begin += count
    total = torch.zeros(hidden.shape, dtype=torch.float32)
    if parts:
        total = total.index_add(0, rows, torch.cat(parts))
    return total.to(hidden.dtype)
