"""What the experts of a model were given while it read text, kept on disk layer by layer.

DST/calibration/
    calibration.json   format, fingerprint of the packed checkpoint, domains, tokens, and per layer: name,
                       rows, num_experts, hidden, experts_per_row, whether it has logits
    tokens.npz         ids int32 [T], sequence int32 [T], domain uint8 [T], part uint8 [T]
    layer-00000/       inputs.bin  bf16 [N, H];  experts.bin int16 [N, K], -1: none;  weights.bin fp32 [N, K]
                       logits.bin  fp16 [N, E], where the router is understood
                       domain.bin  uint8 [N];  part.bin uint8 [N]

A sequence belongs to one part: FITTED is what rungs are made from, MEASURED what their losses are measured on,
and CHOSEN, held out too, is for a stage that keeps the best of several states (distillation): losses of what it
chose must not be measured on the text that chose it. Where there was no such stage, CHOSEN measures as well.

T tokens were read. N rows reached a layer's experts: one per token in the same order in most families,
but some call their experts with routed rows only (then K = 1, and rows carry no token).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from comoe.aggregate.errors import CalibrationError

FORMAT = 2
FOLDER = "calibration"
MANIFEST = "calibration.json"
FITTED, MEASURED, CHOSEN = range(3)
DTYPES = {
    "inputs": torch.bfloat16,
    "experts": torch.int16,
    "weights": torch.float32,
    "logits": torch.float16,
    "domain": torch.uint8,
    "part": torch.uint8,
}


@dataclass(frozen=True)
class LayerRecord:
    """What one layer's experts were given; tensors are mapped from disk, so index before computing."""

    inputs: torch.Tensor  # bf16 [N, H]
    experts: torch.Tensor  # int16 [N, K], -1: none
    weights: torch.Tensor  # fp32 [N, K], 0 where there is no expert
    logits: torch.Tensor | None  # fp16 [N, E]
    domain: torch.Tensor  # uint8 [N], index into Calibration.domains
    held_out: torch.Tensor  # bool [N]


def shapes(entry: dict) -> dict[str, tuple[int, ...]]:
    """Shape of each file of a layer, from its entry in the manifest."""
    n = entry["rows"]
    found = {
        "inputs": (n, entry["hidden"]),
        "experts": (n, entry["experts_per_row"]),
        "weights": (n, entry["experts_per_row"]),
        "domain": (n,),
        "part": (n,),
    }
    if entry["logits"]:
        found["logits"] = (n, entry["num_experts"])
    return found


class Calibration:
    """A finished calibration folder; `comoe.aggregate.calibrate` makes one."""

    def __init__(
        self,
        folder: Path,
        manifest: dict,
        tokens: dict[str, np.ndarray],
        held_out: tuple[int, ...] = (MEASURED, CHOSEN),
    ) -> None:
        self.folder, self.manifest = folder, manifest
        self._tokens, self._held_out = tokens, held_out
        self.domains: tuple[str, ...] = tuple(manifest["domains"])
        self.fingerprint: str = manifest["fingerprint"]
        self.layers: list[dict] = manifest["layers"]
        self.ids, self.sequence = tokens["ids"], tokens["sequence"]
        self.domain, self.part = tokens["domain"], tokens["part"]
        self.held_out = np.isin(self.part, held_out)

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @classmethod
    def open(cls, folder: str | Path, *, fingerprint: str | None = None) -> Calibration:
        """folder: a packed folder, or its calibration folder. fingerprint: of the packed checkpoint, to be
        sure that these records are its own (`ExpertWeights.fingerprint`)."""
        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            folder = folder / FOLDER
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
        except FileNotFoundError:
            raise CalibrationError(
                f"{folder}: no calibration; make one with comoe calibrate, which needs a text like those the "
                "model will read"
            ) from None
        except (OSError, ValueError) as error:
            raise CalibrationError(f"{folder / MANIFEST} cannot be read: {error}") from error
        if manifest.get("format") != FORMAT:
            raise CalibrationError(
                f"{folder}: format {manifest.get('format')} is not known; this comoe reads format {FORMAT}. "
                "Calibrate again"
            )
        try:
            with np.load(folder / "tokens.npz", allow_pickle=False) as file:
                tokens = {name: file[name] for name in ("ids", "sequence", "domain", "part")}
            found = cls(folder, manifest, tokens)
            found._check_files()
        except (OSError, KeyError, ValueError, TypeError) as error:
            if isinstance(error, CalibrationError):
                raise
            raise CalibrationError(
                f"{folder}: damaged or incomplete ({error}); calibrate again"
            ) from error
        if fingerprint is not None and fingerprint != found.fingerprint:
            raise CalibrationError(
                f"{folder}: these records are of another checkpoint than the packed one; calibrate again"
            )
        return found

    def _check_files(self) -> None:
        for number, entry in enumerate(self.layers):
            for name, shape in shapes(entry).items():
                path = self._path(number, name)
                expected = int(np.prod(shape)) * DTYPES[name].itemsize
                if path.stat().st_size != expected:
                    raise CalibrationError(
                        f"{path}: {expected:,} bytes expected, got {path.stat().st_size:,}; calibrate again"
                    )

    def _path(self, layer: int, name: str) -> Path:
        return self.folder / f"layer-{layer:05d}" / f"{name}.bin"

    def layer(self, layer: int) -> LayerRecord:
        tensors = {
            name: _map(self._path(layer, name), shape, DTYPES[name])
            for name, shape in shapes(self.layers[layer]).items()
        }
        part = tensors.pop("part")
        held_out = torch.zeros(len(part), dtype=torch.bool)
        for number in self._held_out:
            held_out |= part == number
        return LayerRecord(**{"logits": None, **tensors}, held_out=held_out)

    def after_choice(self) -> Calibration:
        """The same for what comes after a choice made on CHOSEN: that part counts as fitted to."""
        found = Calibration(self.folder, self.manifest, self._tokens, (MEASURED,))
        if not found.held_out.any():
            raise CalibrationError(
                f"{self.folder}: no text to measure on is left after a choice; calibrate again on a longer text"
            )
        return found

    def counts(self, layer: int) -> np.ndarray:
        """int64 [E]: rows that each expert was given, held-out ones included."""
        experts = self.layer(layer).experts.numpy().reshape(-1)
        return np.bincount(
            experts[experts >= 0].astype(np.int64), minlength=self.layers[layer]["num_experts"]
        )


def _map(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    # Private pages, since torch takes only memory that could be written.
    raw = np.memmap(path, np.uint8, "c", shape=(int(np.prod(shape)) * dtype.itemsize,))
    return torch.from_numpy(raw).view(dtype).view(shape)
