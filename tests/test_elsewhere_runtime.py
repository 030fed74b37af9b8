"""A running model whose missing experts another machine computes."""

import json
import time

import numpy as np
import pytest
import torch
from expert_server import TOKEN, serving

import comoe
from comoe.cli import main
from comoe.config import CoMoEConfig
from comoe.policy.misses import SENT

PROMPT = "import os\n\n\nclass Reader:\n"


class SendAll:
    """Everything that is missing is sent; what the server refuses is used as it is here."""

    def __init__(self, policy):
        self.policy = policy

    def decide(self, chosen):
        missing = chosen.resident < chosen.low
        away = missing & (self.policy.level[chosen.experts] >= 0) & self.policy.available
        return np.where(away, SENT, np.minimum(np.maximum(chosen.resident, 0), chosen.low))


@pytest.fixture
def token_file(tmp_path):
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    path.chmod(0o600)
    return str(path)


@pytest.fixture
def load(packed_demo, token_file):
    models = []

    def load_model(url, memory="8MB", folder=packed_demo, **options):
        model = comoe.load(
            folder, memory, expert_server=url, expert_token_file=token_file, quality=1e-6, **options
        )
        models.append(model)
        return model

    yield load_model
    for model in models:
        model.comoe.close()


def connected(model, seconds=20.0):
    """The model's side of the server, once it knows what that has."""
    away = model.comoe.network.away
    end = time.monotonic() + seconds
    while not away._known and time.monotonic() < end:
        away.tick()
        time.sleep(0.02)
    assert away._known, away.last_error
    return away


def logits_of(model, ids):
    with torch.inference_mode():
        return model(ids).logits.float()


def test_experts_computed_elsewhere_give_the_same_logits(host, load, packed_demo):
    """All missing experts are sent: as near to the exact model as bf16 on the wire is."""
    ids = comoe.load_tokenizer(packed_demo)(PROMPT, return_tensors="pt")["input_ids"]
    exact = comoe.load(packed_demo, exact=True)
    want = logits_of(exact, ids)
    exact.comoe.close()
    with serving(host) as (url, service):
        model = load(url)
        runtime = model.comoe
        away = connected(model)
        away.policy.timeout = lambda tokens: 20.0
        runtime.placement.own_rule = None
        runtime.network.rule = runtime.placement.network_rule = SendAll(away.policy)
        runtime.network._refresh = lambda: None
        runtime.placement.min_level = [np.full_like(low, 4) for low in runtime.placement.min_level]
        runtime.placement.want_level = [
            np.full_like(low, 4) for low in runtime.placement.want_level
        ]
        got = logits_of(model, ids)
        assert runtime.stats()["decided"]["sent"] > 0
        assert service.batches.figures.calls >= 4
        kl = (want.softmax(-1) * (want.log_softmax(-1) - got.log_softmax(-1))).sum(-1)
        assert float(kl.max()) < 0.01
        assert runtime.stats()["network"]["elsewhere"]["failed"] == 0


def test_a_server_that_goes_away_is_done_without(host, load, packed_demo):
    ids = comoe.load_tokenizer(packed_demo)(PROMPT, return_tensors="pt")["input_ids"]
    with serving(host) as (url, _):
        model = load(url)
        runtime = model.comoe
        away = connected(model)
        runtime.network.rule = runtime.placement.network_rule = SendAll(away.policy)
        runtime.network._refresh = lambda: None
        logits_of(model, ids)
    assert torch.isfinite(logits_of(model, ids)).all()
    stats = model.comoe.stats()["network"]["elsewhere"]
    assert stats["failed"] >= 1 and stats["last_error"]
    assert not away.policy.available or stats["failed"]


def test_a_server_of_another_store_is_not_asked(host, load, tmp_path, demo_folder):
    other = comoe.pack(demo_folder, tmp_path / "other")
    manifest = other / "experts" / "manifest.json"
    assert manifest.exists()
    with serving(host) as (url, service):
        model = load(url, folder=other)
        away = model.comoe.network.away
        away._store_id = bytes(16)
        end = time.monotonic() + 20
        while not away._never and time.monotonic() < end:
            away.tick()
            time.sleep(0.02)
        assert away._never and "another store" in away.last_error
        assert service.batches.figures.calls == 0
        assert (away.policy.level == -1).all()


def test_settings_are_checked(tmp_path):
    with pytest.raises(ValueError, match="together"):
        CoMoEConfig.create(expert_server="http://host")
    with pytest.raises(ValueError, match="exact: expected no expert_server"):
        CoMoEConfig.create(exact=True, expert_server="http://host", expert_token_file="t")


def test_a_plan_with_a_server_and_without(packed_demo, host, token_file, capsys):
    """`comoe plan` asks the server what it has; behind a slow disk some experts are left to it."""
    device = ["--device", "rpi5", "--memory", "6MB", "--quality", "0.0005", "--json"]
    plans = []
    with serving(host) as (url, _):
        for more in ([], ["--expert-server", url, "--expert-token-file", str(token_file)]):
            assert main(["plan", str(packed_demo), *device, *more]) == 0
            plans.append(json.loads(capsys.readouterr().out)["plans"][0])
    alone, both = plans
    assert alone["loss"] <= 0.0005 and both["loss"] <= 0.0005
    assert both["tokens_per_second"] >= alone["tokens_per_second"]
    assert main(["plan", str(packed_demo), *device, "--expert-server", url]) != 0
