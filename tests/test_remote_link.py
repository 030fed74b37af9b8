"""A link that is cut, slow or lying while a model generates."""

from __future__ import annotations

import logging
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from range_server import FAULTS, RangeServer

import comoe
from comoe.runtime import remote as afar
from comoe.tiers import sources as several

PROMPT = "import os\n\n\nclass Reader:\n"
ROOT = Path(__file__).resolve().parent.parent
SOAK_FAULTS = 1000


pytestmark = pytest.mark.usefixtures("own_cache")


def is_expert(path: str) -> bool:
    return path.startswith("experts/layer-")


def generated(model, tokenizer, count=16, prompt=PROMPT):
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        out = model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False)
    return out[0, ids.shape[1] :].tolist()


def test_goes_on_when_the_link_is_cut_and_says_so(server, packed_demo, caplog):
    model = comoe.load(server.url)
    tokenizer = comoe.load_tokenizer(packed_demo)
    try:
        generated(model, tokenizer, 4)
        assert model.comoe.engine.wait_idle(30)
        # Only the coarsest rung of every expert is here, and not even that of some.
        engine, sizes = model.comoe.engine, model.comoe.store_sizes
        import numpy as np

        engine.evict(np.arange(engine.resident().size, dtype=np.int32))
        engine.set_local(np.arange(engine.resident().size, dtype=np.int32), False)
        model.comoe.remote._fetcher._cache.forget(slice(None))
        coarsest = np.unique(sizes.records[::2, 0])
        engine.request(coarsest[coarsest >= 0].astype(np.int32), 1)
        assert engine.wait_idle(30)
        server.down()
        with caplog.at_level(logging.WARNING, "comoe"):
            assert len(generated(model, tokenizer, 24)) == 24
            stats = model.comoe.stats()["remote"]
            assert stats["coarser"] > 0 and stats["left_out"] > 0 and not stats["up"]
            assert "no source of the experts answers" in caplog.text and server.url in caplog.text
            server.up = True
            give_up = time.monotonic() + 60
            while not model.comoe.stats()["remote"]["up"] and time.monotonic() < give_up:
                time.sleep(0.02)
            generated(model, tokenizer, 4)
        assert "answer again" in caplog.text
        while time.monotonic() < give_up:  # and quality climbs back to all of the plan
            generated(model, tokenizer, 1)
            engine.wait_idle(5)
            if model.comoe.placement.has(model.comoe.placement.base):
                break
        assert model.comoe.placement.has(model.comoe.placement.base)
        left_out = model.comoe.stats()["remote"]["left_out"]
        generated(model, tokenizer, 4)
        assert model.comoe.stats()["remote"]["left_out"] == left_out
    finally:
        model.comoe.close()


def test_a_link_cut_while_a_layer_waits(server, packed_demo, monkeypatch):
    """Nothing is here, and what was asked for never comes: the layer is not stuck."""
    model = comoe.load(server.url)
    tokenizer = comoe.load_tokenizer(packed_demo)
    silent = threading.Event()
    try:
        asked = threading.Event()

        def delay(path):
            if is_expert(path):
                asked.set()
                silent.wait(60)
            return 0.0

        model.comoe.engine.evict(torch.arange(10**4).int().numpy()[: model.comoe.records.count])
        server.delay = delay
        thread = threading.Thread(target=generated, args=(model, tokenizer, 4))
        thread.start()
        assert asked.wait(30)
        server.down()
        thread.join(60)
        assert not thread.is_alive()
    finally:
        silent.set()
        model.comoe.close()


def test_exact_waits_then_says_why_and_stays_usable(server, packed_demo):
    remote = comoe.open_url(server.url)
    remote.sources.patience = 0.6
    model = comoe.load(remote, exact=True)
    tokenizer = comoe.load_tokenizer(packed_demo)
    try:
        expected = None
        server.fault = lambda path, *_: "500" if is_expert(path) else None
        with pytest.raises(
            OSError, match=rf"fetching record \d+: {server.url}: experts/layer.*500"
        ):
            generated(model, tokenizer)
        server.fault = lambda *_: None
        give_up = time.monotonic() + 30
        while expected is None:
            try:
                expected = generated(model, tokenizer)
            except OSError:
                assert time.monotonic() < give_up
    finally:
        model.comoe.close()
    local = comoe.load(packed_demo, exact=True)
    assert generated(local, tokenizer) == expected
    local.comoe.close()


def test_exact_rides_out_a_short_cut(server, packed_demo):
    remote = comoe.open_url(server.url)
    model = comoe.load(remote, exact=True)
    tokenizer = comoe.load_tokenizer(packed_demo)
    local = comoe.load(packed_demo, exact=True)
    try:
        server.down()
        timer = threading.Timer(0.7, lambda: setattr(server, "up", True))
        timer.start()
        assert generated(model, tokenizer) == generated(local, tokenizer)
        timer.join()
    finally:
        model.comoe.close()
        local.comoe.close()


def test_a_thousand_faults_and_no_wrong_token(packed_demo, monkeypatch):
    """Three sources, each answer of which may be wrong, late or missing; `exact` gives the exact tokens."""
    monkeypatch.setattr(several, "SLOW_SECONDS", 0.3)
    local = comoe.load(packed_demo, exact=True)
    tokenizer = comoe.load_tokenizer(packed_demo)
    prompts = [PROMPT, "def f(x):\n", "class A:\n    def __init__(self", "for i in range("]
    expected = [generated(local, tokenizer, 8, prompt) for prompt in prompts]
    local.comoe.close()
    rng, lock, injected = random.Random(7), threading.Lock(), []
    passing = [*(f for f in FAULTS if f not in ("404", "ignore_range")), "slow", "slow_head"]
    weights = [1.0] * (len(passing) - 2) + [0.05, 0.05]

    def fault(path, begin, end):
        if not is_expert(path):
            return None
        with lock:
            if rng.random() < 0.45:
                injected.append(rng.choices(passing, weights)[0])
                return injected[-1]
        return None

    with (
        RangeServer(packed_demo) as a,
        RangeServer(packed_demo) as b,
        RangeServer(packed_demo) as c,
    ):
        remote = comoe.open_url(a.url, [b.url, c.url])
        remote.sources.patience = 60.0
        model = comoe.load(remote, exact=True)
        engine = model.comoe.engine
        everything = torch.arange(model.comoe.records.count).int().numpy()
        give_up = time.monotonic() + 240
        try:
            for server in (a, b, c):
                server.fault = fault
            turn = 0
            while len(injected) < SOAK_FAULTS:
                assert time.monotonic() < give_up, f"{len(injected)} faults in time"
                engine.cancel(2)
                engine.evict(everything)
                engine.set_local(everything, False)
                remote.cache.forget(slice(None))
                assert generated(model, tokenizer, 8, prompts[turn % 4]) == expected[turn % 4]
                turn += 1
            stats = model.comoe.stats()
        finally:
            model.comoe.close()
    assert stats["engine"]["remote_refused"] > 50 and stats["remote"]["retries"] > 300
    assert set(injected) == set(passing)
    print(f"{len(injected)} faults, {turn} runs, {stats['remote']['retries']} retries")


def test_a_model_that_is_not_closed_ends_with_the_process(server, tmp_path):
    code = f"import comoe; m = comoe.load({server.url!r}, memory='200MB'); print('loaded')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
    )
    assert done.returncode == 0 and "loaded" in done.stdout, done.stderr
    assert "terminate" not in done.stderr


def test_the_deadline_is_named():
    assert afar.WAIT_SECONDS <= 0.25  # docs/remote.md
