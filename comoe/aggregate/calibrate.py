"""Runs a packed model over text within a memory budget and records what its experts were given.

One streaming pass: the model runs with its exact weights, experts are read as they are needed, and
each layer's inputs and routing go straight to disk (comoe/aggregate/calibration.py says how they lie).
Several texts are several domains. Whole windows of each are held out, so that losses can be measured
on tokens that nothing was fitted to, and half of these are of the part that distillation chooses on.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from comoe.aggregate.calibration import (
    CHOSEN,
    DTYPES,
    FITTED,
    FOLDER,
    FORMAT,
    MANIFEST,
    MEASURED,
    Calibration,
)
from comoe.aggregate.errors import CalibrationError
from comoe.aggregate.published import published
from comoe.config import format_bytes
from comoe.runtime.budget import Step
from comoe.trace import tapping

HELD_OUT_EVERY = 4  # one window in four
FEW_ROWS = 32  # an expert with fewer calibration rows is reported
LEAST_WINDOW = 8
PASS_TOKENS = 4096  # windows that run together, so that each expert is read once for them
WORKSPACE_SHARE = 0.25  # of the memory, that a pass may take

Progress = Callable[[int, int], None]  # tokens done, tokens in all
Text = str | Path | Sequence[int]


@dataclass(frozen=True)
class Batch:
    """Windows of one length, one domain and one part."""

    ids: np.ndarray  # int32 [B, T]
    domain: int
    part: int


def calibrate(
    dst: str | os.PathLike,
    texts: Mapping[str, Text],
    *,
    memory: str | int | None = None,
    tokens: int = 32_768,
    window: int = 512,
    progress: Progress | None = None,
) -> Calibration:
    """Calibrates the packed folder `dst`; an older calibration there is replaced.

    texts: domain -> a text, the Path of one, or token ids; each gets an equal part of `tokens`, taken in
    windows spread evenly over it. memory: as for comoe.load. progress(done, total): tokens.

    Warns, with counts, when experts saw few tokens. Raises CalibrationError for a text without tokens,
    for activations that are NaN or infinite, and when the disk has no room.
    """
    import comoe

    dst = Path(dst)
    tokenizer = None
    if any(isinstance(text, (str, Path)) for text in texts.values()):
        tokenizer = comoe.load_tokenizer(dst)
    ids = {name: _ids(name, text, tokenizer) for name, text in texts.items()}
    windows = plan_windows(ids, tokens, window)
    model = comoe.load(dst, memory=memory, exact=True)
    try:
        batches = list(_batches(windows, _pass_tokens(model, window)))
        fingerprint = str(model.comoe.store.manifest.extra.get("fingerprint", ""))
        found = record(model, batches, dst / FOLDER, list(texts), fingerprint, progress)
    finally:
        model.comoe.close()
    _warn_of_few(found)
    return found


def plan_windows(
    ids: Mapping[str, np.ndarray], tokens: int, window: int
) -> list[tuple[int, int, np.ndarray]]:
    """(domain, part, ids) of each window. A short text gets shorter windows, so that some are held out."""
    if tokens < 2 or window < LEAST_WINDOW:
        raise CalibrationError(
            f"calibrate: expected tokens >= 2 and window >= {LEAST_WINDOW}, got {tokens} and {window}"
        )
    if not ids:
        raise CalibrationError("calibrate: no text; give at least one")
    found = []
    for domain, text in enumerate(ids.values()):
        share = min(tokens // len(ids), len(text))
        length = min(window, max(share // (2 * HELD_OUT_EVERY), LEAST_WINDOW))
        count = max(share // length, 1)
        starts = np.linspace(0, max(len(text) - length, 0), count).astype(np.int64)
        for number, start in enumerate(starts):
            turn, last = divmod(number, HELD_OUT_EVERY)
            held_out = last == HELD_OUT_EVERY - 1
            part = (MEASURED, CHOSEN)[turn % 2] if held_out else FITTED
            found.append((domain, part, text[start : start + length]))
    return found


def _ids(name: str, text: Text, tokenizer: Any) -> np.ndarray:
    if isinstance(text, Path):
        text = _read(name, text)
    if isinstance(text, str):
        text = tokenizer(text, verbose=False)["input_ids"]
    ids = np.asarray(text, np.int32).reshape(-1)
    if len(ids) < 2:
        raise CalibrationError(
            f"calibrate: text {name!r}: expected at least 2 tokens, got {len(ids)}; give a longer text"
        )
    return ids


def _read(name: str, path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise CalibrationError(f"calibrate: text {name!r} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"calibrate: text {name!r}: {path} is not UTF-8 text (byte {error.start}); convert it first"
        ) from error
    if "\0" in text:
        raise CalibrationError(
            f"calibrate: text {name!r}: {path} has NUL bytes (the first at character {text.index(chr(0))}), so it "
            "is binary; give a text"
        )
    return text


def _batches(windows: list[tuple[int, int, np.ndarray]], pass_tokens: int) -> Iterator[Batch]:
    groups: dict[tuple[int, int, int], list[np.ndarray]] = {}
    for domain, part, ids in windows:
        groups.setdefault((domain, part, len(ids)), []).append(ids)
    for (domain, part, length), members in groups.items():
        step = max(pass_tokens // length, 1)
        for i in range(0, len(members), step):
            yield Batch(np.stack(members[i : i + step]), domain, part)


def _pass_tokens(model: Any, window: int) -> int:
    """As many tokens per pass as the budget has room for, since a pass may read every expert."""
    budget, tokens = model.comoe.budget, PASS_TOKENS
    while tokens > window and (
        budget.sizes.workspace(Step(tokens // window, window)) > WORKSPACE_SHARE * budget.memory
    ):
        tokens //= 2
    return tokens


@torch.inference_mode()
def record(
    model: Any,
    batches: Sequence[Batch],
    folder: Path,
    domains: Sequence[str],
    fingerprint: str,
    progress: Progress | None = None,
) -> Calibration:
    """Runs a loaded model over `batches` and writes `folder`, all of it or nothing."""
    from comoe.hf.routers import router_logits
    from comoe.hf.sizes import experts_per_token

    k = experts_per_token(model)
    logits = router_logits(model, model.comoe.specs, k)
    total = sum(batch.ids.size for batch in batches)
    _check_space(folder.parent, model, total, k, logits)
    with published(folder, "calibrate", CalibrationError) as part:
        with contextlib.ExitStack() as stack:
            layers = [
                stack.enter_context(_LayerWriter(part / f"layer-{i:05d}", spec, logits[i]))
                for i, spec in enumerate(model.comoe.specs)
            ]

            def note(layer_idx: int, hidden: Any, index: Any, weights: Any) -> None:
                layers[layer_idx].add(hidden, index, weights, batch)

            with tapping(model, note):
                done = 0
                for batch in batches:
                    _run(model, torch.from_numpy(batch.ids).long())
                    done += batch.ids.size
                    if progress is not None:
                        progress(done, total)
        _write_tokens(part, batches)
        manifest = {
            "format": FORMAT,
            "fingerprint": fingerprint,
            "domains": list(domains),
            "tokens": total,
            "layers": [layer.entry() for layer in layers],
        }
        (part / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return Calibration.open(folder)


def _run(model: Any, ids: torch.Tensor) -> None:
    accepted = inspect.signature(type(model).forward).parameters
    options: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in accepted:
        options["logits_to_keep"] = 1
    if getattr(model.config, "is_encoder_decoder", False):
        options["decoder_input_ids"] = ids
    model(input_ids=ids, **options)


class _LayerWriter:
    """Appends the rows of one layer to its files."""

    def __init__(self, folder: Path, spec: Any, logits: Any) -> None:
        self.spec, self.logits = spec, logits
        self.rows, self.k = 0, 0
        folder.mkdir()
        names = [name for name in DTYPES if name != "logits" or logits is not None]
        with contextlib.ExitStack() as stack:
            self.files = {
                name: stack.enter_context(open(folder / f"{name}.bin", "wb")) for name in names
            }
            self._close = stack.pop_all().close

    def __enter__(self) -> _LayerWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def add(
        self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, batch: Batch
    ) -> None:
        if not (torch.isfinite(hidden).all() and torch.isfinite(weights).all()):
            raise CalibrationError(
                f"calibrate: {self.spec.name} got NaN or infinite activations; the checkpoint is damaged, or "
                "its type overflows: try dtype float32 with transformers on the same text"
            )
        self.rows += hidden.shape[0]
        self.k = index.shape[1]
        chosen = (index >= 0) & (index < self.spec.num_experts)
        parts = {
            "inputs": hidden,
            "experts": torch.where(chosen, index, -1),
            "weights": torch.where(chosen, weights.float(), 0.0),
            "domain": torch.full((hidden.shape[0],), batch.domain),
            "part": torch.full((hidden.shape[0],), batch.part),
        }
        if self.logits is not None:
            parts["logits"] = self.logits(hidden)
        for name, tensor in parts.items():
            raw = tensor.to(DTYPES[name]).contiguous().view(torch.uint8)
            self.files[name].write(memoryview(raw.numpy()))

    def entry(self) -> dict:
        return {
            "name": self.spec.name,
            "rows": self.rows,
            "num_experts": self.spec.num_experts,
            "hidden": self.spec.hidden,
            "experts_per_row": self.k,
            "logits": self.logits is not None,
        }


def _write_tokens(part: Path, batches: Sequence[Batch]) -> None:
    lengths = [batch.ids.shape[1] for batch in batches for _ in batch.ids]

    def per_token(name: str, dtype: type) -> np.ndarray:
        return np.concatenate([np.full(b.ids.size, getattr(b, name), dtype) for b in batches])

    np.savez(
        part / "tokens.npz",
        ids=np.concatenate([batch.ids.reshape(-1) for batch in batches]).astype(np.int32),
        sequence=np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
        domain=per_token("domain", np.uint8),
        part=per_token("part", np.uint8),
    )


def _check_space(folder: Path, model: Any, tokens: int, k: int, logits: list) -> None:
    per_token = sum(
        2 * spec.hidden + 6 * k + (2 * spec.num_experts if logits[i] is not None else 0) + 2
        for i, spec in enumerate(model.comoe.specs)
    )
    free = shutil.disk_usage(folder).free
    if free < tokens * per_token:
        raise CalibrationError(
            f"calibrate: {folder} has {format_bytes(free)} free, {tokens} tokens need "
            f"{format_bytes(tokens * per_token)}; make room or calibrate on fewer tokens"
        )


def _warn_of_few(found: Calibration) -> None:
    counts = [found.counts(layer) for layer in range(found.num_layers)]
    every = np.concatenate(counts)
    few = int((every < FEW_ROWS).sum())
    if not few:
        return
    per_layer = ", ".join(
        f"{found.layers[i]['name']}: {c.min()} to {c.max()}, {int((c == 0).sum())} unseen"
        for i, c in enumerate(counts)
        if c.min() < FEW_ROWS
    )
    warnings.warn(
        f"calibrate: {few} of {every.size} experts saw fewer than {FEW_ROWS} tokens of {found.num_tokens} "
        f"({per_layer}); losses of experts that saw none are estimated without data. Give a longer text",
        stacklevel=3,
    )
