"""A running model that is told to change: quality, latency, memory; alone and while it generates."""

import threading

import numpy as np
import pytest
import torch

import comoe
from comoe import memory
from comoe.policy.joint import GoalError
from comoe.policy.sensors import Readings

PROMPT = "import os\n\ndef read_lines(path):\n    "
TIGHT = 6_000_000  # a sixth of the experts' bytes


def ids_of(folder):
    return torch.tensor([comoe.load_tokenizer(folder).encode(PROMPT)])


def generate(model, ids, tokens=24):
    out = model.generate(ids, max_new_tokens=tokens, do_sample=False)
    return out[0, ids.shape[1] :].tolist()


@pytest.fixture
def model(packed_demo):
    loaded = comoe.load(packed_demo, memory=TIGHT, quality="high")
    yield loaded
    loaded.comoe.close()


def test_a_bound_on_loss_reads_what_it_needs(packed_demo, model):
    runtime = model.comoe
    assert runtime.plan.loss <= 0.002 and not runtime.plan.resident
    generate(model, ids_of(packed_demo))
    fine = runtime.stats()
    decided = runtime.stats()["decided"]
    assert decided["waited"] > 0 and decided["coarser"] > 0
    assert "nats per token" in runtime.describe()
    with comoe_loaded(packed_demo, quality="fast") as other:
        generate(other, ids_of(packed_demo))
        coarse = other.comoe.stats()
    assert coarse["bits_per_weight"] < fine["bits_per_weight"]
    assert coarse["engine"]["demand_bytes"] < fine["engine"]["demand_bytes"]


class comoe_loaded:
    def __init__(self, folder, **options):
        self.model = comoe.load(folder, memory=options.pop("memory", TIGHT), **options)

    def __enter__(self):
        return self.model

    def __exit__(self, *_):
        self.model.comoe.close()


def test_quality_changes_while_it_runs(packed_demo, model):
    runtime = model.comoe
    before = runtime.plan
    runtime.set_quality("fast")
    assert runtime.plan.loss > before.loss and runtime.plan.seconds < before.seconds
    runtime.set_quality(None)
    assert runtime.plan.resident
    runtime.set_quality(0.001)
    assert runtime.plan.loss <= 0.001
    generate(model, ids_of(packed_demo), 4)
    assert any("quality set" in d.reason for d in runtime.controller.log)


def test_wishes_that_cannot_be_met_change_nothing(packed_demo, model):
    before = model.comoe.plan
    with pytest.raises(GoalError, match="cannot be met"):
        model.comoe.set_latency_target(1e-9)
    with pytest.raises(ValueError, match="quality: expected"):
        model.comoe.set_quality("best")
    assert model.comoe.plan is before
    generate(model, ids_of(packed_demo), 4)
    with comoe_loaded(packed_demo, exact=True) as exact, pytest.raises(ValueError, match="exact"):
        exact.comoe.set_quality("fast")
    with pytest.raises(ValueError, match="exact"):
        comoe.load(packed_demo, exact=True, quality="fast")


def test_quality_can_be_chosen_later(packed_demo):
    with comoe_loaded(packed_demo) as plain:
        assert plain.comoe.plan.resident
        plain.comoe.set_quality("high")
        assert not plain.comoe.plan.resident and plain.comoe.plan.loss <= 0.002
        generate(plain, ids_of(packed_demo), 4)


def test_the_text_changes_the_plan(packed_demo, model):
    """Experts that the text uses all the time are held finer than those that it never does."""
    runtime = model.comoe
    first = runtime.plan
    counts = runtime.store_sizes.num_experts
    for layer_idx in range(len(counts)):
        for _ in range(64):
            runtime.live.profile.note(layer_idx, np.arange(4)[None], np.full((1, 4), 0.5))
    decision = runtime.controller.follow(runtime.live.profile.use())
    assert decision is not None and "text" in decision.reason
    used = np.concatenate([np.arange(count) < 4 for count in counts.tolist()])
    held = runtime.store_sizes.bytes_at[np.arange(len(used)), np.maximum(decision.after.held, 0)]
    held[decision.after.held < 0] = 0
    assert held[used].mean() > 2 * held[~used].mean()
    assert runtime.controller.follow(runtime.live.profile.use()) is None  # already done
    assert decision.before is first


def test_memory_that_others_take_is_given_up(packed_demo, model):
    """The monitor sees free memory vanish; the next step runs in a smaller pool, and it comes back."""
    runtime = model.comoe
    pool = runtime.plan.pool_bytes

    class Sensors:
        free = 1 << 40

        def read(self, slow=False):
            return Readings(host_free=self.free, host_total=1 << 40)

    now = [0.0]
    runtime.live.monitor._sensors, runtime.live.monitor._clock = Sensors(), lambda: now[0]
    ids = ids_of(packed_demo)
    generate(model, ids, 2)
    assert runtime.plan.pool_bytes == pool
    now[0] += 10
    Sensors.free = 0
    held = runtime.engine.stats()["mapped_bytes"]
    runtime.controller._reserve = held // 2
    generate(model, ids, 2)
    assert runtime.plan.pool_bytes < pool
    assert runtime.engine.stats()["mapped_bytes"] <= runtime.plan.pool_bytes
    Sensors.free = 1 << 39
    for _ in range(8):
        now[0] += 2
        generate(model, ids, 2)
    assert runtime.plan.pool_bytes == pool


@pytest.mark.parametrize("options", [{"exact": True}, {"quality": "balanced"}])
def test_twenty_random_budgets_while_generating(packed_demo, options):
    """No wrong token (in exact mode), nothing leaked, never above the budget in force."""
    rng = np.random.default_rng(0)
    ids = ids_of(packed_demo)
    with comoe_loaded(packed_demo, **options) as model:
        runtime = model.comoe
        want = generate(model, ids, 200)
        done = threading.Event()
        failures = []

        def change():
            try:
                for size in rng.integers(5_200_000, 12_000_000, 20).tolist():
                    runtime.set_memory(size)
                    mapped = runtime.engine.stats()["mapped_bytes"]
                    assert mapped <= runtime.controller.plan.pool_bytes
                    done.wait(0.02)
            except BaseException as error:
                failures.append(error)

        rss = memory.rss()
        thread = threading.Thread(target=change)
        thread.start()
        got = generate(model, ids, 200)
        thread.join()
        assert not failures
        if "exact" in options:
            assert got == want
        runtime.set_memory(TIGHT)
        memory.give_back_free()
        assert memory.rss() - rss < 32_000_000
        assert len(runtime.controller.log) >= 20
