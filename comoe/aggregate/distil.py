"""Distillation: what stays of a coarse expert is tuned until it gives what the exact experts gave.

Dense weights are never changed, since exact mode shares them. What is tuned is what the records hold:
codes, scales, zeros, tables (comoe/aggregate/coded_layer.py), so the result is plain payloads again.

    distil_layer   one layer against its exact outputs on given inputs: mean squared error. The inputs may be
                   those of a model whose earlier layers are coarse already (`coarse_inputs`).
    distil_logits  all layers at once against the exact model's predictions: KL(exact || coarse)

The closed form (least squares of the down projection on what coarse gate and up give) is a part of
rounding: `round_routed` in comoe/aggregate/rounding.py.

Both measure on text they were not fitted to, before, meanwhile and after, and end with the best state
measured; if none is better than the start, the start it is, and the report says so. With `checkpoint`
an interrupted run goes on where its last checkpoint was.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from comoe.aggregate.coded_layer import CodedLayer
from comoe.aggregate.errors import AggregateError

BATCH_TOKENS = 2048
LATENT_RATE = (
    1.0  # code units per step of Adam, at 2 bits (bins of 64); less in proportion for finer bins
)
TABLE_RATE = 0.1  # code units per step, of tables and zeros
SCALE_RATE = 0.001  # octaves of scale per step
WARM_UP = 10  # steps
MEASURES = 6  # times a run measures on held-out text after its start
Progress = Callable[[int, int, float], None]  # steps done, in all, loss of the last one


@dataclass(frozen=True)
class Report:
    """Held-out loss (relative squared error, or nats of KL per token) before and after."""

    before: float
    after: float
    steps: int
    seconds: float

    @property
    def kept(self) -> bool:
        return self.after < self.before

    def __str__(self) -> str:
        if not self.kept:
            return (
                f"not kept: {self.steps} steps did not lower the held-out loss of {self.before:.5g}"
            )
        return f"held-out loss {self.before:.5g} -> {self.after:.5g} in {self.steps} steps, {self.seconds:.0f} s"


def distil_layer(
    layer: CodedLayer,
    inputs: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    targets: torch.Tensor,
    held_out: torch.Tensor,
    *,
    steps: int = 100,
    rate: float = 1.0,
    batch_tokens: int = BATCH_TOKENS,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Tunes `layer` in place so that its outputs come near `targets`.

    inputs [N, H], experts [N, K] and weights [N, K]: what the layer is given; targets [N, H]: what the
    exact experts gave for these rows (with their own inputs, if predecessors are coarse here); held_out
    bool [N]: rows to measure on. rate: times the usual learning rates.
    """
    fitted, measured = (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]
    if not len(fitted) or not len(measured):
        raise AggregateError(
            f"distil_layer: expected rows to fit and held-out rows, got {len(fitted)} and {len(measured)}; "
            "calibrate with more text"
        )
    energy = float(targets[measured].float().square().mean()) or 1.0

    def error(rows: torch.Tensor, bits: int) -> torch.Tensor:
        out = layer(inputs[rows].float(), experts[rows].long(), weights[rows].float(), bits)
        return (out - targets[rows].float()).square().mean() / energy

    def measure() -> float:
        return sum(float(error(measured, bits)) for bits in layer.bits) / len(layer.bits)

    draw = _draws(len(fitted), batch_tokens, seed)

    def loss(step: int) -> torch.Tensor:
        return error(fitted[draw(step)], layer.bits[step % len(layer.bits)])

    return _tune([layer], loss, measure, steps, rate, seed, checkpoint, progress)


def distil_logits(
    model: Any,
    layers: Sequence[CodedLayer],
    windows: torch.Tensor,
    held_out_windows: torch.Tensor,
    *,
    steps: int = 200,
    rate: float = 1.0,
    batch_tokens: int = BATCH_TOKENS,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Tunes all `layers` in place so that the whole model predicts what it predicts with exact experts.

    model: from comoe.load(dst, exact=True, dtype=torch.float32); layers: one per MoE layer, in order.
    windows, held_out_windows: token ids int64 [B, T] to fit on and to measure on. The exact model runs once
    over both. batch_tokens: tokens per step, in whole windows.
    """
    from comoe.evaluate import Head

    if len(windows) < 1 or len(held_out_windows) < 1:
        raise AggregateError(
            f"distil_logits: expected windows to fit on and held-out ones, got {len(windows)} and "
            f"{len(held_out_windows)}; give more text"
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    head = Head(model)
    per_step = max(1, batch_tokens // windows.shape[1])
    fitted, measured = (exact_hidden(model, w, per_step) for w in (windows, held_out_windows))

    def divergence(ids: torch.Tensor, exact: torch.Tensor, bits: int) -> torch.Tensor:
        with torch.no_grad():
            truth = head(exact.flatten(0, 1)).log_softmax(-1)
        with coarse(model, layers, bits):
            logits = model(input_ids=ids, use_cache=False).logits.float().flatten(0, 1)
        return nn.functional.kl_div(
            logits.log_softmax(-1), truth, reduction="batchmean", log_target=True
        )

    def measure() -> float:
        total = 0.0
        for bits in layers[0].bits:
            for begin in range(0, len(held_out_windows), per_step):
                some = slice(begin, begin + per_step)
                ids = held_out_windows[some]
                total += float(divergence(ids, measured[some], bits)) * len(ids)
        return total / len(held_out_windows) / len(layers[0].bits)

    draw = _draws(len(windows), per_step, seed)

    def loss(step: int) -> torch.Tensor:
        drawn = draw(step)
        return divergence(windows[drawn], fitted[drawn], layers[0].bits[step % len(layers[0].bits)])

    return _tune(layers, loss, measure, steps, rate, seed, checkpoint, progress)


def coarse(model: Any, layers: Sequence[CodedLayer | None], bits: int):
    """Context: the experts of a loaded model are `layers` at `bits`; None: that layer's are exact.

    Gradients flow. Layers with None run through the runtime and stop gradients.
    """
    from comoe.hf.attach import replaced

    def forward(layer_idx, hidden, top_k_index, top_k_weights):
        layer = layers[layer_idx]
        if layer is None:
            return model.comoe.experts_forward(
                layer_idx, hidden.detach(), top_k_index, top_k_weights.detach()
            )
        return layer(hidden, top_k_index, top_k_weights, bits)

    return replaced(model, forward)


@torch.no_grad()
def exact_hidden(model: Any, windows: torch.Tensor, per_step: int) -> torch.Tensor:
    """Last hidden states of the exact model, [B, T, H] in the model's dtype."""
    from comoe.evaluate import Head

    found = []
    with Head(model).hidden_of_body() as caught:
        for begin in range(0, len(windows), per_step):
            model(input_ids=windows[begin : begin + per_step], use_cache=False, logits_to_keep=1)
            found.append(caught.pop())
    return torch.cat(found)


@torch.no_grad()
def coarse_inputs(
    model: Any, layers: Sequence[CodedLayer], layer_idx: int, bits: int, windows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What layer `layer_idx` is given while the layers before it are coarse, and what it gives when all
    are exact: (inputs [N, H], experts [N, K], weights [N, K], targets [N, H]), for `distil_layer`."""
    from comoe.hf.attach import replaced

    def run(before: Sequence[CodedLayer | None]):
        seen, out = [], []

        def forward(idx, hidden, top_k_index, top_k_weights):
            if idx > layer_idx:  # nothing after it matters
                return torch.zeros_like(hidden)
            if idx < layer_idx and before[idx] is not None:
                return before[idx](hidden, top_k_index, top_k_weights, bits)
            result = model.comoe.experts_forward(idx, hidden, top_k_index, top_k_weights)
            if idx < layer_idx:
                return result
            seen.append((hidden.clone(), top_k_index.clone(), top_k_weights.clone()))
            out.append(result.clone())
            return result

        with replaced(model, forward):
            for ids in windows:
                model(input_ids=ids[None], use_cache=False, logits_to_keep=1)
        return [torch.cat(parts) for parts in zip(*seen, strict=True)], torch.cat(out)

    # Targets come from exact predecessors.
    _, targets = run([None] * len(layers))
    (inputs, experts, weights), _ = run(layers)
    return inputs, experts, weights, targets


# ---- the loop ------------------------------------------------------------------------------------


def _draws(count: int, size: int, seed: int) -> Callable[[int], torch.Tensor]:
    """step -> indices of what it uses: each of `count` once per epoch, in shuffled order."""
    size = min(size, count)
    per_epoch = count // size

    def draw(step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed + step // per_epoch)
        begin = step % per_epoch * size
        return torch.randperm(count, generator=generator)[begin : begin + size]

    return draw


def _tune(
    layers: Sequence[CodedLayer],
    loss: Callable[[int], torch.Tensor],
    measure: Callable[[], float],
    steps: int,
    rate: float,
    seed: int,
    checkpoint: str | Path | None,
    progress: Progress | None,
) -> Report:
    started, modules = time.monotonic(), nn.ModuleList(layers)
    optimizer = torch.optim.Adam(_rates(layers), betas=(0.9, 0.98), fused=True)
    rates = [group["lr"] * rate for group in optimizer.param_groups]
    settings = {"steps": steps, "rate": rate, "seed": seed, "sizes": [len(x.slot) for x in layers]}
    state = _resume(checkpoint, settings)
    if state is None:
        with torch.no_grad():
            before = measure()
        state = {"step": 0, "before": before, "least": before, "best": _copy(modules), "spent": 0.0}
    else:
        modules.load_state_dict(state["now"])
        optimizer.load_state_dict(state["optimizer"])
    spent = state["spent"]
    due = {round(steps * (i + 1) / MEASURES) for i in range(MEASURES)}
    for step in range(state["step"], steps):
        factor = min(1.0, (step + 1) / WARM_UP) * max(0.02, 1 - step / steps)
        for group, usual in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = usual * factor
        optimizer.zero_grad(set_to_none=True)
        value = loss(step)
        if not bool(torch.isfinite(value)):
            break  # the best state so far is what is kept
        value.backward()
        optimizer.step()
        if step + 1 in due:
            with torch.no_grad():
                measured = measure()
            if measured < state["least"]:
                state["least"], state["best"] = measured, _copy(modules)
            if checkpoint is not None:
                state |= {
                    "step": step + 1,
                    "now": modules.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "settings": settings,
                    "spent": spent + time.monotonic() - started,
                }
                _save(checkpoint, state)
        if progress is not None:
            progress(step + 1, steps, value.item())
    modules.load_state_dict(state["best"])
    return Report(state["before"], state["least"], steps, spent + time.monotonic() - started)


def _rates(layers: Sequence[CodedLayer]) -> list[dict]:
    groups = []
    for layer in layers:
        for stack in layer.stacks:
            narrow = 4 / 2**stack.anchor
            step = float(stack.step.mean()) or 1.0
            groups += [
                {"params": [stack.latent], "lr": LATENT_RATE * narrow},
                {"params": [stack.zero, *stack.tables.values()], "lr": TABLE_RATE},
                {"params": [stack.scale_q], "lr": SCALE_RATE / max(step, 1e-3)},
            ]
    return groups


def _copy(modules: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in modules.state_dict().items()}


def _resume(checkpoint: str | Path | None, settings: dict) -> dict | None:
    """The state of an interrupted run of the same settings, else None."""
    if checkpoint is None or not Path(checkpoint).is_file():
        return None
    try:
        state = torch.load(checkpoint, weights_only=True)
    except Exception as error:
        raise AggregateError(
            f"distil: {checkpoint} cannot be read ({error}); remove it to start anew"
        ) from error
    return state if state.get("settings") == settings else None


def _save(checkpoint: str | Path, state: dict) -> None:
    path = Path(checkpoint)
    part = path.with_name(path.name + ".part")
    torch.save(state, part)
    os.replace(part, path)
