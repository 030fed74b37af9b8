"""comoe calibrate, aggregate and eval --sweep as a user meets them, on a tiny random model."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_lm
import torch
from cli_helpers import ok_json
from transformers import AutoModelForCausalLM, AutoTokenizer

import comoe
from comoe.aggregate.fewer import METHODS
from comoe.aggregate.sweep import FRACTIONS
from comoe.cli import main
from comoe.store import Store

EXPERTS, LAYERS, TOKENS = 6, 2, 1024
CODE = "def f(x):\n    return x * 2  # naïve, ü, 你好\n" * 30
PROSE = "The ladder has rungs, and every rung has a price. " * 30
ROW = {"method", "fraction", "expert_bytes", "perplexity", "perplexity_exact", "kl"}
ALONE = {"plain bits", "m-smoe", "hc-smoe", "ream", "gated merge"}
ALONE |= {"hc-smoe, 4-bit", "gated merge, 4-bit", "base + residual", "base + low rank", "e-wemoe"}


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("text")
    (folder / "code.txt").write_text(CODE, encoding="utf-8")
    (folder / "prose.txt").write_text(PROSE, encoding="utf-8")
    return folder / "code.txt", folder / "prose.txt"


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """Without a calibration."""
    folder = tmp_path_factory.mktemp("cli-aggregate")
    model = tiny_lm.save_qwen3_moe(folder / "model", num_experts=EXPERTS)
    return comoe.pack(model, folder / "packed")


@pytest.fixture(scope="module")
def calibrated(packed, texts) -> tuple[Path, dict]:
    folder = packed.with_name("calibrated")
    shutil.copytree(packed, folder)
    options = ("--text", texts[0], "--text", texts[1], "--tokens", TOKENS, "--memory", "40MB")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main([str(a) for a in ("calibrate", folder, *options, "--json")]) == 0
    return folder, json.loads(printed.getvalue())


def test_calibrate_counts_what_each_expert_saw(calibrated):
    folder, found = calibrated
    assert Path(found["folder"]) == folder / "calibration"
    assert found["domains"] == ["code", "prose"]
    assert 0.9 * TOKENS <= found["tokens"] <= TOKENS
    assert 0.15 * found["tokens"] <= found["held_out"] <= 0.35 * found["tokens"]
    rows = np.array(found["rows"])
    assert rows.shape == (LAYERS, EXPERTS) and (rows.sum(1) == 2 * found["tokens"]).all()
    assert found["least_rows"] == rows.min(1).tolist()
    assert found["unseen_experts"] == (rows == 0).sum()


@pytest.fixture(scope="module")
def aggregated(calibrated) -> Path:
    """Uses the calibration that is there."""
    folder = calibrated[0].with_name("aggregated")
    shutil.copytree(calibrated[0], folder)
    assert main(["aggregate", str(folder), "--memory", "40MB"]) == 0
    return folder


def test_aggregate_prints_what_was_chosen_and_measured(cli, calibrated, tmp_path):
    folder = tmp_path / "plain"
    shutil.copytree(calibrated[0], folder)
    found = ok_json(cli("aggregate", folder, "--memory", "40MB", "--refine", "--json"))
    store = Store.open(folder)
    assert found["levels"] == list(store.levels.names) and found["levels"][-1] == "exact"
    assert not set(found["levels"]) & set(found["unused"])
    assert found["distilled"] == {}
    losses = store.losses()
    assert [p["loss"] for p in found["curve"]] == pytest.approx(losses["curve_loss"].tolist())
    for row in found["predicted"]:
        assert row["predicted"] >= 0 and row["measured"] >= -1e-6
        assert row["perplexity_exact"] == found["predicted"][0]["perplexity_exact"] > 1
    assert {"layers", "curve", "refine", "validate"} <= set(found["seconds"])
    assert len(found["refined"]["scale"]) == LAYERS


def test_aggregate_calibrates_and_distils(cli, packed, texts, tmp_path):
    folder = tmp_path / "distilled"
    shutil.copytree(packed, folder)
    options = ("--text", texts[0], "--tokens", TOKENS, "--distil", 3, "--memory", "40MB", "--json")
    found = ok_json(cli("aggregate", folder, *options))
    assert {"calibrate", "distil"} <= set(found["seconds"])
    assert found["distilled"]["steps"] == 3 and found["distilled"]["level"] == "2c"
    assert found["distilled"]["kept"] == (
        found["distilled"]["after"] < found["distilled"]["before"]
    )
    status, out, _ = cli("run", folder, "-p", "def f", "--max-tokens", 3, "--memory", "40MB")
    assert status == 0 and out


def test_aggregate_nests_three_bits_in_four(cli, calibrated, tmp_path):
    folder = tmp_path / "nested"
    shutil.copytree(calibrated[0], folder)
    found = ok_json(cli("aggregate", folder, "--nested", "--memory", "40MB", "--json"))
    assert {"3n", "4n"} <= {*found["levels"], *found["unused"]}
    assert not {"3c", "4c"} & {*found["levels"], *found["unused"]}


def test_aggregate_shows_tables(cli, calibrated, tmp_path):
    folder = tmp_path / "shown"
    shutil.copytree(calibrated[0], folder)
    status, out, err = cli("aggregate", folder, "--memory", "40MB", "--distil", 1, "--refine")
    assert status == 0, err
    for text in (
        "levels, coarsest first: ",
        "KL predicted",
        "losses of layers at the whole choice",
        "distillation of 2c, 1 steps",
    ):
        assert text in out


@pytest.mark.parametrize("method", METHODS)
def test_fewer_experts_as_a_plain_checkpoint(cli, calibrated, tmp_path, method):
    out = tmp_path / method
    options = ("--method", method, "--experts", 3, "--out", out, "--memory", "40MB", "--json")
    found = ok_json(cli("aggregate", calibrated[0], *options))
    assert found == {"folder": str(out), "method": method, "experts": 3}
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.num_experts == 3
    assert getattr(model.config, "quantization_config", None) is None
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("def f(x):", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        assert torch.isfinite(model(ids).logits).all()
        assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > ids.shape[1]


def test_the_sweep_as_json(cli, aggregated, texts):
    rows = ok_json(
        cli("eval", aggregated, "--text", texts[1], "--max-tokens", 96, "--window", 48, "--sweep",
            "--memory", "40MB", "--json")
    )  # fmt: skip
    full = 2 * LAYERS * EXPERTS * 3 * 64 * 32
    assert {row["method"] for row in rows} >= ALONE | {"allocator"}
    assert {row["fraction"] for row in rows} == set(FRACTIONS)
    assert {row["domain"] for row in rows} == {"prose"}
    for row in rows:
        assert set(row) >= ROW
        assert 0 < row["expert_bytes"] <= row["fraction"] * full
        assert row["perplexity"] > 1 and row["kl"] >= -1e-6
    assert len({row["perplexity_exact"] for row in rows}) == 1


def test_the_sweep_as_a_table_and_a_plot(cli, aggregated, texts, tmp_path):
    options = ("--max-tokens", 64, "--window", 32, "--memory", "40MB", "--sweep")
    methods = ("--method", "allocator", "--method", "plain bits")
    plot = tmp_path / "sweep.png"
    texts_of = ("--text", texts[0], "--text", texts[1])
    status, out, err = cli("eval", aggregated, *texts_of, *options, *methods, "--plot", plot)
    assert status == 0, err
    assert "code: perplexity over exact" in out and "prose: perplexity over exact" in out
    assert "allocator" in out and "hc-smoe" not in out
    assert plot.stat().st_size > 1000


# ---- bad input ---------------------------------------------------------------------------------------


def error_of(result: tuple[int, str, str]) -> str:
    status, out, err = result
    assert status == 1 and out == "" and "Traceback" not in err
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    return line


@pytest.mark.parametrize("command", ["calibrate", "aggregate"])
def test_texts_that_cannot_be_read(cli, packed, tmp_path, command):
    def fails(path: Path) -> str:
        return error_of(cli(command, packed, "--text", path, "--memory", "40MB", "--json"))

    (tmp_path / "empty").write_text("")
    (tmp_path / "one").write_text("a")
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 4)
    (tmp_path / "zeros").write_bytes(bytes(500))
    assert "missing is not a file" in fails(tmp_path / "missing")
    assert "is not a file" in fails(tmp_path)
    assert "expected at least 2 tokens, got 0; give a longer text" in fails(tmp_path / "empty")
    assert "expected at least 2 tokens, got 1" in fails(tmp_path / "one")
    assert "binary is not UTF-8 text (byte 128)" in fails(tmp_path / "binary")
    assert "NUL bytes" in fails(tmp_path / "zeros")
    assert not (packed / "calibration").exists()


def test_a_store_without_calibration(cli, packed, tmp_path):
    assert "no calibration; make one with comoe calibrate" in error_of(cli("aggregate", packed))
    options = ("--method", "hc-smoe", "--experts", 3, "--out", tmp_path / "out")
    assert "no calibration" in error_of(cli("aggregate", packed, *options))
    assert not (tmp_path / "out").exists()


def test_a_sweep_of_a_store_that_was_not_aggregated(cli, packed, calibrated, texts):
    options = ("--text", texts[0], "--max-tokens", 64, "--window", 32, "--sweep", "--json")
    assert "no calibration" in error_of(cli("eval", packed, *options))
    # Calibrated only: what packing wrote can be swept, the allocator's mix is not there yet.
    rows = ok_json(cli("eval", calibrated[0], *options, "--method", "plain bits"))
    assert {row["method"] for row in rows} == {"plain bits"}
    error = error_of(cli("eval", calibrated[0], *options, "--method", "allocator"))
    assert "unknown methods ['allocator']" in error and "comoe aggregate" in error


def test_a_text_too_small_for_the_experts(cli, packed, tmp_path):
    """What was not seen is estimated, and it is said how many tokens each expert saw."""
    folder = tmp_path / "few"
    shutil.copytree(packed, folder)
    (tmp_path / "short.txt").write_text("a" * 64)
    options = ("--memory", "40MB", "--json")
    said = r"experts saw fewer than 32 tokens of 64 .*layers\.0\.mlp\.experts: 0 to .*unseen.*Give a longer"
    with pytest.warns(UserWarning, match=said):
        found = ok_json(cli("calibrate", folder, "--text", tmp_path / "short.txt", *options))
    unseen = [(la, e) for la, row in enumerate(found["rows"]) for e, n in enumerate(row) if n == 0]
    assert unseen and found["unseen_experts"] == len(unseen)
    report = ok_json(cli("aggregate", folder, *options))
    losses = Store.open(folder).losses()
    assert np.isfinite(losses["loss"]).all() and len(report["predicted"]) > 0
    coarse = losses["loss"][:, report["levels"].index("2")]
    assert all(coarse[la * EXPERTS + e] > 0 for la, e in unseen)


def test_weights_and_activations_that_are_not_finite(cli, texts, tmp_path):
    """A bad expert is refused by pack; dense weights show when text runs through them."""
    model = tiny_lm.qwen3_moe(num_experts=EXPERTS)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2, 3, 4] = float("nan")
    model.save_pretrained(tmp_path / "model")
    tiny_lm.byte_tokenizer().save_pretrained(tmp_path / "model")
    error = error_of(cli("pack", tmp_path / "model", tmp_path / "packed"))
    assert "NaN" in error and "layers.1.mlp.experts" in error
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2, 3, 4] = 0.0
        model.model.layers[0].post_attention_layernorm.weight[5] = float("inf")
    model.save_pretrained(tmp_path / "model")
    comoe.pack(tmp_path / "model", tmp_path / "packed")
    for command in ("calibrate", "aggregate"):
        options = ("--text", texts[0], "--tokens", 256, "--memory", "40MB")
        error = error_of(cli(command, tmp_path / "packed", *options))
        assert "layers.0.mlp.experts got NaN or infinite activations" in error
    assert not (tmp_path / "packed" / "calibration").exists()


def test_no_such_method_number_or_folder(cli, calibrated, tmp_path):
    def fails(*options: object) -> str:
        return error_of(cli("aggregate", calibrated[0], "--memory", "40MB", *options))

    out = ("--out", tmp_path / "out")
    assert "method: expected one of" in fails("--method", "magic", "--experts", 3, *out)
    assert "experts: expected 1 to 6, got 7" in fails("--method", "ream", "--experts", 7, *out)
    assert "experts: expected 1 to 6, got 0" in fails("--method", "ream", "--experts", 0, *out)
    assert "keep at least 2" in fails("--method", "ream", "--experts", 1, *out)
    (tmp_path / "out").mkdir()
    assert "exists; choose another" in fails("--method", "ream", "--experts", 3, *out)
    for options in (("--method", "ream"), ("--experts", 3), ("--method", "ream", "--experts", 3)):
        status, _, err = cli("aggregate", calibrated[0], *options)
        assert status == 2 and "belong together" in err
    whole = ("--method", "ream", "--experts", 3, *out)
    for option in (("--distil", 3), ("--nested",)):
        status, _, err = cli("aggregate", calibrated[0], *whole, *option)
        assert status == 2 and option[0] in err and "leave it out" in err
