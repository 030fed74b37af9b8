"""Writing and reading a store: round trip, atomic files, resuming, full disks."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace

import numpy as np
import pytest
from store_helpers import SPEC, tiny_expert, tiny_experts, write_tiny_store

from comoe.store import LayerSpec, Store, StoreError, StoreWriter, inspect
from comoe.store import format as fmt
from comoe.store.writer import layer_file_bytes
from comoe_kernels import ladder_codec as codec


def payloads_of(store: Store, layer_idx: int, expert: int) -> list[np.ndarray]:
    return [np.frombuffer(store.payload(layer_idx, expert, r), np.uint8) for r in range(5)]


def shape_of(spec: LayerSpec) -> codec.Shape:
    return codec.Shape(
        spec.hidden, spec.intermediate, spec.gated, spec.biased, spec.exact_dtype_code
    )


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        replace(SPEC, biased=True, exact_dtype="float16"),
        replace(SPEC, gated=False, exact_dtype="float32", activation="relu"),
        replace(SPEC, activation="swigluoai", alpha=1.702, limit=7.0, biased=True),
        replace(SPEC, num_experts=1, hidden=8, intermediate=5, activation=None),
    ],
    ids=lambda s: f"{s.exact_dtype}-{s.activation}",
)
def test_round_trip(tmp_path, spec):
    write_tiny_store(tmp_path, [spec])
    store = Store.open(tmp_path)
    (layer,) = store.layers
    assert layer.name == "model.layers.0.mlp.experts"
    assert layer.records.shape == (spec.num_experts, fmt.NUM_RECORDS)
    for field in LayerSpec.__dataclass_fields__:
        assert getattr(layer, field) == pytest.approx(getattr(spec, field))
    for expert in range(spec.num_experts):
        matrices, biases = tiny_expert(spec, expert)
        payloads = payloads_of(store, 0, expert)
        for m, source in enumerate(matrices):
            exact = codec.decode_ref(shape_of(spec), payloads, codec.EXACT_LEVEL, m)
            np.testing.assert_array_equal(exact, source)
        for m, bias in enumerate(biases):
            exact = codec.bias_ref(shape_of(spec), payloads, codec.EXACT_LEVEL, m)
            np.testing.assert_array_equal(exact, bias)


def test_extents_are_aligned_padded_with_zeros_and_in_order(tmp_path):
    write_tiny_store(tmp_path)
    store = Store.open(tmp_path)
    raw = store.path(0).read_bytes()
    at = store.layers[0].records["offset"][0, 0]
    for record in store.layers[0].records.reshape(-1):
        assert record["offset"] == at and at % 4096 == 0
        end = int(record["offset"] + record["nbytes"])
        at = record["offset"] + fmt.padded(int(record["nbytes"]))
        assert not any(raw[end:at])
    assert len(raw) == at == layer_file_bytes(SPEC, store.layers[0].name)


def test_inspect(tmp_path):
    specs = [SPEC, replace(SPEC, num_experts=2, intermediate=130)]
    write_tiny_store(tmp_path, specs)
    found = inspect(tmp_path)
    assert found["version"] == 1 and found["layers"] == 2 and found["experts"] == 5
    assert found["dense_bytes"] == 1234
    assert [rung["name"] for rung in found["rungs"]] == ["2", "3", "4", "8", "exact"]
    weights = sum(s.num_experts * 3 * s.hidden * s.intermediate for s in specs)
    for level, rung in enumerate(found["rungs"]):
        assert rung["bytes"] == sum(
            s.num_experts * codec.expert_bytes(shape_of(s), level) for s in specs
        )
        assert rung["bits"] == pytest.approx(8 * rung["bytes"] / weights)
        assert rung["exact"] is (level == 4)  # 8 bits never counts as exact
    json.dumps(found)


def test_page_bytes_hold_whole_blocks_and_waste_little():
    for hidden, intermediate, gated in [(2048, 768, True), (768, 3072, False), (4096, 14336, True)]:
        geometry = LayerSpec(1, hidden, intermediate, gated).geometry
        sizes = np.array([geometry.record_bytes(r) for r in range(4)])
        page = fmt.choose_page_bytes(
            geometry.num_weights, [tuple(sizes[:level]) for level in range(1, 5)]
        )
        assert page % 4096 == 0
        assert (-(-sizes // page) * page).sum() <= 1.03 * sizes.sum()
        # A mean of 4 H bytes does not take a page of 100 KB.
        page = fmt.choose_page_bytes(geometry.num_weights, [(geometry.mean_bytes,), tuple(sizes)])
        assert page <= fmt.padded(geometry.mean_bytes)
    assert fmt.choose_page_bytes(120, [(4000,)]) == 4096


# ---- interruption and resuming --------------------------------------------------------------------


class Interrupted(Exception):
    pass


def interrupted_experts(spec: LayerSpec):
    yield tiny_expert(spec, 100)
    raise Interrupted


def start_and_stop(folder):
    writer = StoreWriter(folder)
    writer.add_layer(
        "model.layers.0.mlp.experts", SPEC, tiny_experts(SPEC, 0), fingerprint="source"
    )
    with pytest.raises(Interrupted):
        writer.add_layer("model.layers.1.mlp.experts", SPEC, interrupted_experts(SPEC))


def test_interrupted_packing_looks_unfinished_and_resumes(tmp_path):
    start_and_stop(tmp_path)
    assert sorted(os.listdir(tmp_path / "experts")) == ["layer-00000.bin"]
    with pytest.raises(StoreError, match="did not finish: run `comoe pack` again"):
        Store.open(tmp_path)
    before = os.stat(tmp_path / "experts/layer-00000.bin").st_mtime_ns
    assert write_tiny_store(tmp_path).skipped == 1
    assert os.stat(tmp_path / "experts/layer-00000.bin").st_mtime_ns == before
    assert len(Store.open(tmp_path).layers) == 2


def test_a_killed_process_leaves_a_part_that_is_ignored(tmp_path):
    folder = tmp_path / "experts"
    folder.mkdir()
    (folder / "layer-00000.bin.part").write_bytes(b"half of it")
    write_tiny_store(tmp_path)
    assert sorted(os.listdir(folder)) == ["layer-00000.bin", "layer-00001.bin", "manifest.json"]


def test_resume_encodes_again_what_is_not_the_same(tmp_path):
    start_and_stop(tmp_path)
    path = tmp_path / "experts/layer-00000.bin"

    def skipped(fingerprint="source", spec=SPEC, name="model.layers.0.mlp.experts"):
        writer = StoreWriter(tmp_path)
        writer.add_layer(name, spec, tiny_experts(spec, 0), fingerprint=fingerprint)
        return writer.skipped

    assert skipped() == 1
    assert skipped(fingerprint="another") == 0 and skipped(fingerprint="another") == 1
    assert skipped(spec=replace(SPEC, activation="silu")) == 0
    assert skipped(name="another.name") == 0
    os.truncate(path, path.stat().st_size - 1)
    assert skipped(name="another.name") == 0


def test_a_shorter_store_over_a_longer_one_leaves_no_old_layers(tmp_path):
    write_tiny_store(tmp_path, [SPEC] * 3)
    write_tiny_store(tmp_path, [SPEC])
    assert sorted(os.listdir(tmp_path / "experts")) == ["layer-00000.bin", "manifest.json"]


def test_progress_adds_up_to_the_files(tmp_path):
    for _ in range(2):  # written, then skipped
        seen = []
        writer = StoreWriter(tmp_path)
        writer.add_layer("experts", SPEC, tiny_experts(SPEC, 0), on_bytes=seen.append)
        assert sum(seen) == layer_file_bytes(SPEC, "experts")


@pytest.mark.parametrize("fails", ["fallocate", "write", "short", "fsync"])
def test_a_full_disk_says_what_is_needed_and_leaves_nothing(tmp_path, monkeypatch, fails):
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(*args):
        raise full

    real_pwrite, calls = os.pwrite, []

    def fail_late(fd, data, offset):
        calls.append(offset)
        if len(calls) > 2:
            raise full
        return real_pwrite(fd, data, offset)

    def short(fd, data, offset):
        calls.append(offset)
        return real_pwrite(fd, data[: len(data) // 2], offset)  # of one byte: none

    name, fake = {
        "fallocate": ("posix_fallocate", fail),
        "write": ("pwrite", fail_late),
        "short": ("pwrite", short),
        "fsync": ("fsync", fail),
    }[fails]
    monkeypatch.setattr(os, name, fake)
    with pytest.raises(
        StoreError, match=r"disk full .*needs [0-9,]+ bytes, [0-9,]+ are free.*run again"
    ):
        write_tiny_store(tmp_path)
    assert os.listdir(tmp_path / "experts") == []
    monkeypatch.undo()
    write_tiny_store(tmp_path)
    Store.open(tmp_path)


def test_too_little_space_is_seen_before_any_expert_is_encoded(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 10_000}))

    def experts():
        raise AssertionError("read an expert")
        yield

    with pytest.raises(StoreError, match=r"10,000 are free"):
        StoreWriter(tmp_path).add_layer("experts", SPEC, experts())


def test_short_writes_are_finished(tmp_path, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(
        os, "pwrite", lambda fd, data, at: real(fd, data[: max(1, len(data) // 3)], at)
    )
    write_tiny_store(tmp_path, [SPEC])
    store = Store.open(tmp_path)
    for expert in range(SPEC.num_experts):
        payloads_of(store, 0, expert)  # checksums


def test_an_unwritable_folder_is_a_clear_error(tmp_path):
    (tmp_path / "experts").write_text("a file in the way")
    with pytest.raises(StoreError, match="cannot write to"):
        StoreWriter(tmp_path)


@pytest.mark.parametrize(
    "experts,message",
    [
        (lambda: list(tiny_experts(SPEC, 0))[:2], "must have 3 experts, got 2"),
        (lambda: [*tiny_experts(SPEC, 0), tiny_expert(SPEC, 9)], "must have 3 experts, got more"),
        (lambda: [(tiny_expert(SPEC, 0)[0][:2], [])], r"expert 0: encode_expert: matrices must be"),
        (
            lambda: tiny_experts(replace(SPEC, hidden=48), 0),
            r"expected matrix 0 of shape \(24, 40\)",
        ),
        (lambda: tiny_experts(replace(SPEC, biased=True), 0), "without biases, got .* with"),
        (
            lambda: [([np.full_like(m, 0x7FC0) for m in tiny_expert(SPEC, 0)[0]], [])],
            "gate .*NaN at row 0",
        ),
    ],
)
def test_wrong_experts_are_named(tmp_path, experts, message):
    with pytest.raises(StoreError, match=f"'some.experts'.*{message}"):
        StoreWriter(tmp_path).add_layer("some.experts", SPEC, experts())
    assert os.listdir(tmp_path / "experts") == []


def test_wrong_specs_are_named():
    with pytest.raises(StoreError, match="activation must be None or one of"):
        replace(SPEC, activation="sine")
    with pytest.raises(StoreError, match=r"hidden must be 1\.\.16777216, got 0"):
        replace(SPEC, hidden=0)


def test_a_source_that_cannot_be_read_is_not_called_a_full_disk(tmp_path):
    def experts():
        yield tiny_expert(SPEC, 0)
        raise OSError(errno.EIO, "shard 3 cannot be read")

    with pytest.raises(OSError, match="shard 3"):
        StoreWriter(tmp_path).add_layer("experts", SPEC, experts())
    assert os.listdir(tmp_path / "experts") == []


@pytest.mark.parametrize("refused", ["open", "pwrite"])
def test_without_direct_writes_the_file_is_the_same(tmp_path, monkeypatch, refused):
    write_tiny_store(tmp_path / "a", [SPEC])
    real_open, real_pwrite, direct = os.open, os.pwrite, set()

    def open_(path, flags, *args, **kwargs):
        if flags & os.O_DIRECT and refused == "open":
            raise OSError(errno.EINVAL, "no direct I/O here")
        fd = real_open(path, flags, *args, **kwargs)
        (direct.add if flags & os.O_DIRECT else direct.discard)(fd)
        return fd

    def pwrite(fd, data, offset):
        if fd in direct:
            raise OSError(errno.EINVAL, "alignment")
        return real_pwrite(fd, data, offset)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "pwrite", pwrite)
    write_tiny_store(tmp_path / "b", [SPEC])
    a, b = ((tmp_path / x / "experts/layer-00000.bin").read_bytes() for x in "ab")
    assert a == b
