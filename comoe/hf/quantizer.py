"""Teaches transformers the packed format, as a quantisation method called "comoe".

`from_pretrained(folder)` then builds the model on the meta device, this plug-in takes the experts'
parameters away before any weight is loaded, and puts a runtime under them afterwards.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from comoe.config import DENSE_BITS, CoMoEConfig
from comoe.hf.attach import refuse_saving, register_experts_function
from comoe.hf.blocks import MoEBlock, discover
from comoe.hf.dense import CODED, EncodeOnLoad, replace_dense

METHOD = "comoe"
STORE_FOLDER = "experts"
FORMAT = 1


class CoMoEQuantizationConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed folder's config.json.

    options: fields of CoMoEConfig for this load; a packed folder has none.
    """

    def __init__(
        self, format: int = FORMAT, options: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        kwargs.pop("quant_method", None)
        if kwargs:
            raise ValueError(f"quantization_config of comoe: unknown fields {sorted(kwargs)}")
        if format != FORMAT:
            raise ValueError(
                f"quantization_config of comoe: format {format} is not known to this version (it knows "
                f"{FORMAT}); install a newer comoe or pack again"
            )
        self.quant_method = METHOD
        self.format = format
        self.options = dict(options or {})

    def comoe_config(self) -> CoMoEConfig:
        return CoMoEConfig.create(**self.options)


class CoMoEQuantizer(HfQuantizer):
    """Loads dense weights only, and experts from the store beside them."""

    requires_calibration = True  # transformers cannot make a store; `comoe pack` does
    quantization_config: CoMoEQuantizationConfig

    def __init__(self, quantization_config: CoMoEQuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._blocks: list[MoEBlock] = []
        self._folder: Path | None = None
        self._baseline = 0
        self._dense_bits = 0

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        from comoe import memory
        from comoe.baseline import warm_up

        if self.quantization_config.comoe_config().compile:
            import comoe.hf.compiled  # noqa: F401  a library like others, not the model's

        # What the process holds besides, other models for instance, is not this model's.
        self._baseline = max(warm_up(), memory.rss())
        devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
        if not {str(d) for d in devices} <= {"None", "cpu"}:
            raise ValueError(
                f"from_pretrained: comoe computes on the CPU; expected device_map None or 'cpu', got {device_map}"
            )

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        if not checkpoint_files:
            raise ValueError(
                "from_pretrained: a comoe model is loaded from its folder, not a state dict"
            )
        self._folder = Path(checkpoint_files[0]).parent
        self._blocks = discover(model)
        for block in self._blocks:
            block.strip()
            # Nothing is left to initialise here, and a block's own init would miss the weights.
            parent = model.get_submodule(block.name.rpartition(".")[0])
            for module in (parent, *block.module.modules()):
                if module is parent or next(module.parameters(recurse=False), None) is None:
                    module._is_hf_initialized = True
        self._dense_bits = DENSE_BITS[self.quantization_config.comoe_config().dense]
        if self._dense_bits:
            replace_dense(model, self._blocks, self._dense_bits)
            # Weights are then read one at a time, and get_quantize_ops is asked for those below.
            self.pre_quantized = False
        return model

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        name, _, leaf = param_name.rpartition(".")
        return leaf == "weight" and isinstance(model.get_submodule(name), CODED)

    def get_quantize_ops(self) -> EncodeOnLoad:
        return EncodeOnLoad(self._dense_bits)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        from comoe.hf.load import start_runtime
        from comoe.store import Store
        from comoe.tiers.remote_store import current

        self.pre_quantized = True
        folder = self._folder / STORE_FOLDER
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{self._folder}: no folder {STORE_FOLDER!r} beside the weights. A packed model is loaded "
                "from its whole folder; for a hub id use comoe.load, which downloads all of it."
            )
        config = self.quantization_config.comoe_config()
        remote = current(self._folder)
        store = Store.open(folder, verify=config.verify)
        check_store(store, self._blocks, self._folder)
        start_runtime(model, self._blocks, store, config, self._baseline, remote=remote)
        refuse_saving(model, f"copy the folder {self._folder} instead")
        self.quantization_config.options = {}
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def check_store(store, blocks: list[MoEBlock], folder: Path) -> None:
    """The store's layers are those of the model, by name and shape."""
    fields = ("name", "num_experts", "hidden", "intermediate", "gated", "biased")
    have = [tuple(getattr(layer, f) for f in fields) for layer in store.layers]
    want = [tuple(getattr(block.spec, f) for f in fields) for block in blocks]
    if have != want:
        odd = next((pair for pair in zip(have, want, strict=False) if pair[0] != pair[1]), None)
        detail = (
            f"it has {odd[0]}, the model {odd[1]}" if odd else f"{len(have)} layers for {len(want)}"
        )
        raise ValueError(
            f"{folder}: the expert store belongs to another model: {detail}. Pack the checkpoint again."
        )


def register() -> None:
    """Register the method and the experts function; may be called more than once."""
    register_experts_function()
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(CoMoEQuantizationConfig)
        register_quantizer(METHOD)(CoMoEQuantizer)
