"""Rounding into the ladder's codes with second moments of the inputs, so that the *output* moves least.

For one matrix W [rows, cols] and the second moment M [cols, cols] of what it is multiplied with, the
error of codes that decode to W' is tr((W - W') M (W - W')^T): the mean square of the change of the
output. `round_matrix` lowers it in this order:

1. Scale and zero of each group of 128 columns: the range of the group, shrunk as suits the anchor's
   table under the diagonal of M; tables by weighted Lloyd iterations.
2. Codes at the anchor's bits column by column, each column's error passed on to the columns that are
   still to come (GPTQ, Frantar et al. 2022, arXiv:2210.17323), columns with large M first.
3. `sweeps` times: scale and zero of each group by least squares under M, the table by least squares under M,
   then each code once more to the table entry that is best while all others stay (coordinate descent; no
   step raises the error but through the rounding of scales, zeros and tables to 8 bits, and the best
   state seen is what is kept).
4. Tables of the levels below the anchor by least squares under M, for the bins that truncation gives.

All rungs up to the anchor come from the one set of codes. Bits below the anchor are chosen by coordinate
descent inside the anchor's bins; they make a valid 8-bit rung, but the packer's own codes are better there,
and are a replacement set of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from comoe import _C
from comoe.aggregate.coded import CodedMatrix, scale_grid, scale_of, to_payloads
from comoe.aggregate.experts import Expert, activate, intermediate
from comoe.runtime.spec import ExpertsSpec
from comoe_kernels.ladder_codec import GROUP_COLS, LEVEL_BITS, Shape

ANCHORS = (2, 3, 4)
DAMPING = 0.01  # of the mean of the diagonal of M
SWEEPS = 2
BLOCK = (
    128  # columns between two updates of all that follow; a group of columns in the natural order
)
FIT_WEIGHTS = (
    1 << 16
)  # about as many of a matrix tables are fitted on under M: sums over pairs cost
FEW_ROWS = 4  # rows per neuron at which half of the fit of down is taken
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.72, 0.64)
LLOYD_ITERATIONS = 3


def round_expert(
    matrices: Sequence[torch.Tensor],
    moments: Sequence[torch.Tensor | None],
    *,
    anchor: int = 4,
    bits: int | None = None,
    biases: Sequence[torch.Tensor] = (),
    sweeps: int = SWEEPS,
    damping: float = DAMPING,
) -> list[np.ndarray]:
    """One expert as record payloads, in the layout that `_C.encode_expert` gives to its plane records.

    matrices: [gate,] up, down: float [rows, cols], cols along the input.
    moments: of each matrix, the second moment [cols, cols] of its inputs (mean over routed tokens of
        gate^2 x x^T; any positive factor), or None where nothing is known: that matrix is then rounded
        without (M = identity).
    anchor: 2, 3 or 4: the bits that codes are chosen for; coarser levels are its upper bits.
    bits: of the set: `anchor` if None, or 8 to get all four planes, as record 0..3 of a store want them.
    biases: [rows] of each matrix, or empty.

    Returns uint8 payloads: 1, 2, 3 or 4 for 2, 3, 4 or 8 bits. Raises ValueError for weights or moments
    that are not finite, and for shapes that do not fit.
    """
    coded = round_matrices(
        matrices, moments, anchor=anchor, lower_bits=bits == 8, sweeps=sweeps, damping=damping
    )
    shape = shape_of(matrices, biased=len(biases) > 0)
    bits = anchor if bits is None else bits
    if bits != 8 and bits > anchor:
        raise ValueError(
            f"round_expert: bits: expected at most the anchor's {anchor}, or 8, got {bits}"
        )
    return to_payloads(shape, coded, [b.float().numpy() for b in biases], bits=bits)


def round_matrices(
    matrices: Sequence[torch.Tensor],
    moments: Sequence[torch.Tensor | None],
    *,
    anchor: int = 4,
    lower_bits: bool = False,
    sweeps: int = SWEEPS,
    damping: float = DAMPING,
) -> list[CodedMatrix]:
    """`round_expert` before it is written down: one CodedMatrix per matrix.

    lower_bits: also choose the bits below the anchor's, for a rung of 8 bits; else they are 0.
    """
    if len(moments) != len(matrices):
        raise ValueError(
            f"round_expert: moments: expected one (or None) for each of {len(matrices)} matrices, got {len(moments)}"
        )
    prepared: dict[int, _Moment] = {}  # gate and up have the same
    coded = []
    for m, (weight, moment) in enumerate(zip(matrices, moments, strict=True)):
        if moment is not None:
            _check_moment(m, weight, moment)
            if id(moment) not in prepared:
                prepared[id(moment)] = _Moment.of(moment, damping)
        found = _Moment.identity(weight.shape[1]) if moment is None else prepared[id(moment)]
        coded.append(_Rounding(weight, found, anchor, m).run(sweeps, lower_bits))
    return coded


def round_routed(
    expert: Expert,
    spec: ExpertsSpec,
    inputs: torch.Tensor,
    gate: torch.Tensor,
    *,
    anchor: int = 4,
    sweeps: int = SWEEPS,
    damping: float = DAMPING,
) -> list[CodedMatrix]:
    """`round_matrices` with what rows of routed inputs allow beyond plain second moments.

    inputs [S, H] and gate [S]: rows that were routed to the expert, and their router weights. S = 0: every
    matrix is rounded without moments.

    - The moments of gate and up weigh each row by how much a change of that projection's outputs, the same
      for all, would change the expert's output there: g^2 sum_i (dh_i / dgate_i)^2 ||down_i||^2.
    - down is rounded last, as the least-squares fit of what the exact expert gives on what the *coarse* gate
      and up hand it, under their second moment (the closed form of distillation).

    On the demo model at 2 bits these took perplexity from 3.8 to 3.2% over exact.
    """
    if not len(inputs):
        return round_matrices(
            expert.matrices, [None] * len(expert.matrices), anchor=anchor, sweeps=sweeps
        )
    x, g = inputs.float(), gate.float()[:, None]
    options = {"anchor": anchor, "sweeps": sweeps, "damping": damping}
    weights = _sensitivities(expert, spec, x)
    moments = [(x * (g * w[:, None])).T @ (x * (g * w[:, None])) for w in weights]
    coded = round_matrices(expert.matrices[:-1], moments, **options)
    level = tuple(torch.from_numpy(c.decode(anchor)) for c in coded)
    exact = g * intermediate(x, expert, spec)
    coarse = g * intermediate(x, replace(expert, matrices=(*level, expert.matrices[-1])), spec)
    moment = coarse.T @ coarse
    ridge = damping * moment.diagonal().mean() + 1e-30
    moment.diagonal().add_(ridge)
    # min over D of ||exact down^T - coarse D^T||^2 + ridge ||D - down||^2
    down = expert.matrices[-1].float()
    right = (coarse.T @ exact) @ down.T + ridge * down.T
    fitted = torch.linalg.solve(moment, right).T.contiguous()
    if not bool(torch.isfinite(fitted).all()):
        fitted = down
    # With few rows per neuron the fit is mostly noise.
    fitted = down + (fitted - down) * (len(x) / (len(x) + FEW_ROWS * len(moment)))
    return coded + round_matrices([fitted], [moment], **options)


def _sensitivities(expert: Expert, spec: ExpertsSpec, x: torch.Tensor) -> list[torch.Tensor]:
    """For each projection before down, [S]: sqrt(sum_i (dh_i / dprojection_i)^2 ||down_i||^2)."""
    columns = expert.matrices[-1].float().square().sum(0)
    biases = expert.biases or (None,) * len(expert.matrices)
    with torch.enable_grad():
        parts = [
            torch.nn.functional.linear(x, w.float(), b).requires_grad_()
            for w, b in zip(expert.matrices[:-1], biases[:-1], strict=True)
        ]
        # The activation acts on each neuron alone, so the gradient of the sum holds each one's own.
        slopes = torch.autograd.grad(activate(parts, spec).sum(), parts)
    return [(slope.square() @ columns).sqrt() for slope in slopes]


def shape_of(matrices: Sequence[torch.Tensor], biased: bool = False) -> Shape:
    intermediate, hidden = matrices[0].shape
    shape = Shape(hidden, intermediate, gated=len(matrices) == 3, biased=biased)
    got = tuple(tuple(w.shape) for w in matrices)
    if got != shape.matrices:
        raise ValueError(f"round_expert: matrices: expected shapes {shape.matrices}, got {got}")
    return shape


def moment_error(weight: torch.Tensor, decoded: torch.Tensor, moment: torch.Tensor) -> float:
    """tr((W - W') M (W - W')^T) / tr(W M W^T)."""
    error = weight - decoded
    total = float(((weight @ moment) * weight).sum())
    return float(((error @ moment) * error).sum()) / max(total, 1e-30)


@dataclass(frozen=True)
class _Moment:
    """A second moment, made safe to invert, with its columns in the order in which codes are chosen."""

    matrix: torch.Tensor  # [cols, cols] in natural order, mean of the diagonal 1
    order: (
        torch.Tensor | None
    )  # int64 [cols], largest diagonal first; None: white, nothing to pass on
    factor: torch.Tensor | None  # upper Cholesky factor of the inverse, in that order

    @classmethod
    def identity(cls, cols: int) -> _Moment:
        return cls(torch.eye(cols), None, None)

    @classmethod
    def of(cls, moment: torch.Tensor, damping: float) -> _Moment:
        matrix = moment.to(torch.float32)
        matrix = (matrix + matrix.T) / 2
        mean = float(matrix.diagonal().mean())
        if mean <= 0:  # inputs that are always zero say nothing
            return cls.identity(len(matrix))
        matrix = matrix / mean
        order = matrix.diagonal().argsort(descending=True)
        eye = torch.eye(len(matrix))
        for attempt in range(8):
            damped = matrix + damping * 10.0**attempt * eye
            lower, failed = torch.linalg.cholesky_ex(damped[order][:, order])
            if failed:
                continue
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed and bool(torch.isfinite(upper).all()):
                return cls(damped, order, upper)
        return cls.identity(len(matrix))


class _Rounding:
    """One matrix on its way. Groups are padded to 128 columns in nothing; the last one may be narrow."""

    def __init__(self, weight: torch.Tensor, moment: _Moment, anchor: int, number: int) -> None:
        if anchor not in ANCHORS:
            raise ValueError(f"round_expert: anchor: expected one of {ANCHORS}, got {anchor}")
        if weight.dim() != 2 or not bool(torch.isfinite(weight).all()):
            raise ValueError(
                f"round_expert: matrix {number} must be [rows, cols] and finite, got shape "
                f"{list(weight.shape)}{'' if weight.dim() != 2 else ' with NaN or infinity'}"
            )
        self.weight, self.moment, self.anchor = weight.float(), moment, anchor
        self.rows, self.cols = weight.shape
        self.groups = [
            slice(a, min(a + GROUP_COLS, self.cols)) for a in range(0, self.cols, GROUP_COLS)
        ]
        self.group_of = torch.arange(self.cols) // GROUP_COLS
        self.table = self.scale_q = self.zero = self.scale = self.index = None

    def run(self, sweeps: int, lower_bits: bool) -> CodedMatrix:
        self._fit_ranges()
        if self.moment.order is None:
            self.index = self._nearest(self.weight, slice(None)).to(torch.uint8)
        else:
            self._pass_errors_on()
        best, gradient = self._state()
        for _ in range(sweeps):
            self._refit_groups(gradient)
            self._refit_table()
            self._descend()
            state, gradient = self._state()
            best = min(best, state, key=lambda state: state[0])
        _, self.table, self.scale, self.scale_q, self.zero, self.grid, self.index = best
        return self._coded(lower_bits)

    def _state(self) -> tuple[tuple, torch.Tensor]:
        """What is chosen, its error first; and (W - W') M."""
        error = self.weight - self._decoded()
        gradient = error @ self.moment.matrix
        total = float((gradient * error).sum())
        chosen = (self.table, self.scale, self.scale_q, self.zero, self.grid, self.index.clone())
        return (total, *chosen), gradient

    # ---- codes and what they mean ---------------------------------------------------------------

    def _spread(self, per_group: torch.Tensor) -> torch.Tensor:
        """[rows, groups] -> [rows, cols]"""
        return per_group[:, self.group_of]

    def _grouping(self, scale: torch.Tensor, zero: torch.Tensor) -> tuple:
        """As the native functions take it."""
        return GROUP_COLS, scale.contiguous().numpy(), zero.contiguous().numpy(), self.table.numpy()

    def _decoded(self) -> torch.Tensor:
        grouping = self._grouping(self.scale, self.zero)
        return torch.from_numpy(_C.decode_codes(self.index.numpy(), *grouping))

    def _bounds(self) -> torch.Tensor:
        return (self.table[1:] + self.table[:-1]) / 2

    def _nearest(self, target: torch.Tensor, cols) -> torch.Tensor:
        groups = self.group_of[cols]
        units = target / self.scale[:, groups] + self.zero[:, groups]
        return torch.bucketize(units, self._bounds())

    def _set_groups(self, scale: torch.Tensor, offset: torch.Tensor) -> None:
        """scale, offset [rows, groups]: weights are scale * value - offset; onto the 8-bit grids."""
        log2_min, log2_step, q = scale_grid(scale.numpy())
        self.grid, self.scale_q = (log2_min, log2_step), q
        self.scale = torch.from_numpy(scale_of(log2_min, log2_step, q))
        self.zero = (offset / self.scale).round().clamp(0, 255)

    # ---- step 1 ---------------------------------------------------------------------------------

    def _fit_ranges(self) -> None:
        """Ranges of groups (zero included), shrunk to what the anchor's table likes best."""
        diagonal = self.moment.matrix.diagonal().contiguous()
        lows, highs = [], []
        for cols in self.groups:
            lows.append(self.weight[:, cols].amin(1).clamp(max=0))
            highs.append(self.weight[:, cols].amax(1).clamp(min=0))
        low, high = torch.stack(lows, 1), torch.stack(highs, 1)
        # Groups of zeros take a scale that does not stretch the grid.
        span = (high - low) / 255
        span = torch.where(span > 0, span, span.max().clamp_min(1e-30) * 2.0**-16)
        self._set_groups(span, -low)
        count = 2**self.anchor
        self.table = (torch.arange(count) + 0.5) * (256 / count) - 0.5
        self._lloyd(diagonal)
        best = torch.full_like(span, torch.inf)
        chosen, offset = span, -low
        for shrink in SHRINKS:
            tried = span * shrink
            # Both ends move in by the same share of the range.
            moved = (
                torch.minimum(-low, 255 * tried).clamp_min(0) if shrink == 1.0 else -low * shrink
            )
            zero = (moved / tried).round().clamp(0, 255)
            grouping = self._grouping(tried, zero)
            error = torch.from_numpy(
                _C.group_errors(self.weight.numpy(), *grouping, diagonal.numpy())
            )
            better = error < best
            best = torch.where(better, error, best)
            chosen = torch.where(better, tried, chosen)
            offset = torch.where(better, zero * tried, offset)
        self._set_groups(chosen, offset)
        self._lloyd(diagonal)

    def _lloyd(self, diagonal: torch.Tensor) -> None:
        """The anchor's table for the present scales: weighted means of what rounds to each entry."""
        unit = 1 / float(self.scale.max())
        for _ in range(LLOYD_ITERATIONS):
            grouping = self._grouping(self.scale, self.zero)
            sums = _C.bin_sums(self.weight.numpy(), *grouping, diagonal.numpy(), unit)
            count, total = (torch.from_numpy(s) for s in sums)
            means = (total / count.clamp_min(1e-30)).float()
            self._set_table(torch.where(count > 0, means, self.table))

    def _set_table(self, table: torch.Tensor) -> None:
        """Rounded, and kept in order: codes are truncated, so entries must not cross."""
        self.table = table.round().clamp(0, 255).sort().values

    # ---- step 2 ---------------------------------------------------------------------------------

    def _pass_errors_on(self) -> None:
        order, upper = self.moment.order, self.moment.factor
        left = self.weight[:, order].clone()
        index = torch.empty((self.rows, self.cols), dtype=torch.uint8)
        groups = self.group_of[order]
        for begin in range(0, self.cols, BLOCK):
            some = slice(begin, min(begin + BLOCK, self.cols))
            inverse = 1 / upper.diagonal()[some]
            index[:, some], errors = self._round(
                left[:, some], upper[some, some], inverse, groups[some]
            )
            left[:, some.stop :] -= errors @ upper[some, some.stop :]
        self.index = torch.empty_like(index)
        self.index[:, order] = index

    def _round(
        self, values, factor, inverse, groups, **options
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`_C.round_columns` on tensors: codes uint8 and errors float32, [rows, columns of the block]."""
        codes, errors = _C.round_columns(
            values.contiguous().numpy(), factor.contiguous().numpy(), inverse.contiguous().numpy(),
            self.scale.numpy(), self.zero.numpy(), groups.to(torch.int32).numpy(), self.table.numpy(), **options
        )  # fmt: skip
        return torch.from_numpy(codes), torch.from_numpy(errors)

    # ---- step 3 ---------------------------------------------------------------------------------

    def _refit_groups(self, gradient: torch.Tensor) -> None:
        """Scale and offset of each group by least squares under M, group after group. gradient: (W - W') M,
        which is used up."""
        m = self.moment.matrix
        value = self.table[self.index.int()]
        scale, offset = self.scale.clone(), self.scale * self.zero
        for g, cols in enumerate(self.groups):
            v, inner = value[:, cols], m[cols, cols]
            vm = v @ inner
            ones = inner.sum(0)
            # e = e0 - ds * v + do * 1; minimise over (ds, do) of each row.
            a, b, c = (vm * v).sum(1), vm.sum(1), ones.sum()
            p, q = (gradient[:, cols] * v).sum(1), gradient[:, cols].sum(1)
            det = (a * c - b * b).clamp_min(1e-12 * float((a * c).max().clamp_min(1e-30)))
            ds, do = (c * p - b * q) / det, (b * p - a * q) / det
            new = scale[:, g] + ds
            # A group may neither vanish nor turn round, nor grow out of its grid.
            fits = (new > 0.5 * scale[:, g]) & (new < 2 * scale[:, g])
            ds, do = torch.where(fits, ds, 0), torch.where(fits, do, 0)
            scale[:, g] += ds
            offset[:, g] += do
            if cols.stop < self.cols:
                change = ds[:, None] * v - do[:, None]
                gradient[:, cols.stop :] -= change @ m[cols, cols.stop :]
        self._set_groups(scale, offset)

    def _refit_table(self) -> None:
        fitted = self._least_squares(self.index, self.table)
        self._set_table(fitted)

    def _least_squares(self, index: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Entries of least error under M for given bins, over a sample of rows; `table`: what an entry
        without weights keeps."""
        step = max(1, self.rows * self.cols // FIT_WEIGHTS)
        index, largest = index[::step], self.scale.max()
        scale = self._spread(self.scale[::step]) / largest
        target = self.weight[::step] / largest + scale * self._spread(self.zero[::step])
        count = len(table)
        parts = torch.stack([torch.where(index == k, scale, 0) for k in range(count)])
        weighted = (parts.reshape(-1, self.cols) @ self.moment.matrix).reshape(count, -1)
        flat = parts.reshape(count, -1)
        left = (weighted @ flat.T).double()
        right = (weighted @ target.reshape(-1)).double()
        # A little of the old table, so that empty bins have a solution.
        ridge = 1e-6 * float(left.diagonal().mean()) + 1e-30
        left.diagonal().add_(ridge)
        return torch.linalg.solve(left, right + ridge * table.double()).float()

    def _descend(self) -> None:
        self.index = self._coordinate_descent(self._decoded())

    def _coordinate_descent(
        self, decoded: torch.Tensor, lower: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Each code to what is best while all others stay as they are, group after group.

        lower: uint8 [rows, cols]: choose among the codes of the anchor's bin that begins there.
        """
        m = self.moment.matrix
        gradient = (self.weight - decoded) @ m
        found = torch.empty((self.rows, self.cols), dtype=torch.uint8)
        for cols in self.groups:
            inner = m[cols, cols]
            options = {"present": decoded[:, cols].contiguous().numpy()}
            if lower is not None:
                options |= {
                    "lower": lower[:, cols].contiguous().numpy(),
                    "width": 256 >> self.anchor,
                }
            found[:, cols], moved = self._round(
                gradient[:, cols], inner, 1 / inner.diagonal(), self.group_of[cols], **options
            )
            if cols.stop < self.cols:
                gradient[:, cols.stop :] -= moved @ m[cols, cols.stop :]
        return found

    def _lower_bits(self) -> torch.Tensor:
        """Codes 0..255 [rows, cols] in the anchor's bins, for the rung of 8 bits."""
        width = 256 >> self.anchor
        low = self.index.float() * width
        scale, zero = self._spread(self.scale), self._spread(self.zero)
        codes = (self.weight / scale + zero).round().clamp(low, low + width - 1)
        if self.moment.order is not None:  # else the nearest is the best
            for _ in range(2):
                codes = self._coordinate_descent(scale * (codes - zero), low.to(torch.uint8))
        return codes

    # ---- step 4 ---------------------------------------------------------------------------------

    def _coded(self, lower_bits: bool) -> CodedMatrix:
        tables = {self.anchor: self.table}
        for bits in (b for b in LEVEL_BITS if b < self.anchor):
            index = self.index >> (self.anchor - bits)
            merged = self.table.reshape(2**bits, -1).mean(1)
            tables[bits] = self._least_squares(index, merged).round().clamp(0, 255)
        codes = self._lower_bits() if lower_bits else self.index * (256 >> self.anchor)
        found = {b: t.to(torch.uint8).numpy() for b, t in tables.items()}
        for bits in (
            b for b in (3, 4) if b > self.anchor
        ):  # should one ask: the anchor's own values
            found[bits] = np.repeat(found[self.anchor], 2 ** (bits - self.anchor))
        return CodedMatrix(
            codes.to(torch.uint8).numpy(),
            self.scale_q,
            self.zero.to(torch.uint8).numpy(),
            *self.grid,
            found,
        )


def _check_moment(number: int, weight: torch.Tensor, moment: torch.Tensor) -> None:
    cols = weight.shape[1]
    if tuple(moment.shape) != (cols, cols):
        raise ValueError(
            f"round_expert: moment {number}: expected shape {[cols, cols]} as matrix {number} has {cols} columns, "
            f"got {list(moment.shape)}"
        )
    if not bool(torch.isfinite(moment).all()):
        raise ValueError(
            f"round_expert: moment {number} has NaN or infinity: an activation overflowed during calibration; "
            "calibrate in float32 or pass None for this expert"
        )
