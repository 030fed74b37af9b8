"""Damaged, hostile and merely wrong stores: each a StoreError that says what, and never a large allocation."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_helpers import SPEC, write_tiny_store

from comoe import _C
from comoe.store import Store, StoreError
from comoe.store import format as fmt

HEADER_BYTES = 256


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    write_tiny_store(folder)
    return folder


@pytest.fixture
def copy(good, tmp_path):
    """A store to be spoilt."""
    shutil.copytree(good / "experts", tmp_path / "experts")
    return tmp_path / "experts"


def rewrite_manifest(folder, change):
    """Applies `change` to the manifest and gives it a right checksum, as an attacker would."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    manifest["crc32c"] = "00000000"
    text = json.dumps(manifest)
    crc = _C.crc32c(text.encode())
    path.write_text(text.replace('"crc32c": "00000000"', f'"crc32c": "{crc:08x}"', 1))


def rewrite_layer(folder, change, layer="layer-00000.bin"):
    """Applies `change(header, records)` to a layer file, with right checksums here and in the manifest."""
    path = folder / layer
    raw = bytearray(path.read_bytes())
    header = np.frombuffer(raw, fmt.LAYER_HEADER, 1)[0]
    records = np.frombuffer(raw, fmt.RECORD, SPEC.num_experts * 5, HEADER_BYTES).reshape(-1, 5)
    nbytes = int(header["header_bytes"])
    change(header, records)
    header["header_crc32c"] = 0
    header["header_crc32c"] = _C.crc32c(raw[:nbytes])
    path.write_bytes(raw)
    crc = f"{header['header_crc32c']:08x}"
    rewrite_manifest(folder, lambda m: m["layers"][0].update(header_crc32c=crc))


def put(field, value):
    def change(header, records):
        header[field] = value

    return change


def put_record(field, value, expert=1, record=2):
    def change(header, records):
        records[expert, record][field] = value

    return change


def test_rewriting_alone_changes_nothing(copy):
    """The attacks below fail for their own reason, not for a checksum."""
    rewrite_layer(copy, lambda header, records: None)
    Store.open(copy)


# ---- manifest -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file",
    [
        "../layer-00000.bin",
        "/etc/passwd",
        "..",
        "",
        ".hidden",
        "a/../layer-00000.bin",
        "sub\\layer.bin",
        "nul\0.bin",
        "x" * 300,
        None,
        7,
        ["layer-00000.bin"],
    ],
)
def test_path_tricks(copy, file):
    (copy.parent / "layer-00000.bin").write_bytes((copy / "layer-00000.bin").read_bytes())
    rewrite_manifest(copy, lambda m: m["layers"][0].update(file=file))
    with pytest.raises(StoreError, match="plain name inside this folder"):
        Store.open(copy)


def test_a_link_out_of_the_folder(copy, tmp_path):
    os.rename(copy / "layer-00000.bin", tmp_path / "elsewhere.bin")
    os.symlink(tmp_path / "elsewhere.bin", copy / "layer-00000.bin")
    with pytest.raises(StoreError, match="link that leads out of its folder"):
        Store.open(copy)


def test_links_of_the_hub_cache_are_followed(good, tmp_path):
    """snapshots/<revision>/experts/<file> -> blobs/<hash>, as huggingface_hub lays downloads out."""
    snapshot, blobs = tmp_path / "snapshots/abc/experts", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in (good / "experts").iterdir():
        shutil.copy(path, blobs / f"hash-{path.stem}")
        os.symlink(f"../../../blobs/hash-{path.stem}", snapshot / path.name)
    assert len(Store.open(tmp_path / "snapshots/abc").layers) == 2


def test_a_store_behind_a_link_to_its_folder(good, tmp_path):
    os.symlink(good, tmp_path / "link")
    Store.open(tmp_path / "link")


@pytest.mark.timeout(10)
def test_a_pipe_is_not_waited_for(copy):
    os.unlink(copy / "layer-00000.bin")
    os.mkfifo(copy / "layer-00000.bin")
    with pytest.raises(StoreError, match="must be a regular file"):
        Store.open(copy)


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda m: m.update(version=2), "version 2 is newer .*pip install -U comoe"),
        (lambda m: m.update(version=0), "version must be 1"),
        (lambda m: m.update(version="1"), "version must be an integer"),
        (lambda m: m.update(version=True), "version must be an integer"),
        (lambda m: m.update(format="zip"), "not a comoe store"),
        (lambda m: m.update(page_bytes=5000), "multiple of 4096"),
        (lambda m: m.update(page_bytes=2**60), "page_bytes must be an integer in"),
        (lambda m: m.update(page_bytes=-4096), "page_bytes must be an integer in"),
        (lambda m: m.update(dense_bytes=1e9), "dense_bytes must be an integer"),
        (lambda m: m.update(layers=[]), "layers must be a list of 1"),
        (lambda m: m.update(layers={}), "layers must be a list of 1"),
        (lambda m: m.update(layers=[3]), "layers must be a list of 1"),
        (lambda m: m.update(layers=m["layers"] * 3000), "layers must be a list of 1"),
        (lambda m: m["layers"].append(m["layers"][0]), "two layers name the same file"),
        (lambda m: m["layers"].reverse(), "exchanged or renamed"),
        (lambda m: m["layers"][0].update(name="other"), "exchanged or renamed"),
        (lambda m: m["layers"][0].update(bytes=-1), "bytes must be an integer"),
        (lambda m: m["layers"][0].pop("header_crc32c"), "header_crc32c must be text"),
        (lambda m: m.pop("model_type"), "model_type must be text"),
        (lambda m: m["levels"].pop(), "last level must be 'exact' with mask 16"),
        (lambda m: m["levels"][4].update(mask=0b10), "last level must be 'exact'"),
        (lambda m: m["levels"][4].update(mask=0b1111), "same name or mask"),
        (lambda m: m["levels"].reverse(), "last level must be 'exact'"),
        (lambda m: m["levels"][1].update(name="2"), "same name or mask"),
        (lambda m: m["levels"][1].update(mask=0b10), "record 1 adds to record 0, .* lacks"),
        (lambda m: m["levels"][1].update(mask=0b10001), r"\(exact\) must be the level's only"),
        (lambda m: m["levels"][1].update(mask=1 << 5), "needs records .5., which no expert has"),
        (lambda m: m["levels"][1].update(mask=1 << 32), "mask must be an integer in"),
        (lambda m: m.update(levels=m["levels"] * 7), "levels must be a list of 1..32"),
    ],
)
def test_bad_manifests(copy, change, message):
    rewrite_manifest(copy, change)
    with pytest.raises(StoreError, match=message):
        Store.open(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "[" * 100_000, "\xff\xfe", "{}"])
def test_manifests_that_are_none(copy, text):
    (copy / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(StoreError, match=r"not JSON|not a comoe store"):
        Store.open(copy)


def test_an_edited_manifest(copy):
    path = copy / "manifest.json"
    path.write_text(path.read_text().replace('"tiny"', '"huge"'))
    with pytest.raises(StoreError, match="checksum does not match"):
        Store.open(copy)


def test_a_huge_manifest_is_not_read(copy):
    os.truncate(copy / "manifest.json", 1 << 40)  # sparse
    with pytest.raises(StoreError, match="larger than"):
        Store.open(copy)


def test_not_a_store(tmp_path):
    with pytest.raises(StoreError, match=r"not a comoe store.*comoe pack SRC DST"):
        Store.open(tmp_path)
    with pytest.raises(StoreError, match="not a comoe store"):
        Store.open(tmp_path / "missing")


def test_unknown_keys_are_kept(copy):
    rewrite_manifest(copy, lambda m: m.update(future=[1, 2]))
    assert Store.open(copy).manifest.extra["future"] == [1, 2]


# ---- layer files ----------------------------------------------------------------------------------


def test_missing_layer(copy):
    os.unlink(copy / "layer-00001.bin")
    with pytest.raises(StoreError, match=r"layer-00001.bin cannot be read.*copy it again"):
        Store.open(copy)


def test_exchanged_layers(copy):
    os.rename(copy / "layer-00000.bin", copy / "x")
    os.rename(copy / "layer-00001.bin", copy / "layer-00000.bin")
    os.rename(copy / "x", copy / "layer-00001.bin")
    with pytest.raises(StoreError, match="exchanged or renamed"):
        Store.open(copy)


def test_truncated_and_extended(copy):
    path = copy / "layer-00001.bin"
    size = path.stat().st_size
    for length in (0, 7, 100, 256, 1000, size - 4096, size - 1, size + 1, 1 << 40):
        os.truncate(path, length)
        with pytest.raises(StoreError, match=r"cut off|too long|not a layer"):
            Store.open(copy)


@pytest.mark.parametrize(
    "change,message",
    [
        (put("version", 2), "version 2 is newer"),
        (put("magic", b"SAFETENS"), "not a layer"),
        (put("num_experts", 2**32 - 1), "num_experts must be"),
        (put("num_experts", 16384), "name_offset or name_bytes"),
        (put("num_experts", 0), "num_experts must be"),
        (put("num_records", 2**32 - 1), "num_records must be"),
        (put("num_records", 4), "num_records must be"),
        (put("record_bytes", 32), "record_bytes must be"),
        (put("records_offset", 2**32 - 8), "name_offset or name_bytes"),
        (put("records_offset", 0), "records_offset"),
        (put("name_bytes", 2**31), "name_offset or name_bytes"),
        (put("name_offset", 2**32 - 1), "header_bytes is wrong"),
        (put("header_bytes", 2**32 - 1), "header_bytes is wrong"),
        (put("header_bytes", 8), "header_bytes is wrong"),
        (put("file_bytes", 2**63), "cut off"),
        (put("hidden", 2**40), "hidden must be"),
        (put("intermediate", 0), "intermediate must be"),
        (put("hidden", 72), "does not fit"),
        (put("gated", 0), "does not fit"),
        (put("gated", 2), "gated and biased"),
        (put("activation", 77), "activation 77 is unknown"),
        (put("exact_dtype", 9), "exact_dtype 9 is unknown to this comoe"),
        (put("exact_dtype", 0), "does not fit"),
        (put("alpha", np.nan), "must be finite"),
        (put("group_cols", 64), "groups 128"),
        (put("layer_idx", 1), "exchanged or renamed"),
        (put_record("offset", 2**64 - 4096), "record 2 of expert 1: offset is outside"),
        (put_record("offset", 2**63), "offset is outside"),
        (put_record("offset", 0), "offset is outside"),
        (put_record("offset", 12345), "multiple of 4096"),
        (put_record("offset", 4096), r"record \d of expert \d and record \d of expert \d overlap"),
        (put_record("nbytes", 2**64 - 1), "nbytes does not fit"),
        (put_record("nbytes", 0), "nbytes does not fit"),
        (put_record("kind", fmt.MEAN), "kind does not fit"),
        (put_record("kind", 600), "needs records of kind 600.*upgrade"),
        (put_record("parent", 7), "parent does not fit"),
        (put_record("params_offset", 64), "params_offset does not fit"),
    ],
)  # fmt: skip
def test_bad_headers_with_right_checksums(copy, change, message):
    tracemalloc.start()
    try:
        rewrite_layer(copy, change)
        with pytest.raises(StoreError, match=message):
            Store.open(copy)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_offset_of_the_last_extent_behind_the_end(copy):
    size = (copy / "layer-00000.bin").stat().st_size
    rewrite_layer(copy, put_record("offset", size, expert=2, record=4))
    with pytest.raises(StoreError, match="ends behind the end"):
        Store.open(copy)


def test_a_shared_extent_is_no_overlap(copy):
    def share(header, records):
        records[1, 4] = records[0, 4]
        records["shared_id"][:2, 4] = 0

    rewrite_layer(copy, share)
    store = Store.open(copy)
    assert store.payload(0, 0, 4) == store.payload(0, 1, 4)

    rewrite_layer(copy, put_record("shared_id", 1, expert=1, record=4))
    with pytest.raises(StoreError, match="record 4 of expert 0 and record 4 of expert 1 overlap"):
        Store.open(copy)


def with_sixth_record(folder, kind, flags):
    """A layer file of six records per expert, the last of a kind from the future, 4,096 bytes long."""
    path = folder / "layer-00000.bin"
    raw = path.read_bytes()
    header = np.frombuffer(raw, fmt.LAYER_HEADER, 1)[0].copy()
    old = np.frombuffer(raw, fmt.RECORD, 15, HEADER_BYTES).reshape(3, 5)
    records = np.zeros((3, 6), fmt.RECORD)
    records[:, :5] = old
    records["kind"][:, 5], records["flags"][:, 5], records["shared_id"][:, 5] = kind, flags, -1
    records["offset"][:, 5] = len(raw) + 4096 * np.arange(3)
    records["nbytes"][:, 5] = 100
    name = raw[int(header["name_offset"]) :][: int(header["name_bytes"])]
    header["num_records"] = 6
    header["name_offset"] = HEADER_BYTES + records.nbytes
    header["header_bytes"] = int(header["name_offset"]) + len(name)
    header["file_bytes"] = len(raw) + 3 * 4096
    header["header_crc32c"] = 0
    header["header_crc32c"] = _C.crc32c(header.tobytes() + records.tobytes() + name)
    head = header.tobytes() + records.tobytes() + name
    path.write_bytes(head + bytes(4096 - len(head)) + raw[4096:] + bytes(3 * 4096))
    crc = f"{header['header_crc32c']:08x}"
    size = int(header["file_bytes"])
    rewrite_manifest(folder, lambda m: m["layers"][0].update(header_crc32c=crc, bytes=size))


def test_a_kind_from_the_future_is_skipped_unless_it_is_required(copy):
    with_sixth_record(copy, kind=99, flags=0)
    store = Store.open(copy)
    assert store.layers[0].records.shape == (3, 6)
    assert not store.layers[0].records["nbytes"][:, 5].any()
    store.payload(0, 2, 4)


def test_a_required_kind_from_the_future_asks_for_an_upgrade(copy):
    with_sixth_record(copy, kind=99, flags=fmt.REQUIRED)
    with pytest.raises(StoreError, match=r"kind 99.*upgrade"):
        Store.open(copy)


# ---- flipped bits ---------------------------------------------------------------------------------


def flip(path, byte, bit):
    with open(path, "r+b") as file:
        file.seek(byte)
        value = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([value ^ 1 << bit]))


def read_everything(folder, **options):
    store = Store.open(folder, **options)
    for layer_idx, layer in enumerate(store.layers):
        for expert in range(layer.num_experts):
            for record in range(fmt.NUM_RECORDS):
                store.payload(layer_idx, expert, record)


def test_every_byte_of_the_header_is_guarded(copy):
    path = copy / "layer-00000.bin"
    end = int(np.fromfile(path, fmt.LAYER_HEADER, 1)[0]["header_bytes"])
    for byte in range(end):
        flip(path, byte, byte % 8)
        with pytest.raises(StoreError):
            Store.open(copy)
        flip(path, byte, byte % 8)
    Store.open(copy)


def test_every_byte_of_the_manifest_is_guarded(copy):
    path = copy / "manifest.json"
    for byte in range(path.stat().st_size):
        flip(path, byte, byte % 7)
        with pytest.raises(StoreError):
            Store.open(copy)
        flip(path, byte, byte % 7)
    Store.open(copy)


def test_flipped_bits_of_a_payload_are_found_when_it_is_read(copy):
    store = Store.open(copy)
    path, records = store.path(0), store.layers[0].records
    for record in range(fmt.NUM_RECORDS):
        entry = records[1, record]
        for byte in (0, int(entry["nbytes"]) // 2, int(entry["nbytes"]) - 1):
            flip(path, int(entry["offset"]) + byte, 3)
            place = re.escape(f"record {record} of expert 1: checksum")
            with pytest.raises(StoreError, match=place):
                store.payload(0, 1, record)
            store.payload(0, 0, record)  # its neighbours are whole
            assert len(Store.open(copy, verify=False).payload(0, 1, record)) == entry["nbytes"]
            flip(path, int(entry["offset"]) + byte, 3)


def test_a_file_cut_off_after_opening(copy):
    store = Store.open(copy)
    os.truncate(store.path(0), 8192)
    with pytest.raises(StoreError, match="bytes expected, got"):
        store.payload(0, 2, 4)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_fuzz_layer_header(copy, data):
    """Arbitrary changes to the header, checksums put right: opening works or is a StoreError."""
    path = copy / "layer-00000.bin"
    original, manifest = path.read_bytes(), (copy / "manifest.json").read_bytes()
    raw = bytearray(original)
    end = HEADER_BYTES + 15 * fmt.RECORD.itemsize + 30
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(8, end - 8))
        piece = data.draw(
            st.one_of(
                st.binary(min_size=1, max_size=8),
                st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]).map(
                    lambda v: v.to_bytes(8, "little")
                ),
            )
        )
        raw[at : at + len(piece)] = piece
    header = np.frombuffer(raw, fmt.LAYER_HEADER, 1)[0]
    header["header_crc32c"] = 0
    header["header_crc32c"] = _C.crc32c(raw[: min(int(header["header_bytes"]), len(raw))])
    try:
        path.write_bytes(raw)
        rewrite_manifest(
            copy, lambda m: m["layers"][0].update(header_crc32c=f"{header['header_crc32c']:08x}")
        )
        with contextlib.suppress(StoreError):
            read_everything(copy)
    finally:
        path.write_bytes(original)
        (copy / "manifest.json").write_bytes(manifest)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_fuzz_manifest(copy, data):
    original = (copy / "manifest.json").read_bytes()

    def change(m):
        target = data.draw(st.sampled_from([m, m["layers"][0], m["levels"][1]]))
        target[data.draw(st.sampled_from(sorted(target)))] = data.draw(json_values)

    try:
        rewrite_manifest(copy, change)
        with contextlib.suppress(StoreError):
            Store.open(copy)
    finally:
        (copy / "manifest.json").write_bytes(original)
