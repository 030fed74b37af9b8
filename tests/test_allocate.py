"""From rungs to a choice, and to a store that holds them: on a tiny model, end to end."""

import dataclasses
import gc
import shutil
import types
import weakref

import numpy as np
import pytest
import torch

import comoe
from comoe.aggregate.allocate import Losses, interpolated
from comoe.aggregate.based import Based
from comoe.aggregate.build import Workshop, aggregate
from comoe.aggregate.candidates import Mean, Merged, Packed, Rounded, Truncated, layer_menu
from comoe.aggregate.experts import Expert
from comoe.aggregate.stored import StoredRungs, level_sizes
from comoe.aggregate.sweep import Sweep, plot_rows, price_of_change, run_sweep
from comoe.aggregate.trial import Trial
from comoe.policy.solver import InfeasibleError
from comoe.store import Store

SOURCES = (Packed(), Rounded(2), Merged(2, 3), Based(), Mean())


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A packed model of two layers with four experts, and a calibration of random tokens."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from comoe.aggregate.calibrate import calibrate

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("allocate")
    config = Qwen3MoeConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_experts=4,
        num_experts_per_tok=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        initializer_range=0.2,
    )
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "plain")
    with pytest.warns(UserWarning, match="no tokenizer"):
        comoe.pack(folder / "plain", folder / "packed")
    ids = np.random.default_rng(0).integers(0, 96, 1024)
    calibrate(folder / "packed", {"noise": ids}, tokens=1024, window=64)
    return folder / "packed"


@pytest.fixture(scope="module")
def aggregated(packed):
    folder = packed.with_name("aggregated")
    shutil.copytree(packed, folder)
    stages = []
    report = aggregate(
        folder,
        sources=SOURCES,
        refine=True,
        progress=lambda stage, done, total: stages.append(stage),
    )
    assert {"layers", "refining", "validating"} <= set(stages)
    return folder, report


def test_the_store_holds_what_was_measured(packed, aggregated):
    folder, report = aggregated
    store = Store.open(folder)
    assert store.levels.names == report.levels
    assert store.levels.names[-1] == "exact"
    with Workshop(folder) as shop:
        rungs = StoredRungs(shop.weights)
        for statistics in shop.statistics:
            menu = layer_menu(statistics, SOURCES)
            assert {rung.name for rung in menu.rungs} == {*report.levels, *report.unused}
            for rung in (rung for rung in menu.rungs if rung.name in report.levels):
                level = report.levels.index(rung.name)
                for expert in (0, 3):
                    _same(rungs.expert(statistics.layer_idx, expert, level), rung.stand_in(expert))
    # The records that packing wrote are there bit for bit.
    before = Store.open(packed)
    for r in range(5):
        assert store.payload(1, 2, r) == before.payload(1, 2, r)
    assert not (folder / "experts.partial").exists()


def test_three_bits_nest_in_four(packed, tmp_path):
    folder = tmp_path / "nested"
    shutil.copytree(packed, folder)
    levels = aggregate(folder, sources=(Packed(), Truncated()), validate=False).levels
    store = Store.open(folder)
    three, four = (levels.index(name) for name in ("3n", "4n"))
    masks = store.levels.masks
    assert masks[three] & masks[four] == masks[three] != masks[four]
    with Workshop(folder) as shop:
        statistics = shop.statistics[0]
        menu = layer_menu(statistics, (Rounded(4), Truncated()))
        rungs = StoredRungs(shop.weights)
        for expert in range(4):
            for level, name in ((three, "3n"), (four, "4n")):
                _same(rungs.expert(0, expert, level), menu.rung(name).stand_in(expert))
            _same(menu.rung("4n").stand_in(expert), menu.rung("4c").stand_in(expert))


def _same(found, expected) -> None:
    if isinstance(expected, Expert):
        for a, b in zip(found.matrices, expected.matrices, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # one decodes in C
    elif expected is None:
        assert found is None
    else:
        torch.testing.assert_close(found, expected)


def test_losses_and_curve_are_in_order(aggregated):
    folder, report = aggregated
    losses = Store.open(folder).losses()
    assert (losses["loss"][:, -1] == 0).all()
    assert (losses["loss"][np.isfinite(losses["loss"])] >= 0).all()
    by_name = dict(zip(report.levels, np.nanmean(losses["loss"], axis=0), strict=True))
    assert by_name["8"] < by_name["4"] < by_name["3"] < by_name["2"] < by_name["mean"]
    assert (np.diff(losses["curve_loss"]) <= 1e-9).all()
    assert (np.diff(losses["curve_bytes"]) >= 0).all()
    refined = report.refined
    assert len(refined["scale"]) == 2 and refined["before"].keys() == refined["after"].keys()
    assert len(report.predicted) == 3
    for row in report.predicted:
        # What is kept is what measured better.
        kl = refined["after" if refined["kept"] else "before"]
        assert min(abs(row["measured"] - measured) for measured in kl.values()) < 1e-9
        assert 0 < row["measured"] < 20 * row["predicted"] + 1e-3


def test_an_aggregated_store_still_runs_exactly(packed, aggregated):
    ids = torch.arange(24)[None]
    outs = []
    for folder in (packed, aggregated[0]):
        model = comoe.load(folder, exact=True)
        with torch.inference_mode():
            outs.append(model(ids).logits)
        model.comoe.close()
    assert torch.equal(*outs)


def test_shared_records_count_once(aggregated):
    folder, report = aggregated
    with Workshop(folder) as shop:
        own, shared, shared_bytes = level_sizes(shop.weights)
        merged = report.levels.index("merge2.3c")
        assert (own[:, merged] == 0).all()
        geometry = shop.weights.store.layers[0].geometry
        three_bits = geometry.record_bytes(0) + geometry.record_bytes(1)
        ids = np.unique(shared[:4, merged])
        assert shared_bytes[ids[ids >= 0]].sum() == 2 * three_bits  # two groups of the first layer


def test_the_sweep_gives_every_method_the_same_bytes(aggregated, tmp_path):
    folder, _ = aggregated
    with Workshop(folder) as shop, shop.judge() as judge:
        sweep = Sweep(shop)
        rows = run_sweep(sweep, judge, fractions=(0.5, 0.25), domain="noise")
        for row in rows:
            assert row["expert_bytes"] <= row["fraction"] * sweep.full_bytes
            assert row["kl"] >= -1e-6
        assert {"allocator", "plain bits", "hc-smoe", "m-smoe"} <= {row["method"] for row in rows}
        prices = {row["method"]: row for row in price_of_change(sweep, 1e6, more=0.5, less=0.25)}
        # Planes nest: going down reads nothing, going up only what is missing.
        plain = prices["plain bits"]
        assert plain["bytes_down"] == 0
        assert plain["bytes_up"] == plain["expert_bytes_from"] - plain["expert_bytes_to"]
        assert prices["hc-smoe"]["bytes_up"] == prices["hc-smoe"]["expert_bytes_from"]
        with pytest.raises(ValueError, match="unknown methods"):
            run_sweep(sweep, judge, methods=["magic"])
    plot_rows(rows, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 1000


def test_a_failure_leaves_the_folder_as_it_was(packed, tmp_path, monkeypatch):
    folder = tmp_path / "packed"
    shutil.copytree(packed, folder)
    manifest = (folder / "experts" / "manifest.json").read_bytes()
    monkeypatch.setattr("comoe.aggregate.build.losses_of", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        aggregate(folder, sources=(Packed(),), validate=False)
    assert (folder / "experts" / "manifest.json").read_bytes() == manifest
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in packed.iterdir())


def test_a_trial_measures_the_engine_at_any_choice(aggregated):
    """Against torch on the rungs of the store; the exact level is the exact model."""
    folder, report = aggregated
    rng = np.random.default_rng(0)
    has = np.concatenate(
        [la.has_levels(Store.open(folder).levels) for la in Store.open(folder).layers]
    )
    with Workshop(folder) as shop, shop.judge() as judge:
        rungs = StoredRungs(shop.weights)
        choices = [
            np.full(len(has), column)
            for column in range(len(report.levels))
            if has[:, column].all()
        ]
        choices.append(np.array([rng.choice(np.flatnonzero(row)) for row in has]))
        wanted = []
        for choice in choices:
            layers = {
                layer: lambda e, la=layer, c=choice: rungs.expert(la, e, int(c[4 * la + e]))
                for layer in range(2)
            }
            wanted.append(judge.measure(layers).kl)
        judge.let_go()
        shop.close()
        with Trial(folder, judge) as trial:
            found = [trial.measure(choice).kl for choice in choices]
            again = trial.measure(choices[0]).kl
    assert found[-2] == 0  # every expert exact
    assert again == found[0]
    # The engine rounds activations to 8 bits.
    for kl, want in zip(found, wanted, strict=True):
        assert abs(kl - want) < 0.1 * want + 2e-3
    assert max(found) > 0.05


def test_aggregation_keeps_no_rungs_of_layers_it_is_done_with(packed, tmp_path, monkeypatch):
    """Memory: one layer's rungs at a time, also where the choice is validated."""
    folder = tmp_path / "packed"
    shutil.copytree(packed, folder)
    alive = []

    def noted(statistics, sources):
        gc.collect()
        alive.append(sum(ref() is not None for ref in made))
        menu = layer_menu(statistics, sources)
        for rung in menu.rungs[:-1]:
            stand_in = rung.stand_in(0)
            made.append(weakref.ref(stand_in))
        return menu

    made: list = []
    monkeypatch.setattr("comoe.aggregate.build.layer_menu", noted)
    report = aggregate(folder, sources=SOURCES)
    assert len(report.predicted) == 3
    gc.collect()
    assert alive == [0, 0] and not any(ref() is not None for ref in made)


def test_budgets_below_the_coarsest_mix_are_left_out(packed, tmp_path, monkeypatch):
    folder = tmp_path / "packed"
    shutil.copytree(packed, folder)
    monkeypatch.setattr("comoe.aggregate.build.VALIDATED", (0.9, 0.001))
    assert len(aggregate(folder, sources=(Packed(), Rounded(2))).predicted) == 1


def make_losses() -> Losses:
    """Three experts: 1, 2 and 8 bytes alone, or 1 byte on a base of 3; the last is a super expert."""
    return Losses(
        levels=("1", "base", "2", "8"),
        layer=np.zeros(3, int),
        loss=np.array([[4.0, 1.0, 2.0, 0.0]] * 3),
        own=np.array([[1, 1, 2, 8]] * 3),
        shared=np.array([[[-1], [0], [-1], [-1]]] * 3),
        shared_bytes=np.array([3]),
        error=np.zeros((3, 4)),
        energy=np.ones(3),
        use=np.ones(3),
        floor=np.array([0, 0, 3]),
        full_bytes=30,
    )


def test_super_experts_stay_above_their_floor():
    losses = make_losses()
    solution = losses.solve(13 / 30)
    assert solution.choice.tolist() == [1, 1, 3]
    assert losses.bytes_of(solution.choice) == 13
    with pytest.raises(InfeasibleError, match="expert bytes"):
        losses.solve(5 / 30)


def test_only_the_named_levels_are_used():
    losses = dataclasses.replace(make_losses(), floor=np.zeros(3, int))
    assert set(losses.solve(0.5, levels=["1", "2"]).choice.tolist()) <= {0, 2}


def test_the_curve_never_gets_worse_with_more_bytes():
    points = make_losses().curve([0.1, 0.4, 0.5, 0.7, 1.0])
    assert [fraction for fraction, _ in points] == [0.4, 0.5, 0.7, 1.0]
    assert (np.diff([solution.loss for _, solution in points]) <= 0).all()


def test_sensitivities_that_were_not_measured_come_from_their_kind():
    slope = np.array([np.nan, 8.0, np.nan, 2.0, np.nan, 100.0])
    relative = np.array([0.5, 0.1, np.sqrt(0.001), 0.01, 1e-6, 0.3])
    kinds = ["coded"] * 5 + ["merged"]
    found = interpolated(slope, relative, kinds)
    assert found == pytest.approx([8, 8, 4, 2, 2, 100])
    assert interpolated(slope[[5, 0]], relative[[5, 0]], ["merged", "coded"]) == pytest.approx(
        [100, 100]
    )
    assert (interpolated(np.full(2, np.nan), relative[:2], kinds[:2]) == 1).all()


def test_a_calibration_without_held_out_text_is_refused(packed):
    with Workshop(packed) as shop:
        shop.calibration = types.SimpleNamespace(
            ids=np.zeros(4, np.int32), sequence=np.zeros(4), held_out=np.zeros(4, bool)
        )
        with pytest.raises(ValueError, match="no held-out text"):
            shop.judge()
