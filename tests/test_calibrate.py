"""Calibration: what is recorded is what the layers got, for every kind of experts module."""

import json
import warnings

import moe_families
import numpy as np
import pytest
import tiny_lm
import torch
from test_families import eager_results
from test_families import logits as eager_logits

import comoe
from comoe.aggregate.calibrate import Batch, calibrate, plan_windows, record
from comoe.aggregate.calibration import FITTED, MEASURED, Calibration
from comoe.aggregate.errors import AggregateError, CalibrationError
from comoe.aggregate.experts import Expert, ExpertWeights, expert_forward, intermediate
from comoe.aggregate.published import published
from comoe.aggregate.statistics import LayerStatistics, super_experts

TEXT = "def f(x):\n    return x + 1  # \u00e9t\u00e9\n" * 40
OTHER = "The ladder has rungs, and every rung has a price. " * 25


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A tiny model with its calibration: 2 layers, 4 experts of which 2 are chosen, two domains."""
    folder = tmp_path_factory.mktemp("calibrate")
    comoe.pack(tiny_lm.save_qwen3_moe(folder / "model", dtype=torch.float32), folder / "packed")
    calls = []
    calibrate(
        folder / "packed",
        {"code": TEXT, "prose": OTHER},
        tokens=1024,
        window=64,
        memory="200MB",
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls[-1][0] == calls[-1][1] and [c[0] for c in calls] == sorted(c[0] for c in calls)
    return folder / "packed"


@pytest.fixture(scope="module")
def statistics(packed):
    return LayerStatistics(ExpertWeights.open(packed), Calibration.open(packed), 0)


def test_what_is_recorded(packed):
    found = Calibration.open(packed)
    assert found.domains == ("code", "prose") and found.num_tokens == 1024
    assert 0.2 <= found.held_out.mean() <= 0.3
    assert set(found.domain[found.held_out]) == {0, 1}
    record = found.layer(1)
    assert record.inputs.shape == (1024, 64) and record.inputs.dtype == torch.bfloat16
    assert record.experts.shape == record.weights.shape == (1024, 2)
    assert (record.domain.numpy() == found.domain).all()
    assert (record.held_out.numpy() == found.held_out).all()
    # The gates are the softmax of the two largest logits, and those experts were chosen.
    best = record.logits.float().softmax(-1).topk(2)
    assert (best.indices == record.experts).float().mean() > 0.99  # fp16 may turn a near tie
    torch.testing.assert_close(best.values, record.weights, rtol=0.01, atol=0.01)
    assert (found.counts(1) == np.bincount(record.experts.flatten(), minlength=4)).all()


FAMILIES = [  # one of each way of keeping or calling experts
    "gpt_oss",  # biases, clamps
    "switch_transformers",  # one-hot masks, encoder and decoder
    "nllb_moe",  # each expert called on its own
    "llama4",  # rows scaled beforehand
    "dbrx",
    "gemma4",
    "deepseek_v3",
    "longcat_flash",  # experts that do nothing
    "deepseek_v4",  # activation in torch
]


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_and_records_give_the_layers_own_output(family, tmp_path):
    if family not in moe_families.families():
        pytest.skip(f"not in this transformers: {family}")
    model = moe_families.build(family)
    eager_results(model, lambda: eager_logits(model))
    comoe.offload(model, "4GB", exact=True, folder=tmp_path / "store")
    outputs = {}
    forward = model.comoe.experts_forward

    def noted(layer_idx, *arguments):
        out = forward(layer_idx, *arguments)
        outputs.setdefault(layer_idx, []).append(out.float())
        return out

    model.comoe.experts_forward = noted
    ids = torch.randint(3, 130, (2, 12), generator=torch.Generator().manual_seed(0)).int().numpy()
    batches = [Batch(ids[:1], 0, FITTED), Batch(ids[1:], 0, MEASURED)]
    found = record(model, batches, tmp_path / "calibration", ["text"], "")
    weights = ExpertWeights.open(tmp_path / "store", model.comoe.specs)
    for layer, outs in outputs.items():
        expected = torch.cat(outs)
        layer_record = found.layer(layer)
        assert layer_record.inputs.shape[0] == len(expected)
        assert layer_record.held_out.any() and not layer_record.held_out.all()
        total = torch.zeros_like(expected)
        experts = weights.layer(layer)
        for row, chosen in enumerate(layer_record.experts.tolist()):
            for k, e in enumerate(chosen):
                if e >= 0:
                    x = layer_record.inputs[row : row + 1].float()
                    total[row] += (
                        layer_record.weights[row, k]
                        * expert_forward(x, experts[e], weights.specs[layer])[0]
                    )
        # Inputs are kept in bf16.
        assert (total - expected).norm() <= 0.02 * expected.norm() + 1e-6
    assert outputs
    model.comoe.close()


def test_gated_error_is_the_formula(packed, statistics):
    found, record = statistics.calibration, statistics.record
    exact = statistics.weights.expert(0, 1)
    other = Expert(tuple(m * 1.1 for m in exact.matrices))
    total = 0.0
    for row in record.held_out.nonzero()[:, 0]:
        for k in range(2):
            if record.experts[row, k] == 1:
                x = record.inputs[row][None].float()
                gap = expert_forward(x, exact, statistics.spec) - expert_forward(
                    x, other, statistics.spec
                )
                total += float(record.weights[row, k] ** 2 * gap.square().sum())
    expected = total / found.held_out.sum()
    assert expected > 0
    assert statistics.gated_error(1, other) == pytest.approx(expected, rel=1e-4)
    assert statistics.gated_error(1, exact) == 0
    # A reservoir gives the same within its sampling error.
    few = LayerStatistics(statistics.weights, found, 0, limit=30)
    assert (
        len(few.routed(1, held_out=True).rows) == 30 < len(statistics.routed(1, held_out=True).rows)
    )
    assert few.gated_error(1, other) == pytest.approx(expected, rel=0.5)


def test_counts_moments_and_pairs(statistics):
    record = statistics.record
    counts = statistics.counts
    assert counts.shape == (2, 4) and counts.sum() == 2 * 1024
    assert counts[1].sum() == 2 * int((record.domain == 1).sum())
    assert statistics.use.sum() == pytest.approx(2)
    assert statistics.gate_sums.sum() == pytest.approx(float(record.weights.sum()), rel=1e-5)
    dense = torch.zeros(1024, 4, dtype=torch.float64)
    dense.scatter_(1, record.experts.long(), record.weights.double())
    dense = dense[~record.held_out]
    np.testing.assert_allclose(
        statistics.gate_moments, (dense.T @ dense / len(dense)).numpy(), atol=1e-9
    )
    used = (dense > 0).double()
    assert (statistics.co_activation == (used.T @ used).numpy()).all()
    x, gate = statistics.inputs(2, held_out=False), statistics.routed(2, held_out=False).gate
    inputs, inner = statistics.second_moments(2, damp=0)
    torch.testing.assert_close(inputs, torch.einsum("s,sh,sk->hk", gate**2, x, x) / len(x))
    a = intermediate(x, statistics.weights.expert(0, 2), statistics.spec)
    torch.testing.assert_close(inner, torch.einsum("s,sh,sk->hk", gate**2, a, a) / len(x))
    damped, _ = statistics.second_moments(2, damp=0.1)
    assert torch.linalg.eigvalsh(damped).min() > 0


def test_mean_output_is_the_best_constant(statistics):
    mean = statistics.mean_output(0)
    error = statistics.gated_error(0, mean)
    assert error < statistics.gated_energy(0)
    assert error <= statistics.gated_error(0, mean * 1.2)


def test_super_experts():
    rng = np.random.default_rng(0)
    peaks = [rng.uniform(1, 2, 64) for _ in range(4)]
    assert not any(found.any() for found in super_experts(peaks)), "an even model has none"
    peaks[1][7] = 60.0
    assert [np.flatnonzero(found).tolist() for found in super_experts(peaks)] == [[], [7], [], []]


def test_peaks_see_a_rare_token(tmp_path):
    """One sequence start sends an expert far off: a sample of 4 rows has not got it, `peaks` has."""
    model = tiny_lm.qwen3_moe(seed=1)
    model.save_pretrained(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        packed = comoe.pack(tmp_path / "model", tmp_path / "packed")
        found = calibrate(packed, {"a": np.arange(1, 250)}, tokens=240, window=24, memory="200MB")
    weights = ExpertWeights.open(packed)
    few, all_rows = (LayerStatistics(weights, found, 0, limit=n) for n in (4, 1000))
    extreme = few._extreme_rows()
    assert {0, 24} <= set(extreme.tolist())
    assert (few.peaks <= all_rows.peaks).all()
    assert (few.peaks >= 0.5 * all_rows.peaks).all()


def test_an_expert_that_no_token_chose(tmp_path):
    model = tiny_lm.qwen3_moe()
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight[3] = 0
        model.model.layers[0].mlp.gate.weight[:3].abs_()
        # Inputs of one sign leave expert 3 with the least logit always.
        model.model.layers[0].post_attention_layernorm.weight.zero_()
    model.save_pretrained(tmp_path / "model")
    tiny_lm.byte_tokenizer().save_pretrained(tmp_path / "model")
    packed = comoe.pack(tmp_path / "model", tmp_path / "packed")
    with pytest.warns(UserWarning, match=r"layers\.0.*: 0 to .*estimated without data"):
        found = calibrate(packed, {"text": TEXT}, tokens=128, window=32, memory="200MB")
    statistics = LayerStatistics(ExpertWeights.open(packed), found, 0)
    unseen = int(np.flatnonzero(statistics.use == 0)[0])
    assert statistics.evidence(unseen) == "proxy"
    exact = statistics.weights.expert(0, unseen)
    half = Expert(tuple(m / 2 for m in exact.matrices))
    assert statistics.gated_error(unseen, exact) == 0
    assert np.isfinite(statistics.gated_error(unseen, half))
    assert torch.isfinite(statistics.mean_output(unseen)).all()
    for moment in statistics.second_moments(unseen):
        torch.linalg.cholesky(moment)
    assert statistics.saliency[unseen] == 0


def test_small_texts_give_held_out_tokens():
    windows = plan_windows({"a": np.arange(100), "b": np.arange(9)}, 1000, 512)
    assert any(held for domain, held, _ in windows if domain == 0)
    assert not any(held for domain, held, _ in windows if domain == 1), "too short to hold out"
    assert sum(len(ids) for domain, _, ids in windows if domain == 0) <= 100


def test_bad_texts(packed, tmp_path):
    with pytest.raises(CalibrationError, match="at least 2 tokens, got 0"):
        calibrate(packed, {"a": ""})
    with pytest.raises(CalibrationError, match="no text"):
        calibrate(packed, {})
    with pytest.raises(CalibrationError, match="'a' cannot be read"):
        calibrate(packed, {"a": tmp_path / "none.txt"})
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "zeros.txt").write_bytes(b"a text\0\0\0")
    with pytest.raises(CalibrationError, match=r"latin.txt is not UTF-8 text \(byte 2\)"):
        calibrate(packed, {"a": tmp_path / "latin.txt"})
    with pytest.raises(CalibrationError, match="zeros.txt has NUL bytes .*character 6"):
        calibrate(packed, {"a": tmp_path / "zeros.txt"})
    with pytest.raises(CalibrationError, match="expected tokens >= 2"):
        calibrate(packed, {"a": TEXT}, tokens=1)
    assert Calibration.open(packed).num_tokens == 1024, "the old one is still there"


def test_bad_folders(packed, tmp_path):
    with pytest.raises(CalibrationError, match="no calibration; make one with comoe calibrate"):
        Calibration.open(tmp_path)
    with pytest.raises(CalibrationError, match="another checkpoint"):
        Calibration.open(packed, fingerprint="x")
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(packed / "calibration", copy)
    (copy / "layer-00001" / "inputs.bin").write_bytes(b"1234")
    with pytest.raises(CalibrationError, match="inputs.bin: .* bytes expected, got 4"):
        Calibration.open(copy)
    (copy / "layer-00001" / "inputs.bin").unlink()
    with pytest.raises(CalibrationError, match="damaged or incomplete"):
        Calibration.open(copy)
    manifest = json.loads((copy / "calibration.json").read_text())
    (copy / "calibration.json").write_text(json.dumps(manifest | {"format": 9}))
    with pytest.raises(CalibrationError, match="format 9 is not known"):
        Calibration.open(copy)


def test_activations_that_are_not_finite(tmp_path):
    """Weights that are not are refused by pack already."""
    model = tiny_lm.qwen3_moe()
    with torch.no_grad():
        model.model.embed_tokens.weight[200:] = float("inf")
    model.save_pretrained(tmp_path / "model")
    packed = comoe.pack(tmp_path / "model", tmp_path / "packed")
    with pytest.raises(CalibrationError, match=r"layers\.0.*NaN or infinite activations"):
        calibrate(packed, {"a": np.arange(3, 250)}, tokens=64, memory="200MB")
    assert not [p for p in packed.iterdir() if "calibration" in p.name], "nothing is left behind"


def test_an_approximation_that_overflows(packed, statistics):
    exact = statistics.weights.expert(0, 1)
    with pytest.raises(AggregateError, match="approximation of expert 1 is not finite"):
        statistics.gated_error(1, Expert(tuple(m * 1e38 for m in exact.matrices)))


def test_a_disk_error_leaves_the_old_folder(tmp_path):
    folder = tmp_path / "there"
    folder.mkdir()
    (folder / "old").touch()
    with (
        pytest.raises(CalibrationError, match="calibrate: cannot write to .*No space left"),
        published(folder, "calibrate", CalibrationError) as part,
    ):
        (part / "new").touch()
        raise OSError(28, "No space left on device")
    assert [p.name for p in tmp_path.rglob("*")] == ["there", "old"]
    with published(folder, "calibrate") as part:
        (part / "new").touch()
    assert [p.name for p in tmp_path.rglob("*")] == ["there", "new"]
