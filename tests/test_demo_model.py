"""The bundled demo model: small, loadable by plain transformers, and as good as documented."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from comoe.heldout import HELD_OUT_MODULES, held_out_text

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

FOLDER = Path(__file__).resolve().parent.parent / "comoe" / "demo_model"
SLICE_BYTES = 20_000
CONTEXT = 1024
BOUND = 1.05  # bits per byte; measured 0.995 to 1.021 on Python 3.10 to 3.13, and three per cent


@pytest.fixture(scope="module")
def measured():
    """Bits per byte of a slice of held-out text, and how often each layer chose each expert."""
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    config = model.config
    text = held_out_text(SLICE_BYTES)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(tokens) == text
    counts = torch.zeros(config.num_hidden_layers, config.num_experts)
    nats = 0.0
    with torch.inference_mode():
        for start in range(0, len(tokens), CONTEXT):
            part = tokens[start : start + CONTEXT]
            ids = torch.tensor([[config.bos_token_id, *part[:-1]]])
            output = model(ids, output_router_logits=True)
            logits, targets = output.logits[0].float(), torch.tensor(part)
            nats += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
            for layer, router in enumerate(output.router_logits):
                chosen = router.topk(config.num_experts_per_tok).indices.flatten()
                counts[layer] += torch.bincount(chosen, minlength=config.num_experts)
    return nats / math.log(2) / len(text.encode()), counts


def test_held_out_text_is_stable_and_cut_by_bytes():
    assert len(HELD_OUT_MODULES) == len(set(HELD_OUT_MODULES)) >= 15
    text = held_out_text()
    assert 300_000 < len(text.encode()) < 700_000
    assert text.startswith(held_out_text(1000))
    assert len(held_out_text(1000).encode()) <= 1000


def test_folder_is_small_and_complete():
    files = [path for path in FOLDER.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12_000_000
    names = {path.name for path in files}
    assert {"config.json", "generation_config.json", "model.safetensors", "README.md"} <= names
    assert {"tokenizer.json", "tokenizer_config.json"} <= names
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["architectures"] == ["Qwen3MoeForCausalLM"]
    assert config["max_position_embeddings"] >= 4096


def test_bits_per_byte_of_unseen_code(measured):
    assert measured[0] < BOUND


def test_every_expert_is_used_evenly(measured):
    counts = measured[1]
    assert counts.min() > 0
    share = counts / counts.sum(1, keepdim=True)
    entropy = -(share * share.log()).sum(1)
    assert (entropy >= 0.8 * math.log(counts.shape[1])).all(), entropy
