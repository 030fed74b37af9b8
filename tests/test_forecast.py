"""`comoe plan`: expectations that agree with the planners and the store, byte by byte."""

import json
from dataclasses import replace

import numpy as np
import pytest

from comoe.cli import main
from comoe.config import CoMoEConfig
from comoe.forecast import Forecaster, Model, choices, device_of
from comoe.overheads import Overheads
from comoe.policy.devices import load_device
from comoe.policy.plan import LADDER, BudgetError, EvenPlanner, Sizes, all_cached
from comoe.policy.residency import cache_age, missing_of

X = 40
SIZES = Sizes(
    LADDER,
    np.arange(5 * X, dtype=np.int32).reshape(X, 5),
    np.array([2, 1, 1, 4, 16] * X, np.int64) * 1000,
    np.array([30, 10], np.int64),
)


@pytest.fixture(scope="module")
def model(packed_demo):
    return Model.open(packed_demo)


@pytest.fixture
def forecaster(model):
    return Forecaster(model, load_device("rpi5"))


@pytest.fixture
def cli(capsys, packed_demo):
    def call(*arguments):
        capsys.readouterr()
        status = main(["plan", str(packed_demo), *map(str, arguments)])
        return status, *capsys.readouterr()

    return call


# ---- what a cache holds ------------------------------------------------------------------------


def lru_misses(use, sizes, room, tokens=60_000):
    """Share of uses at which each expert was not in an LRU cache of `room` bytes; each token uses experts
    independently."""
    rng = np.random.default_rng(0)
    cached: dict[int, None] = {}
    held, misses, uses = 0, np.zeros(len(use)), np.zeros(len(use))
    for token in range(tokens):
        for expert in np.flatnonzero(rng.random(len(use)) < use):
            counted = token > tokens // 10
            uses[expert] += counted
            if expert in cached:
                del cached[expert]
            else:
                misses[expert] += counted
                held += sizes[expert]
                while held > room:
                    held -= sizes[(oldest := next(iter(cached)))]
                    del cached[oldest]
            cached[expert] = None
    return misses / np.maximum(uses, 1), uses


@pytest.mark.parametrize("share", [0.15, 0.4, 0.6])
def test_the_age_of_a_cache_tells_its_misses(share):
    rng = np.random.default_rng(1)
    use = np.minimum(0.01 + 0.05 * rng.gamma(0.7, 1.0, X), 0.9)
    sizes = rng.integers(1, 5, X) * 1000
    room = share * sizes.sum()
    predicted = np.exp(-use * cache_age(sizes, use, room))
    measured, uses = lru_misses(use, sizes, room)
    assert predicted @ uses == pytest.approx(measured @ uses, rel=0.1)


def test_a_cache_that_holds_all_never_misses():
    use = np.full(X, 0.1)
    assert cache_age(np.full(X, 10), use, 10 * X) == np.inf
    assert cache_age(np.full(X, 10), np.zeros(X), 0) == np.inf
    plan = EvenPlanner().plan(SIZES, SIZES.total(2), exact=False)
    read, misses = missing_of(SIZES, plan, use)
    assert not read.any() and not misses.any()


def test_what_is_missing_of_a_plan():
    use = np.full(X, 0.1)
    use[:5] = 0.0
    cached = all_cached(SIZES, SIZES.all_at(2), SIZES.total(2) // 2)
    read, misses = missing_of(SIZES, cached, use)
    assert not read[:5].any()
    assert (read[5:] == 4000 * misses[5:]).all() and (misses[5:] > 0.2).all()
    held = np.where(np.arange(X) < 20, 2, 0).astype(np.int8)
    base = SIZES.chosen(held)
    mixed = replace(cached, held=held, base=base, spare=0)
    read, misses = missing_of(SIZES, mixed, np.full(X, 0.1))
    assert not read[:20].any()
    assert (misses[20:] == 1).all() and (read[20:] == 2000).all()  # 4 bits less the 2 that are held


# ---- outlooks ----------------------------------------------------------------------------------


def test_more_memory_is_never_worse(forecaster):
    rows = forecaster.frontier(choices())
    assert {row["name"] for row in rows} == set(choices())
    for name in choices():
        mine = [row for row in rows if row["name"] == name]
        assert [row["memory"] for row in mine] == sorted(row["memory"] for row in mine)
        if name == "exact":
            seconds = [row["seconds"] for row in mine]
            assert (np.diff(seconds) <= 1e-9).all()
            assert all(row["loss"] == 0 for row in mine)
        elif name == "default":
            assert (np.diff([row["loss"] for row in mine]) <= 1e-9).all()
    last = [row for row in rows if row["memory"] == rows[-1]["memory"]]
    assert all(row["loss"] == 0 for row in last)  # enough for all of it


def test_every_byte_has_its_place(forecaster, model):
    for name, config in choices().items():
        for memory in (5_500_000, 7_000_000, 13_000_000):
            found = forecaster.outlook(memory, config)
            rows = forecaster.where(found, config)
            here = sum(row["bytes"] for row in rows if row["tier"] == "memory")
            assert here <= memory, (name, memory)
            assert here >= 0.9 * min(memory, 11_000_000), (name, memory)
            held = sum(row["bytes"] for row in rows if "always" in row["what"])
            assert held == model.sizes.record_bytes[found.plan.base].sum()
            counted = sum(row["experts"] or 0 for row in rows if "read when used" in row["what"])
            short = (found.plan.held < found.plan.min_level).sum()
            assert counted == short
            assert found.seconds == pytest.approx(found.dense + found.compute + found.stall)
            assert (found.stall > 0) == (found.read > 0)


def test_speed_follows_the_device(model):
    config = CoMoEConfig(exact=True)
    seconds = {
        name: Forecaster(model, load_device(name)).outlook(5_000_000, config).stall
        for name in ("rpi5", "phone", "jetson-agx-orin")
    }
    assert seconds["rpi5"] > 3 * seconds["phone"] > 0
    assert seconds["phone"] > seconds["jetson-agx-orin"] > 0


def test_limits_are_named(forecaster):
    with pytest.raises(BudgetError, match="needs at least"):
        forecaster.outlook(3_500_000, CoMoEConfig())
    least = forecaster.least_memory(CoMoEConfig())
    assert forecaster.outlook(least, CoMoEConfig()).memory == least
    with pytest.raises(BudgetError, match="more than rpi5 has"):
        forecaster.outlook(9 * 10**9, CoMoEConfig())


def test_the_pool_is_the_runtimes_own(packed_demo, model):
    """The same memory gives the same pool and plan when the model is loaded."""
    import comoe

    loaded = comoe.load(packed_demo, memory=7_000_000)
    try:
        plan = Forecaster(model, load_device("rpi5")).outlook(7_000_000, CoMoEConfig()).plan
        assert plan.pool_bytes == pytest.approx(loaded.comoe.plan.pool_bytes, rel=0.02)
        assert (plan.min_level == loaded.comoe.plan.min_level).all()
    finally:
        loaded.comoe.close()


# ---- the command -------------------------------------------------------------------------------


def test_the_command_says_speed_loss_and_places(cli):
    status, out, err = cli("--memory", "6MB", "--device", "rpi5", "--explain")
    assert status == 0, err
    for text in ("tokens/s", "nats per token (assumed)", "dense weights", "the whole store"):
        assert text in out
    for text in ("start: pool", "memory is short by", "memory has been free for 2 s"):
        assert text in out


def test_the_command_as_json_with_several_memories_and_a_plot(cli, tmp_path):
    status, out, err = cli(
        *("-m", "6MB", "-m", "13MB", "--device", "phone", "--quality", "0.02"),
        *("--plot", tmp_path / "f.png", "--explain", "--json"),
    )
    assert status == 0, err
    found = json.loads(out)
    assert [plan["memory"] for plan in found["plans"]] == [6_000_000, 13_000_000]
    assert found["plans"][0]["loss"] <= 0.0201
    assert found["plans"][1]["loss"] == 0
    assert found["plans"][0]["inputs"]["bandwidth"] == load_device("phone").disk_bandwidth
    assert (tmp_path / "f.png").stat().st_size > 10_000
    assert {row["name"] for row in found["frontier"]} == set(choices())


def test_this_machine(cli):
    status, out, err = cli("--memory", "6MB", "--json")
    assert status == 0, err
    plan = json.loads(out)["plans"][0]
    assert plan["device"] == "measured" and plan["tokens_per_second"] > 1
    assert not any("profile" in note for note in plan["notes"])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("--device", "rpi-5"), "no profile 'rpi-5'; did you mean rpi5?"),
        (("--memory", "3MB", "--device", "rpi5"), "needs at least"),
        (("--memory", "900GB", "--device", "rpi5"), "more than rpi5 has"),
        (("--memory", "lots"), "--memory: expected a size"),
        (("--quality", "superb"), "quality: expected"),
        (("--exact", "--quality", "fast"), "exact: expected neither"),
        (
            ("-m", "6MB", "--device", "rpi5", "--latency-target", "0.01"),
            "cannot be met",
        ),
        (("--plot", "/no/such/folder/f.png", "--device", "rpi5"), "does not exist"),
    ],
)
def test_bad_input(cli, arguments, match):
    status, out, err = cli(*arguments)
    assert (status, out) == (1, "")
    assert match in err and err.startswith("error: ") and "Traceback" not in err


def test_a_folder_that_is_no_store(capsys, tmp_path):
    assert main(["plan", str(tmp_path), "--device", "rpi5"]) == 1
    assert "error: " in capsys.readouterr().err


def test_this_machine_has_its_own_overheads(tmp_path):
    """What tokens take beside bytes is measured, on the disk of the store, and not assumed."""
    asked = []

    def examine(folder, *, disk_bytes):
        return {
            "bandwidth": {
                "memory_read": 2e10,
                "disk": {"bytes_per_second": 1e9, "latency_seconds": 1e-4},
            },
            "memory": {"total": 8e9},
            "cpu": {"model": "a CPU", "cores": 2},
        }

    def overheads(folder, bandwidth):
        asked.append((folder, bandwidth))
        return Overheads(1e-3, 2e-3, 3e-5, 4e-4)

    packed = tmp_path / "packed"
    packed.mkdir()
    device = device_of("measured", packed, examine, overheads)
    assert (device.step_overhead, device.layer_overhead) == (1e-3, 2e-3)
    assert (device.deciding_overhead, device.disk_latency) == (3e-5, 4e-4)
    assert asked == [(tmp_path, 1e9)]
    assert device_of("rpi5", packed, examine, overheads) == load_device("rpi5") and len(asked) == 1
