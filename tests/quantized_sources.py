"""Tiny checkpoints whose weights are quantised, written without transformers' help."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

BLOCK = 128


def to_fp8(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and one fp32 scale per block; blocks at the right and at the bottom may be smaller."""
    rows, cols = weight.shape
    grid = -(-rows // block[0]), -(-cols // block[1])
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(grid)
    for i in range(grid[0]):
        for j in range(grid[1]):
            at = (
                slice(i * block[0], (i + 1) * block[0]),
                slice(j * block[1], (j + 1) * block[1]),
            )
            scales[i, j] = weight[at].float().abs().max() / 448
            codes[at] = (weight[at].float() / scales[i, j]).to(torch.float8_e4m3fn)
    return codes, scales


def save_fp8(model, folder: Path, block: tuple[int, int] = (BLOCK, BLOCK), dense: bool = True):
    """Every projection of `model` in FP8, embeddings and norms in bf16; dense: attention as well."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        quantised = name.endswith("proj.weight") if dense else ".experts." in name
        if quantised:
            codes, scales = to_fp8(tensor, block)
            tensors |= {name: codes, f"{name}_scale_inv": scales}
        else:
            tensors[name] = tensor
    _write(folder, tensors, {"quant_method": "fp8", "weight_block_size": list(block)})
    return folder


def save_mxfp4(model, folder: Path, seed: int = 0):
    """A GPT-OSS with random MXFP4 experts."""
    model.to(torch.bfloat16).save_pretrained(folder)
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, cols, rows = tensor.shape
            shape = (experts, rows, cols // 32)
            draw = {"dtype": torch.uint8, "generator": random}
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), **draw)
            tensors[f"{name}_scales"] = torch.randint(120, 125, shape, **draw)
        else:
            tensors[name] = tensor
    _write(folder, tensors, {"quant_method": "mxfp4"})
    return folder


def _write(folder: Path, tensors: dict[str, torch.Tensor], quantization: dict) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), "quantization_config": quantization}
    path.write_text(json.dumps(config))
