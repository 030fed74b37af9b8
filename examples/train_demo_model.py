#!/usr/bin/env python3
"""Train the demo model that comoe bundles: a small mixture-of-experts model of Python code.

The text is what every installation has: the sources of the standard library and of installed
packages with permissive licences, pinned file by file in ``demo_corpus.txt.gz``.  The modules
in ``comoe.heldout`` are never trained on, nor are files that share many lines with them.

    python examples/train_demo_model.py --max-minutes 70 --output comoe/demo_model
    python examples/train_demo_model.py --evaluate comoe/demo_model \
        --json bench/results/demo_model.json

The architecture is plain ``Qwen3MoeForCausalLM``.  Its forward pass is slow to train on a CPU,
so training uses its parameters in a forward pass of its own (bfloat16, experts sorted into
contiguous groups); the weights load into the plain class, which also does every measurement.
Training can be stopped and started again: it resumes from the last checkpoint in ``--work``.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import lzma
import math
import os
import platform
import re
import shutil
import sys
import sysconfig
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from comoe.heldout import HELD_OUT_MODULES, held_out_text  # noqa: E402

MANIFEST = Path(__file__).with_name("demo_corpus.txt.gz")
SEED = 20240607
VOCABULARY = 2048
END = "<|endoftext|>"
ARCHITECTURE = dict(
    vocab_size=VOCABULARY,
    hidden_size=256,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    num_experts=16,
    num_experts_per_tok=4,
    moe_intermediate_size=64,
    intermediate_size=256,
    norm_topk_prob=True,
    decoder_sparse_step=1,
    mlp_only_layers=[],
    max_position_embeddings=4096,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    tie_word_embeddings=True,
    rms_norm_eps=1e-6,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
    router_aux_loss_coef=0.03,
)

# ---------------------------------------------------------------------------- text

# Permissively licensed packages; of the largest a part is enough (bytes).
WHOLE_PACKAGES = """
    PIL _pytest accelerate anyio click contourpy cpuinfo cycler dateutil execnet filelock fontTools
    fsspec functorch h11 huggingface_hub jinja2 markdown_it matplotlib mpl_toolkits mpmath networkx
    numpy packaging pip pluggy psutil pydantic pydantic_core pygments pyparsing pytest_benchmark
    rich safetensors scipy setuptools sortedcontainers tokenizers torchgen truststore typer xdist
    yaml
"""
SKIPPED_FOLDERS = """
    test tests testing _test _testing idlelib lib2to3 encodings pydoc_data turtledemo _vendor
    site-packages __pycache__
"""
PACKAGES = {
    **dict.fromkeys(WHOLE_PACKAGES.split(), math.inf),
    "torch": 13_000_000,
    "transformers": 9_000_000,
    "sympy": 6_000_000,
}


def source_roots() -> dict[str, Path]:
    paths = sysconfig.get_paths()
    return {"stdlib": Path(paths["stdlib"]), "site": Path(paths["purelib"])}


def candidate_files():
    """Yield (root name, relative path) of every source file that is worth a look."""
    held_out = {f"{module}.py" for module in HELD_OUT_MODULES}
    skipped, roots = set(SKIPPED_FOLDERS.split()), source_roots()
    for package in ["", *PACKAGES]:
        root = roots["site" if package else "stdlib"]
        for path in (root / package).rglob("*.py"):
            relative = path.relative_to(root)
            is_test = path.name.startswith("test_") or not skipped.isdisjoint(relative.parts)
            if not is_test and (package or relative.as_posix() not in held_out):
                yield "site" if package else "stdlib", relative.as_posix()


def clean(text: str) -> str:
    """Drop a leading licence comment: thousands of copies of it teach nothing."""
    head = re.match(r"(?:[ \t]*#[^\n]*\n|[ \t]*\n)+", text)
    if head and re.search("licen[sc]e|copyright", head[0], re.IGNORECASE):
        text = text[head.end() :]
    return text


def is_ordinary_code(text: str) -> bool:
    """Reject tables of data, generated files (transformers marks them) and foreign scripts."""
    if not 300 <= len(text) <= 250_000 or "🚨🚨" in text[:500]:
        return False
    lines = text.splitlines()
    readable = sum(map(str.isalpha, text)) + text.count(" ")
    return (
        readable / len(text) > 0.72
        and len(text) / len(lines) < 60
        and max(map(len, lines)) < 1000
        and len(text.encode()) < 1.02 * len(text)
    )


def long_lines(text: str) -> set[str]:
    return {line for raw in text.splitlines() if len(line := raw.strip()) >= 25}


def choose_corpus() -> list[str]:
    """Select the training files; return manifest lines 'root/path sha256-prefix bytes'.

    The order in which files are considered is that of their hashes (the standard library
    first), so that caps and the removal of near-copies take no package's first letters.
    """
    held_out, seen, size, chosen, files = long_lines(held_out_text()), set(), Counter(), [], []
    for root, relative in candidate_files():
        raw = (source_roots()[root] / relative).read_bytes()
        files.append((root != "stdlib", hashlib.sha256(raw).hexdigest(), root, relative, raw))
    for _, digest, root, relative, raw in sorted(files):
        group = relative.split("/")[0] if root == "site" else root
        text = clean(raw.decode("utf-8", errors="replace"))
        if not is_ordinary_code(text) or size[group] + len(raw) > PACKAGES.get(group, math.inf):
            continue
        lines = long_lines(text)
        copied = len(lines & held_out)
        if copied >= 40 or copied >= max(8, 0.04 * len(lines)):
            print(f"left out, {copied} of {len(lines)} lines are in held-out text: {relative}")
            continue
        if len(lines & seen) > 0.5 * len(lines):
            continue
        seen |= lines
        size[group] += len(raw)
        chosen.append(f"{root}/{relative} {digest[:12]} {len(raw)}")
    print(f"{len(chosen)} files, {sum(size.values())} bytes: {size.most_common()}")
    return sorted(chosen)


def write_manifest() -> None:
    data = "\n".join(choose_corpus()).encode() + b"\n"
    MANIFEST.write_bytes(gzip.compress(data, 9, mtime=0))


def read_corpus() -> dict[str, list[str]]:
    """Read the files of the manifest by root; say clearly where this installation differs."""
    roots, texts, missing, changed = source_roots(), {"stdlib": [], "site": []}, [], []
    entries = gzip.decompress(MANIFEST.read_bytes()).decode().splitlines()
    for entry in entries:
        name, digest, _ = entry.rsplit(" ", 2)
        root, relative = name.split("/", 1)
        path = roots[root] / relative
        if not path.is_file():
            missing.append(name)
            continue
        raw = path.read_bytes()
        if hashlib.sha256(raw).hexdigest()[:12] != digest:
            changed.append(name)
        texts[root].append(clean(raw.decode("utf-8", errors="replace")))
    for what, names in (("missing", missing), ("different", changed)):
        if names:
            print(f"WARNING: {len(names)} of {len(entries)} training files are {what}:")
            print("".join(f"  {name}\n" for name in names[:20]) + "  ..." * (len(names) > 20))
    return texts


# ---------------------------------------------------------------------------- tokens

# One character before a word, single digits, and a line break together with its indentation:
# Python's most frequent units become single tokens even in a small vocabulary.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*\n[ \t]*|[ \t]+"


def train_tokenizer(texts: list[str]):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def prepare(work: Path) -> None:
    """Write the tokenizer and the two streams of tokens (standard library, packages)."""
    work.mkdir(parents=True, exist_ok=True)
    if all((work / f"{name}.npy").exists() for name in ("stdlib", "site")):
        return
    texts = read_corpus()
    # The standard library, and as much again of packages: the text should weigh like the use.
    tokenizer = train_tokenizer(texts["stdlib"] + texts["site"][::6])
    tokenizer.save(str(work / "tokenizer.json"))
    for name, files in texts.items():
        order = np.random.default_rng(SEED).permutation(len(files))
        stream: list[np.ndarray] = []
        for start in range(0, len(files), 256):
            batch = [files[i] for i in order[start : start + 256]]
            for encoding in tokenizer.encode_batch(batch):
                stream.append(np.array([0, *encoding.ids], dtype=np.uint16))
        tokens = np.concatenate(stream)
        size = sum(len(text.encode()) for text in files)
        print(f"{name}: {len(files)} files, {size} bytes, {len(tokens)} tokens", flush=True)
        np.save(work / f"{name}.npy", tokens)


class Stream:
    """Windows of a token stream in shuffled order; each pass cuts them at another offset."""

    def __init__(self, tokens: np.ndarray):
        self.tokens, self.position, self.epoch = tokens, 0, 0

    def take(self, count: int, length: int) -> np.ndarray:
        windows = []
        for _ in range(count):
            rng = np.random.default_rng([SEED, self.epoch, length])
            offset = int(rng.integers(length))
            slots = (len(self.tokens) - 1 - offset) // length
            # A walk by a stride without a common factor visits every window exactly once.
            stride = next(s for s in range(int(slots * 0.382), slots) if math.gcd(s, slots) == 1)
            start = offset + (self.position * stride % slots) * length
            windows.append(self.tokens[start : start + length + 1])
            self.position += 1
            if self.position >= slots:
                self.position, self.epoch = 0, self.epoch + 1
        return np.stack(windows).astype(np.int64)


# ---------------------------------------------------------------------------- forward pass


def gated(gate_up: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up * weight[:, None]).to(gate_up.dtype)


def gated_backward(gate_up: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor):
    gate, up = gate_up.float().chunk(2, dim=-1)
    grad = grad.float()
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    grad_weight = (grad * silu * up).sum(-1)
    grad = grad * weight[:, None]
    grad_gate = grad * up * (sigmoid + silu * (1 - sigmoid))
    return torch.cat((grad_gate, grad * silu), dim=-1).to(gate_up.dtype), grad_weight


gated = torch.compile(gated)
gated_backward = torch.compile(gated_backward)


# Rows of an expert are padded to a multiple of this: oneDNN prepares a kernel for every new
# shape, which takes longer than the product itself, so there must be few shapes.
ROWS = 256


@torch.library.custom_op("comoe_demo::experts", mutates_args=())
def experts(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run every token through its experts: sorted by expert, so each one is a plain product.

    Returns the output and what the backward pass needs.  No token is dropped, so the result is
    that of the plain class.
    """
    tokens, top_k = chosen.shape
    number, flat = gate_up.shape[0], chosen.flatten()
    counts = torch.bincount(flat, minlength=number)
    padded = (counts + ROWS - 1) // ROWS * ROWS
    order = torch.argsort(flat, stable=True)
    shift = (padded.cumsum(0) - padded) - (counts.cumsum(0) - counts)
    place = torch.empty_like(order)  # row of each (token, choice)
    place[order] = torch.arange(flat.numel(), device=x.device) + shift[flat[order]]
    source = torch.full((flat.numel() + number * ROWS,), tokens, device=x.device)
    source[place] = torch.arange(flat.numel(), device=x.device) // top_k
    inputs = F.pad(x, (0, 0, 0, 1)).index_select(0, source)
    weight = weights.new_zeros(len(source)).index_copy_(0, place, weights.flatten())
    hidden = x.new_empty(len(source), gate_up.shape[1])
    outputs = torch.empty_like(inputs)
    for e, rows, out in by_expert(padded, inputs, hidden):
        torch.mm(rows, gate_up[e].t(), out=out)
    active = gated(hidden, weight)
    for e, rows, out in by_expert(padded, active, outputs):
        torch.mm(rows, down[e].t(), out=out)
    result = outputs.index_select(0, place).view(tokens, top_k, -1).sum(1)
    return result, counts, source, place, inputs, hidden


def by_expert(sizes: torch.Tensor, *tensors: torch.Tensor):
    """Yield (expert, its rows of each tensor); the rows after the last expert are not used."""
    sizes = sizes.tolist()
    sizes.append(len(tensors[0]) - sum(sizes))
    yield from zip(range(len(sizes) - 1), *(t.split(sizes) for t in tensors), strict=False)


@experts.register_fake
def _(x, chosen, weights, gate_up, down):
    rows = chosen.numel() + gate_up.shape[0] * ROWS
    counts = x.new_empty(gate_up.shape[0], dtype=torch.int64)
    source = x.new_empty(rows, dtype=torch.int64)
    place = x.new_empty(chosen.numel(), dtype=torch.int64)
    inputs, hidden = x.new_empty(rows, x.shape[1]), x.new_empty(rows, gate_up.shape[1])
    return torch.empty_like(x), counts, source, place, inputs, hidden


@torch.library.custom_op("comoe_demo::experts_backward", mutates_args=())
def experts_backward(
    grad: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    counts: torch.Tensor,
    source: torch.Tensor,
    place: torch.Tensor,
    inputs: torch.Tensor,
    hidden: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    padded = (counts + ROWS - 1) // ROWS * ROWS
    weight = weights.new_zeros(len(source)).index_copy_(0, place, weights.flatten())
    active = gated(hidden, weight)
    grad_outputs = F.pad(grad, (0, 0, 0, 1)).index_select(0, source)
    grad_active, grad_inputs = torch.empty_like(active), torch.empty_like(inputs)
    grad_gate_up, grad_down = torch.zeros_like(gate_up), torch.zeros_like(down)
    for e, rows, act, out in by_expert(padded, grad_outputs, active, grad_active):
        torch.mm(rows, down[e], out=out)
        torch.mm(rows.t(), act, out=grad_down[e])
    grad_hidden, grad_weight = gated_backward(hidden, weight, grad_active)
    for e, rows, act, out in by_expert(padded, grad_hidden, inputs, grad_inputs):
        torch.mm(rows, gate_up[e], out=out)
        torch.mm(rows.t(), act, out=grad_gate_up[e])
    grad_x = grad_inputs.index_select(0, place).view(*weights.shape, -1).sum(1)
    return grad_x, grad_weight[place].view(weights.shape), grad_gate_up, grad_down


@experts_backward.register_fake
def _(grad, weights, gate_up, down, counts, source, place, inputs, hidden):
    like = (grad, weights, gate_up, down)
    return tuple(torch.empty_like(t) for t in like)


def _save(ctx, inputs, output):
    _, _, weights, gate_up, down = inputs
    ctx.save_for_backward(weights, gate_up, down, *output[1:])


def _backward(ctx, grad, *_):
    grads = experts_backward(grad.contiguous(), *ctx.saved_tensors)
    return grads[0], None, *grads[1:]


experts.register_autograd(_backward, setup_context=_save)


def normalise(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * weight).to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention in two blocks of queries: faster on CPUs than the fused kernel."""
    length = q.shape[2]
    half = length // 2
    future = torch.full((half, half), -math.inf, device=q.device).triu(1)
    outputs = []
    for end in (half, length):
        scores = (q[:, :, end - half : end] @ k[:, :, :end].transpose(2, 3)).float()
        scores = scores * q.shape[-1] ** -0.5 + F.pad(future, (end - half, 0))
        outputs.append(torch.softmax(scores, -1).to(q.dtype) @ v[:, :, :end])
    return torch.cat(outputs, 2)


def layer_forward(x, cos, sin, parameters, heads, kv_heads, head_dim, top_k):
    """One decoder layer; returns the new state and the two losses of its router."""
    norm_1, q_w, k_w, v_w, o_w, q_norm, k_norm, norm_2, router, gate_up, down = parameters
    cast = x.dtype
    batch, length, width = x.shape
    h = normalise(x, norm_1)
    q = F.linear(h, q_w.to(cast)).view(batch, length, heads, head_dim)
    k = F.linear(h, k_w.to(cast)).view(batch, length, kv_heads, head_dim)
    v = F.linear(h, v_w.to(cast)).view(batch, length, kv_heads, head_dim).transpose(1, 2)
    q = rotate(normalise(q, q_norm).transpose(1, 2), cos, sin)
    k = rotate(normalise(k, k_norm).transpose(1, 2), cos, sin)
    k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))
    h = attend(q, k, v).transpose(1, 2).reshape(batch, length, heads * head_dim)
    x = x + F.linear(h, o_w.to(cast))
    h = normalise(x, norm_2).view(-1, width)
    logits = F.linear(h.float(), router)
    probabilities = torch.softmax(logits, -1)
    weights, chosen = torch.topk(probabilities, top_k)
    weights = weights / weights.sum(-1, keepdim=True)
    result = experts(h, chosen, weights, gate_up.to(cast), down.to(cast))
    share = result[1].float() / chosen.numel()
    balance = router.shape[0] * (share * probabilities.mean(0)).sum()
    z = torch.logsumexp(logits, -1).pow(2).mean()
    return x + result[0].view(batch, length, width), balance, z


def head_forward(x, norm, embedding, targets):
    logits = F.linear(normalise(x, norm), embedding.to(x.dtype)).view(-1, embedding.shape[0])
    return F.cross_entropy(logits.float(), targets.reshape(-1))


class Trainer:
    """Wraps a plain Qwen3MoeForCausalLM: its parameters, our forward pass."""

    def __init__(self, model, compiled: bool = True):
        self.model, self.config = model, model.config
        wrap = torch.compile if compiled else lambda function: function
        self.layer, self.head = wrap(layer_forward), wrap(head_forward)

    def loss(self, tokens: torch.Tensor, dtype: torch.dtype = torch.bfloat16):
        """Return (cross entropy, load balance, router z) of a batch of token windows."""
        config, core = self.config, self.model.model
        embedding = core.embed_tokens.weight
        x = F.embedding(tokens[:, :-1], embedding).to(dtype)
        cos, sin = core.rotary_emb(x.float(), torch.arange(x.shape[1], device=x.device)[None])
        half = config.head_dim // 2
        cos, sin = cos[..., :half], sin[..., :half]
        balance = z = 0.0
        for layer in core.layers:
            a = layer.self_attn
            parameters = (
                layer.input_layernorm.weight,
                *(p.weight for p in (a.q_proj, a.k_proj, a.v_proj, a.o_proj)),
                *(p.weight for p in (a.q_norm, a.k_norm, layer.post_attention_layernorm)),
                layer.mlp.gate.weight,
                layer.mlp.experts.gate_up_proj,
                layer.mlp.experts.down_proj,
            )
            shape = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
            x, b, zz = self.layer(x, cos, sin, parameters, *shape, config.num_experts_per_tok)
            balance, z = balance + b, z + zz
        count = len(core.layers)
        return self.head(x, core.norm.weight, embedding, tokens[:, 1:]), balance / count, z / count


# ---------------------------------------------------------------------------- optimiser


def orthogonalise(x: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz iteration of Muon, for a batch of matrices [count, rows, columns]."""
    x = x.bfloat16()
    wide = x.shape[1] <= x.shape[2]
    if not wide:
        x = x.transpose(1, 2).contiguous()
    x = x / (x.float().norm(dim=(1, 2), keepdim=True) + 1e-7).to(x.dtype)
    for _ in range(5):
        a = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    return x if wide else x.transpose(1, 2)


class Optimizer:
    """Muon for the matrices (each expert is a matrix of its own), AdamW for the rest."""

    def __init__(self, model, muon_rate: float, adam_rate: float):
        self.groups: dict[tuple, list] = {}
        rest = []
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "embed_tokens" in name or "mlp.gate." in name:
                rest.append(parameter)
                continue
            rows = parameter.shape[-2] // (2 if "gate_up" in name else 1)
            self.groups.setdefault((rows, parameter.shape[-1]), []).append(parameter)
        self.momentum = {
            shape: torch.zeros_like(torch.cat([p.data.reshape(-1, *shape) for p in group]))
            for shape, group in self.groups.items()
        }
        self.muon_rate = muon_rate
        self.adam = torch.optim.AdamW(
            rest, lr=adam_rate, betas=(0.9, 0.95), eps=1e-9, weight_decay=0.0
        )
        self.adam_rate = adam_rate

    @torch.no_grad()
    def step(self, factor: float) -> None:
        for (rows, columns), group in self.groups.items():
            grad = torch.cat([p.grad.reshape(-1, rows, columns) for p in group])
            momentum = self.momentum[rows, columns]
            momentum.lerp_(grad, 0.05)
            update = orthogonalise(grad.lerp_(momentum, 0.95)).float()
            rate = self.muon_rate * factor * max(1.0, rows / columns) ** 0.5
            counts = [p.numel() // (rows * columns) for p in group]
            for parameter, part in zip(group, update.split(counts), strict=True):
                parameter.add_(part.reshape(parameter.shape), alpha=-rate)
        for group in self.adam.param_groups:
            group["lr"] = self.adam_rate * factor
        self.adam.step()

    def state(self) -> dict:
        return {"momentum": self.momentum, "adam": self.adam.state_dict()}

    def load(self, state: dict) -> None:
        self.adam.load_state_dict(state["adam"])
        for shape, momentum in state["momentum"].items():
            self.momentum[shape].copy_(momentum)


# ---------------------------------------------------------------------------- training


def new_model():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(SEED)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**ARCHITECTURE)).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj")):
                parameter.zero_()  # every layer starts as the identity
            elif parameter.ndim > 1:
                parameter.normal_(std=0.03)
    return model


def keep_memory() -> None:
    """Ask glibc to reuse large blocks: mapping them anew for each step costs a third."""
    if sys.platform == "linux":
        import ctypes

        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-4, 0)  # M_MMAP_MAX
            libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def save(model, work: Path, folder: Path) -> None:
    """Save in bfloat16 for the plain classes; a reader of the folder never sees half a file."""
    import copy

    from transformers import GenerationConfig, PreTrainedTokenizerFast

    staging = folder.with_name(folder.name + ".new")
    shipped = copy.deepcopy(model).to("cpu", torch.bfloat16)
    shipped.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    shipped.save_pretrained(staging)
    (staging / "model.safetensors").chmod(0o644)
    PreTrainedTokenizerFast(
        tokenizer_file=str(work / "tokenizer.json"),
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=ARCHITECTURE["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    ).save_pretrained(staging)
    folder.mkdir(parents=True, exist_ok=True)
    for path in staging.iterdir():
        os.replace(path, folder / path.name)
    shutil.rmtree(staging)


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    keep_memory()
    prepare(args.work)
    streams = {n: Stream(np.load(args.work / f"{n}.npy")) for n in ("stdlib", "site")}
    model = new_model().to(args.device)
    size = sum(p.numel() for p in model.parameters())
    print(f"{size} parameters; {vars(args)}", flush=True)
    trainer = Trainer(model)
    optimizer = Optimizer(model, args.muon_rate, args.adam_rate)
    checkpoint = args.work / "checkpoint.pt"
    step, elapsed, tokens_seen = 0, 0.0, 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=args.device)
        step, elapsed, tokens_seen = state["step"], state["elapsed"], state["tokens"]
        model.load_state_dict(state["model"])
        optimizer.load(state["optimizer"])
        for name, (position, epoch) in state["streams"].items():
            streams[name].position, streams[name].epoch = position, epoch
        print(f"resumed at step {step}", flush=True)

    started, saved = time.monotonic() - elapsed, elapsed
    progress, recent = 0.0, []
    while progress < 1:
        elapsed = time.monotonic() - started
        # Either limit ends the run, and always with the complete decay.
        progress = max((step + 1) / args.steps, elapsed / 60 / args.max_minutes)
        factor = min(1, (step + 1) / args.warm_up, max(0.0, 1 - progress) / args.decay)
        length = args.length if progress > args.short_until else args.length // 2
        # The standard library is small and closest to the held-out text: more of it late.
        share = args.stdlib_share * (0.4 + 1.2 * progress)
        total, micros = 0.0, args.batch_tokens // args.micro_tokens
        count = args.micro_tokens // length
        for _ in range(micros):
            library = round(count * share)
            windows = [
                streams["stdlib"].take(library, length),
                streams["site"].take(count - library, length),
            ]
            batch = torch.from_numpy(np.concatenate(windows)).to(args.device)
            loss, balance, z = trainer.loss(batch)
            ((loss + args.balance * balance + args.z * z) / micros).backward()
            total += loss.item() / micros
        optimizer.step(factor)
        model.zero_grad(set_to_none=True)
        step, tokens_seen = step + 1, tokens_seen + args.batch_tokens
        recent = [*recent[-49:], total]
        if step % 10 == 0 or step <= 5:
            speed = args.batch_tokens / (time.monotonic() - started - elapsed)
            print(
                f"step {step} progress {progress:.3f} loss {total:.3f} "
                f"mean {sum(recent) / len(recent):.3f} balance {balance.item():.3f} z {z.item():.1f} "
                f"rate {factor:.3f} length {length} tokens/s {speed:.0f}",
                flush=True,
            )
        if progress >= 1 or time.monotonic() - started - saved > 60 * args.save_minutes:
            saved = time.monotonic() - started
            state = {
                "step": step,
                "elapsed": saved,
                "tokens": tokens_seen,
                "model": model.state_dict(),
                "optimizer": optimizer.state(),
                "streams": {name: (s.position, s.epoch) for name, s in streams.items()},
            }
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
            save(model, args.work, args.work / "model")
    facts = {"tokens_trained": tokens_seen, "steps": step, "minutes": round(saved / 60, 1)}
    (args.work / "training.json").write_text(json.dumps(facts) + "\n")
    if args.output:
        save(model, args.work, args.output)


# ---------------------------------------------------------------------------- measurement


@torch.inference_mode()
def measure(model, tokens: list[int], context: int, stride: int) -> dict:
    """Nats of a text under the plain class, each token with at least context - stride before it
    (but for the first), and how the routers spread the same tokens over the experts.
    """
    config = model.config
    ids = torch.tensor([config.bos_token_id, *tokens])
    nats, counts = 0.0, torch.zeros(config.num_hidden_layers, config.num_experts)
    done = 0  # tokens scored; ids[done] is the last one
    while done < len(tokens):
        end = min(max(done + stride, context), len(tokens))
        start = max(0, end - context)
        output = model(ids[None, start:end], output_router_logits=True)
        logits, targets = output.logits[0, done - start :].float(), ids[done + 1 : end + 1]
        nats += F.cross_entropy(logits, targets, reduction="sum").item()
        for layer, router in enumerate(output.router_logits):
            chosen = router[done - start :].topk(config.num_experts_per_tok).indices.flatten()
            counts[layer] += torch.bincount(chosen, minlength=config.num_experts)
        done = end
    share = counts / counts.sum(1, keepdim=True)
    entropy = -torch.xlogy(share, share).sum(1)
    return {
        "nats": nats,
        "entropy": (entropy / math.log(config.num_experts)).tolist(),
        "least_share": share.min(1).values.tolist(),
    }


def evaluate(args: argparse.Namespace) -> None:
    """Measure the folder's model on the held-out modules and write the figures."""
    import transformers

    torch.set_num_threads(args.threads)
    folder = args.evaluate
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = held_out_text(args.max_bytes)
    encoded = tokenizer(text, add_special_tokens=False, verbose=False)  # longer than any window
    size, tokens = len(text.encode()), encoded["input_ids"]
    context, stride = args.context, args.stride
    result = measure(model, tokens, context, stride)
    packed = len(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    facts = {
        "bits_per_byte": round(result["nats"] / math.log(2) / size, 4),
        "xz_bits_per_byte": round(8 * packed / size, 4),
        "perplexity_per_token": round(math.exp(result["nats"] / len(tokens)), 4),
        "held_out_bytes": size,
        "held_out_tokens": len(tokens),
        "context": context,
        "stride": stride,
        "arithmetic": "bfloat16 weights, computed in float32 by the plain transformers class",
        "routing_entropy_over_log_experts": [round(x, 4) for x in result["entropy"]],
        "least_expert_share": [round(x, 5) for x in result["least_share"]],
        "experts": model.config.num_experts,
        "experts_per_token": model.config.num_experts_per_tok,
        "parameters": sum(p.numel() for p in model.parameters()),
        "folder_bytes": sum(p.stat().st_size for p in folder.iterdir() if p.is_file()),
    }
    if (args.work / "training.json").exists():
        facts["training"] = json.loads((args.work / "training.json").read_text())
    facts |= {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": cpu_name(),
        "threads": args.threads,
        "command": f"python examples/train_demo_model.py --evaluate {folder} "
        f"--context {context} --stride {stride} --threads {args.threads}",
    }
    print(json.dumps(facts, indent=2))
    if args.json:
        args.json.write_text(json.dumps(facts, indent=2) + "\n")
    unseen = text[-2000:-1000]
    for prompt in (unseen, END + "class Stack:\n    def __init__(self"):
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        torch.manual_seed(SEED)
        out = model.generate(**inputs, max_new_tokens=120, do_sample=True, temperature=0.6)
        start = inputs["input_ids"].shape[1]
        print(f"{'-' * 80}\n{prompt}\n{'=' * 20} continued by the model:")
        print(tokenizer.decode(out[0, start:], skip_special_tokens=True))


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.*)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor()


def check(args: argparse.Namespace) -> None:
    """Compare loss and gradients of the training forward pass with the plain class."""
    torch.manual_seed(0)
    model = new_model()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.05)
    tokens = torch.randint(VOCABULARY, (2, 129))
    plain = model(tokens[:, :-1], output_router_logits=True)
    losses = [F.cross_entropy(plain.logits.flatten(0, 1), tokens[:, 1:].flatten())]
    losses[0].backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    losses.append(Trainer(model, compiled=False).loss(tokens, torch.float32)[0])
    losses[1].backward()
    print(f"loss: plain {losses[0].item():.6f}, training {losses[1].item():.6f}")
    worst = max(
        ((p.grad - grads[name]).norm() / grads[name].norm()).item()
        for name, p in model.named_parameters()
    )
    print(f"largest relative difference of a gradient: {worst:.2e}")
    assert abs(losses[0].item() - losses[1].item()) < 1e-4 and worst < 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--work", type=Path, default=Path("demo-out/training"), help="tokens, checkpoints, results")
    add("--output", type=Path, help="also save the final model here")
    add("--threads", type=int, default=2)
    add("--device", default="cpu", help="with a GPU, also raise --steps and --max-minutes")
    add("--steps", type=int, default=3200)
    add("--max-minutes", type=float, default=600.0, help="end (with full decay) at this time")
    add("--batch-tokens", type=int, default=8192)
    add("--micro-tokens", type=int, default=8192)
    add("--length", type=int, default=1024, help="window; half of it in the first part")
    add("--short-until", type=float, default=0.65, help="progress up to which windows are short")
    add("--warm-up", type=int, default=60, help="steps")
    add("--decay", type=float, default=0.6, help="share of the run in which the rate falls")
    add("--muon-rate", type=float, default=0.02)
    add("--adam-rate", type=float, default=0.005)
    add("--stdlib-share", type=float, default=0.35)
    add("--balance", type=float, default=0.03)
    add("--z", type=float, default=1e-4)
    add("--save-minutes", type=float, default=5.0)
    add("--write-manifest", action="store_true", help="choose the files anew and pin them")
    add("--check", action="store_true", help="compare the training forward with the plain class")
    add("--evaluate", type=Path, metavar="FOLDER")
    add("--context", type=int, default=1024)
    add("--stride", type=int, default=512)
    add("--max-bytes", type=int, help="measure only the start of the held-out text")
    add("--json", type=Path, help="write the figures of --evaluate here")
    args = parser.parse_args()
    if args.write_manifest:
        write_manifest()
    elif args.check:
        check(args)
    elif args.evaluate:
        evaluate(args)
    else:
        train(args)


if __name__ == "__main__":
    main()
