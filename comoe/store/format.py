"""Constants and binary structures of the store. The same in words: docs/format.md."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from comoe import _C
from comoe.policy.plan import Levels

VERSION = 1
EXPERTS_FOLDER = "experts"
MANIFEST_FILE = "manifest.json"
LOSSES_FILE = "losses.npz"
MANIFEST_FORMAT = "comoe-store"
LAYER_MAGIC = b"COMOELYR"
ALIGNMENT = 4096  # of extents in a layer file, and of page_bytes

# Limits that a reader checks before it believes a count. Far above any model that exists.
MAX_LAYERS = 4096
MAX_EXPERTS = 1 << 14
MAX_RECORDS = 32
MAX_SIZE = 1 << 24  # of H and I
MAX_NAME_BYTES = 4096
MAX_MANIFEST_BYTES = 16 << 20
MAX_PAGE_BYTES = 1 << 30

EXACT_DTYPES = (
    "float32",
    "bfloat16",
    "float16",
    "float8_e4m3fn",
    "mxfp4",
)  # position is the code in the file, as in layout.h
EXACT_BITS = (32, 16, 16, 8, 4)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "quick_gelu", "swigluoai")
NO_ACTIVATION = 255  # the activation is not one of these: it runs outside the kernels

PLANE, REPLACEMENT, SHARED_BASE, LOW_RANK, MEAN, ALIAS = range(6)
REQUIRED = 1  # record flag: a reader that does not know the record's kind must refuse the file

CODED = (PLANE, REPLACEMENT, SHARED_BASE, ALIAS)  # kinds whose payload is planes of codes
KNOWN_BITS = (2, 3, 4, 8)  # of a code after 1, 2, 3 and 4 planes

# Records 0..4 of every expert: the ladder that packing writes. Aggregation adds records behind them.
NUM_RECORDS = _C.NUM_RECORDS
EXACT_RECORD = NUM_RECORDS - 1

LAYER_HEADER = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u4"),
        ("header_bytes", "<u4"),  # this structure, record table and name
        ("file_bytes", "<u8"),
        ("header_crc32c", "<u4"),  # of header_bytes bytes, with this field zero
        ("num_experts", "<u4"),
        ("num_records", "<u4"),
        ("record_bytes", "<u4"),  # size of one table entry
        ("hidden", "<u8"),
        ("intermediate", "<u8"),
        ("gated", "u1"),
        ("biased", "u1"),
        ("activation", "u1"),
        ("exact_dtype", "u1"),
        ("alpha", "<f4"),
        ("limit", "<f4"),
        ("layer_idx", "<u4"),
        ("records_offset", "<u4"),
        ("name_offset", "<u4"),
        ("name_bytes", "<u4"),
        ("block_rows", "<u2"),
        ("block_cols", "<u2"),
        ("group_cols", "<u4"),
        ("fingerprint", "V32"),  # of the source, for resuming
        ("reserved", "V132"),
    ]
)
RECORD = np.dtype(
    [
        ("kind", "<u2"),
        ("bits", "u1"),  # that the record adds per weight
        ("flags", "u1"),
        ("parent", "<i4"),  # record of the same expert that this one adds to, or -1
        ("replaces", "<u8"),  # bit set of records of the same expert
        ("shared_id", "<i4"),  # records with one shared id >= 0 may share one extent
        ("crc32c", "<u4"),  # of the payload
        ("offset", "<u8"),
        ("nbytes", "<u8"),  # payload; the extent is padded with zeros to ALIGNMENT
        ("params_offset", "<u4"),  # where reconstruction parameters lie in the payload
        ("params_nbytes", "<u4"),
        ("ranks", "<u2", 3),  # of a low-rank record: rank of each matrix's factors
        ("reserved", "V10"),
    ]
)
assert LAYER_HEADER.itemsize == 256 and RECORD.itemsize == 64


class StoreError(ValueError):
    """A store that cannot be read or written; the message says what to do."""


def padded(nbytes: int) -> int:
    """Size of the extent of a payload."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class LayerSpec:
    """Shape and arithmetic of every expert of one MoE layer."""

    num_experts: int
    hidden: int
    intermediate: int
    gated: bool = True
    biased: bool = False
    activation: str | None = "silu"  # one of ACTIVATIONS; None: runs outside the kernels
    alpha: float = 0.0
    limit: float = 0.0
    exact_dtype: str = "bfloat16"

    def __post_init__(self):
        checks = [
            (
                "num_experts",
                self.num_experts,
                1 <= self.num_experts <= MAX_EXPERTS,
                f"1..{MAX_EXPERTS}",
            ),
            ("hidden", self.hidden, 1 <= self.hidden <= MAX_SIZE, f"1..{MAX_SIZE}"),
            (
                "intermediate",
                self.intermediate,
                1 <= self.intermediate <= MAX_SIZE,
                f"1..{MAX_SIZE}",
            ),
            (
                "activation",
                self.activation,
                self.activation in (None, *ACTIVATIONS),
                f"None or one of {ACTIVATIONS}",
            ),
            (
                "exact_dtype",
                self.exact_dtype,
                self.exact_dtype in EXACT_DTYPES,
                f"one of {EXACT_DTYPES}",
            ),
        ]
        for name, value, good, expected in checks:
            if not good:
                raise StoreError(f"LayerSpec: {name} must be {expected}, got {value!r}")

    @property
    def exact_dtype_code(self) -> int:
        return EXACT_DTYPES.index(self.exact_dtype)

    @property
    def geometry(self) -> _C.Geometry:
        return _C.Geometry(
            self.hidden, self.intermediate, self.gated, self.biased, self.exact_dtype_code
        )


@dataclass(frozen=True)
class LayerInfo(LayerSpec):
    """One MoE layer of a store."""

    name: str = ""  # path of the experts module in the model
    layer_idx: int = 0
    file: str = ""  # inside the experts folder
    file_bytes: int = 0
    header_crc32c: int = 0
    fingerprint: bytes = b""
    # RECORD [num_experts, R]; nbytes 0 where the expert has no such record. The first are the ladder.
    records: np.ndarray | None = None

    def has_levels(self, levels: Levels) -> np.ndarray:
        """bool [num_experts, levels]: which levels each expert has."""
        present = self.records["nbytes"] > 0
        needs = levels.needs(MAX_RECORDS)
        beyond = needs[:, present.shape[1] :].any(axis=1)
        missing = ~present[:, None, :] & needs[None, :, : present.shape[1]]
        return ~missing.any(axis=2) & ~beyond


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says about the whole store."""

    version: int
    comoe_version: str
    model_type: str
    source: str  # where the weights came from
    page_bytes: int
    dense_bytes: int
    layers: list[dict[str, Any]]
    levels: Levels
    extra: dict[str, Any]  # other keys, kept as they are


def fingerprint_of(source: str | bytes) -> bytes:
    """32 bytes that stand for the source of a layer."""
    return hashlib.sha256(source.encode() if isinstance(source, str) else source).digest()


def ladder_records(geometry: _C.Geometry) -> np.ndarray:
    """RECORD [NUM_RECORDS]: the ladder of one expert, without places and checksums."""
    records = np.zeros(NUM_RECORDS, RECORD)
    for r, bits in enumerate((2, 1, 1, 4)):
        records[r]["bits"] = bits
        records[r]["parent"] = r - 1
    last = NUM_RECORDS - 1
    records[last]["kind"] = REPLACEMENT
    records[last]["bits"] = EXACT_BITS[geometry.exact_dtype]
    records[last]["parent"] = -1
    records[last]["replaces"] = (1 << last) - 1
    records["flags"] = REQUIRED
    records["shared_id"] = -1
    records["nbytes"] = [geometry.record_bytes(r) for r in range(NUM_RECORDS)]
    # All parameters of the planes lie in record 0, before its first block.
    records[0]["params_nbytes"] = geometry.blocks_offset(0, 0)
    # Scales of an exact record that holds codes.
    first, end = (geometry.exact_scales_offset(m) for m in (0, geometry.num_matrices))
    if end > first:
        records[last]["params_offset"], records[last]["params_nbytes"] = first, end - first
    return records


def sizes_at_levels(layers: list[LayerInfo], levels: Levels) -> list[tuple[int, ...]]:
    """Sizes of the records that experts need at each level but `exact`: every combination once."""
    seen = set()
    for layer in layers:
        _, first = np.unique(layer.records["nbytes"], axis=0, return_index=True)
        has, needs = layer.has_levels(levels), levels.needs(layer.records.shape[1])
        for expert in first:
            for level in np.flatnonzero(has[expert, : levels.exact]):
                seen.add(tuple(layer.records["nbytes"][expert, needs[level]].tolist()))
    return sorted(seen)


def choose_page_bytes(num_weights: int, level_sizes: list[tuple[int, ...]]) -> int:
    """Size of a pool page that wastes least over all levels; among equals the largest.

    About weights / 64 bytes (a 1-bit plane is then 8 pages), and at least four pages per 1-bit plane,
    so that a level's records end near the end of their last page. Levels of much smaller records (a
    mean, a low-rank delta) ask for smaller pages.
    """
    centre = max(1, num_weights // 64 // ALIGNMENT)
    least = min((min(sizes) for sizes in level_sizes), default=num_weights)
    lowest = max(1, min(centre // 2, least // ALIGNMENT))
    arrays = [np.array(sizes, np.int64) for sizes in level_sizes]

    def waste(pages_of_4k: int) -> float:
        page = pages_of_4k * ALIGNMENT
        return sum(float((-(-sizes // page) * page).sum() / sizes.sum()) for sizes in arrays)

    candidates = range(lowest, min(2 * centre, MAX_PAGE_BYTES // ALIGNMENT) + 1)
    return max(candidates, key=lambda p: (-round(waste(p), 3), p)) * ALIGNMENT
