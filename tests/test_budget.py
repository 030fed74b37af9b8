"""What a forward pass is said to need, and what is refused."""

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, EncoderDecoderCache
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig

from comoe.hf.kv_cache import bytes_of, positions
from comoe.hf.sizes import _layer_kinds
from comoe.policy.plan import BudgetError
from comoe.runtime.budget import (
    EXPERT_ROWS,
    Budget,
    ModelSizes,
    Step,
    memory_within,
    tolerance,
)
from comoe.runtime.engine import HUGE_PAGE, pool_floor, slab_bytes

SIZES = ModelSizes(
    dense=1_000_000,
    kv_per_token=100,
    kv_windowed=40,
    window=8,
    kv_layer=20,
    activations_per_token=1000,
    expert_rows_per_token=50,
    logits_per_token=7,
    scores_per_pair=0,
    mask_per_pair=3,
    repeat_per_position=11,
)


def test_kv_grows_to_the_window_and_beyond_it_only_where_all_is_kept():
    assert SIZES.kv(4) == 4 * 140
    assert SIZES.kv(20) == 20 * 100 + 8 * 40
    assert SIZES.new_kv(Step(3, 10, past=5)) == 3 * (10 * 100 + 3 * 40)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (Step(1, 1), 140 + 1000 + 7 + 50),
        (Step(2, 6, logits=6), 2 * (6 * 140 + 6 * 1000 + 6 * 7) + 12 * 50),
        (Step(1, 1, past=9), 100 + 1000 + 10 * 20 + 7 + 50),
        (Step(1, 4, masked=True), 4 * 140 + 4000 + 16 * 3 + 4 * 11 + 7 + 200),
        (Step(1, 2, past=3, masked=True), 280 + 2000 + 10 * 3 + 5 * (11 + 20) + 7 + 100),
    ],
    ids=["decode", "prompt", "decode after nine", "padded", "chunk"],
)
def test_workspace(step, expected):
    assert SIZES.workspace(step) == expected


@pytest.mark.parametrize("available", [10**8, 2 * 10**9, 10**11])
def test_the_promise_made_of_what_is_available_fits_in_it(available):
    memory = memory_within(available)
    assert memory + tolerance(memory) <= available
    assert memory_within(1000) == 1  # refused later, with what is needed


def test_rows_of_experts_are_bounded():
    sizes = ModelSizes(dense=0, expert_rows_per_token=1_000_000)
    assert sizes.workspace(Step(1, 10)) == 10_000_000
    assert sizes.workspace(Step(4, 1000)) == EXPERT_ROWS


PAGE = 4096


@settings(max_examples=400, deadline=None)
@given(
    largest=st.integers(1, 3000).map(lambda pages: pages * PAGE),
    experts=st.integers(1, 5000),
    pool=st.floats(1, 5000),
    less=st.floats(1, 10),
)
def test_whole_slabs_leave_room_for_the_largest_expert(largest, experts, pool, less):
    """Whatever pool the size of slabs was chosen for, and whatever is left of it later."""
    total = largest * experts
    floor = pool_floor(largest, total, PAGE)
    assert largest < floor <= max(largest * 9 // 8 + 2 * PAGE, largest + total // 64)
    chosen_for = int(floor * pool)
    slab = slab_bytes(min(chosen_for, total + floor), largest, floor, PAGE)
    assert 0 < slab <= floor and slab % PAGE == 0
    for later in (floor, int(floor * min(less, pool)), chosen_for):
        assert later // slab * slab >= largest


def test_slabs_are_whole_huge_pages_where_there_is_much_memory():
    two_bits, exact = 1_228_800, 9_437_184  # of an expert of 2048 x 768
    for largest in (two_bits, exact):
        floor = pool_floor(largest, 100 * 48 * exact, 73728)
        slab = slab_bytes(20 << 30, largest, floor, 73728)
        assert slab >= 2 * HUGE_PAGE and slab % HUGE_PAGE < 73728


@pytest.mark.parametrize(("memory", "named"), [(1000, "first"), (2_000_000, "first"), (10**9, "")])
@pytest.mark.parametrize("kv_held", [0, 50_000_000, 500_000_000])
def test_a_new_budget_below_two_leasts_is_told_the_larger(memory, named, kv_held):
    budget = Budget(memory, 0, SIZES, pool_floor=1000, fixed=1000)
    if not named:
        return budget.require(max_context=100, kv_held=kv_held)
    with pytest.raises(BudgetError) as error:
        budget.require(max_context=100_000, kv_held=kv_held)
    budget.memory = int(str(error.value).split("(")[1].split(" bytes")[0])
    budget.require(max_context=100_000, kv_held=kv_held)
    budget.planned_pool(max_context=100_000)
    budget.check(Step(1, 1), kv_held)


@pytest.mark.parametrize("kv_held", [0, 50_000_000, 5_000_000_000])
def test_refusal_names_the_least_that_is_accepted(kv_held):
    step = Step(1, 200_000)
    budget = Budget(2_000_000, 0, SIZES, pool_floor=1000, fixed=1000)
    with pytest.raises(BudgetError, match="200000 tokens.*prefill_chunk_size") as error:
        budget.check(step, kv_held)
    least = int(str(error.value).split("(")[1].split(" bytes")[0])
    budget.memory = least
    budget.check(step, kv_held)
    budget.memory = least - 2
    with pytest.raises(BudgetError):
        budget.check(step, kv_held)
    assert tolerance(least) >= 64_000_000


def test_bytes_of_a_cache_are_those_of_the_moment():
    cache = DynamicCache()
    held = bytes_of(cache)
    assert held() == 0 and positions(cache) == 0
    for layer in range(3):
        cache.update(torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, 5, 8), layer)
    assert held() == 3 * 2 * 2 * 4 * 5 * 8 * 4 and positions(cache) == 5
    both = EncoderDecoderCache(cache, DynamicCache())
    assert bytes_of(both)() == held() and positions(both) == 5
    del cache, both
    gc.collect()
    assert held() == 0


@pytest.mark.parametrize("cache", [None, ((torch.zeros(1),),)])
def test_no_cache_and_tuples_count_as_nothing(cache):
    assert bytes_of(cache)() == 0 and positions(cache) == 0


def test_layers_with_a_window_are_told_from_the_config():
    config = GptOssConfig(num_hidden_layers=4)
    assert _layer_kinds(config, 4) == (2, 2)
    config.layer_types = ["linear_attention", "full_attention", "sliding_attention", "mamba"]
    assert _layer_kinds(config, 4) == (1, 1)
    del config.layer_types
    assert _layer_kinds(object(), 4) == (4, 0)
