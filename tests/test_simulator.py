from __future__ import annotations

import dataclasses
from collections import OrderedDict

import numpy as np
import pytest
from cache_worlds import LADDER, ONE, costs_of, random_trace, sizes_of, trace_of
from hypothesis import given, settings
from hypothesis import strategies as st

from comoe.policy.cache import LRU
from comoe.policy.misses import UseResident
from comoe.policy.next_use import Belady, NextUse
from comoe.policy.plan import BudgetError, EvenPlanner, all_cached
from comoe.policy.predictor import Predictor
from comoe.policy.scoring import AlwaysOn
from comoe.policy.simulator import ReplayError, Simulator
from comoe.policy.token_table import TokenTable


def simulate(trace, sizes=None, costs=None, slots=6, cache=None, **more):
    sizes = sizes or sizes_of(len(trace.num_experts), int(trace.num_experts[0]))
    costs = costs or costs_of(sizes)
    plan = all_cached(sizes, sizes.all_at(sizes.levels.exact), slots * 1000)
    cache = cache or LRU(trace.num_experts)
    return Simulator(sizes, costs, plan, trace=trace, cache=cache, **more).run()


def lru_misses(trace, slots, experts=6):
    """By hand, for one expert per token and layer; memory starts with the first experts."""
    total = len(trace.num_experts) * experts
    held = OrderedDict((x, None) for x in range(min(slots, total)))
    misses = 0
    for row in trace.experts:
        for layer, (expert,) in enumerate(row):
            x = layer * experts + int(expert)
            if x not in held:
                misses += 1
                if len(held) == slots:
                    held.popitem(last=False)
            held.pop(x, None)
            held[x] = None
    return misses


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 18))
def test_lru_misses_are_those_of_a_plain_lru(seed, slots):
    trace = random_trace(seed, n=40, k=1)
    result = simulate(trace, slots=slots)
    assert result.misses == lru_misses(trace, slots)
    assert result.hits + result.misses == 120
    assert result.bytes_read == 1000 * result.misses


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 17))
def test_nothing_misses_less_than_belady(seed, slots):
    trace = random_trace(seed, n=40)
    least = simulate(trace, slots=slots, cache=Belady(trace.num_experts, trace.experts)).misses
    for cache in (LRU(trace.num_experts), NextUse(trace.num_experts)):
        assert simulate(trace, slots=slots, cache=cache).misses >= least


def test_time_of_a_token_by_hand():
    """Two layers; memory for one expert, so each layer reads one: 1000 B at 1 MB/s is 1 ms."""
    trace = trace_of([[[0], [1]], [[0], [1]]])
    sizes = sizes_of(2)
    costs = costs_of(sizes, compute=2e-3, dense=8e-3, bandwidth=1e6, latency=5e-4)
    result = simulate(trace, sizes, costs, slots=1)
    # Memory begins with expert 0 of layer 0; from the second token on both layers miss.
    np.testing.assert_allclose(result.stall, [1.5e-3, 3e-3])
    np.testing.assert_allclose(result.token_time, [8e-3 + 4e-3 + 1.5e-3, 8e-3 + 4e-3 + 3e-3])


def test_reads_hide_behind_the_hits_of_their_layer():
    trace = trace_of([[[0, 1, 5]]])
    sizes = sizes_of(1)
    costs = costs_of(sizes, compute=0.4e-3, bandwidth=1e6)
    result = simulate(trace, sizes, costs, slots=4)
    assert (result.hits, result.misses) == (2, 1)
    np.testing.assert_allclose(result.stall, [1e-3 - 0.8e-3])


def test_what_does_not_fit_at_once_goes_in_waves():
    trace = trace_of([[[0, 1, 2, 3]]] * 3)
    result = simulate(trace, sizes_of(1), slots=1)
    assert result.hits + result.misses == 12
    assert result.misses >= 9
    np.testing.assert_allclose(result.stall.sum(), result.bytes_read / 1e6)


class NextLayer(Predictor):
    """Knows the trace; `shift` makes it wrong."""

    def __init__(self, trace, shift=0):
        self.experts, self.row, self.shift = trace.experts.astype(np.int64), -1, shift

    def begin_token(self, token):
        self.row += 1

    def predict(self, layer_idx, hidden):
        if layer_idx < 0 or layer_idx + 1 == self.experts.shape[1]:
            return []
        return [(layer_idx + 1, (self.experts[self.row, layer_idx + 1] + self.shift) % 6)]


def test_reading_ahead_hides_reads_and_wrong_guesses_delay_by_one_chunk_at_most():
    trace = random_trace(3, n=50, k=1)
    sizes = sizes_of()
    costs = costs_of(sizes, compute=1e-3, dense=6e-3)
    alone = simulate(trace, sizes, costs, slots=5)
    right = simulate(trace, sizes, costs, slots=5, predictor=NextLayer(trace), gauge=AlwaysOn())
    wrong = simulate(trace, sizes, costs, slots=5, predictor=NextLayer(trace, 3))
    # The first layer has nobody before it.
    assert right.stall.sum() < 0.6 * alone.stall.sum()
    assert right.prefetch_used_bytes == right.prefetch_bytes > 0
    assert wrong.prefetch_used_bytes < wrong.prefetch_bytes
    # Wrong guesses switch themselves off.
    gated = simulate(trace, sizes, costs, slots=5, predictor=NextLayer(trace, 3), prefetch=False)
    assert gated.prefetch_bytes == 0
    assert wrong.prefetch_bytes < 50 * 1000


def test_demand_overtakes_speculation():
    """A large record is on its way for layer 1 when layer 0 of the next token misses a small one."""
    trace = trace_of([[[0], [0]], [[1], [1]]])
    sizes = sizes_of(2)
    big = sizes.record_bytes.copy()
    big[6:] = 8 << 20
    sizes = dataclasses.replace(sizes, record_bytes=big)
    costs = costs_of(sizes, bandwidth=1 << 20)  # a chunk takes a second
    plan = all_cached(sizes, sizes.all_at(0), (16 << 20) + 1000)

    class Wrong(Predictor):
        def predict(self, layer_idx, hidden):
            return [(1, np.array([4]))] if layer_idx == 0 else []

    result = Simulator(sizes, costs, plan, trace=trace, cache=LRU([6, 6]), predictor=Wrong()).run()
    alone = Simulator(sizes, costs, plan, trace=trace, cache=LRU([6, 6])).run()
    assert result.stall.sum() <= alone.stall.sum() + 2 * 1.0 + 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_the_same_replay_gives_the_same_result(seed):
    trace = random_trace(seed)
    runs = [
        simulate(trace, slots=7, cache=NextUse(trace.num_experts), predictor=TokenTable([6] * 3, 2))
        for _ in range(2)
    ]
    np.testing.assert_array_equal(runs[0].token_time, runs[1].token_time)
    assert runs[0].summary() == runs[1].summary()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_memory_is_kept_whatever_happens(data):
    """Records of many sizes, levels, guesses, wrong ones too, and memory that comes and goes."""
    seed = data.draw(st.integers(0, 1000))
    rng = np.random.default_rng(seed)
    trace = random_trace(seed, n=12, k=data.draw(st.integers(1, 6)))
    sizes = sizes_of(levels=data.draw(st.sampled_from([ONE, LADDER])))
    nbytes = rng.integers(0, 3000, sizes.record_bytes.size)
    sizes = dataclasses.replace(sizes, record_bytes=nbytes)
    low = sizes.all_at(data.draw(st.integers(0, len(sizes.levels) - 1)))
    need = max(sizes.largest(low), 1)
    plan = all_cached(sizes, low, need * data.draw(st.integers(1, 20)))
    script = [(1e-3 * t, "memory", need * (1 + t % 7)) for t in range(5)]
    script += [(2e-3, "bandwidth", 0.1)]

    class Checked(Simulator):
        def _layer(self, *arguments):
            super()._layer(*arguments)
            held = self._state != 0
            assert self._used == sizes.record_bytes[held].sum() <= self._budget

    simulator = Checked(
        sizes,
        costs_of(sizes, compute=1e-4, dense=1e-3, latency=1e-4),
        plan,
        trace=trace,
        cache=NextUse(trace.num_experts),
        predictor=NextLayer(trace, data.draw(st.integers(0, 2))),
        misses=data.draw(st.sampled_from([None, UseResident()])),
        script=script,
    )
    result = simulator.run()
    assert (result.stall >= -1e-12).all()
    assert result.hits + result.misses + result.skipped == (trace.experts >= 0).sum()
    assert result.prefetch_used_bytes <= result.prefetch_bytes


def test_a_resident_plan_never_waits():
    trace = random_trace()
    sizes = sizes_of(levels=LADDER)
    plan = EvenPlanner().plan(sizes, sizes.total(1), exact=False)
    result = Simulator(sizes, costs_of(sizes), plan, trace=trace, cache=LRU([6] * 3)).run()
    assert result.stall.sum() == result.bytes_read == 0
    assert result.levels[1] == result.hits == 60 * 3 * 2


def test_rules_for_misses_use_what_is_here_and_losses_add_up():
    """Half the experts have their 2-bit planes, and the plan aims at 3 bits."""
    trace = random_trace(n=20)
    sizes = sizes_of(levels=LADDER)
    loss = np.tile(np.array([1.0, 0.5, 0.2, 0.1, 0.0]), (18, 1))
    plan = dataclasses.replace(
        all_cached(sizes, sizes.all_at(1), 18 * 1000 + 4000), base=sizes.chosen(sizes.all_at(0))
    )
    runs = {
        rule: Simulator(
            sizes,
            costs_of(sizes),
            plan,
            trace=trace,
            cache=LRU([6] * 3),
            misses=UseResident() if rule else None,
            loss=loss,
        ).run()
        for rule in (False, True)
    }
    assert runs[False].levels[0] == 0 < runs[False].stall.sum()
    assert runs[True].stall.sum() == 0 < runs[True].levels[0]
    for run in runs.values():
        np.testing.assert_allclose(run.loss.sum(), run.levels @ loss[0])


def test_memory_taken_and_a_slower_disk_cost_time():
    trace = random_trace(n=200)
    sizes = sizes_of()
    costs = costs_of(sizes, dense=1e-3)
    plain = simulate(trace, sizes, costs, slots=9)
    taken = simulate(trace, sizes, costs, slots=9, script=[(0.01, "memory", 2000)])
    slow = simulate(trace, sizes, costs, slots=9, script=[(0.01, "bandwidth", 0.25)])
    assert taken.misses > plain.misses
    assert slow.misses == plain.misses
    assert slow.stall.sum() > 3 * plain.stall.sum()


def test_a_controller_may_change_the_plan():
    trace = random_trace()
    sizes = sizes_of(levels=LADDER)
    planner = EvenPlanner()
    first = planner.plan(sizes, sizes.total(2), exact=False)
    then = planner.plan(sizes, sizes.total(0), exact=False)
    at = []

    def control(seconds, simulator, token_time):
        at.append(seconds)
        if len(at) == 10:
            simulator.set_plan(then)

    result = Simulator(
        sizes,
        costs_of(sizes, dense=1e-3),
        first,
        trace=trace,
        cache=LRU([6] * 3),
        on_token=control,
    ).run()
    assert at == sorted(at)
    assert result.levels[2] == 10 * 6
    assert result.levels[0] == 50 * 6


def test_rows_that_a_layer_does_not_see_are_left_out():
    experts = np.full((4, 2, 1), -1)
    experts[::2, 0], experts[1::2, 1] = 2, 3
    trace = trace_of(experts)
    for cache in (LRU([6, 6]), NextUse([6, 6]), Belady([6, 6], trace.experts)):
        result = simulate(trace, slots=2, cache=cache)
        assert (result.hits, result.misses) == (2, 2)


# ---- bad input ------------------------------------------------------------------------------------


def test_a_trace_of_another_model_is_refused():
    sizes = sizes_of(3, 6)
    with pytest.raises(
        ReplayError, match=r"expected a trace of 3 layers of 6 experts, got one of 2 "
    ):
        simulate(random_trace(num_layers=2), sizes)
    with pytest.raises(ReplayError, match="got one of 3 layers of 8 experts"):
        simulate(random_trace(num_experts=8), sizes)


def test_an_empty_trace_is_refused():
    with pytest.raises(ReplayError, match="has no tokens"):
        simulate(trace_of(np.zeros((0, 3, 2))))


def test_one_expert_must_fit():
    with pytest.raises(BudgetError, match="one expert needs 1,000"):
        simulate(random_trace(), slots=0.5)
    with pytest.raises(BudgetError, match="script: 10 bytes are too few"):
        simulate(random_trace(), script=[(0.0, "memory", 10)])


@pytest.mark.parametrize(
    "event", [(0, "disk", 1), (-1, "memory", 1000), (0, "bandwidth", 0), (0, "memory", np.nan)]
)
def test_scripts_that_make_no_sense_are_refused(event):
    with pytest.raises(ValueError, match="script: expected"):
        simulate(random_trace(), script=[event])


@pytest.mark.parametrize("change", [{"bandwidth": 0.0}, {"bandwidth": -1e9}, {"latency": -1.0}])
def test_costs_that_make_no_sense_are_refused(change):
    with pytest.raises(ValueError, match=r"bandwidth|latency"):
        simulate(random_trace(), costs=costs_of(sizes_of(), **change))
    with pytest.raises(ValueError, match="costs.compute: expected shape"):
        simulate(random_trace(), costs=costs_of(sizes_of(2)))
