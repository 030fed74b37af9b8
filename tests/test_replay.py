from __future__ import annotations

import json

import numpy as np
import pytest
from cache_worlds import costs_of, random_trace, sizes_of
from typer.testing import CliRunner

from comoe.cli import app
from comoe.policy.plan import BudgetError
from comoe.policy.predictors import BestOf
from comoe.policy.simulator import ReplayError
from comoe.replay import DEFAULT, POLICIES, compare, first_tokens, predictor_for, replay
from comoe.runtime.engine import RecordTable, store_sizes
from comoe.store import Store


@pytest.fixture(scope="module")
def sizes(packed_demo):
    store = Store.open(packed_demo)
    return store_sizes(store, RecordTable(store))


@pytest.fixture
def trace_file(tmp_path, sizes):
    layers, experts = len(sizes.num_experts), int(sizes.num_experts[0])
    random_trace(n=40, num_layers=layers, k=4, num_experts=experts).write(tmp_path / "t.npz")
    return tmp_path / "t.npz"


def test_every_policy_is_measured_against_lru_and_belady():
    sizes = sizes_of()
    rows = compare(sizes, costs_of(sizes, latency=1e-4), random_trace(n=120), 7000, 0)
    by_name = {row["policy"]: row for row in rows}
    assert list(by_name) == list(POLICIES)
    assert by_name["lru"]["closed"] == 0
    assert by_name["belady"]["closed"] == 1
    assert all(row["hit_rate"] <= by_name["belady"]["hit_rate"] for row in rows)
    assert all(row["wasted_per_token"] == 0 for row in rows)


def test_the_default_beats_lru_on_text_that_repeats_its_words():
    sizes = sizes_of()
    costs = costs_of(sizes, latency=1e-4)
    for seed in range(3):
        rows = compare(
            sizes, costs, random_trace(seed, n=300), 7000, 0, policies=("lru", DEFAULT, "belady")
        )
        assert rows[1]["closed"] > 0.4


def test_no_gap_has_no_share():
    """Everything fits: nobody stalls."""
    sizes = sizes_of()
    rows = compare(sizes, costs_of(sizes), random_trace(), 10**6, 0)
    assert {row["closed"] for row in rows} == {None}
    assert {row["stall_ms"] for row in rows} == {0.0}


def test_predictions_come_from_the_trace_where_it_has_some():
    trace = random_trace(n=10)
    assert len(predictor_for(trace)._predictors) == 1
    predicted = np.zeros((10, 3, 2), np.int16)
    import dataclasses

    both = predictor_for(dataclasses.replace(trace, predicted=predicted, depth=2))
    assert isinstance(both, BestOf)
    assert len(both._predictors) == 2
    assert first_tokens(dataclasses.replace(trace, predicted=predicted), 4).predicted.shape[0] == 4


def test_replay_of_a_store(packed_demo, trace_file, sizes):
    done = []
    rows = replay(packed_demo, trace_file, memory=[3_000_000], progress=lambda *a: done.append(a))
    assert [row["policy"] for row in rows] == list(POLICIES)
    assert done[-1] == (len(POLICIES), len(POLICIES))
    assert rows[0]["share"] == pytest.approx(3e6 / sizes.total(sizes.levels.exact))
    assert len(replay(packed_demo, trace_file, tokens=2)) == 4 * len(POLICIES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bandwidth": 0}, "--bandwidth: expected bytes/s above 0"),
        ({"bandwidth": -1.0}, "--bandwidth: expected bytes/s above 0"),
        ({"latency": -1.0}, "--latency: expected seconds of at least 0"),
        ({"latency": float("nan")}, "--latency: expected seconds of at least 0"),
        ({"tokens": 0}, "--tokens: expected at least 1"),
        ({"memory": [1000]}, "--memory: 1,000 bytes do not hold one expert"),
    ],
)
def test_options_that_make_no_sense_are_refused(packed_demo, trace_file, change, message):
    error = BudgetError if "memory" in change else ValueError
    with pytest.raises(error, match=message):
        replay(packed_demo, trace_file, **change)


def test_a_trace_of_another_model_is_refused(packed_demo, tmp_path):
    random_trace(n=5).write(tmp_path / "other.npz")
    with pytest.raises(
        ReplayError, match="expected a trace of 5 layers of 16 experts, got one of 3"
    ):
        replay(packed_demo, tmp_path / "other.npz")


def test_the_command(packed_demo, trace_file):
    def run(*arguments):
        return CliRunner().invoke(app, ["plan", str(packed_demo), *map(str, arguments)])

    shown = run("--replay", trace_file, "--memory", "3MB", "--json")
    assert shown.exit_code == 0, shown.output
    rows = json.loads(shown.stdout)
    assert [row["policy"] for row in rows] == list(POLICIES)
    shown = run("--replay", trace_file, "--memory", "3MB", "--memory", "4MB", "--prefetch")
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.count("belady") == 2
    assert run("--replay", trace_file.parent / "none.npz").exit_code != 0
