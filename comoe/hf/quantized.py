"""Checkpoints whose weights are quantised: FP8 with scales per block, and MXFP4.

transformers' own quantisers say which tensors belong together and which weights they stand for; their
conversions for `dequantize=True` are used as they are. Experts keep their codes and scales where a
store can hold them; where it cannot (docs/families.md), and for dense weights, the dequantised
weights are taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from packaging.version import Version
from transformers import PreTrainedConfig
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightConverter,
)
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.base import HfQuantizer

from comoe.hf.blocks import MoEBlock
from comoe.hf.layouts import Expert, InterfaceLayout
from comoe.hf.safetensors_io import CheckpointError, TensorEntry

FP8, MXFP4 = "float8_e4m3fn", "mxfp4"  # as the store names them
# How the tensors of codes and of scales are named, by quant_method.
SUFFIXES = {"fp8": ("", "_scale_inv"), "mxfp4": ("_blocks", "_scales")}
FP8_SINCE = "5.10"  # of transformers
TILE_ROWS, GROUP_COLS, MXFP4_COLS = 16, 128, 32  # what one scale of a store covers


def source_quantizer(config: PreTrainedConfig, folder: Path) -> HfQuantizer | None:
    """transformers' quantiser of the checkpoint, set to dequantise; None if it has plain weights."""
    settings = _settings(config)
    if settings is None:
        return None
    method = str(settings.get("quant_method", "unknown"))
    if method == "comoe":
        raise CheckpointError(f"{folder} is packed already: load it with comoe.load.")
    if method not in SUFFIXES:
        raise CheckpointError(
            f"{folder}: its weights are quantised ({method}), which comoe cannot pack. It packs "
            "bf16, fp16, fp32, FP8 (fp8) and MXFP4 (mxfp4) checkpoints: use one of these, or save a "
            "dequantised copy: from_pretrained(src, dtype='bfloat16') with the method's dequantize "
            "option, then save_pretrained(copy)."
        )
    try:
        quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=True)
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{folder}: quantization_config is not understood: {error}"
        ) from error
    if method == "fp8" and not dequantises_fp8_experts():
        raise CheckpointError(
            f"{folder}: transformers {transformers.__version__} cannot dequantise FP8 experts; expected "
            f"{FP8_SINCE} or later: pip install -U transformers."
        )
    quantizer.quantization_config.dequantize = True
    return quantizer


def dequantises_fp8_experts() -> bool:
    """transformers 5.7 merges FP8 experts without their scales; 5.8 and 5.9 give them in float32 whatever
    the model's type, and refuse tensors with one scale."""
    return Version(transformers.__version__) >= Version(FP8_SINCE)


def _settings(config: PreTrainedConfig) -> dict | None:
    for part in (config, config.get_text_config()):
        settings = getattr(part, "quantization_config", None)
        if settings is not None:
            return settings if isinstance(settings, dict) else settings.to_dict()
    return None


def _plain(pattern: str) -> str:
    """A source pattern without the anchor that some versions of transformers put at its end."""
    return pattern.removesuffix("$")


@dataclass(frozen=True)
class Pair:
    """A tensor of codes and the tensor of its scales."""

    codes: TensorEntry
    scales: TensorEntry


def find_pairs(
    sources: Sequence[tuple[str, str]], tensors: Mapping[str, TensorEntry], method: str
) -> list[Pair]:
    """The quantised tensors among `sources` (pattern, checkpoint name); none if they are plain.

    Raises CheckpointError if codes lack their scales.
    """
    end, scale_end = SUFFIXES[method]
    by_pattern: dict[str, list[TensorEntry]] = {}
    for pattern, key in sources:
        by_pattern.setdefault(_plain(pattern), []).append(tensors[key])
    pairs = []
    for pattern, codes in by_pattern.items():
        if not pattern.endswith(end) or pattern.endswith((scale_end, "activation_scale")):
            continue
        scales = by_pattern.get(pattern.removesuffix(end) + scale_end, [])
        if len(scales) == len(codes):  # paired by position, as transformers does
            pairs += [Pair(c, s) for c, s in zip(codes, scales, strict=True)]
        elif scales or end or codes[0].dtype.startswith("F8"):
            given = {s.name for s in scales}
            names = [c.name.removesuffix(end) + scale_end for c in codes]
            lost = next((name for name in names if name not in given), names[0])
            raise CheckpointError(
                f"{codes[0].path}: {len(codes)} tensors of codes like {codes[0].name} have "
                f"{len(scales)} of scales: {lost} is missing. Download the checkpoint again."
            )
    return pairs


def scale_blocks(pair: Pair, block_size: Sequence[int] | None) -> list[tuple[int, int]]:
    """(block, step) along rows and columns of an FP8 tensor: how much one scale in the file covers, and
    the most that divides the tensor evenly, where the last blocks of the grid are smaller."""
    out = []
    counts = pair.scales.shape[-2:] if len(pair.scales.shape) >= 2 else (1, 1)
    sizes = pair.codes.shape[-2:]
    for size, count, block in zip(sizes, counts, block_size or (0, 0), strict=True):
        if block and count == -(-size // block):
            block = min(block, size)
        elif count and size % count == 0:
            block = size // count
        else:
            raise CheckpointError(
                f"{pair.scales.path}: {pair.scales.name} of shape {pair.scales.shape} does not fit "
                f"{pair.codes.name} of shape {pair.codes.shape}. The config does not belong to these "
                "weights."
            )
        out.append((block, math.gcd(size, block)))
    return out


def read_scales(pair: Pair, block_size: Sequence[int] | None) -> torch.Tensor:
    """An FP8 tensor's scales, repeated until they divide it evenly: transformers takes no others."""
    scales = pair.scales.read()
    if scales.dim() < 2:  # one for the whole tensor
        scales = scales.reshape(1, 1)
    for dim, (block, step) in enumerate(scale_blocks(pair, block_size), start=-2):
        if block != step:
            count = pair.codes.shape[dim] // step
            scales = scales.repeat_interleave(block // step, dim).narrow(dim, 0, count)
    return scales


class Pick(ConversionOps):
    """In place of a dequantisation: hands the codes, or the scales, to the operations behind it."""

    def __init__(self, method: str, scales: bool) -> None:
        self.method, self.scales = method, scales

    def convert(self, input_dict, full_layer_name=None, **kwargs):
        end, scale_end = SUFFIXES[self.method]
        if self.method == "mxfp4":
            wanted = scale_end if self.scales else end
            (tensors,) = (v for pattern, v in input_dict.items() if pattern.endswith(wanted))
            tensor = tensors[0] if self.scales else tensors[0].flatten(-2)
            return {full_layer_name: tensor.transpose(1, 2)}  # as the dequantised weights lie
        by_pattern = {_plain(pattern): tensors for pattern, tensors in input_dict.items()}
        # Under the patterns as they came, which the operations behind expect.
        return {
            pattern: [_floats(s) for s in by_pattern[_plain(pattern) + scale_end]]
            if self.scales
            else [t.view(torch.uint8) for t in tensors]
            for pattern, tensors in input_dict.items()
            if not _plain(pattern).endswith((scale_end, "activation_scale"))
        }


def _floats(scales: torch.Tensor) -> torch.Tensor:
    """FP8 scales as float32; bytes are exponents, as transformers reads them."""
    if scales.dtype == torch.uint8:
        return (scales.float() - 127).exp2()
    return scales.float()


def exact_type(
    block: MoEBlock, units: Sequence[tuple[WeightConverter, list[Pair]]], quantizer: HfQuantizer
) -> str | None:
    """FP8 or MXFP4 if a store can hold the codes and scales of this block; None: dequantise them.

    units: the converters of the block's weight matrices, with what they read.
    """
    spec = block.spec
    if type(block.layout) is not InterfaceLayout:
        return None
    if quantizer.quantization_config.quant_method == "mxfp4":
        for pair in (pair for _, pairs in units for pair in pairs):
            shape = pair.codes.shape
            if len(shape) != 4 or shape[3] != MXFP4_COLS // 2 or pair.scales.shape != shape[:3]:
                raise CheckpointError(
                    f"{pair.codes.path}: {pair.codes.name} and {pair.scales.name} must be [experts, "
                    f"rows, groups, {MXFP4_COLS // 2}] and [experts, rows, groups], got {shape} and "
                    f"{pair.scales.shape}. Download the checkpoint again."
                )
        return MXFP4
    module = block.module
    if getattr(module, "is_transposed", False) or not getattr(module, "is_concatenated", True):
        return None
    shapes = {(spec.intermediate, spec.hidden), (spec.hidden, spec.intermediate)}
    for converter, pairs in units:
        if not all(
            isinstance(op, (MergeModulelist, Concatenate)) for op in converter.operations[1:]
        ):
            return None
        for pair in pairs:
            if pair.codes.dtype != "F8_E4M3" or pair.codes.shape not in shapes:
                return None
            (_, rows), (_, cols) = scale_blocks(
                pair, quantizer.quantization_config.weight_block_size
            )
            if rows % TILE_ROWS and rows != pair.codes.shape[0]:
                return None
            if cols % GROUP_COLS and cols != pair.codes.shape[1]:
                return None
    return FP8


def coded_experts(
    block: MoEBlock, kind: str, codes: dict[str, torch.Tensor], scales: dict[str, torch.Tensor]
) -> Iterator[Expert]:
    """Experts whose matrices are codes, expert by expert, with their scales as a store holds them.

    codes: the module's tensors, uint8 (MXFP4: two codes per byte along columns), and its biases.
    scales: the weights' tensors, [experts, rows / block, columns / block].
    """
    spec, layout, module = block.spec, block.layout, block.module
    first = scales[layout.parameter_names(module)[0]]  # gate and up, or up
    rows = first.shape[-1 if getattr(module, "is_transposed", False) else -2]
    grid = replace(spec, biased=False, intermediate=rows // 2 if spec.gated else rows)
    pairs = zip(
        layout.experts(spec, module, codes), layout.experts(grid, module, scales), strict=True
    )
    for expert, grids in pairs:
        found = grids.matrices
        if kind == FP8:
            matrices = zip(found, expert.matrices, strict=True)
            found = tuple(_tile_scales(g, *m.shape) for g, m in matrices)
        biases = tuple(b.float() for b in expert.biases)
        yield Expert(expert.matrices, biases, found)


def _tile_scales(grid: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """One scale for each 16 rows x 128 columns of an FP8 matrix, from a grid that divides it."""
    row = torch.arange(0, rows, TILE_ROWS) * grid.shape[0] // rows
    col = torch.arange(0, cols, GROUP_COLS) * grid.shape[1] // cols
    return grid[row][:, col]
