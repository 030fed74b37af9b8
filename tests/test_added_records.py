"""Records beyond the ladder: written, shared, copied, read back; and what a hostile file may say of them."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
from mixed_store import (
    LEVELS,
    mixed_records,
    ranks_of,
    reference_expert,
    shape_of,
    write_mixed_store,
)
from store_helpers import SPEC, tiny_expert
from test_store_checks import rewrite_manifest

from comoe import _C
from comoe.policy.plan import Levels
from comoe.store import (
    AddedRecord,
    Payloads,
    Store,
    StoreError,
    StoreWriter,
    copied_experts,
    inspect,
    write_losses,
)
from comoe.store import format as fmt
from comoe_kernels import ladder_codec as codec

MIXED = replace(SPEC, num_experts=4)
UNGATED = replace(
    MIXED, gated=False, biased=True, hidden=24, intermediate=40, exact_dtype="float32"
)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    write_mixed_store(folder, [MIXED, UNGATED])
    return folder


@pytest.fixture
def copy(good, tmp_path):
    shutil.copytree(good / "experts", tmp_path / "experts")
    return tmp_path / "experts"


# ---- codec ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("biased", [False, True])
def test_a_code_set_in_one_record_is_the_ladder_in_one_piece(bits, biased):
    """Primes, and a matrix of more than one group; the planes are those that encode_expert makes."""
    rng = np.random.default_rng(bits)
    shape = codec.Shape(131, 37, True, biased, codec.FP32)
    matrices = [rng.standard_normal(size).astype(np.float32) for size in shape.matrices]
    biases = [rng.standard_normal(r).astype(np.float32) for r, _ in shape.matrices if biased]
    ladder = _C.encode_expert(matrices, biases, codec.FP32, True)
    payload = _C.encode_coded(matrices, biases, bits)
    level = (2, 3, 4, 8).index(bits)
    assert len(payload) == shape.coded.record_bytes(0, level + 1)
    assert len(payload) == _C.Geometry(131, 37, True, biased, 0).coded_bytes(0, bits)
    for m in range(3):
        got = codec.decode_coded_ref(shape.coded, codec.chain_planes([(payload, bits)]), m)
        np.testing.assert_array_equal(got, codec.decode_ref(shape, ladder, level, m))
    at = shape.coded.plane_offset(0, 0, 0)
    np.testing.assert_array_equal(payload[:at], ladder[0][:at])


def test_low_rank_factors_come_back_within_their_bits():
    rng = np.random.default_rng(0)
    shape = codec.Shape(131, 37)
    factors = []
    for (rows, cols), r in zip(shape.matrices, (32, 0, 7), strict=True):
        factors.append((rng.standard_normal((rows, r)), rng.standard_normal((r, cols))))
    payload, ranks = codec.encode_low_rank(factors)
    assert ranks == (32, 0, 7)
    assert len(payload) == _C.Geometry(131, 37, True, False, 1).low_rank_bytes(ranks)
    for m, (u, v) in enumerate(factors):
        got = codec.low_rank_ref(shape, payload, ranks, m)
        assert np.linalg.norm(got - u @ v) <= 0.01 * np.linalg.norm(u @ v)


def test_bad_factors_and_sets():
    with pytest.raises(ValueError, match=r"U \[rows, rank\] and V \[rank, cols\]"):
        codec.encode_low_rank([(np.zeros((4, 3)), np.zeros((2, 5)))])
    with pytest.raises(ValueError, match="matrix 1 .* NaN or infinite"):
        _C.encode_coded([np.zeros((2, 2), np.float32), np.full((1, 1), np.inf, np.float32)], [], 8)
    with pytest.raises(ValueError, match="bits must be"):
        _C.encode_coded([np.zeros((2, 2), np.float32)], [], 5)
    geometry = _C.Geometry(40, 24, True, False, 1)
    with pytest.raises(ValueError, match=r"rank of matrix 0 \[24, 40\] must be in 0..32, got 33"):
        geometry.low_rank_bytes([33, 1, 1])
    with pytest.raises(ValueError, match="one rank per matrix"):
        geometry.low_rank_bytes([1, 1])


# ---- writing and reading --------------------------------------------------------------------------


def test_all_kinds_come_back(good):
    store = Store.open(good)
    assert store.levels == LEVELS
    for layer_idx, spec in enumerate([MIXED, UNGATED]):
        layer, added = store.layers[layer_idx], mixed_records(spec, layer_idx)
        for expert, own in enumerate(added):
            for r, record in enumerate(own, 5):
                if record is None:
                    assert layer.records["nbytes"][expert, r] == 0
                    assert store.payload(layer_idx, expert, r) == b""
                elif record.alias_of is not None:
                    same = store.payload(layer_idx, *record.alias_of)
                    assert store.payload(layer_idx, expert, r) == same != b""
                else:
                    wanted = record.payload() if callable(record.payload) else record.payload
                    assert store.payload(layer_idx, expert, r) == wanted.tobytes()
            exact, _, _ = reference_expert(store, layer_idx, expert, LEVELS.exact)
            matrices, _ = tiny_expert(spec, 100 * layer_idx + expert)
            for got, want in zip(exact, matrices, strict=True):
                wide = want if want.dtype == np.float32 else (want.astype(np.uint32) << 16)
                np.testing.assert_array_equal(got, wide.view(np.float32))


def test_who_has_which_level(good):
    has = Store.open(good).layers[0].has_levels(LEVELS)
    names = [[LEVELS.names[i] for i in np.flatnonzero(row)] for row in has]
    common = ["base", "base+lr", "2", "base+2", "8", "exact"]
    extra = [
        ["mean", "base3", "base+lr2", "other", "8g"],
        ["mean", "base3", "4g"],
        ["mean", "base+lr2", "4g"],
        ["other"],
    ]
    for got, own in zip(names, extra, strict=True):
        assert set(got) == {*common, *own}


def test_shared_records_lie_in_the_file_once(good):
    layer = Store.open(good).layers[0]
    offset = layer.records["offset"]
    assert offset[0, 5] == offset[1, 5] != offset[2, 5] == offset[3, 5]
    assert offset[0, 6] == offset[1, 6]
    assert offset[0, 13] == offset[1, 0] and offset[3, 13] == offset[2, 11]
    used = layer.records[layer.records["nbytes"] > 0]
    _, once = np.unique(used["offset"], return_index=True)
    extents = sum(fmt.padded(int(n)) for n in used["nbytes"][once])
    assert layer.file_bytes == int(used["offset"].min()) + extents


def test_inspect_counts_shared_bytes_once(good):
    store = Store.open(good)
    rungs = {rung["name"]: rung for rung in inspect(good)["rungs"]}
    assert rungs["mean"]["experts"] == 6 and rungs["exact"]["experts"] == 8
    assert rungs["mean"]["bytes"] == 3 * sum(layer.geometry.mean_bytes for layer in store.layers)
    assert rungs["base"]["bytes"] == 2 * sum(
        layer.geometry.coded_bytes(0, 2) for layer in store.layers
    )


def test_an_aggregated_store_is_made_from_a_packed_one(good, tmp_path):
    """Copied experts are the same bytes; one plane is replaced by another of the same size."""
    source = Store.open(good)
    mine = np.full(source.layers[0].geometry.record_bytes(3), 0x5A, np.uint8)

    def experts():
        for payloads in copied_experts(source, 0):
            yield Payloads([*payloads[:3], mine, payloads[4]])

    writer = StoreWriter(tmp_path)
    writer.add_layer("layers.0", MIXED, experts(), added=[[None]] * 4)
    writer.finish(model_type="tiny", source="", dense_bytes=0)
    store = Store.open(tmp_path)
    assert store.layers[0].records.shape == (4, 6)
    for expert in range(4):
        for r in (0, 1, 2, 4):
            assert store.payload(0, expert, r) == source.payload(0, expert, r)
        assert store.payload(0, expert, 3) == mine.tobytes()
    assert not store.layers[0].has_levels(Levels(("x", "exact"), (1 << 5, 16)))[:, 0].any()


def test_resuming_asks_for_the_same_records(tmp_path):
    def run(change=lambda added: added, fingerprint="a"):
        writer = StoreWriter(tmp_path)
        experts = (tiny_expert(MIXED, e) for e in range(4))
        added = change(mixed_records(MIXED))
        writer.add_layer("layers.0", MIXED, experts, added=added, fingerprint=fingerprint)
        return writer.skipped

    assert (run(), run()) == (0, 1)
    assert run(fingerprint="b") == 0
    assert run(lambda added: [own[:-1] for own in added], "b") == 0
    assert run(lambda added: [own[:-1] for own in added], "b") == 1


@pytest.mark.parametrize(
    "record,message",
    [
        (AddedRecord(fmt.PLANE, 5), "record 5: coded_bytes: bits must be"),
        (AddedRecord(fmt.PLANE, 1, parent=4), "coded_bytes: bits must be"),
        (AddedRecord(fmt.PLANE, 1, parent=5), "parent must be -1 or an earlier record"),
        (AddedRecord(fmt.PLANE, 2, payload=b"12"), r"expected a payload of [\d,]+ bytes"),
        (AddedRecord(fmt.PLANE, 2), r"expected a payload of [\d,]+ bytes .* got None"),
        (AddedRecord(fmt.LOW_RANK, 8, 0, ranks=(99, 1, 1)), "rank of matrix 0"),
        (AddedRecord(fmt.ALIAS, 2), "needs alias_of"),
        (AddedRecord(fmt.ALIAS, 2, alias_of=(1, 0)), "of another expert"),
        (AddedRecord(fmt.ALIAS, 2, alias_of=(0, 1)), "a record like itself"),
        (AddedRecord(17), "kind 17 is unknown"),
    ],
)
def test_bad_records_are_refused_when_written(tmp_path, record, message):
    experts = (tiny_expert(MIXED, e) for e in range(4))
    added = [[], [record], [], []]
    with pytest.raises(StoreError, match=message):
        StoreWriter(tmp_path).add_layer("layers.0", MIXED, experts, added=added)


def test_more_records_than_a_mask_has_bits(tmp_path):
    with pytest.raises(StoreError, match="may have 32 records, got 33"):
        StoreWriter(tmp_path).add_layer("x", MIXED, [], added=[[None] * 28] + [[]] * 3)
    with pytest.raises(StoreError, match=r"one list of records per expert \(4\), got 1"):
        StoreWriter(tmp_path).add_layer("x", MIXED, [], added=[[]])


# ---- hostile files --------------------------------------------------------------------------------


def rewrite_records(folder, change):
    """Applies `change(records [E, R])` to the first layer, with right checksums here and there."""
    path = folder / "layer-00000.bin"
    raw = bytearray(path.read_bytes())
    header = np.frombuffer(raw, fmt.LAYER_HEADER, 1)[0]
    count = int(header["num_experts"]) * int(header["num_records"])
    records = np.frombuffer(raw, fmt.RECORD, count, int(header["records_offset"]))
    change(records.reshape(int(header["num_experts"]), -1))
    header["header_crc32c"] = 0
    header["header_crc32c"] = _C.crc32c(raw[: int(header["header_bytes"])])
    path.write_bytes(raw)
    crc = f"{header['header_crc32c']:08x}"
    rewrite_manifest(folder, lambda m: m["layers"][0].update(header_crc32c=crc))


def put(expert, record, **fields):
    def change(records):
        for field, value in fields.items():
            records[expert, record][field] = value

    return change


def other_base(records):
    """Expert 0 shares the base of experts 2 and 3 by name only."""
    records[0, 5]["shared_id"] = records[2, 5]["shared_id"]


def overlap(records):
    records[0, 7]["offset"] = records[1, 7]["offset"]


def overlap_of_shared(records):
    """One extent, two shared ids."""
    for field in ("offset", "nbytes", "crc32c"):
        records[2:, 5][field] = records[0, 5][field]


def twice(records):
    """An expert whose residual is its own base again."""
    records[0, 7] = records[0, 5]


@pytest.mark.parametrize(
    "change,message",
    [
        (put(1, 6, parent=6), "record 6 of expert 1: parent must be -1 or an earlier"),
        (put(1, 6, parent=8), "parent must be -1 or an earlier"),
        (put(1, 6, parent=-2), "parent must be -1 or an earlier"),
        (put(1, 6, parent=2**31 - 1), "parent must be -1 or an earlier"),
        (put(1, 7, parent=4), "parent must be a coded record"),
        (put(1, 8, parent=4), "parent must be a coded or low-rank"),
        (put(3, 8, parent=6), "parent must be a coded or low-rank"),  # absent there
        (put(2, 9, parent=10), "parent must be -1 or an earlier"),
        (put(1, 6, bits=3), "bits does not fit"),
        (put(1, 7, bits=4), "nbytes does not fit"),
        (put(1, 7, bits=255), "bits does not fit"),
        (put(1, 7, kind=fmt.LOW_RANK), "a low-rank record needs a rank"),
        (put(1, 8, bits=5), "bits must be 2, 3, 4 or 8"),
        (put(1, 8, ranks=(64, 0, 40)), "rank of matrix 0"),
        (put(1, 8, ranks=(65535, 65535, 65535)), "rank of matrix 0"),
        (put(1, 8, ranks=(17, 0, 32)), "nbytes does not fit"),
        (put(1, 8, nbytes=2**63), "longer than the file"),
        (put(1, 10, parent=0), "a mean has no parent"),
        (put(1, 10, bits=1), "a mean has no parent and no bits"),
        (put(1, 10, nbytes=64), "nbytes does not fit"),
        (put(1, 7, replaces=1 << 7), "replaces must be a set of other records"),
        (put(1, 7, replaces=1 << 63), "replaces must be a set of other records"),
        (put(1, 7, params_offset=64), "params_offset must be 0"),
        (put(1, 7, params_nbytes=0), "params_nbytes is wrong"),
        (put(1, 5, shared_id=-1), "a shared base or an alias needs a shared_id"),
        (put(1, 5, offset=2**40), "offset is outside the file"),
        (put(1, 5, crc32c=1), "has the shared_id of a record that is not the same"),
        (other_base, "has the shared_id of a record that is not the same"),
        (overlap, "record 7 of expert 0 and record 7 of expert 1 overlap"),
        (overlap_of_shared, "overlap"),
        (twice, "another record with this shared_id"),
        (put(1, 7, kind=99), "needs records of kind 99"),
    ],
)
def test_bad_records_with_right_checksums(copy, change, message):
    rewrite_records(copy, change)
    with pytest.raises(StoreError, match=message):
        Store.open(copy)


def test_records_that_go_missing_take_their_levels_with_them(copy):
    """Unknown kinds that are not required, and sizes of 0."""
    rewrite_records(copy, put(slice(None), 8, kind=99, flags=0))
    rewrite_records(copy, put(slice(None), 9, nbytes=0))
    with pytest.raises(StoreError, match="level 'base.lr' .* no expert has"):
        rewrite_manifest(copy, lambda m: m["layers"].pop())
        Store.open(copy)
    keep = [n not in ("base+lr", "base+lr2") for n in LEVELS.names]
    levels = [
        {"name": n, "mask": m}
        for n, m, k in zip(LEVELS.names, LEVELS.masks, keep, strict=True)
        if k
    ]
    rewrite_manifest(copy, lambda m: m.update(levels=levels))
    assert not Store.open(copy).layers[0].records["nbytes"][:, 8:10].any()


@pytest.mark.parametrize(
    "mask,message",
    [
        (1 << 6, "record 6 adds to record 5, which the level lacks"),
        (1 << 8, "record 8 adds to record 5"),
        (1 << 5 | 1 << 9, "record 9 adds to record 8"),
        (1 << 31, "which no expert has"),
        (1 << 13 | 1 << 4, "only record"),
        (1 << 12 | 1 << 11, "no expert has"),  # each has one of them
    ],
)
def test_masks_that_make_no_sense(copy, mask, message):
    rewrite_manifest(copy, lambda m: m["levels"][3].update(mask=mask))
    with pytest.raises(StoreError, match=message):
        Store.open(copy)


def test_two_planes_on_one_make_no_level(tmp_path):
    shape = shape_of(MIXED)
    plane = np.zeros(shape.coded.record_bytes(1, 2), np.uint8)
    own = [AddedRecord(fmt.PLANE, 1, parent=0, payload=plane)]
    writer = StoreWriter(tmp_path)
    experts = (tiny_expert(MIXED, e) for e in range(4))
    writer.add_layer("layers.0", MIXED, experts, added=[own] * 4)
    with pytest.raises(StoreError, match="two records of the level add to record 0"):
        writer.finish(
            model_type="", source="", dense_bytes=0, levels=Levels(("x", "exact"), (0b100011, 16))
        )


# ---- losses ---------------------------------------------------------------------------------------


def losses_of(store):
    has = np.concatenate([layer.has_levels(store.levels) for layer in store.layers])
    count = len(has)
    return {
        "levels": np.array(store.levels.names),
        "layer": np.repeat(np.arange(2), 4).astype(np.int32),
        "expert": np.tile(np.arange(4), 2).astype(np.int32),
        "loss": np.where(has, np.float32(0.5), np.float32("nan")),
        "use": np.full(count, 0.25, np.float32),
        "floor": np.zeros(count, np.uint8),
        "curve_fraction": np.array([0.1, 1.0], np.float32),
        "curve_level": np.stack([np.argmax(has, 1), np.full(count, 11)]).astype(np.uint8),
        "curve_loss": np.array([0.5, 0.0], np.float32),
        "curve_bytes": np.array([1000, 10_000], np.int64),
    }


def test_losses_are_part_of_the_store(copy):
    assert Store.open(copy).losses() is None
    wanted = losses_of(Store.open(copy))
    write_losses(copy, wanted)
    write_losses(copy, wanted)  # again
    got = Store.open(copy).losses()
    assert got.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(got[name], array)


@pytest.mark.parametrize(
    "name,change,message",
    [
        ("loss", lambda a: a[:, 1:], r"loss must be of shape \[8, 12\], is \(8, 11\)"),
        ("loss", lambda a: a.astype(np.float64), "loss must be float32"),
        ("loss", lambda a: a * np.float32("nan"), "loss must be finite"),
        ("levels", lambda a: a[::-1], "levels must be"),
        ("expert", lambda a: a[::-1].copy(), "every expert of every layer in order"),
        ("curve_level", lambda a: a * 0, "a level that the expert does not have"),
        ("curve_level", lambda a: a + 100, "curve_level must be less than 12"),
        ("curve_fraction", lambda a: a[::-1].copy(), "curve_fraction must ascend"),
        ("curve_loss", lambda a: a[:1], r"curve_loss must be of shape \[2\]"),
        ("floor", lambda a: a + 12, "floor must be less"),
    ],
)
def test_losses_that_do_not_fit(copy, name, change, message):
    arrays = losses_of(Store.open(copy))
    arrays[name] = change(arrays[name])
    with pytest.raises(StoreError, match=message):
        write_losses(copy, arrays)


def test_damaged_losses(copy):
    write_losses(copy, losses_of(Store.open(copy)))
    path = copy / "losses.npz"
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + b"x")
    with pytest.raises(StoreError, match="checksum does not match"):
        Store.open(copy).losses()
    path.write_bytes(raw[:-1])
    with pytest.raises(StoreError, match="bytes long"):
        Store.open(copy).losses()
    path.write_bytes(b"not a zip")
    crc = f"{_C.crc32c(b'not a zip'):08x}"
    rewrite_manifest(copy, lambda m: m["losses"].update(bytes=9, crc32c=crc))
    with pytest.raises(StoreError, match="not a file of arrays"):
        Store.open(copy).losses()
    rewrite_manifest(copy, lambda m: m["losses"].update(file="../losses.npz"))
    with pytest.raises(StoreError, match="plain name"):
        Store.open(copy).losses()


def test_ranks_of_the_helper_are_uneven():
    assert ranks_of(MIXED) == (16, 0, 32) and ranks_of(UNGATED) == (0, 32)
