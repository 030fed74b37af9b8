"""Checkpoints of a real model's shape with random weights, whose routing is as uneven as is asked for.

For timing and memory: text from them means nothing. Random weights route almost evenly, real models do not. So:

- coordinate 0 of every embedding is a constant, every other weight ignores it and leaves it alone;
- a router's row is a random direction of length SPREAD plus a bias on coordinate 0, fitted so that the K largest logits
  fall on each expert as often as asked (comoe/popularity.py), experts shuffled anew in each layer;
- what a block adds to the residual stream is DRIFT of an embedding's size and has no mean, so that hidden states stay near
  the embeddings, and a later layer's logits near those that the bias was fitted for.

Limits: an expert depends on the token far more than on its context; which tokens share an expert is chance; the shares
hold for tokens drawn evenly from the vocabulary; later layers are somewhat more even than asked; greedy text of a model with
tied embeddings repeats one token, so feed such a model tokens instead.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from comoe.aggregate.published import published
from comoe.config import format_bytes
from comoe.hf.blocks import discover
from comoe.hf.checkpoint import meta_model
from comoe.hf.safetensors_io import MadeTensor, write_file
from comoe.hf.sizes import experts_per_token
from comoe.popularity import PopularityError, biases, layer_shares

SPREAD = 3.0  # standard deviation of a router's logits before the bias
DRIFT = 0.1  # what one block adds to the residual stream, in sizes of an embedding
CONSTANT = 0.15  # coordinate 0 of an embedding, in lengths of the embedding
SHARD_BYTES = 2_000_000_000
SLACK_BYTES = 64_000_000
WRITES_RESIDUAL = re.compile(r"(\.o|\.wo|o_proj|down_proj|\.w2|\.fc2|out_proj)\.weight$|down_proj$")


class MakeModelError(ValueError):
    """A model that cannot be made; the message says what to do."""


@dataclass(frozen=True)
class Shape:
    """A published model. model_type and fields are those of its transformers configuration."""

    model_type: str
    fields: dict[str, Any]


SHAPES = {
    "switch-base-8": Shape("switch_transformers", {"num_experts": 8}),
    "switch-base-128": Shape("switch_transformers", {"num_experts": 128}),
    "qwen3-30b-a3b": Shape(
        "qwen3_moe",
        {
            "vocab_size": 151_936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "tie_word_embeddings": False,
        },
    ),
    "qwen1.5-moe-a2.7b": Shape(
        "qwen2_moe",
        {
            "vocab_size": 151_936,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "tie_word_embeddings": False,
        },
    ),
    "olmoe-1b-7b": Shape(
        "olmoe",
        {
            "vocab_size": 50_304,
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "tie_word_embeddings": False,
        },
    ),
    "mixtral-8x7b": Shape(
        "mixtral",
        {
            "vocab_size": 32_000,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "tie_word_embeddings": False,
        },
    ),
}
SWITCH_BASE = {
    "vocab_size": 32_128,
    "d_model": 768,
    "d_kv": 64,
    "d_ff": 3072,
    "num_layers": 12,
    "num_heads": 12,
    "expert_capacity": 64,
    "decoder_start_token_id": 0,
}


def config_of(
    like: str,
    *,
    layers: int | None = None,
    hidden: int | None = None,
    intermediate: int | None = None,
    experts: int | None = None,
    top_k: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    vocab: int | None = None,
    tied: bool | None = None,
) -> Any:
    """The transformers configuration of a shape of SHAPES, some of it changed. layers: of the encoder and of the decoder
    each, where there are two. With another hidden size there are as many heads, of the same size, as it has room for.

    Raises MakeModelError.
    """
    from transformers import AutoConfig

    if like not in SHAPES:
        raise MakeModelError(f"make-model: like: expected one of {', '.join(SHAPES)}; got {like!r}")
    shape = SHAPES[like]
    given = locals()
    for name in ("layers", "hidden", "intermediate", "experts", "top_k", "heads", "kv_heads", "vocab"):  # fmt: skip
        if given[name] is not None and given[name] < 1:
            raise MakeModelError(f"make-model: {name}: expected at least 1, got {given[name]}")
    if shape.model_type == "switch_transformers":
        fields = _switch_fields(shape.fields, layers, hidden, intermediate, experts, heads, vocab)
        if top_k not in (None, 1) or kv_heads is not None:
            raise MakeModelError(
                "make-model: Switch Transformers use one expert per token and have no KV heads of their own; "
                "leave top_k and kv_heads out"
            )
    else:
        fields = dict(shape.fields)
        count = "num_local_experts" if "num_local_experts" in fields else "num_experts"
        size = "moe_intermediate_size" if "moe_intermediate_size" in fields else "intermediate_size"
        if hidden is not None:
            head = fields.setdefault("head_dim", fields["hidden_size"] // fields["num_attention_heads"])  # fmt: skip
            per_kv = fields["num_attention_heads"] // fields["num_key_value_heads"]
            fields["num_attention_heads"] = max(hidden // head, 1)
            fields["num_key_value_heads"] = max(fields["num_attention_heads"] // per_kv, 1)
        changes = {
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            size: intermediate,
            count: experts,
            "num_experts_per_tok": top_k,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "vocab_size": vocab,
            "tie_word_embeddings": tied,
        }
        fields |= {name: value for name, value in changes.items() if value is not None}
        if fields["num_experts_per_tok"] > fields[count]:
            raise MakeModelError(
                f"make-model: a token uses {fields['num_experts_per_tok']} experts, but there are only "
                f"{fields[count]}; give a smaller top_k"
            )
    config = AutoConfig.for_model(shape.model_type, dtype="bfloat16", **fields)
    config.architectures = [type(meta_model(config)).__name__]
    return config


def _switch_fields(
    fields: dict[str, Any],
    layers: int | None,
    hidden: int | None,
    intermediate: int | None,
    experts: int | None,
    heads: int | None,
    vocab: int | None,
) -> dict[str, Any]:
    layers = layers or SWITCH_BASE["num_layers"]
    fields = SWITCH_BASE | fields | {"num_layers": layers, "num_decoder_layers": layers}
    # Every second layer has experts.
    fields |= {"num_sparse_encoder_layers": max(layers // 2, 1)}
    fields |= {"num_sparse_decoder_layers": max(layers // 2, 1)}
    if hidden is not None:
        fields |= {"d_model": hidden, "num_heads": max(hidden // fields["d_kv"], 1)}
    changes = {"d_ff": intermediate, "num_experts": experts, "num_heads": heads}
    changes["vocab_size"] = vocab
    return fields | {name: value for name, value in changes.items() if value is not None}


def make_model(
    dst: str | os.PathLike,
    config: Any,
    *,
    popularity: str = "zipf",
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Writes a checkpoint of `config` (config_of, or any configuration with a family of the ExpertsInterface and
    softmax or plain top-k routers) to the new folder `dst`, in shards, and returns it.

    popularity: of experts, as comoe.popularity.layer_shares reads it; the shares asked for, expert by expert, are written
    to `synthetic.json`. progress(done, total): bytes. No more is in memory than two tensors.

    Raises MakeModelError, and leaves nothing behind: for a folder that exists, a disk that is too small or fails, a
    popularity that cannot be, a router that is not one linear layer.
    """
    dst = Path(os.path.abspath(dst))
    if dst.exists():
        raise MakeModelError(f"make-model: {dst} exists; choose another folder or remove it")
    with torch.random.fork_rng(devices=[]):
        maker = _Maker(config, popularity, seed)
        tensors = [maker.tensor(name, shape) for name, shape in maker.shapes.items()]
    total = sum(tensor.nbytes for tensor in tensors)
    parent = next(folder for folder in dst.parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < total + SLACK_BYTES:
        raise MakeModelError(
            f"make-model: {parent} has {format_bytes(free)} free, the model needs "
            f"{format_bytes(total + SLACK_BYTES)}; make room, choose another disk or fewer layers"
        )
    with published(dst, "make-model", MakeModelError) as part:
        config.save_pretrained(part)
        maker.save_shares(part)
        _write(part, tensors, total, progress)
    return dst


class _Maker:
    """Which tensors a checkpoint has, and what is in each."""

    def __init__(self, config: Any, popularity: str, seed: int) -> None:
        from transformers.core_model_loading import revert_weight_conversion

        self.popularity, self.seed = popularity, seed
        model = meta_model(config)
        self.blocks = discover(model)
        self.k = 1 if config.model_type == "switch_transformers" else experts_per_token(model)
        self.hidden = self.blocks[0].spec.hidden
        state = model.state_dict()
        for name in model.all_tied_weights_keys:  # they are kept once
            state.pop(name, None)
        self.shapes = {n: tuple(t.shape) for n, t in revert_weight_conversion(model, state).items()}
        embedding = model.get_input_embeddings().weight
        self.head_dim = getattr(config, "d_kv", None)  # Switch: scores are not scaled down
        self.embeddings = {n for n, t in state.items() if t is embedding or t.shape == embedding.shape}  # fmt: skip
        self.embeddings = {n for n in self.embeddings if "head" not in n}
        self.gated = self.blocks[0].spec.gated
        counts = [block.spec.num_experts for block in self.blocks]
        try:
            shares = layer_shares(popularity, counts, self.k)
        except PopularityError as error:
            raise MakeModelError(f"make-model: {error}") from error
        self.shares: dict[str, np.ndarray] = {}
        self.asked: dict[str, list[float]] = {}
        for block, share in zip(self.blocks, shares, strict=True):
            order = np.random.default_rng(_number(seed, block.name)).permutation(len(share))
            name = self._router(block)
            self.shares[name] = share
            self.orders = {**getattr(self, "orders", {}), name: order}
            placed = np.empty_like(share)
            placed[order] = share
            self.asked[block.name] = [round(float(x), 7) for x in placed]

    def _router(self, block: Any) -> str:
        """Its name in the checkpoint."""
        place = _place(block.name)
        shape = (block.spec.num_experts, self.hidden)
        found = [
            name
            for name, has in self.shapes.items()
            if has == shape and _place(name) == place and re.search("gate|router", name)
        ]
        if len(found) != 1:
            raise MakeModelError(
                f"make-model: {block.name}: expected one router of shape {shape} beside the experts, found {found}; "
                "this family's routing cannot be made uneven"
            )
        return found[0]

    def save_shares(self, folder: Path) -> None:
        about = {"popularity": self.popularity, "seed": self.seed, "k": self.k}
        (folder / "synthetic.json").write_text(
            json.dumps({**about, "shares": self.asked}, indent=1) + "\n"
        )

    def tensor(self, name: str, shape: tuple[int, ...]) -> MadeTensor:
        return MadeTensor(name, torch.bfloat16, shape, partial(self._make, name, shape))

    def _make(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            fill = 0.0 if name.endswith("bias") else 1.0
            return torch.full(shape, fill, dtype=torch.bfloat16)
        generator = torch.Generator().manual_seed(_number(self.seed, name))
        out = torch.empty(shape, dtype=torch.bfloat16)
        if name in self.shares:
            return self._router_rows(name, out, generator)
        if name in self.embeddings:
            out.normal_(generator=generator)
            out[:, 0] = CONSTANT * math.sqrt(self.hidden)
            return out
        fan_in = shape[-1]
        scale = fan_in**-0.5
        writes = bool(WRITES_RESIDUAL.search(name)) and self.hidden in shape[-2:]
        if writes:
            # relu keeps half of a random input's energy, silu(g) * u 0.36 of it.
            ffn = not re.search(r"(\.o|o_proj|out_proj)\.weight$", name)
            scale *= DRIFT / (math.sqrt(0.36 if self.gated else 0.5) if ffn else 1.0)
        elif re.search(r"Attention\.q\.weight$", name) and self.head_dim:
            scale *= self.head_dim**-0.5
        out.normal_(0, scale, generator=generator)
        if writes and shape[-2] == self.hidden:
            # What is the same for all inputs would shift all tokens' routing alike: relu's mean.
            out -= out.mean(-1, keepdim=True, dtype=torch.float32).to(out.dtype)
            out[..., 0, :] = 0
        elif shape[-1] == self.hidden:
            out[..., 0] = 0
        return out

    def _router_rows(self, name: str, out: torch.Tensor, generator: torch.Generator):
        rows = torch.randn(out.shape, generator=generator)
        rows[:, 0] = 0
        rows *= SPREAD / rows.norm(dim=1, keepdim=True)
        bias = SPREAD * biases(self.shares[name], self.k)
        at = torch.from_numpy(self.orders[name])
        rows[at, 0] = torch.from_numpy(bias).float() / (CONSTANT * math.sqrt(self.hidden))
        return out.copy_(rows)


def _place(name: str) -> list[str]:
    """Stack and layer of a tensor or module, however a checkpoint calls the rest."""
    return re.findall(r"(?:^|(?<=\.))(?:encoder|decoder|\d+)(?=\.)", name)


def _number(seed: int, name: str) -> int:
    """The same for the same tensor, whatever else the model has."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "little")


def _write(
    folder: Path, tensors: list[MadeTensor], total: int, progress: Callable[[int, int], None]
) -> None:
    shards: list[list[MadeTensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(tensor)
    done, places = 0, {}

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    for number, shard in enumerate(shards, 1):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        places |= {tensor.name: name for tensor in shard}
        write_file(folder / name, [(t.name, t) for t in _ahead(shard)], advance)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _ahead(tensors: list[MadeTensor]) -> Iterator[MadeTensor]:
    """The same tensors; while one is written, the next is made."""
    pool = ThreadPoolExecutor(1)
    coming: dict[int, Any] = {}

    def read(i: int) -> torch.Tensor:
        now = coming.pop(i) if i in coming else pool.submit(tensors[i].read)
        if i + 1 < len(tensors):
            coming[i + 1] = pool.submit(tensors[i + 1].read)
        return now.result()

    return (
        MadeTensor(t.name, t.torch_dtype, t.shape, partial(read, i)) for i, t in enumerate(tensors)
    )
