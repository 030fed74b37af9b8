from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import tiny_lm
import torch
from hypothesis import given
from hypothesis import strategies as st

from comoe import evaluate as ev

TEXT = "def f(x):\n    return x * 2  # naïve, ü, 你好\n" * 3


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_lm.byte_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_lm.qwen3_moe()


@given(st.integers(0, 400), st.integers(2, 64), st.data())
def test_windows_score_every_target_once(num_tokens, window, data):
    context = data.draw(st.integers(0, window - 2))
    windows = ev.plan_windows(num_tokens, window, context)
    targets = [t for w in windows for t in range(w.first, w.end)]
    assert targets == list(range(1, num_tokens))
    for number, w in enumerate(windows):
        assert w.end - w.begin <= window
        assert 0 <= w.begin < w.first
        assert number == 0 or w.first - w.begin > context


@pytest.mark.parametrize(("window", "context"), [(1, 0), (8, 7), (8, 8), (8, -1)])
def test_windows_that_cannot_move_on_are_refused(window, context):
    with pytest.raises(ValueError, match="plan_windows: expected window >= 2"):
        ev.plan_windows(10, window, context)


def direct_logp(model, ids, window):
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids[window.begin : window.end]])).logits[0].float()
    return logits.log_softmax(-1)[window.first - 1 - window.begin : -1]


@pytest.mark.parametrize("make", [tiny_lm.qwen3_moe, tiny_lm.granite_moe])
@pytest.mark.parametrize("logits_bytes", [1, 32 << 20])  # one position at a time, and all at once
def test_score_is_the_models_own_likelihood(make, logits_bytes, tokenizer, monkeypatch):
    monkeypatch.setattr(ev, "LOGITS_BYTES", logits_bytes)
    model = make()
    ids, _ = ev.encode(tokenizer, TEXT)
    windows = ev.plan_windows(len(ids), 48, 16)
    expected = 0.0
    for w in windows:
        targets = torch.tensor(ids[w.first : w.end])
        expected -= float(direct_logp(model, ids, w).gather(-1, targets[:, None]).sum())
    score = ev.score(model, ids, windows)
    assert score.tokens == len(ids) - 1
    assert score.nats == pytest.approx(expected, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(expected / score.tokens), rel=1e-4)


def test_kl_and_agreement_against_another_run(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(ev, "LOGITS_BYTES", 4 * tiny_lm.VOCABULARY * 5)
    other = tiny_lm.qwen3_moe()
    with torch.no_grad():
        for layer in other.model.layers:
            layer.mlp.experts.down_proj.mul_(1.5)
    ids, _ = ev.encode(tokenizer, TEXT)
    windows = ev.plan_windows(len(ids), 48, 16)
    with (tmp_path / "hidden").open("w+b") as kept:
        ev.score(other, ids, windows, keep=kept)
        kept.seek(0)
        against = ev.score(model, ids, windows, against=kept)
        kept.seek(0)
        itself = ev.score(other, ids, windows, against=kept)
    kl = agreements = 0.0
    for w in windows:
        p, q = direct_logp(model, ids, w), direct_logp(other, ids, w)
        kl += float((p.exp() * (p - q)).sum())
        agreements += int((p.argmax(-1) == q.argmax(-1)).sum())
    assert against.kl == pytest.approx(kl, rel=1e-4)
    assert against.kl / against.tokens > 1e-3
    assert against.agreements == agreements < against.tokens
    assert abs(itself.kl) < 1e-6 * itself.tokens
    assert itself.agreements == itself.tokens


def test_a_run_cut_short_is_noticed(model, tokenizer, tmp_path):
    ids, _ = ev.encode(tokenizer, TEXT)
    windows = ev.plan_windows(len(ids), 48, 16)
    with (tmp_path / "hidden").open("w+b") as kept:
        ev.score(model, ids, windows[:-1], keep=kept)
        kept.seek(0)
        with pytest.raises(ValueError, match="differ in length"):
            ev.score(model, ids, windows, against=kept)


def test_the_body_is_left_as_it_was(model, tokenizer):
    ids, _ = ev.encode(tokenizer, TEXT)
    before = model(input_ids=torch.tensor([ids[:8]])).logits
    ev.score(model, ids, ev.plan_windows(len(ids), 64, 16))
    assert "forward" not in model.base_model.__dict__
    assert torch.equal(before, model(input_ids=torch.tensor([ids[:8]])).logits)


def test_a_head_that_needs_more_than_the_last_hidden_states_is_refused(model, tokenizer):
    """Then the chunked logits would be wrong in silence."""
    odd = tiny_lm.qwen3_moe()

    def scale(module, args, output):
        output.logits = output.logits * 1.5

    odd.register_forward_hook(scale)
    ids, _ = ev.encode(tokenizer, TEXT)
    with pytest.raises(ValueError, match="the head of Qwen3MoeForCausalLM gives other logits"):
        ev.score(odd, ids, ev.plan_windows(len(ids), 64, 16))


def test_encode_counts_bytes_of_what_is_scored(tokenizer):
    ids, num_bytes = ev.encode(tokenizer, "naïve 你好")
    assert len(ids) == len("naïve 你好".encode())
    assert num_bytes == len("aïve 你好".encode())
    # Cut inside a character: the whole character's bytes count, as its tokens were (partly) read.
    ids, num_bytes = ev.encode(tokenizer, "a你好", max_tokens=3)
    assert (len(ids), num_bytes) == (3, 3)


@pytest.mark.parametrize(
    ("text", "message"), [("", "text is empty"), ("a", "at least 2 tokens, got 1")]
)
def test_encode_refuses_too_little(tokenizer, text, message):
    with pytest.raises(ValueError, match=message):
        ev.encode(tokenizer, text)


def test_encoder_decoders_are_refused():
    model = SimpleNamespace(config=SimpleNamespace(is_encoder_decoder=True))
    with pytest.raises(ValueError, match="needs a causal language model"):
        ev.score(model, [1, 2], [])


class FakeRuntime:
    def __init__(self, log, name):
        self.log, self.name = log, name

    def stats(self):
        self.log.append(f"stats {self.name}")
        return {"memory": 5}

    def close(self):
        self.log.append(f"close {self.name}")


def test_the_budgeted_model_is_closed_before_the_exact_one_is_loaded(tokenizer):
    log = []

    def load(exact):
        log.append(f"load {exact}")
        model = tiny_lm.qwen3_moe()
        if not exact:
            with torch.no_grad():
                model.model.layers[0].mlp.experts.down_proj.mul_(1.3)
        model.comoe = FakeRuntime(log, exact)
        return model

    result = ev.evaluate(load, tokenizer, TEXT, window=64, context=16)
    assert log[:4] == ["load False", "stats False", "close False", "load True"]
    assert result["stats"] == {"memory": 5}
    assert result["kl"] > 0
    assert 0 < result["top1_agreement"] <= 1
    assert result["perplexity"] != result["perplexity_exact"]
    bits = math.log2(result["perplexity"]) * result["tokens"] / result["bytes"]
    assert result["bits_per_byte"] == pytest.approx(bits, rel=1e-6)

    log.clear()
    exact = ev.evaluate(load, tokenizer, TEXT, exact=True, window=64, context=16)
    assert log.count("load True") == 1
    assert "load False" not in log
    assert (exact["kl"], exact["top1_agreement"]) == (0.0, 1.0)
    assert (
        exact["perplexity"]
        == exact["perplexity_exact"]
        == pytest.approx(result["perplexity_exact"])
    )

    alone = ev.evaluate(load, tokenizer, TEXT, reference=False, window=64, context=16)
    assert alone["kl"] is alone["top1_agreement"] is alone["perplexity_exact"] is None
