"""A packed folder on a web server is a model: the same tokens as from disk, whatever the server does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import comoe
from comoe.tiers import cache

PROMPT = "import os\n\n\nclass Reader:\n"


pytestmark = pytest.mark.usefixtures("own_cache")


def tokens_of(model, tokenizer, count=12):
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        out = model.generate(ids, max_new_tokens=count, do_sample=False)
    return out[0, ids.shape[1] :].tolist()


@pytest.fixture(scope="module")
def exact_tokens(packed_demo):
    model = comoe.load(packed_demo, exact=True)
    try:
        return tokens_of(model, comoe.load_tokenizer(packed_demo))
    finally:
        model.comoe.close()


def test_exact_tokens_over_http(server, exact_tokens):
    model = comoe.load(server.url, exact=True)
    try:
        assert tokens_of(model, comoe.load_tokenizer(server.url)) == exact_tokens
        stats = model.comoe.stats()
        assert stats["bytes_read"]["network"] > 0
        assert stats["engine"]["remote_refused"] == 0
        assert server.url in model.comoe.describe()
    finally:
        model.comoe.close()
    # Kept connections: a few for each of the loads, not one per request.
    assert server.connections < len(server.requests) / 3 + 12


def test_what_was_fetched_is_not_fetched_again(server, exact_tokens):
    before = 0
    for run in range(2):
        model = comoe.load(server.url, exact=True)
        try:
            tokenizer = comoe.load_tokenizer(server.url)
            assert tokens_of(model, tokenizer) == exact_tokens
            assert model.comoe.engine.wait_idle(20)
            stats = model.comoe.stats()
        finally:
            model.comoe.close()
        if run == 1:
            assert stats["bytes_read"]["network"] == 0
            assert stats["engine"]["cache_failures"] == 0
            assert not any(path.endswith(".safetensors") for path, *_ in server.requests[before:])
        before = len(server.requests)


def test_damaged_copies_are_fetched_again(server, exact_tokens):
    model = comoe.load(server.url, exact=True)
    folder = model.comoe.store.folder
    assert tokens_of(model, comoe.load_tokenizer(server.url)) == exact_tokens
    model.comoe.close()
    rng = np.random.default_rng(1)
    for path in folder.glob("layer-*.bin"):
        data = np.fromfile(path, np.uint8)
        where = rng.integers(200_000, len(data), 400)
        data[where] ^= 0xFF
        data.tofile(path)
    model = comoe.load(server.url, exact=True)
    try:
        assert tokens_of(model, comoe.load_tokenizer(server.url)) == exact_tokens
        assert model.comoe.stats()["engine"]["cache_failures"] > 0
    finally:
        model.comoe.close()


def test_the_cache_is_not_a_model_by_itself(server):
    comoe.load(server.url).comoe.close()
    (folder,) = cache.stores(cache.root())
    with pytest.raises(ValueError, match="load it by its URL"):
        comoe.load(folder)
