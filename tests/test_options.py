"""Options of the planner: what is held, shared and read, against record sets; and the solver on them."""

import itertools

import numpy as np
import pytest

from comoe.policy.options import NOTHING, SHARED, Options, expert_options
from comoe.policy.plan import LADDER, Levels, Sizes
from comoe.policy.solver import solve

# Places: 0, 1 planes of 2 and 1 bits; 2 exact; 3, 4 a base in two planes; 5 a residual; 6 a merged set.
LEVELS = Levels(
    ("merge", "base+", "2", "3", "exact"), (0b1000000, 0b0111000, 0b0000001, 0b0000011, 0b0000100)
)
BYTES_OF_PLACE = np.array([40, 20, 320, 50, 30, 16, 40])


def small_store(experts: int = 5, layers: int = 2) -> Sizes:
    """Every layer has one base; experts 2k and 2k + 1 of a layer are merged; the last one has no merge."""
    total, places = experts * layers, len(BYTES_OF_PLACE)
    records = np.full((total, places), -1, np.int32)
    ids: dict[tuple, int] = {}
    nbytes: list[int] = []
    for x, place in itertools.product(range(total), range(places)):
        layer, expert = divmod(x, experts)
        owner = {3: layer, 4: layer, 6: (layer, expert // 2)}.get(place, x)
        if place == 6 and expert == experts - 1:
            continue
        if (place, owner) not in ids:
            ids[place, owner] = len(nbytes)
            nbytes.append(int(BYTES_OF_PLACE[place]) + 3 * (layer + 1))
        records[x, place] = ids[place, owner]
    return Sizes(LEVELS, records, np.array(nbytes, np.int64), np.full(layers, experts, np.int64))


def losses(sizes: Sizes, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    use = rng.uniform(0.02, 0.6, len(sizes.records))
    loss = use[:, None] * np.array([1.0, 0.5, 0.3, 0.1, 0.0]) * rng.uniform(0.5, 2, sizes.has.shape)
    return np.where(sizes.has, loss, np.nan), use


def record_sets(sizes: Sizes, options: Options, x: int, o: int) -> tuple[set, set]:
    """Ids of the records that an option holds, and of those it reads, from their definition."""
    places = [set(np.flatnonzero(row)) for row in sizes.needs]
    every, (h, u) = sizes.records[x], (options.held[x, o], options.used[x, o])
    needed = {int(every[r]) for r in places[u]}
    shared = {i for i in needed if (sizes.records == i).sum() > 1}
    held = {NOTHING: set(), SHARED: shared}.get(int(h))
    if held is None:
        held = {int(every[r]) for r in places[h]}
    assert held <= needed  # nothing is held in vain
    return held, needed - held


def offered(options: Options):
    return zip(*np.nonzero(np.isfinite(options.loss)), strict=True)


def total(sizes: Sizes, ids: set) -> int:
    return int(sizes.record_bytes[sorted(ids)].sum())


def test_bytes_are_those_of_the_records():
    sizes = small_store()
    loss, use = losses(sizes)
    options = expert_options(sizes, loss, use)
    for x, o in offered(options):
        held, read = record_sets(sizes, options, x, o)
        shared = [s for s in options.shared[x, o] if s >= 0]
        assert len(set(shared)) == len(shared)
        own = {i for i in held if (sizes.records == i).sum() == 1}
        assert options.held_bytes[x, o] == total(sizes, own)
        assert options.shared_bytes[shared].sum() == total(sizes, held - own)
        assert options.missing[x, o] == total(sizes, read)
        assert options.loss[x, o] == loss[x, options.used[x, o]]
        assert options.reads[x, o] == pytest.approx(use[x] * total(sizes, read))


def test_shared_bytes_of_a_choice_are_charged_once():
    sizes = small_store()
    loss, use = losses(sizes)
    options = expert_options(sizes, loss, use)
    rng = np.random.default_rng(1)
    for _ in range(20):
        choice = np.array([rng.choice(np.flatnonzero(np.isfinite(row))) for row in options.loss])
        rows = np.arange(len(choice))
        ids = np.unique(options.shared[rows, choice])
        counted = options.held_bytes[rows, choice].sum() + options.shared_bytes[ids[ids >= 0]].sum()
        held = set().union(*(record_sets(sizes, options, x, o)[0] for x, o in enumerate(choice)))
        assert counted == total(sizes, held)


def test_what_a_base_is_made_of_is_one_shared_cost():
    sizes = small_store()
    options = expert_options(sizes, *losses(sizes))
    base_planes = sorted(sizes.record_bytes[np.unique(sizes.records[:, [3, 4]])])
    assert len(base_planes) == 4
    # Two bases and two merged pairs in each of two layers.
    assert len(options.shared_bytes) == 2 + 4
    assert options.shared.shape[2] == 1


def pairs_of(options: Options, x: int) -> set:
    good = np.isfinite(options.loss[x])
    return set(zip(options.held[x, good].tolist(), options.used[x, good].tolist(), strict=True))


def test_each_kind_of_option_is_there():
    sizes = small_store()
    merge, base, two, three, exact = range(5)
    loss = np.where(sizes.has, [1.0, 0.25, 0.5, 0.1, 0.0], np.nan)
    options = expert_options(sizes, loss, np.full(len(loss), 0.5))
    held = {(level, level) for level in (merge, base, two, three, exact)}
    # Reading a merged set costs what reading the planes of 2 bits costs, reading a base more than 3 bits.
    read = {(NOTHING, level) for level in (two, three, exact)}
    assert pairs_of(options, 0) == held | read | {(two, three), (SHARED, base)}
    assert (merge, merge) not in pairs_of(options, 4)  # the one without
    assert (two, exact) not in pairs_of(options, 0)  # no part of it


def test_options_of_an_expert_that_another_beats_are_dropped():
    sizes = small_store(experts=1, layers=3)
    loss = np.array(
        [
            [np.nan, np.nan, 0.5, 0.1, 0.0],
            [np.nan, np.nan, 0.1, 0.1, 0.1],  # the finer ones are of no use
            [np.nan, np.nan, 0.1, 0.2, 0.0],  # worse with more bits
        ]
    )
    options = expert_options(sizes, loss, np.ones(3))
    used = [{u for _, u in pairs_of(options, x)} for x in range(3)]
    assert used == [{2, 3, 4}, {2}, {2, 4}]
    # Places without an option are not offered, and name one that is.
    for x in range(3):
        assert {*zip(options.held[x].tolist(), options.used[x].tolist(), strict=True)} == pairs_of(
            options, x
        )


def test_floor_is_kept():
    sizes = small_store()
    loss, use = losses(sizes)
    floor = np.zeros(len(loss), int)
    floor[3] = 4
    options = expert_options(sizes, loss, use, floor=floor)
    assert {u for _, u in pairs_of(options, 3)} == {4}
    assert len({u for _, u in pairs_of(options, 2)}) > 1


@pytest.mark.parametrize("seed", range(6))
def test_the_solver_finds_what_brute_force_finds(seed):
    sizes = small_store(experts=3, layers=1)
    loss, use = losses(sizes, seed)
    options = expert_options(sizes, loss, use)
    memory, reads = 250.0, 90.0
    best = np.inf
    choices = [np.flatnonzero(np.isfinite(row)) for row in options.loss]
    for choice in itertools.product(*choices):
        sets = [record_sets(sizes, options, x, o) for x, o in enumerate(choice)]
        held = total(sizes, set().union(*(held for held, _ in sets)))
        read = sum(use[x] * total(sizes, read) for x, (_, read) in enumerate(sets))
        if held <= memory and read <= reads:
            best = min(best, sum(options.loss[x, o] for x, o in enumerate(choice)))
    solution = solve(options.problem(memory, reads))
    assert (solution.used <= [memory, reads]).all()
    step = np.nanmax(loss, 1) - np.nanmin(loss, 1)
    assert best - 1e-9 <= solution.loss <= best + 2 * step.max()


def test_more_memory_means_fewer_reads_or_less_loss():
    sizes = small_store(experts=8)
    loss, use = losses(sizes)
    options = expert_options(sizes, loss, use)
    least = [solve(options.problem(m, 400.0)).loss for m in (300, 600, 1200, 2400, 5000)]
    assert least == sorted(least, reverse=True) and least[-1] < 0.2 * least[0]
    assert solve(options.problem(1e9, 0.0)).loss == 0.0
    # Without memory everything is read.
    everything = solve(options.problem(0.0, 1e9))
    assert everything.loss == 0.0
    assert (options.held[np.arange(16), everything.choice] == NOTHING).all()


def test_a_plain_ladder_has_no_shared_costs():
    sizes = Sizes(
        LADDER,
        np.arange(20, dtype=np.int32).reshape(4, 5),
        np.array([200, 100, 100, 400, 1600] * 4, np.int64),
        np.array([4], np.int64),
    )
    options = expert_options(sizes, np.tile([0.4, 0.2, 0.1, 0.01, 0.0], (4, 1)), np.full(4, 0.5))
    assert options.shared_bytes.size == 0 and (options.shared == -1).all()
    # 2 in 3, 4, 8; 3 in 4, 8; 4 in 8; five of their own and five read whole.
    assert len(pairs_of(options, 0)) == 6 + 5 + 5
    penalty = np.where(options.used == 4, 0.0, 1.0)
    solution = solve(options.problem(1e9, penalty=penalty))
    assert solution.penalty == 0.0 and (options.used[range(4), solution.choice] == 4).all()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"loss": np.zeros((9, 5))}, "loss: expected shape"),
        ({"use": np.zeros(9)}, "use: expected shape"),
        ({"use": np.full(10, 1.5)}, "outside 0..1"),
        ({"use": np.full(10, np.nan)}, "outside 0..1"),
        ({"floor": np.zeros(3, int)}, "floor: expected shape"),
        ({"floor": np.full(10, 5)}, "no level at or above its floor"),
        ({"loss": np.full((10, 5), np.nan)}, "expert 0 has no level"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change, match):
    sizes = small_store()
    loss, use = losses(sizes)
    arguments = {"loss": loss, "use": use, "floor": None} | change
    with pytest.raises(ValueError, match=match):
        expert_options(sizes, arguments.pop("loss"), arguments.pop("use"), **arguments)
