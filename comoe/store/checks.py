"""Everything that a reader checks before it believes a file. Sizes come before allocations."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from comoe import _C
from comoe.policy.plan import Levels
from comoe.store import format as fmt
from comoe.store.format import LayerInfo, Manifest, StoreError
from comoe.store.parts import parts_of, records_of

DAMAGED = "the file is damaged or was changed; pack the model again"


def check_version(version: int, what: str) -> None:
    if version > fmt.VERSION:
        raise StoreError(
            f"{what}: format version {version} is newer than this comoe reads ({fmt.VERSION}); "
            "upgrade with `pip install -U comoe`"
        )
    if version < 1:
        raise StoreError(
            f"{what}: format version must be 1..{fmt.VERSION}, got {version}; {DAMAGED}"
        )


def safe_path(folder: Path, name: Any) -> Path:
    """The regular file `name` right inside `folder`."""
    if (
        not isinstance(name, str)
        or not 0 < len(name) <= 255
        or name.startswith(".")
        or any(c in name for c in "/\\\0")
    ):
        raise StoreError(
            f"{folder}: a layer's file must be a plain name inside this folder, got {name!r}"
        )
    path = folder / name
    try:
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
    except OSError as error:
        raise StoreError(
            f"{path} cannot be read ({error.strerror}); copy it again or pack the model again"
        ) from error
    if real.parent != folder.resolve() and not _is_hub_blob(folder, real):
        raise StoreError(
            f"{path} is a link that leads out of its folder, to {real}; replace it by the file itself"
        )
    if not stat.S_ISREG(mode):
        raise StoreError(f"{path} must be a regular file")
    return path


def _is_hub_blob(folder: Path, real: Path) -> bool:
    """Hugging Face's cache: .../snapshots/<revision>/experts/* are links to .../blobs/<hash>."""
    for parent in folder.resolve().parents:
        if parent.name == "snapshots":
            return real.parent == parent.parent / "blobs"
    return False


def read_manifest(folder: Path) -> Manifest:
    path = folder / fmt.MANIFEST_FILE
    if not path.exists():
        unfinished = any(folder.glob("layer-*.bin*"))
        raise StoreError(
            f"{folder} is not a comoe store: {fmt.MANIFEST_FILE} is missing"
            + (
                "; packing did not finish: run `comoe pack` again, it resumes"
                if unfinished
                else "; make one with `comoe pack SRC DST`"
            )
        )
    path = safe_path(folder, fmt.MANIFEST_FILE)
    if path.stat().st_size > fmt.MAX_MANIFEST_BYTES:
        raise StoreError(f"{path}: larger than {fmt.MAX_MANIFEST_BYTES:,} bytes; {DAMAGED}")
    raw = path.read_bytes()
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path}: not JSON ({error}); {DAMAGED}") from error
    if not isinstance(found, dict) or found.get("format") != fmt.MANIFEST_FORMAT:
        raise StoreError(f'{path}: not a comoe store ("format" must be "{fmt.MANIFEST_FORMAT}")')
    check_version(_integer(found, "version", 0, 2**31, path), str(path))
    if not _crc_fits(raw, found):
        raise StoreError(f"{path}: checksum does not match; {DAMAGED}")
    return _manifest_of(found, path)


def _crc_fits(raw: bytes, found: dict) -> bool:
    crc = found.get("crc32c")
    zeroed = raw.replace(f'"crc32c": "{crc}"'.encode(), b'"crc32c": "00000000"', 1)
    return isinstance(crc, str) and crc == f"{_C.crc32c(zeroed):08x}"


def manifest_is_whole(raw: bytes) -> bool:
    """Whether these are the bytes of some store's manifest, undamaged."""
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        return False
    return (
        isinstance(found, dict)
        and found.get("format") == fmt.MANIFEST_FORMAT
        and _crc_fits(raw, found)
    )


def _integer(found: dict, key: str, low: int, high: int, where: Any) -> int:
    value = found.get(key)
    if type(value) is not int or not low <= value <= high:
        raise StoreError(
            f"{where}: {key} must be an integer in {low}..{high}, got {value!r}; {DAMAGED}"
        )
    return value


def _text(found: dict, key: str, where: Any) -> str:
    value = found.get(key)
    if not isinstance(value, str):
        raise StoreError(f"{where}: {key} must be text, got {value!r}; {DAMAGED}")
    return value


def _list(found: dict, key: str, limit: int, where: Any) -> list[dict]:
    value = found.get(key)
    if (
        not isinstance(value, list)
        or not 1 <= len(value) <= limit
        or not all(isinstance(v, dict) for v in value)
    ):
        raise StoreError(f"{where}: {key} must be a list of 1..{limit} objects; {DAMAGED}")
    return value


def _manifest_of(found: dict, path: Path) -> Manifest:
    layers = _list(found, "layers", fmt.MAX_LAYERS, path)
    for layer in layers:
        _text(layer, "name", path)
        _integer(layer, "bytes", 1, 2**62, path)
        _text(layer, "header_crc32c", path)
    files = [layer.get("file") for layer in layers]
    if len({str(f) for f in files}) != len(files):
        raise StoreError(f"{path}: two layers name the same file; {DAMAGED}")
    levels = _levels_of(found, path)
    page_bytes = _integer(found, "page_bytes", fmt.ALIGNMENT, fmt.MAX_PAGE_BYTES, path)
    if page_bytes % fmt.ALIGNMENT:
        raise StoreError(
            f"{path}: page_bytes must be a multiple of {fmt.ALIGNMENT}, got {page_bytes}; {DAMAGED}"
        )
    known = (
        "format",
        "version",
        "crc32c",
        "comoe_version",
        "model_type",
        "source",
        "page_bytes",
        "dense_bytes",
        "layers",
        "levels",
    )
    return Manifest(
        version=found["version"],
        comoe_version=_text(found, "comoe_version", path),
        model_type=_text(found, "model_type", path),
        source=_text(found, "source", path),
        page_bytes=page_bytes,
        dense_bytes=_integer(found, "dense_bytes", 0, 2**62, path),
        layers=layers,
        levels=levels,
        extra={key: value for key, value in found.items() if key not in known},
    )


def _levels_of(found: dict, path: Path) -> Levels:
    levels = _list(found, "levels", fmt.MAX_RECORDS, path)
    for level in levels:
        _text(level, "name", path)
        _integer(level, "mask", 1, 2**fmt.MAX_RECORDS - 1, path)
    names = tuple(level["name"] for level in levels)
    masks = tuple(level["mask"] for level in levels)
    if len(set(names)) != len(names) or len(set(masks)) != len(masks):
        raise StoreError(f"{path}: two levels have the same name or mask; {DAMAGED}")
    if (names[-1], masks[-1]) != ("exact", 1 << fmt.EXACT_RECORD):
        raise StoreError(
            f"{path}: the last level must be 'exact' with mask {1 << fmt.EXACT_RECORD}, "
            f"got {names[-1]!r} with {masks[-1]}; {DAMAGED}"
        )
    return Levels(names, masks)


def check_levels(levels: Levels, layers: Sequence[LayerInfo], what: str) -> None:
    """Every level belongs to some expert, and makes sense for each expert that has all its records."""
    has_one = np.zeros(len(levels), bool)
    for layer in layers:
        has = layer.has_levels(levels)
        has_one |= has.any(axis=0)
        fields = [layer.records[f].astype(np.int64) for f in ("kind", "parent", "nbytes")]
        _, first = np.unique(np.stack(fields, axis=2), axis=0, return_index=True)
        for expert in first:
            for level in np.flatnonzero(has[expert]):
                try:
                    parts_of(layer.records[expert], levels.masks[level])
                except ValueError as error:
                    raise StoreError(
                        f"{what}: level {levels.names[level]!r} (mask {levels.masks[level]:#b}) does not fit "
                        f"expert {expert} of layer {layer.name!r}: {error}; {DAMAGED}"
                    ) from error
    if not has_one.all():
        lost = int(np.flatnonzero(~has_one)[0])
        raise StoreError(
            f"{what}: level {levels.names[lost]!r} needs records {records_of(levels.masks[lost])}, "
            f"which no expert has; {DAMAGED}"
        )


def parse_layer_header(file: BinaryIO, size: int, what: str) -> LayerInfo:
    """Reads and checks the header of a layer file of `size` bytes; `what` names it in errors."""

    def require(good: bool, problem: str) -> None:
        if not good:
            raise StoreError(f"{what}: {problem}; {DAMAGED}")

    file.seek(0)
    raw = file.read(fmt.LAYER_HEADER.itemsize)
    if len(raw) < fmt.LAYER_HEADER.itemsize or raw[:8] != fmt.LAYER_MAGIC:
        raise StoreError(
            f"{what}: not a layer of a comoe store (it must begin with {fmt.LAYER_MAGIC!r})"
        )
    head = {
        name: value
        for name, value in zip(
            fmt.LAYER_HEADER.names, np.frombuffer(raw, fmt.LAYER_HEADER)[0].item(), strict=True
        )
    }
    check_version(head["version"], what)
    require(
        head["file_bytes"] == size,
        f"must be {head['file_bytes']:,} bytes long, is {size:,} ({'cut off' if size < head['file_bytes'] else 'too long'})",
    )
    experts, num_records, nbytes = head["num_experts"], head["num_records"], head["header_bytes"]
    require(
        1 <= experts <= fmt.MAX_EXPERTS, f"num_experts must be 1..{fmt.MAX_EXPERTS}, got {experts}"
    )
    require(
        fmt.NUM_RECORDS <= num_records <= fmt.MAX_RECORDS,
        f"num_records must be {fmt.NUM_RECORDS}..{fmt.MAX_RECORDS}, got {num_records}",
    )
    require(
        head["record_bytes"] == fmt.RECORD.itemsize,
        f"record_bytes must be {fmt.RECORD.itemsize}, got {head['record_bytes']}",
    )
    table = experts * num_records * fmt.RECORD.itemsize
    at, name_at, name_bytes = head["records_offset"], head["name_offset"], head["name_bytes"]
    require(at >= fmt.LAYER_HEADER.itemsize and at % 8 == 0, f"records_offset {at} is wrong")
    require(
        name_at >= at + table and name_bytes <= fmt.MAX_NAME_BYTES,
        "name_offset or name_bytes is wrong",
    )
    require(name_at + name_bytes <= nbytes <= size, "header_bytes is wrong")
    require(nbytes <= at + table + 2 * fmt.MAX_NAME_BYTES, "header_bytes is wrong")

    text = bytearray(raw + file.read(nbytes - len(raw)))
    require(len(text) == nbytes, "header is cut off")
    crc_at = fmt.LAYER_HEADER.fields["header_crc32c"][1]
    text[crc_at : crc_at + 4] = bytes(4)
    require(_C.crc32c(text) == head["header_crc32c"], "checksum of the header does not match")

    require(head["gated"] <= 1 and head["biased"] <= 1, "gated and biased must be 0 or 1")
    require(
        head["exact_dtype"] < len(fmt.EXACT_DTYPES),
        f"exact_dtype {head['exact_dtype']} is unknown to this comoe (a newer one may know it)",
    )
    activation = head["activation"]
    require(
        activation == fmt.NO_ACTIVATION or activation < len(fmt.ACTIVATIONS),
        f"activation {activation} is unknown",
    )
    require(
        math.isfinite(head["alpha"]) and math.isfinite(head["limit"]),
        "alpha and limit must be finite",
    )
    require(
        (head["block_rows"], head["block_cols"], head["group_cols"]) == (16, 32, 128),
        "blocks must be 16 x 32 and groups 128 columns",
    )
    for field in ("hidden", "intermediate"):
        require(
            1 <= head[field] <= fmt.MAX_SIZE,
            f"{field} must be 1..{fmt.MAX_SIZE}, got {head[field]}",
        )
    try:
        name = bytes(text[name_at : name_at + name_bytes]).decode()
    except UnicodeDecodeError:
        require(False, "name is not UTF-8")
    records = np.frombuffer(text[at : at + table], fmt.RECORD).reshape(experts, num_records)
    info = LayerInfo(
        num_experts=experts,
        hidden=head["hidden"],
        intermediate=head["intermediate"],
        gated=bool(head["gated"]),
        biased=bool(head["biased"]),
        activation=None if activation == fmt.NO_ACTIVATION else fmt.ACTIVATIONS[activation],
        alpha=head["alpha"],
        limit=head["limit"],
        exact_dtype=fmt.EXACT_DTYPES[head["exact_dtype"]],
        name=name,
        layer_idx=head["layer_idx"],
        file=what,
        file_bytes=size,
        header_crc32c=head["header_crc32c"],
        fingerprint=bytes(head["fingerprint"]),
        records=records,
    )
    check_records(records, info.geometry, nbytes, size, what)
    records.flags.writeable = False
    return info


def check_records(
    records: np.ndarray, geometry: _C.Geometry, header_bytes: int, size: int, what: str
) -> None:
    """Kinds, sizes and places of all records of a layer file, [E, R]. Records that an expert does not
    have, or whose kind is unknown and not required, become empty."""
    require = _Require(records, what)
    unknown = records["kind"] > fmt.ALIAS
    if (unknown & (records["flags"] & fmt.REQUIRED != 0)).any():
        kind = int(records["kind"][unknown].max())
        raise StoreError(
            f"{what}: needs records of kind {kind}, which this comoe does not know; upgrade comoe"
        )

    # The ladder that packing writes: exactly these kinds, bits and sizes.
    want = np.broadcast_to(fmt.ladder_records(geometry), (len(records), fmt.NUM_RECORDS))
    ladder = records[:, : fmt.NUM_RECORDS]
    for field in ("kind", "bits", "parent", "replaces", "nbytes", "params_offset", "params_nbytes"):
        require(ladder[field] == want[field], f"{field} does not fit the layer's shape")

    absent = unknown | (records["nbytes"] == 0)
    empty = np.zeros((), fmt.RECORD)
    empty["parent"] = empty["shared_id"] = -1
    records[absent] = empty

    offset, nbytes = records["offset"], records["nbytes"]
    require(offset % fmt.ALIGNMENT == 0, f"offset must be a multiple of {fmt.ALIGNMENT}")
    require(((offset >= header_bytes) & (offset <= size)) | absent, "offset is outside the file")
    # Both are at most `size` < 2^62 from here on, so nothing below wraps.
    require(nbytes <= size, "longer than the file")
    extent = -(-nbytes.astype(np.int64) // fmt.ALIGNMENT) * fmt.ALIGNMENT
    require(offset.astype(np.int64) + extent <= size, "ends behind the end of the file")
    begins = _check_added(records, absent, geometry, require)
    _check_shared(records, begins, require)
    _check_overlaps(records.reshape(-1), extent.reshape(-1), records.shape[1], what)


class _Require:
    """require(good, problem): StoreError for the first record where `good` [E, R] is false."""

    def __init__(self, records: np.ndarray, what: str):
        self.shape, self.what = records.shape, what

    def __call__(self, good: np.ndarray, problem: str, record: int | None = None) -> None:
        if good.all():
            return
        if record is None:
            expert, record = np.argwhere(~good)[0][:2]
        else:
            expert = np.flatnonzero(~good)[0]
        raise StoreError(f"{self.what}: record {record} of expert {expert}: {problem}; {DAMAGED}")


def _check_added(
    records: np.ndarray, absent: np.ndarray, geometry: _C.Geometry, require: _Require
) -> np.ndarray:
    """Parents, bits and sizes of the records behind the ladder. Returns the bits of a code that are
    known before each coded record, int64 [E, R]."""
    experts, num_records = records.shape
    known = np.zeros(records.shape, np.int64)  # bits of a code after each coded record, else 0
    known[:, :4] = fmt.KNOWN_BITS
    begins = np.zeros(records.shape, np.int64)
    begins[:, 1:4] = fmt.KNOWN_BITS[:3]
    is_low_rank = np.zeros(records.shape, bool)
    params = geometry.blocks_offset(0, 0)
    rows = np.arange(experts)
    for r in range(fmt.NUM_RECORDS, num_records):
        record, here = records[:, r], ~absent[:, r]
        kind, parent, bits = record["kind"], record["parent"], record["bits"].astype(np.int64)
        # Parents come first, so no chain of them can close.
        require((parent >= -1) & (parent < r), "parent must be -1 or an earlier record", r)
        require(
            (record["replaces"] >> np.uint64(num_records) == 0)
            & (record["replaces"] >> np.uint64(r) & np.uint64(1) == 0),
            "replaces must be a set of other records",
            r,
        )
        require(
            (record["shared_id"] >= 0) | ~here | ((kind != fmt.SHARED_BASE) & (kind != fmt.ALIAS)),
            "a shared base or an alias needs a shared_id",
            r,
        )
        known_before = np.where(parent >= 0, known[rows, parent], 0)
        size, params_size = np.zeros(experts, np.int64), np.zeros(experts, np.int64)

        coded = here & np.isin(kind, fmt.CODED)
        require(~coded | (parent < 0) | (known_before > 0), "parent must be a coded record", r)
        after = known_before + bits
        require(~coded | np.isin(after, fmt.KNOWN_BITS), "bits does not fit what it adds to", r)
        for first, last in {*zip(known_before[coded].tolist(), after[coded].tolist(), strict=True)}:
            chosen = coded & (known_before == first) & (after == last)
            size[chosen] = geometry.coded_bytes(first, last)
            params_size[chosen] = params if first == 0 else 0
        known[:, r] = np.where(coded, after, 0)
        begins[:, r] = np.where(coded, known_before, 0)

        low_rank = here & (kind == fmt.LOW_RANK)
        fits = (known_before > 0) | is_low_rank[rows, parent] | (parent < 0)
        require(~low_rank | fits, "parent must be a coded or low-rank record", r)
        require(~low_rank | np.isin(bits, fmt.KNOWN_BITS), "bits must be 2, 3, 4 or 8", r)
        require(~low_rank | record["ranks"].any(axis=1), "a low-rank record needs a rank", r)
        keys = np.concatenate([bits[:, None], record["ranks"]], axis=1)
        for key in {*map(tuple, keys[low_rank].tolist())}:
            chosen = low_rank & (keys == key).all(axis=1)
            try:
                if any(key[1 + geometry.num_matrices :]):
                    raise ValueError("low rank: a rank for a matrix that the expert lacks")
                ranks = key[1 : 1 + geometry.num_matrices]
                size[chosen] = geometry.low_rank_bytes(ranks, key[0])
                params_size[chosen] = geometry.low_rank_params_bytes(ranks)
            except ValueError as error:
                require(~chosen, str(error), r)
        is_low_rank[:, r] = low_rank

        mean = here & (kind == fmt.MEAN)
        require(~mean | ((parent < 0) & (bits == 0)), "a mean has no parent and no bits", r)
        size[mean] = geometry.mean_bytes
        require(
            record["nbytes"].astype(np.int64) == size, "nbytes does not fit the layer's shape", r
        )
        require(record["params_offset"] == 0, "params_offset must be 0", r)
        require(
            record["params_nbytes"].astype(np.int64) == params_size, "params_nbytes is wrong", r
        )
    return begins


def _check_shared(records: np.ndarray, begins: np.ndarray, require: _Require) -> None:
    """Records with one shared id are one record: the same bytes that mean the same, once per expert."""
    flat = records.reshape(-1)
    shared = np.flatnonzero((flat["nbytes"] > 0) & (flat["shared_id"] >= 0))
    ids = flat["shared_id"][shared]
    _, first, group = np.unique(ids, return_index=True, return_inverse=True)
    one = shared[first[group.ravel()]]
    # An alias of a plane, and a base of planes, differ in name only.
    role = np.where(np.isin(flat["kind"], fmt.CODED), fmt.PLANE, flat["kind"])
    same = (role[shared] == role[one]) & (begins.reshape(-1)[shared] == begins.reshape(-1)[one])
    for field in ("offset", "nbytes", "crc32c", "bits"):
        same &= flat[field][shared] == flat[field][one]
    same &= (flat["ranks"][shared] == flat["ranks"][one]).all(axis=1)
    good = np.ones(flat.shape, bool)
    good[shared] = same
    require(
        good.reshape(records.shape),
        "has the shared_id of a record that is not the same as this one",
    )
    owner = np.stack([shared // records.shape[1], ids.astype(np.int64)], axis=1)
    _, kept = np.unique(owner, axis=0, return_index=True)
    good[shared] = False
    good[shared[kept]] = True
    require(good.reshape(records.shape), "the expert has another record with this shared_id")


def _check_overlaps(records: np.ndarray, extent: np.ndarray, num_records: int, what: str) -> None:
    """Extents may coincide only when their records say so by one shared id; else they must not touch."""
    used = np.flatnonzero(extent)
    order = used[np.lexsort((records["shared_id"][used], records["offset"][used]))]
    start = records["offset"][order].astype(np.int64)
    end = start + extent[order]
    same = (start[1:] == start[:-1]) & (end[1:] == end[:-1])
    shared = records["shared_id"][order]
    allowed = same & (shared[1:] == shared[:-1]) & (shared[1:] >= 0)
    bad = np.flatnonzero((start[1:] < end[:-1]) & ~allowed)
    if len(bad):
        (e0, r0), (e1, r1) = (divmod(int(order[i]), num_records) for i in (bad[0], bad[0] + 1))
        raise StoreError(
            f"{what}: record {r0} of expert {e0} and record {r1} of expert {e1} overlap; {DAMAGED}"
        )


def check_layer(folder: Path, entry: dict, layer_idx: int) -> LayerInfo:
    """Opens and checks the layer file of a manifest entry."""
    path = safe_path(folder, entry.get("file"))
    try:
        with open(path, "rb") as file:
            info = parse_layer_header(file, os.fstat(file.fileno()).st_size, str(path))
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error}") from error
    expected = (entry["name"], entry["bytes"], entry["header_crc32c"], layer_idx)
    got = (info.name, info.file_bytes, f"{info.header_crc32c:08x}", info.layer_idx)
    if expected != got:
        raise StoreError(
            f"{path}: not the file that the manifest means: expected name, bytes, checksum and layer {expected}, got {got}; "
            "layer files were exchanged or renamed, or belong to another store"
        )
    return info
