"""What a running model loses is counted, and kept to what the user allows."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import comoe

TIGHT = 6_000_000  # a sixth of the experts' bytes


@pytest.fixture(scope="module")
def text(packed_demo):
    ids = comoe.load_tokenizer(packed_demo).encode(
        "def parse(line):\n    parts = line.split()\n" * 9
    )
    return torch.tensor([ids])


def read(model, text, tokens=160):
    """Token by token."""
    cache = None
    with torch.inference_mode():
        for token in text[0, :tokens]:
            out = model(token.reshape(1, 1), past_key_values=cache, use_cache=True)
            cache = out.past_key_values


def test_everything_at_one_level_loses_what_calibration_says(packed_demo, text):
    """With every expert at its planned level the account is the loss of the plan, at the uses of the text."""
    model = comoe.load(packed_demo, memory=2 * TIGHT, quality="fast", upgrade=False)
    runtime = model.comoe
    runtime.controller.follow = lambda use: None
    read(model, text)
    account = runtime.stats()["loss"]
    seen, _, tokens = runtime._policy.profile()
    use = seen / np.repeat(tokens, [spec.num_experts for spec in runtime.specs])
    assert runtime.plan.resident and account["passes"] >= 100
    planner, levels = runtime.planner, runtime.plan.min_level
    rows = np.arange(len(levels))
    expected = (planner.loss[rows, levels] / planner.use * use).sum()
    assert account["taken"] == pytest.approx(expected, rel=0.25)  # of the last tokens, of all
    assert account["planned"] == pytest.approx(planner.loss[rows, levels].sum(), rel=1e-6)
    model.comoe.close()


def test_a_dial_is_kept_when_everything_is_given_away(packed_demo, text):
    """A price of time that is far too high would compute with whatever is here; the account takes it back."""
    model = comoe.load(packed_demo, memory=TIGHT, quality=0.0005)
    runtime = model.comoe
    dear = replace(runtime.plan, price=100 * runtime.plan.price)
    free = replace(dear, loss_limit=0.0)
    runtime.controller.follow = lambda use: None
    runtime.controller.heed = lambda caution: None
    taken = {}
    for name, plan in (("kept", dear), ("free", free)):
        runtime.placement.install(plan)
        read(model, text)  # until what was read under another plan is gone
        read(model, text)
        taken[name] = runtime.stats()["loss"]
    assert taken["free"]["caution"] == 1.0 and taken["kept"]["caution"] < 0.5
    assert taken["free"]["taken"] > 2 * taken["kept"]["taken"]
    assert taken["kept"]["taken"] < 1.5 * 0.0005
    model.comoe.close()


def test_what_is_left_out_or_coarser_counts(packed_demo, text):
    """Natively: each expert at the level that it was used at, and what was not computed at all as nothing."""
    model = comoe.load(packed_demo, memory=TIGHT, quality="high")
    runtime = model.comoe
    policy, levels = runtime._policy, len(runtime.store.levels)
    experts = len(runtime.plan.min_level)
    count, layers = experts // len(runtime.specs), len(runtime.specs)
    per_square = np.tile(np.arange(levels, dtype=float)[::-1], (experts, 1))
    policy.set_losses(per_square, np.full(experts, 100.0))
    index = np.array([[1, 2], [1, count]])  # of two tokens; index E is no expert
    weights = np.array([[0.5, 0.25], [1.0, 1.0]], np.float32)
    used = np.zeros(count, np.uint8)
    used[1] = 2  # the second level; expert 2 was left out
    before = policy.account()["passes"]
    for _ in range(2):  # a pass ends when the next begins
        for layer in range(layers):
            policy.note_routing(layer, index.ctypes.data, weights.ctypes.data, 2, 2)
            policy.ran(layer, used)
    account = policy.account()
    assert account["passes"] == before + 1
    each = ((0.25 + 1.0) * (levels - 2) + 0.0625 * 100) / 2
    if before == 0:
        assert account["taken"] == pytest.approx(layers * each)
    with pytest.raises(ValueError, match=r"expected \[X, L\] and \[X\]"):
        policy.set_losses(per_square[:-1], np.full(experts, 100.0))
    with pytest.raises(ValueError, match="limit >= 0"):
        policy.set_loss_limit(-1.0, 1.0)
    model.comoe.close()


def test_caution_makes_a_plan_finer(packed_demo):
    model = comoe.load(packed_demo, memory=TIGHT, quality=0.004)
    runtime = model.comoe
    before = runtime.plan
    assert before.loss_limit == 0.004 and before.caution == 1.0
    assert runtime.controller.heed(0.9) is None  # too little to plan for
    decision = runtime.controller.heed(0.2)
    assert "more is lost than allowed" in decision.reason
    assert decision.after.price == pytest.approx(0.2 * before.price, rel=0.3)
    assert decision.after.loss < before.loss and decision.after.caution == pytest.approx(0.2)
    assert "less is lost" in runtime.controller.heed(3.0).reason
    runtime.controller.heed(1e9)
    assert runtime.controller.caution == 1.0
    # A latency is no bound of loss.
    runtime.set_quality(None)
    runtime.set_latency_target(10.0)
    assert runtime.plan.loss_limit == 0.0 and runtime.controller.heed(0.1) is None
    model.comoe.close()
