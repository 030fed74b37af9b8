"""Rungs on a shared base, and distilled codes: made, chosen, written, and run."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import tiny_lm
import torch
from typer.testing import CliRunner

import comoe
from comoe.aggregate import based, decompose
from comoe.aggregate.based import Based, usual_rank
from comoe.aggregate.build import Workshop, aggregate
from comoe.aggregate.calibrate import calibrate
from comoe.aggregate.calibration import CHOSEN, FITTED, MEASURED, Calibration
from comoe.aggregate.candidates import Mean, Packed, Rounded, layer_menu
from comoe.aggregate.coded_layer import run_experts
from comoe.aggregate.distil import distil_logits
from comoe.aggregate.errors import AggregateError
from comoe.aggregate.judge import Judge
from comoe.aggregate.spill import Spill
from comoe.aggregate.stored import StoredRungs
from comoe.aggregate.tuning import CHECKPOINTS, windows
from comoe.cli import app
from comoe.hf.attach import replaced
from comoe.policy.curve import CurvePlanner
from comoe.policy.plan import all_cached
from comoe.store import AddedRecord, Store
from comoe.store import format as fmt

BASED = (Packed(), Based(), Mean())


def alike(model) -> None:
    """Experts of each layer become copies of the first with permuted neurons and small deltas."""
    generator = torch.Generator().manual_seed(1)
    for layer in model.model.layers:
        experts = layer.mlp.experts
        joined, down = experts.gate_up_proj.data, experts.down_proj.data  # [E, 2 I, H], [E, H, I]
        inter = down.shape[2]
        for e in range(1, len(down)):
            order = torch.randperm(inter, generator=generator)
            joined[e] = joined[0][torch.cat([order, inter + order])]
            down[e] = down[0][:, order]
        for tensor in (joined, down):
            tensor += 0.02 * torch.randn(tensor.shape, generator=generator)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("menu")
    model = tiny_lm.qwen3_moe()
    alike(model)
    model.to(torch.bfloat16).save_pretrained(folder / "plain")
    with pytest.warns(UserWarning, match="no tokenizer"):
        comoe.pack(folder / "plain", folder / "packed")
    ids = np.random.default_rng(0).integers(1, tiny_lm.VOCABULARY, 2048)
    calibrate(folder / "packed", {"noise": ids}, tokens=2048, window=64)
    return folder / "packed"


def copied(packed, folder):
    shutil.copytree(packed, folder)
    return folder


@pytest.fixture(scope="module")
def aggregated(packed):
    folder = copied(packed, packed.with_name("aggregated"))
    return folder, aggregate(folder, sources=BASED)


def test_the_allocator_chooses_base_and_residual(aggregated):
    folder, report = aggregated
    losses = Store.open(folder).losses()
    column = report.levels.index("base.2c")
    assert (losses["curve_level"] == column).any()
    # Beside the 2-bit plane there are at most 4 bits of a base that four share.
    loss = np.nanmean(losses["loss"], axis=0)
    assert loss[column] < 0.5 * loss[report.levels.index("2")]


@pytest.mark.parametrize("name", ["base.2c", "base.lr"])
def test_a_chosen_level_runs_as_reconstructed(packed, tmp_path, name, monkeypatch):
    """The whole model by the engine, all experts at the level, against torch on what the rung promises."""
    folder = copied(packed, tmp_path / "all")
    # The curve is made to use the level, whatever it is worth.
    monkeypatch.setattr("comoe.aggregate.build.CURVE", (1.0,))
    monkeypatch.setattr(
        "comoe.aggregate.allocate.Losses.curve",
        lambda self, fractions: [(f, self.solve(f, levels=[name])) for f in fractions],
    )
    report = aggregate(folder, sources=BASED, validate=False)
    assert name in report.levels and "mean" in report.unused
    losses = Store.open(folder).losses()
    assert set(losses["curve_level"].ravel()) == {report.levels.index(name)}
    ids = torch.arange(1, 49)[None]
    with Workshop(folder) as shop, torch.inference_mode():
        exact = shop.model(ids).logits.float()
        rungs = StoredRungs(shop.weights)
        stand_ins = []
        for statistics in shop.statistics:
            rung = layer_menu(statistics, BASED).rung(name)
            layer = [rung.stand_in(e) for e in range(4)]
            for e, expert in enumerate(layer):
                stored = rungs.expert(statistics.layer_idx, e, report.levels.index(name))
                for a, b in zip(stored.matrices, expert.matrices, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
            stand_ins.append(layer)

        def reconstructed(layer, hidden, index, gates):
            return run_experts(stand_ins[layer], shop.weights.specs[layer], hidden, index, gates)

        with replaced(shop.model, reconstructed):
            want = shop.model(ids).logits.float()
    # A model this small fits in full, which the planner would prefer.
    monkeypatch.setattr(
        CurvePlanner,
        "plan",
        lambda self, sizes, pool_bytes, *, exact: all_cached(
            sizes, self._curve.levels[0], pool_bytes
        ),
    )
    model = comoe.load(folder)
    try:
        model.comoe.wait_ready()
        assert set(model.comoe.plan.min_level.tolist()) == {report.levels.index(name)}
        with torch.inference_mode():
            got = model(ids).logits.float()
    finally:
        model.comoe.close()
    assert (got - want).norm() < 0.05 * want.norm()  # activations of 8 bits, and bf16
    assert (got - want).norm() < 0.5 * (got - exact).norm()


def test_both_rungs_pay_for_their_base_once(packed):
    with Workshop(packed) as shop:
        menu = layer_menu(shop.statistics[0], BASED)
        first, second = menu.rung("base.2c"), menu.rung("base.lr")
        assert first.shared_bytes is second.shared_bytes
        from comoe.aggregate.allocate import losses_of, measure_errors

        errors = measure_errors(shop.statistics[0], menu)
        losses = losses_of(
            [menu], shop.statistics[:1], [errors], [np.ones(len(menu.rungs))],
            [np.zeros(4, bool)], shop.full_bytes,
        )  # fmt: skip
    assert losses.shared_bytes.tolist() == first.shared_bytes.tolist()
    choice = np.array([losses.levels.index(n) for n in ("base.2c", "base.lr", "2", "exact")])
    want = first.own[0] + second.own[1] + menu.rung("2").own[2] + menu.rung("exact").own[3]
    assert losses.bytes_of(choice) == want + first.shared_bytes[0]


def test_levels_that_no_point_uses_are_not_written(packed, tmp_path, monkeypatch):
    folder = copied(packed, tmp_path / "few")
    monkeypatch.setattr("comoe.aggregate.build.CURVE", (1.0,))  # exact fits
    report = aggregate(folder, sources=BASED, validate=False)
    assert report.unused and not {"2", "3", "4", "8", "exact"} & set(report.unused)
    store = Store.open(folder)
    assert store.levels.names == report.levels
    assert len(store.losses()["loss"][0]) == len(report.levels)
    left = {"base.2c", "base.lr", "mean"} & set(report.levels)
    if not left:
        assert (store.layers[0].records["nbytes"][:, fmt.NUM_RECORDS :] == 0).all()
    assert not (folder / "experts.partial").exists()


def test_usual_rank():
    assert usual_rank(64, 32) == 16
    assert usual_rank(2048, 1024) == 80
    assert usual_rank(64, 15) == 0
    per_weight = decompose.low_rank_bytes(2048, 1024, 3, 80) / (3 * 2048 * 1024)
    assert 0.1 < per_weight < 0.15  # about 1 bit


def test_narrow_matrices_have_no_low_rank_rung(packed, monkeypatch):
    monkeypatch.setattr(based, "usual_rank", lambda *sizes: 0)
    with Workshop(packed) as shop:
        menu = layer_menu(shop.statistics[0], BASED)
    rung = menu.rung("base.lr")
    assert (rung.own == -1).all() and (rung.shared == -1).all()
    place = rung.mask.bit_length() - 1 - fmt.NUM_RECORDS
    assert all(own[place] is None for own in menu.records)


def test_a_rank_beyond_the_matrices_is_refused(packed, tmp_path):
    folder = copied(packed, tmp_path / "ranks")
    with pytest.raises(AggregateError, match=r"rank.*multiple of 16 up to 32.*got 48"):
        aggregate(folder, sources=(Packed(), Based(rank=48)), validate=False)
    assert not (folder / "experts.partial").exists()


def test_spilled_records_come_back(tmp_path):
    one, two = (np.arange(n, dtype=np.uint8) for n in (7, 64))
    records = [[AddedRecord(fmt.MEAN, payload=one), None], [AddedRecord(fmt.MEAN, payload=two)] * 2]
    spill = Spill(tmp_path / "deep" / "added.bin")
    for _ in range(2):
        found = spill.put(records)
        assert found[0][1] is None
        assert (found[0][0].payload() == one).all() and (found[1][1].payload() == two).all()
    assert spill.path.stat().st_size == 2 * (7 + 64)  # what is shared is there once


# ---- distillation ------------------------------------------------------------------------------------

CODED = (Packed(), Rounded(2))


def test_distilled_codes_are_what_is_stored(packed, tmp_path):
    plain, tuned = copied(packed, tmp_path / "plain"), copied(packed, tmp_path / "tuned")
    aggregate(plain, sources=CODED, validate=False)
    stages = []
    report = aggregate(
        tuned, sources=CODED, validate=False, distil=24,
        progress=lambda stage, done, total: stages.append(stage),
    )  # fmt: skip
    found = report.distilled
    assert found["level"] == "2c" and found["steps"] == 24 and "distilling" in stages
    assert found["kept"] and 0 < found["after"] < found["before"]
    stores = [Store.open(folder) for folder in (plain, tuned)]
    before, after = (s.payload(0, 1, fmt.NUM_RECORDS) for s in stores)
    assert len(before) == len(after) and bytes(before) != bytes(after)
    assert not (tuned / CHECKPOINTS).exists()


def test_interrupted_distillation_goes_on(packed, tmp_path):
    folder = copied(packed, tmp_path / "stopped")
    seen = []

    def progress(stage: str, done: int, total: int, stop: int = 14) -> None:
        if stage == "distilling":
            seen.append(done)
            if done == stop:
                raise KeyboardInterrupt

    arguments = dict(sources=CODED, validate=False, distil=24)
    with pytest.raises(KeyboardInterrupt):
        aggregate(folder, **arguments, progress=progress)
    assert list((folder / CHECKPOINTS).iterdir())
    seen.clear()
    aggregate(folder, **arguments, progress=lambda *a: progress(*a, stop=-1))
    assert seen[0] == 13 and seen[-1] == 24
    assert not (folder / CHECKPOINTS).exists()


def test_windows_cover_the_parts(packed):
    calibration = Calibration.open(packed)
    parts = [windows(calibration, part) for part in (FITTED, MEASURED, CHOSEN)]
    assert {part.shape[1] for part in parts} == {64}
    assert [len(part) for part in parts] == [24, 4, 4]
    calibration.part = np.zeros_like(calibration.part)
    with pytest.raises(AggregateError, match="no held-out text to choose a state on; calibrate"):
        windows(calibration, CHOSEN)


def test_no_loss_is_measured_on_what_chose_the_state(packed, tmp_path, monkeypatch):
    """Windows of the judge and rows of every layer's held-out part, while distillation is on."""
    seen = {}

    def noted(model, layers, fitted, chosen_on, **options):
        seen["fitted"], seen["chosen"] = fitted, chosen_on
        return distil_logits(model, layers, fitted, chosen_on, **options)

    def judged(self, model, weights, ids, windows):
        seen["judged"] = torch.tensor(ids).reshape(-1, 64)
        seen["rows"] = [s.record.held_out.sum() for s in seen["shop"].statistics]
        init(self, model, weights, ids, windows)

    def opened(self, *arguments, **options):
        seen["shop"] = self
        workshop(self, *arguments, **options)

    init, workshop = Judge.__init__, Workshop.__init__
    monkeypatch.setattr("comoe.aggregate.tuning.distil_logits", noted)
    monkeypatch.setattr(Judge, "__init__", judged)
    monkeypatch.setattr(Workshop, "__init__", opened)
    aggregate(copied(packed, tmp_path / "tuned"), sources=CODED, validate=False, distil=1)
    texts = [{tuple(w) for w in seen[name].tolist()} for name in ("fitted", "chosen", "judged")]
    assert [len(t) for t in texts] == [24, 4, 4]
    assert len(set.union(*texts)) == 32
    assert seen["rows"] == [4 * 64] * 2
    # What chose is fitted to from then on.
    statistics = seen["shop"].statistics[0]
    assert statistics.tokens_fitted == 28 * 64 and statistics.tokens_held_out == 4 * 64
    # Without distillation all held-out text measures.
    aggregate(copied(packed, tmp_path / "plain"), sources=CODED, validate=False)
    assert len(seen["judged"]) == 8


def test_a_text_too_short_to_choose_and_measure(packed):
    calibration = Calibration.open(packed)
    calibration.part[calibration.part == MEASURED] = FITTED
    with pytest.raises(AggregateError, match="no text to measure on is left"):
        calibration.after_choice()


def test_distillation_that_cannot_be(packed, monkeypatch):
    with pytest.raises(AggregateError, match="steps >= 0"):
        aggregate(packed, distil=-1)
    with pytest.raises(AggregateError, match=r"Rounded\(2\)"):
        aggregate(packed, sources=(Packed(),), distil=4)
    monkeypatch.setattr("comoe.aggregate.tuning.available", lambda: 1000)
    with pytest.raises(AggregateError, match="leave distillation out"):
        aggregate(packed, sources=CODED, distil=4)
    assert not (packed / CHECKPOINTS).exists()


def test_options_that_do_not_go_together(packed, tmp_path):
    method = ["--method", "hc-smoe", "--experts", "2", "--out", str(tmp_path / "out")]
    for arguments, message in (
        ([*method, "--distil", "4"], "leave it out"),
        (["--distil", "-1"], "--distil"),
    ):
        result = CliRunner().invoke(app, ["aggregate", str(packed), *arguments])
        assert result.exit_code == 2 and message in result.output
