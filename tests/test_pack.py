"""pack: whole folders or none, resumable, and the same model when loaded again."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple

import moe_families
import pytest
import torch
from reference_runtime import ReferenceRuntime
from safetensors.torch import load_file, save_file
from test_families import supported

from comoe import packing
from comoe.hf.blocks import discover
from comoe.hf.checkpoint import Checkpoint
from comoe.hf.safetensors_io import CheckpointError
from comoe.packing import PackError, is_packed, pack
from comoe.store import Store, StoreError

# One for each kind of tensors on disk and of experts module.
ROUND_TRIP = (
    "mixtral",  # one tensor per expert on disk
    "qwen3_moe",
    "olmoe",
    "deepseek_v3",  # dense first layer, shared experts, correction bias
    "gpt_oss",  # fused, transposed, interleaved, biased, its own gate
    "switch_transformers",  # encoder and decoder, ungated
    "nllb_moe",  # ungated, biased
    "granitemoe",  # fused on disk
    "jamba",  # Mamba layers between
    "ernie4_5_vl_moe",  # text and vision experts in one list
    "llama4",  # rows sorted by expert
    "dbrx",  # 2-D tensors
    "longcat_flash",  # identity experts
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pack") / "mixtral"
    moe_families.build("mixtral", torch.bfloat16).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def src(source, tmp_path):
    return shutil.copytree(source, tmp_path / "src")


def files(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


@pytest.mark.filterwarnings("ignore:.*no tokenizer")
@pytest.mark.parametrize("family", ROUND_TRIP)
def test_round_trip(family, tmp_path):
    if not supported(family):
        pytest.skip(f"this transformers' {family} is not supported")
    model = moe_families.build(family, torch.bfloat16)
    model.save_pretrained(tmp_path / "src")
    assert pack(tmp_path / "src", tmp_path / "dst") == tmp_path / "dst"
    assert is_packed(tmp_path / "dst")
    store = Store.open(tmp_path / "dst")
    blocks = discover(model)
    assert [layer.name for layer in store.layers] == [block.name for block in blocks]
    stored = ReferenceRuntime.of_store(blocks, store)
    for block, layer, experts in zip(blocks, store.layers, stored.experts, strict=True):
        assert layer.exact_dtype == "bfloat16"
        assert layer.activation == block.spec.activation
        for got, want in zip(experts, block.experts(), strict=True):
            for a, b in zip(got.matrices + got.biases, want.matrices + want.biases, strict=True):
                assert torch.equal(a, b)
    # Dense tensors: all others, under their own names, byte for byte.
    before, after = (
        load_file(tmp_path / "src/model.safetensors"),
        load_file(tmp_path / "dst/model.safetensors"),
    )
    checkpoint = Checkpoint(tmp_path / "src")
    assert set(after) == {entry.name for entry in checkpoint.dense}
    assert all(torch.equal(after[name], before[name]) for name in after)
    assert not any(".experts." in name and "shared" not in name for name in after)


def test_folder_is_a_checkpoint(src, tmp_path):
    dst = pack(src, tmp_path / "dst")
    before, after = (json.loads((f / "config.json").read_text()) for f in (src, dst))
    assert after.pop("quantization_config")["quant_method"] == "comoe"
    assert after == before
    assert (dst / "tokenizer.json").read_text() == "{}"
    assert (dst / "generation_config.json").exists()
    assert not list(dst.glob(".*"))
    assert not list(tmp_path.glob("*.partial"))


def test_progress_ends_at_the_total(src, tmp_path):
    seen = []
    dst = pack(src, tmp_path / "dst", progress=lambda done, total: seen.append((done, total)))
    done, totals = zip(*seen, strict=True)
    assert list(done) == sorted(done) and len(set(totals)) == 1
    assert done[-1] == totals[0]
    written = sum(p.stat().st_size for p in dst.rglob("*") if p.suffix in {".bin", ".safetensors"})
    assert abs(written - totals[0]) < 20_000  # headers of safetensors files


def test_no_tokenizer_warns(src, tmp_path):
    (src / "tokenizer.json").unlink()
    with pytest.warns(UserWarning, match="no tokenizer"):
        pack(src, tmp_path / "dst")


def test_unused_tensors_warn(src, tmp_path):
    path = src / "model.safetensors"
    save_file({**load_file(path), "mtp.weight": torch.zeros(2)}, path)
    with pytest.warns(
        UserWarning, match=r"1 tensors that MixtralForCausalLM does not use.*mtp\.weight"
    ):
        dst = pack(src, tmp_path / "dst")
    assert "mtp.weight" not in load_file(dst / "model.safetensors")


def test_source_of_links(src, tmp_path):
    """The hub's cache is a folder of symbolic links."""
    links = tmp_path / "links"
    links.mkdir()
    for path in src.iterdir():
        (links / path.name).symlink_to(path)
    dst = pack(links, tmp_path / "dst")
    assert not any(p.is_symlink() for p in dst.rglob("*"))


def test_shards(src, tmp_path, monkeypatch):
    whole = pack(src, tmp_path / "whole")
    monkeypatch.setattr(packing, "SHARD_BYTES", 40_000)
    dst = pack(src, tmp_path / "dst")
    shards = sorted(dst.glob("model-*-of-*.safetensors"))
    assert len(shards) > 1
    index = json.loads((dst / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = {name: load_file(dst / file)[name] for name, file in index.items()}
    want = load_file(whole / "model.safetensors")
    assert set(tensors) == set(want)
    assert all(torch.equal(tensors[name], want[name]) for name in want)


# ---- interrupted --------------------------------------------------------------------------------


class Stop(BaseException):
    pass


def stop_at(monkeypatch, block_idx, error):
    loaded = []
    original = Checkpoint.load_block

    def load_block(self, i):
        if i == block_idx:
            raise error
        loaded.append(i)
        return original(self, i)

    monkeypatch.setattr(Checkpoint, "load_block", load_block)
    return loaded


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Stop(), CheckpointError("x")])
def test_interrupted_pack_is_resumed(src, tmp_path, monkeypatch, error):
    whole = files(pack(src, tmp_path / "whole"))
    dst = tmp_path / "dst"
    with monkeypatch.context() as patch:
        stop_at(patch, 2, error)
        with pytest.raises(type(error)):
            pack(src, dst)
    assert not dst.exists()
    partial = tmp_path / "dst.partial"
    assert not is_packed(partial)
    with pytest.raises(StoreError):
        Store.open(partial)
    with monkeypatch.context() as patch:
        loaded = stop_at(patch, None, None)
        pack(src, dst)
    assert loaded == [2, 3]
    assert files(dst) == whole
    assert not partial.exists()


def test_changed_source_starts_over(src, tmp_path, monkeypatch):
    dst = tmp_path / "dst"
    with monkeypatch.context() as patch:
        stop_at(patch, 2, Stop())
        with pytest.raises(Stop):
            pack(src, dst)
    moe_families.build("mixtral", torch.bfloat16, seed=7).save_pretrained(src)
    (tmp_path / "dst.partial" / "leftover").mkdir()
    with monkeypatch.context() as patch:
        loaded = stop_at(patch, None, None)
        pack(src, dst)
    assert loaded == [0, 1, 2, 3]
    assert not (dst / "leftover").exists()


def test_interrupted_while_dense_weights_are_written(src, tmp_path, monkeypatch):
    from comoe.hf import safetensors_io

    whole = files(pack(src, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(safetensors_io, "_copy", lambda *a: (_ for _ in ()).throw(Stop()))
        with pytest.raises(Stop):
            pack(src, tmp_path / "dst")
    pack(src, tmp_path / "dst")
    assert files(tmp_path / "dst") == whole


# ---- the destination ----------------------------------------------------------------------------


def test_same_pack_is_left_alone(src, tmp_path, monkeypatch):
    dst = pack(src, tmp_path / "dst")
    before = {p: p.stat().st_mtime_ns for p in dst.rglob("*")}
    assert pack(src, dst) == dst
    assert {p: p.stat().st_mtime_ns for p in dst.rglob("*")} == before


def test_other_folder_is_not_touched(src, tmp_path):
    dst = tmp_path / "dst"
    dst.mkdir()
    (dst / "mine").write_text("x")
    with pytest.raises(PackError, match="exists and is not a pack of this checkpoint"):
        pack(src, dst)
    assert files(dst) == {"mine": b"x"}
    pack(src, dst, overwrite=True)
    assert is_packed(dst) and not (dst / "mine").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dst", "src"]


def test_pack_of_another_source_is_kept_unless_overwritten(src, tmp_path):
    dst = pack(src, tmp_path / "dst")
    before = files(dst)
    moe_families.build("mixtral", torch.bfloat16, seed=7).save_pretrained(src)
    with pytest.raises(PackError, match="overwrite"):
        pack(src, dst)
    assert files(dst) == before
    pack(src, dst, overwrite=True)
    assert files(dst) != before


def test_into_the_source(src):
    for dst in (src, src / "packed"):
        with pytest.raises(PackError, match="source folder or lies in it"):
            pack(src, dst)


def test_packed_source(src, tmp_path):
    dst = pack(src, tmp_path / "dst")
    with pytest.raises(CheckpointError, match="is packed already"):
        pack(dst, tmp_path / "again")


def test_two_processes(src, tmp_path):
    partial = tmp_path / "dst.partial"
    partial.mkdir()
    fd = os.open(partial, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(PackError, match="another process is packing"):
        pack(src, tmp_path / "dst")
    os.close(fd)
    pack(src, tmp_path / "dst")


def test_unwritable_destination(src):
    with pytest.raises(PackError, match="cannot write to"):
        pack(src, "/proc/comoe/dst")


def test_disk_too_small(src, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 0, 10**6))
    with pytest.raises(PackError, match=r"1\.00 MB free, packing needs \d+\.?\d* MB"):
        pack(src, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_disk_full_on_the_way(src, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises((StoreError, PackError), match="disk full|No space left"):
            pack(src, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()
    pack(src, tmp_path / "dst")


PEAK = """
import sys, torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from comoe import memory
from comoe.packing import pack

def source(folder, layers, experts, hidden):
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=hidden, moe_intermediate_size=hidden, num_hidden_layers=layers,
        num_experts=experts, num_experts_per_tok=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=64, head_dim=32,
    )
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)

root = sys.argv[1]
if sys.argv[2] == "make":
    source(root + "/small", 1, 4, 64)
    source(root + "/large", 8, 24, 512)
else:
    pack(root + "/small", root + "/small-packed")
    before = memory.rss()
    assert memory.reset_peak()
    pack(root + "/large", root + "/large-packed")
    print(memory.peak_rss() - before)
"""


@pytest.mark.slow
def test_one_layer_in_memory(tmp_path):
    """Eight layers of 38 MB; what the process grows by is two of them and not eight."""

    def run(what):
        command = [sys.executable, "-W", "ignore", "-c", PEAK, str(tmp_path), what]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    run("make")
    layer = Checkpoint(tmp_path / "large").block_bytes(0)
    assert layer == 24 * 3 * 512 * 512 * 2
    growth = int(run("pack"))
    assert growth <= 2 * layer + 60_000_000, f"{growth / layer:.1f} layers"
