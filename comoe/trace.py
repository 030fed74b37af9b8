"""Routing traces: which experts a model chose, token by token and layer by layer, for replay.

One npz file, `N` rows, `L` MoE layers, `K` experts per token. A row is one token in one forward pass.

    format       int      1
    model        str      what was traced
    layers       str [L]  module names, in order
    num_experts  int32 [L]
    sequence     int32 [N]      rows of one sequence share a number and stand in order
    position     int32 [N]      of the token in its sequence
    token        int32 [N]      its id; -1 where it is not known
    experts      int16 [N, L, K]    chosen experts; -1: none (dropped, or the layer did not see this token,
                                    as an encoder's layers do not see a decoder's tokens)
    weights      float32 [N, L, K]  gate weights; 0 where there is no expert
    predicted    int16 [N, L, P]    optional: experts that were predicted for the layer, -1: none. In
                                    `depth` equal blocks: block d was predicted d + 1 layers before,
                                    each with the most likely expert first
    depth        int32              of `predicted`; 1 where it is not there
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = 1


class TraceError(ValueError):
    """A file that is not a trace, or one that contradicts itself."""


@dataclass(frozen=True)
class Trace:
    """The arrays described above; checked when made."""

    model: str
    layers: tuple[str, ...]
    num_experts: np.ndarray  # int32 [L]
    sequence: np.ndarray  # int32 [N]
    position: np.ndarray  # int32 [N]
    token: np.ndarray  # int32 [N]
    experts: np.ndarray  # int16 [N, L, K]
    weights: np.ndarray  # float32 [N, L, K]
    predicted: np.ndarray | None = None  # int16 [N, L, P]
    depth: int = 1  # blocks of `predicted`

    def __post_init__(self) -> None:
        if self.experts.ndim != 3:
            raise TraceError(f"trace: experts: expected [N, L, K], got shape {self.experts.shape}")
        n, num_layers, k = self.experts.shape
        shapes: dict[str, tuple[int, ...]] = {
            "num_experts": (num_layers,),
            "sequence": (n,),
            "position": (n,),
            "token": (n,),
            "weights": (n, num_layers, k),
        }
        for name, shape in shapes.items():
            if getattr(self, name).shape != shape:
                raise TraceError(
                    f"trace: {name}: expected shape {shape}, got {getattr(self, name).shape}"
                )
        if self.predicted is not None and self.predicted.shape[:2] != (n, num_layers):
            raise TraceError(
                f"trace: predicted: expected [{n}, {num_layers}, P], got {self.predicted.shape}"
            )
        if self.depth < 1 or (self.predicted is not None and self.predicted.shape[2] % self.depth):
            width = None if self.predicted is None else self.predicted.shape[2]
            raise TraceError(f"trace: depth: expected a divisor of P = {width}, got {self.depth}")
        if len(self.layers) != num_layers:
            raise TraceError(f"trace: layers: expected {num_layers} names, got {len(self.layers)}")
        for name in ("num_experts", "sequence", "position", "token", "experts", "predicted"):
            array = getattr(self, name)
            if array is not None and not np.issubdtype(array.dtype, np.integer):
                raise TraceError(f"trace: {name}: expected whole numbers, got {array.dtype}")
        for name in ("experts", "predicted"):
            array = getattr(self, name)
            if array is not None and array.size:
                wrong = (array < -1) | (array >= self.num_experts[None, :, None])
                if wrong.any():
                    row, layer, _ = np.argwhere(wrong)[0]
                    raise TraceError(
                        f"trace: {name}: expected -1 <= expert < {self.num_experts[layer]} in layer {layer}, "
                        f"got {array[row, layer].tolist()} in row {row}"
                    )
        if not np.isfinite(self.weights).all() or (self.weights[self.experts < 0] != 0).any():
            raise TraceError(
                "trace: weights: expected finite numbers, and 0 where there is no expert"
            )

    @property
    def num_tokens(self) -> int:
        return len(self.sequence)

    def entropy_share(self) -> np.ndarray:
        """float64 [L]: entropy of how often each expert is chosen, over the largest possible, log E."""
        shares = np.ones(len(self.layers))
        for layer_idx, num_experts in enumerate(self.num_experts):
            chosen = self.experts[:, layer_idx]
            counts = np.bincount(chosen[chosen >= 0].astype(np.int64), minlength=num_experts)
            p = counts[counts > 0] / max(counts.sum(), 1)
            if num_experts > 1:
                shares[layer_idx] = -(p * np.log(p)).sum() / np.log(num_experts)
        return shares

    def summary(self) -> dict[str, Any]:
        """What is in it, in a few numbers."""
        shares = self.entropy_share()
        return {
            "model": self.model,
            "tokens": self.num_tokens,
            "sequences": len(np.unique(self.sequence)),
            "layers": len(self.layers),
            "experts": int(self.num_experts.max(initial=0)),
            "experts_per_token": self.experts.shape[2],
            "entropy_share": float(shares.mean()),
            "least_entropy_share": float(shares.min()),
        }

    def write(self, path: str | os.PathLike) -> None:
        """Writes the file, or leaves what was there."""
        path = Path(path)
        part = path.with_name(path.name + ".part")
        arrays: dict[str, Any] = {
            "format": np.int32(FORMAT),
            "model": np.str_(self.model),
            "layers": np.array(self.layers, np.str_),
            "num_experts": self.num_experts.astype(np.int32),
            "sequence": self.sequence.astype(np.int32),
            "position": self.position.astype(np.int32),
            "token": self.token.astype(np.int32),
            "experts": self.experts.astype(np.int16),
            "weights": self.weights.astype(np.float32),
        }
        if self.predicted is not None:
            arrays["predicted"] = self.predicted.astype(np.int16)
            arrays["depth"] = np.int32(self.depth)
        try:
            with part.open("wb") as file:
                np.savez_compressed(file, **arrays)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: str | os.PathLike) -> Trace:
        """Reads and checks a trace; TraceError says what is wrong with it."""
        try:
            loaded = np.load(path, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                raise TraceError(
                    f"{path} is a single array, not a routing trace; make one with comoe trace"
                )
            with loaded as file:
                arrays = {name: file[name] for name in file.files}
        except TraceError:
            raise
        except (
            zipfile.BadZipFile,
            zlib.error,
            ValueError,
            EOFError,
            KeyError,
            NotImplementedError,
            OSError,
        ) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk's error, not the file's
            raise TraceError(f"{path} is not a routing trace, or is damaged ({error})") from error
        missing = {
            "format",
            "model",
            "layers",
            "num_experts",
            "sequence",
            "position",
            "token",
            "experts",
            "weights",
        }
        missing -= set(arrays)
        if missing:
            raise TraceError(
                f"{path} is not a routing trace: it has no {', '.join(sorted(missing))}"
            )
        if arrays["format"].size != 1 or int(arrays["format"]) != FORMAT:
            raise TraceError(
                f"{path}: format {arrays['format']} is not known; this comoe reads format {FORMAT}"
            )
        depth = arrays.get("depth", np.int32(1))
        if depth.size != 1 or not np.issubdtype(depth.dtype, np.integer):
            raise TraceError(f"{path}: depth: expected one whole number, got {depth}")
        return cls(
            model=str(arrays["model"]),
            depth=int(depth),
            layers=tuple(map(str, arrays["layers"])),
            predicted=arrays.get("predicted"),
            **{
                name: arrays[name]
                for name in ("num_experts", "sequence", "position", "token", "experts", "weights")
            },
        )


class Recorder:
    """Collects what `runtime.experts_forward` is asked for; use `recording(model)`.

    Layers of one forward pass come in rising order with the same number of rows. When a layer comes
    again, or the number of rows changes (an encoder's and a decoder's tokens), new rows begin.
    """

    def __init__(self, num_layers: int, depth: int = 1):
        self.num_layers, self.depth = num_layers, depth
        self._blocks: list[dict[str, Any]] = []
        self._last_layer = num_layers
        self._sequences = 0
        self._positions: dict[int, int] = {}
        self._tokens: np.ndarray | None = None
        self._batch = 1

    def new_sequences(self, batch: int = 1) -> None:
        """The passes from now on belong to `batch` new sequences, whose rows come one after another."""
        self._sequences += self._batch if self._blocks else 0
        self._batch, self._positions, self._last_layer = batch, {}, self.num_layers

    def expect(self, ids: np.ndarray | None) -> None:
        """Token ids of the next forward pass, [batch, T] or [T]."""
        self._tokens = None if ids is None else np.asarray(ids).reshape(-1)

    def note(
        self, layer_idx: int, experts: np.ndarray, weights: np.ndarray, num_experts: int
    ) -> None:
        """experts: int [T, K], an index outside [0, num_experts) is no expert.  weights: [T, K]."""
        rows = experts.shape[0]
        if layer_idx <= self._last_layer or self._blocks[-1]["rows"] != rows:
            self._begin(rows)
        block = self._blocks[-1]
        chosen = (experts >= 0) & (experts < num_experts)
        block["experts"][layer_idx] = np.where(chosen, experts, -1).astype(np.int16)
        block["weights"][layer_idx] = np.where(chosen, weights, 0).astype(np.float32)
        self._last_layer = layer_idx

    def note_predicted(self, layer_idx: int, ahead: int, experts: np.ndarray) -> None:
        """experts: int [T, K], -1 for none, predicted for `layer_idx` from `ahead` layers before it; called
        after `note` of that earlier layer."""
        if not 1 <= ahead <= self.depth:
            raise TraceError(f"trace: ahead: expected 1 to {self.depth} layers, got {ahead}")
        self._blocks[-1]["predicted"][layer_idx, ahead - 1] = experts.astype(np.int16)

    def _begin(self, rows: int) -> None:
        length = rows // self._batch
        if length * self._batch != rows:
            raise TraceError(f"trace: {rows} rows do not divide into {self._batch} sequences")
        sequence = np.repeat(np.arange(self._batch), length)
        start = np.array([self._positions.get(i, 0) for i in range(self._batch)])
        known = self._tokens is not None and len(self._tokens) == rows
        self._blocks.append(
            {
                "rows": rows,
                "experts": {},
                "weights": {},
                "predicted": {},
                "sequence": sequence + self._sequences,
                "position": start[sequence] + np.tile(np.arange(length), self._batch),
                "token": self._tokens if known else np.full(rows, -1),
            }
        )
        for i in range(self._batch):
            self._positions[i] = self._positions.get(i, 0) + length

    def trace(self, model: str, layers: tuple[str, ...], num_experts: np.ndarray) -> Trace:
        """All that was recorded."""
        widths = [e.shape[1] for block in self._blocks for e in block["experts"].values()]
        if not widths:
            raise TraceError("trace: nothing was recorded; run the model inside recording()")
        k, total = max(widths), sum(block["rows"] for block in self._blocks)
        experts = np.full((total, self.num_layers, k), -1, np.int16)
        weights = np.zeros((total, self.num_layers, k), np.float32)
        row = 0
        for block in self._blocks:
            for layer_idx, chosen in block["experts"].items():
                experts[row : row + block["rows"], layer_idx, : chosen.shape[1]] = chosen
                weights[row : row + block["rows"], layer_idx, : chosen.shape[1]] = block["weights"][
                    layer_idx
                ]
            row += block["rows"]
        predicted = self._predicted(total)

        def joined(name: str) -> np.ndarray:
            return np.concatenate([block[name] for block in self._blocks]).astype(np.int32)

        return Trace(
            model,
            tuple(layers),
            np.asarray(num_experts, np.int32),
            joined("sequence"),
            joined("position"),
            joined("token"),
            experts,
            weights,
            predicted,
            self.depth,
        )

    def _predicted(self, total: int) -> np.ndarray | None:
        """int16 [N, L, depth * K]"""
        k = max((p.shape[1] for b in self._blocks for p in b["predicted"].values()), default=0)
        if k == 0:
            return None
        predicted = np.full((total, self.num_layers, self.depth, k), -1, np.int16)
        row = 0
        for block in self._blocks:
            rows = slice(row, row + block["rows"])
            for (layer_idx, back), experts in block["predicted"].items():
                predicted[rows, layer_idx, back, : experts.shape[1]] = experts
            row += block["rows"]
        return predicted.reshape(total, self.num_layers, self.depth * k)


@contextmanager
def tapping(model: Any, note: Callable[[int, Any, Any, Any], None]) -> Iterator[None]:
    """While the block runs, note(layer_idx, hidden [T, H], top_k_index [T, K], top_k_weights [T, K]) is
    called before the experts of a layer are."""
    runtime = getattr(model, "comoe", None)
    if runtime is None:
        raise TraceError("trace: expected a model that comoe loaded (comoe.load or comoe.offload)")
    forward = runtime.experts_forward

    def noted(layer_idx: int, hidden: Any, top_k_index: Any, top_k_weights: Any) -> Any:
        note(layer_idx, hidden, top_k_index, top_k_weights)
        return forward(layer_idx, hidden, top_k_index, top_k_weights)

    runtime.experts_forward = noted
    try:
        yield
    finally:
        del runtime.experts_forward


@contextmanager
def recording(model: Any, depth: int = 0) -> Iterator[Recorder]:
    """Records the routing of a loaded model (one that has `model.comoe`) while the block runs.

    depth: records also what the routers of the next `depth` layers would choose for each layer's hidden
    state, where the model's predictor can tell.
    """
    recorder: Recorder | None = None

    def note(layer_idx: int, hidden: Any, top_k_index: Any, top_k_weights: Any) -> None:
        recorder.note(
            layer_idx,
            top_k_index.detach().cpu().numpy(),
            top_k_weights.detach().float().cpu().numpy(),
            specs[layer_idx].num_experts,
        )
        for ahead in range(1, depth + 1):
            chosen = predictor.choose(layer_idx, hidden, ahead)
            if chosen is None:
                break
            experts, later = chosen.detach().cpu().numpy(), layer_idx + ahead
            known = (experts >= 0) & (experts < specs[later].num_experts)
            recorder.note_predicted(later, ahead, np.where(known, experts, -1))

    with tapping(model, note):
        specs, predictor = model.comoe.specs, getattr(model.comoe, "predictor", None)
        if depth and not hasattr(predictor, "choose"):
            raise TraceError(
                "trace: depth: this model's routers are not understood, so nothing can be predicted; "
                "record with depth 0"
            )
        recorder = Recorder(len(specs), max(depth, 1))
        yield recorder


def record_text(
    model: Any,
    ids: list[int],
    window: int = 512,
    progress: Callable[[int, int], None] | None = None,
    depth: int = 0,
) -> Recorder:
    """Routing of a text, read in windows of which each is a sequence of its own; with predictions for up
    to `depth` layers ahead."""
    if window < 1:
        raise ValueError(f"trace: window: expected at least 1, got {window}")
    if depth < 0:
        raise ValueError(f"trace: depth: expected 0 or more layers, got {depth}")
    import torch

    with recording(model, depth) as recorder, torch.inference_mode():
        for begin in range(0, len(ids), window):
            part = ids[begin : begin + window]
            recorder.new_sequences()
            recorder.expect(np.array(part))
            model(input_ids=torch.tensor([part]), use_cache=False, logits_to_keep=1)
            if progress is not None:
                progress(begin + len(part), len(ids))
    return recorder


def trace_of(model: Any, recorder: Recorder, name: str) -> Trace:
    """The recorder's trace, with the names of the model's layers."""
    specs = model.comoe.specs
    return recorder.trace(
        name, tuple(s.name for s in specs), np.array([s.num_experts for s in specs])
    )
