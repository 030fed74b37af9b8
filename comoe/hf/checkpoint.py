"""Reads a Hugging Face checkpoint folder layer by layer, in transformers' own layout.

The names and shapes in a checkpoint often differ from the model's (one tensor per expert on disk, one
fused tensor per layer in the model). transformers knows how to convert each family; its tables are
applied here to one layer at a time, so that no more than a layer is ever in memory.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from comoe.hf.blocks import UnsupportedModelError, discover
from comoe.hf.convert import EXACT_DTYPES
from comoe.hf.layouts import Expert
from comoe.hf.quantized import (
    MXFP4,
    SUFFIXES,
    Pair,
    Pick,
    coded_experts,
    exact_type,
    find_pairs,
    read_scales,
    source_quantizer,
)
from comoe.hf.safetensors_io import CheckpointError, MadeTensor, TensorEntry, read_header


@dataclass
class Unit:
    """Checkpoint tensors that are converted together, and the model tensors that come of them."""

    target: str
    converter: WeightConverter | None
    sources: list[tuple[str, str]] = field(default_factory=list)  # (pattern, checkpoint name)
    pairs: list[Pair] = field(default_factory=list)  # those of the sources that are quantised

    def targets(self) -> list[str]:
        if self.converter is None:
            return [self.target]
        first, *_ = patterns = self.converter.target_patterns
        return [self.target.replace(first, pattern) for pattern in patterns]


class Checkpoint:
    """A checkpoint folder, its model on the meta device, and where each tensor of it lies."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(
                f"{self.folder}: not a folder. Expected a Hugging Face checkpoint."
            )
        self.config = read_config(self.folder)
        self.quantizer = source_quantizer(self.config, self.folder)
        self.tensors = find_tensors(self.folder)
        self.model = meta_model(self.config)
        if self.quantizer is not None:
            # Dequantised weights get the type of the model's parameters.
            self.model.to(self.config.dtype or torch.bfloat16)
        self.blocks = discover(self.model)
        self._units, self._dense, self.unused = self._plan()
        self._check_complete()
        self._exact_types = [self._exact_type(i) for i in range(len(self.blocks))]
        self._pending: dict[str, torch.Tensor] = {}

    @property
    def dense(self) -> list[TensorEntry | MadeTensor]:
        """Tensors that are no experts': as they lie in the checkpoint, or dequantised."""
        return [entry for unit in self._dense for entry in self._dense_entries(unit)]

    def _dense_entries(self, unit: Unit) -> list[TensorEntry | MadeTensor]:
        if not unit.pairs:
            return [self.tensors[key] for _, key in unit.sources]
        # What other operations made of a tensor has the model's name, else it keeps the checkpoint's.
        own = len(unit.converter.operations) == 1
        return [
            MadeTensor(
                unit.pairs[0].codes.name.removesuffix(SUFFIXES[self._method][0]) if own else name,
                self.model.get_parameter(name).dtype,
                tuple(self.model.get_parameter(name).shape),
                partial(self._made, unit, name),
            )
            for name in unit.targets()
        ]

    def _made(self, unit: Unit, name: str) -> torch.Tensor:
        return self._convert(unit)[name].to(self.model.get_parameter(name).dtype)

    @property
    def dense_bytes(self) -> int:
        return sum(entry.nbytes for entry in self.dense)

    def block_bytes(self, block_idx: int) -> int:
        """Bytes in the checkpoint of one block's experts."""
        return sum(self.tensors[key].nbytes for u in self._units[block_idx] for _, key in u.sources)

    def block_dtype(self, block_idx: int) -> torch.dtype:
        """The type that load_block will give, known before anything is read."""
        dtypes = [
            self.tensors[key].torch_dtype
            for unit in self._units[block_idx]
            for _, key in unit.sources
            if not unit.pairs
        ]
        if any(unit.pairs for unit in self._units[block_idx]):
            dtypes.append(self.model.dtype)
        return common_dtype(self.blocks[block_idx].name, dtypes)

    def exact_dtype(self, block_idx: int) -> str:
        """What load_experts will give, as the store names it."""
        return self._exact_types[block_idx] or EXACT_DTYPES[self.block_dtype(block_idx)]

    def load_experts(self, block_idx: int) -> Iterator[Expert]:
        """One block's experts in canonical orientation: elements of block_dtype, or codes and scales."""
        block, kind = self.blocks[block_idx], self._exact_types[block_idx]
        if kind is None:
            return block.experts(self.load_block(block_idx))
        codes: dict[str, torch.Tensor] = {}
        scales: dict[str, torch.Tensor] = {}
        for unit in self._units[block_idx]:
            codes |= self._convert(unit, Pick(self._method, scales=False) if unit.pairs else None)
            if unit.pairs:
                scales |= self._convert(unit, Pick(self._method, scales=True))
        for name, tensor in codes.items():
            shape = list(tensor.shape)
            if kind == MXFP4 and tensor.dim() == 3:  # two codes in a byte, along the input
                shape[1] *= 2
            self._check_shape(name, shape)
        short = len(block.name) + 1
        return coded_experts(
            block,
            kind,
            {name[short:]: tensor for name, tensor in codes.items()},
            {name[short:]: tensor for name, tensor in scales.items()},
        )

    def fingerprint(self) -> str:
        """Identifies the source: names, shapes and places of tensors, file sizes and times, config."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for path in sorted({entry.path for entry in self.tensors.values()}):
            stat = path.stat()
            digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        for name, entry in sorted(self.tensors.items()):
            digest.update(f"{name} {entry.dtype} {entry.shape} {entry.offset}\n".encode())
        return digest.hexdigest()

    def load_block(self, block_idx: int) -> dict[str, torch.Tensor]:
        """One block's expert tensors as the module keeps them, all of one dtype.

        The dtype is the checkpoint's own, so nothing is rounded.
        """
        block = self.blocks[block_idx]
        wanted = {f"{block.name}.{name}": name for name in block.parameter_names}
        found = {}
        for name in wanted:
            if name in self._pending:
                found[name] = self._pending.pop(name)
        for unit in self._units[block_idx]:
            if all(name in found for name in unit.targets() if name in wanted):
                continue
            for name, tensor in self._convert(unit).items():
                # A unit may feed two blocks (text and vision experts stored as one list).
                (found if name in wanted else self._pending)[name] = tensor
        for name in wanted:
            if name not in found:
                raise CheckpointError(f"{self.folder}: no tensor of the checkpoint gives {name}.")
            self._check_shape(name, found[name].shape)
        dtype = self.block_dtype(block_idx)
        return {wanted[name]: tensor.to(dtype) for name, tensor in found.items() if name in wanted}

    def _check_shape(self, name: str, got: Sequence[int]) -> None:
        expected = self.model.get_parameter(name).shape
        if tuple(got) != tuple(expected):
            raise CheckpointError(
                f"{name}: config.json asks for shape {tuple(expected)}, the checkpoint has "
                f"{tuple(got)}. The config does not belong to these weights."
            )

    @property
    def _method(self) -> str:
        # Text, or an enumeration of transformers that equals it.
        return next(m for m in SUFFIXES if m == self.quantizer.quantization_config.quant_method)

    def _exact_type(self, block_idx: int) -> str | None:
        """Of codes that the store can hold; None for a block of plain or dequantised weights."""
        block, units = self.blocks[block_idx], self._units[block_idx]
        names = {f"{block.name}.{name}" for name in block.parameter_names}
        quantised = [unit for unit in units if unit.pairs]
        plain = [unit.target for unit in units if not unit.pairs]
        if not quantised or not all(name.endswith("_bias") for name in plain):
            return None
        if not all(names.issuperset(unit.targets()) for unit in quantised):
            return None
        return exact_type(block, [(u.converter, u.pairs) for u in quantised], self.quantizer)

    def _reader(self, unit: Unit, key: str):
        """How to read a tensor for a conversion."""
        for pair in unit.pairs:
            if key == pair.scales.name and pair.codes.dtype.startswith("F8"):
                block_size = self.quantizer.quantization_config.weight_block_size
                return partial(read_scales, pair, block_size)
        return self.tensors[key].read

    def _convert(self, unit: Unit, instead: Pick | None = None) -> dict[str, torch.Tensor]:
        """The unit's model tensors; `instead` takes the place of a dequantisation."""
        if unit.converter is None:
            return {unit.target: self.tensors[unit.sources[0][1]].read()}
        converter = copy.deepcopy(unit.converter)
        if instead is not None:
            converter.operations[0] = instead
        for pattern, key in unit.sources:
            converter.add_tensor(unit.target, key, pattern, self._reader(unit, key))
        try:
            out = converter.convert(unit.target, model=self.model, config=self.model.config)
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"{self.folder}: transformers {transformers.__version__} cannot convert the checkpoint's "
                f"tensors of {unit.target} ({error}). Are experts missing from the checkpoint?"
            ) from error
        return {name: t[0] if isinstance(t, list) else t for name, t in out.items()}

    def _plan(self) -> tuple[list[list[Unit]], list[Unit], list[str]]:
        """Units of each block, units of dense tensors, names that the model has no use for."""
        model_tensors = self.model.state_dict()
        owner = {
            f"{block.name}.{name}": i
            for i, block in enumerate(self.blocks)
            for name in block.parameter_names
        }
        transforms = get_model_conversion_mapping(self.model, None, self.quantizer)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        by_pattern = {p: c for c in converters for p in c.source_patterns}
        prefix = self.model.base_model_prefix
        units: dict[str, Unit] = {}
        unused = []
        # The order and the second try are those of transformers' own loader.
        for key in sorted(self.tensors, key=dot_natural_key):
            target, pattern = rename_source_key(key, renamings, converters, prefix, model_tensors)
            if target not in model_tensors and key in model_tensors:
                target, pattern = rename_source_key(key, [], [], prefix, model_tensors)
            if target not in model_tensors:
                unused.append(key)
                continue
            unit = units.setdefault(target, Unit(target, by_pattern.get(pattern)))
            unit.sources.append((pattern or key, key))
        per_block: list[list[Unit]] = [[] for _ in self.blocks]
        dense = []
        for unit in units.values():
            if self.quantizer is not None and unit.converter is not None:
                unit.pairs = find_pairs(unit.sources, self.tensors, self._method)
            owners = {owner.get(name) for name in unit.targets()}
            if owners == {None}:
                dense.append(unit)
                continue
            if None in owners:
                raise UnsupportedModelError(
                    f"{type(self.model).__name__}: {unit.sources[0][1]} holds expert and other weights "
                    "in one tensor, which comoe cannot pack."
                )
            for block_idx in owners:
                per_block[block_idx].append(unit)
        return per_block, dense, unused

    def _check_complete(self) -> None:
        given = {name for units in self._units for unit in units for name in unit.targets()}
        for block in self.blocks:
            for name in block.parameter_names:
                full = f"{block.name}.{name}"
                if full not in given:
                    raise CheckpointError(
                        f"{self.folder}: the checkpoint has no weights for {full} "
                        f"({type(block.module).__name__}). Download it again, or check that config.json "
                        "belongs to it."
                    )


def read_config(folder: Path) -> PreTrainedConfig:
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: no config.json. Expected a Hugging Face checkpoint folder."
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        if "auto_map" in raw:
            raise UnsupportedModelError(
                f"{folder}: model type {raw.get('model_type')!r} needs code from the checkpoint itself. "
                f"comoe runs only models that transformers has built in (here {transformers.__version__}); "
                "a newer transformers may have it."
            ) from error
        raise UnsupportedModelError(f"{path}: transformers cannot read it: {error}") from error


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that config.json names, or the one that transformers' tables give."""
    for name in config.architectures or []:
        cls = getattr(transformers, name, None)
        if isinstance(cls, type) and issubclass(cls, PreTrainedModel):
            return cls
    for auto in (
        transformers.AutoModelForCausalLM,
        transformers.AutoModelForSeq2SeqLM,
        transformers.AutoModelForImageTextToText,
        transformers.AutoModel,
    ):
        try:
            return auto._model_mapping[type(config)]
        except KeyError:
            continue
    raise UnsupportedModelError(
        f"transformers {transformers.__version__} has no model for {type(config).__name__} "
        f"(architectures {config.architectures})."
    )


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model without memory: every tensor on the meta device."""
    with torch.device("meta"):
        return model_class(config)(copy.deepcopy(config))


def find_tensors(folder: Path) -> dict[str, TensorEntry]:
    """Every tensor of the folder's safetensors files; checks that shards and index agree."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return _indexed(folder, index)
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        others = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".gguf"})
        hint = f" It has {others[0]}: save the model again with save_pretrained." if others else ""
        raise CheckpointError(f"{folder}: no model.safetensors and no index of shards.{hint}")
    counts = {m[1] for p in files if (m := re.search(r"-of-(\d+)\.safetensors$", p.name))}
    if counts:
        raise CheckpointError(
            f"{folder}: {index.name} is missing ({len(files)} of {int(min(counts))} shards are there). "
            "Download the checkpoint again."
        )
    return read_header(files[0])


def _indexed(folder: Path, index: Path) -> dict[str, TensorEntry]:
    try:
        places = json.loads(index.read_text())["weight_map"]
        names = sorted(set(places.values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index}: not an index of shards: {error!r}") from error
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index}: shard {name!r} is not a plain file name.")
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(names)} shards missing: {', '.join(missing[:4])}. "
            "Download them."
        )
    entries: dict[str, TensorEntry] = {}
    for name in names:
        entries |= read_header(folder / name)
    lost = [key for key, name in places.items() if key not in entries]
    if lost:
        raise CheckpointError(
            f"{index}: {len(lost)} tensors are not in the shards it names, e.g. {lost[0]} in "
            f"{places[lost[0]]}. Download the checkpoint again."
        )
    return {key: entries[key] for key in places}


def common_dtype(name: str, dtypes: list[torch.dtype]) -> torch.dtype:
    common = dtypes[0]
    for dtype in dtypes[1:]:
        common = torch.promote_types(common, dtype)
    if common not in EXACT_DTYPES:
        raise CheckpointError(
            f"{name}: expert weights of type {common} cannot be packed; expected float32, bfloat16 or "
            "float16."
        )
    return common
