"""experts/losses.npz: what each level of each expert costs, measured by aggregation. Optional.

levels           str [L]          as in the manifest
layer, expert    int32 [X]        every expert of every layer, in order
loss             float32 [X, L]   nats per token; nan: the expert has no such level; exact: 0
use              float32 [X]      probability that a token uses the expert
floor            uint8 [X]        least level allowed
curve_fraction   float32 [P]      bytes kept / bf16 bytes of the routed experts, ascending
curve_level      uint8 [P, X]     level of each expert at that size
curve_loss       float32 [P]      expected loss
curve_bytes      int64 [P]        bytes kept
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from comoe import _C
from comoe.policy.plan import Levels
from comoe.store import checks
from comoe.store import format as fmt
from comoe.store.format import LayerInfo, StoreError
from comoe.store.part_file import PartFile

MAX_BYTES = 1 << 30  # of the file, and of its arrays together
SHAPES = {
    "levels": ("U", "L"),
    "layer": ("i4", "X"),
    "expert": ("i4", "X"),
    "loss": ("f4", "XL"),
    "use": ("f4", "X"),
    "floor": ("u1", "X"),
    "curve_fraction": ("f4", "P"),
    "curve_level": ("u1", "PX"),
    "curve_loss": ("f4", "P"),
    "curve_bytes": ("i8", "P"),
}


def write_losses(folder: str | Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Adds losses.npz to a finished store, or replaces it, and names it in the manifest."""
    from comoe.store.reader import Store
    from comoe.store.writer import manifest_text

    store = Store.open(folder)
    check_losses(arrays, store.manifest.levels, store.layers, "write_losses")
    buffer = io.BytesIO()
    np.savez(buffer, **{name: np.asarray(arrays[name]) for name in SHAPES})
    raw = buffer.getvalue()
    manifest = json.loads((store.folder / fmt.MANIFEST_FILE).read_bytes())
    manifest["losses"] = {
        "file": fmt.LOSSES_FILE,
        "bytes": len(raw),
        "crc32c": f"{_C.crc32c(raw):08x}",
    }
    text = manifest_text(manifest)
    # A reader in between sees the old manifest with the new file, and says that they do not fit.
    for name, data in ((fmt.LOSSES_FILE, raw), (fmt.MANIFEST_FILE, text)):
        with PartFile(store.folder / name, len(data)) as part:
            part.write(data, 0)
            part.publish()


def read_losses(
    folder: Path, entry: object, levels: Levels, layers: Sequence[LayerInfo]
) -> dict[str, np.ndarray]:
    """The arrays of the file that the manifest's entry names, checked."""
    what = f"{folder}: losses"
    if not isinstance(entry, dict):
        raise StoreError(f"{what} must be an object in the manifest, got {entry!r}")
    path = checks.safe_path(folder, entry.get("file"))
    size = path.stat().st_size
    if size != entry.get("bytes") or size > MAX_BYTES:
        raise StoreError(
            f"{path}: must be {entry.get('bytes')} bytes long (at most {MAX_BYTES:,}), is {size:,}; "
            f"{checks.DAMAGED}"
        )
    raw = path.read_bytes()
    if f"{_C.crc32c(raw):08x}" != entry.get("crc32c"):
        raise StoreError(f"{path}: checksum does not match; {checks.DAMAGED}")
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            if sum(item.file_size for item in archive.infolist()) > MAX_BYTES:
                raise ValueError(f"its arrays have more than {MAX_BYTES:,} bytes")
        with np.load(io.BytesIO(raw), allow_pickle=False) as file:
            arrays = {name: file[name] for name in SHAPES if name in file}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
        raise StoreError(f"{path}: not a file of arrays ({error}); {checks.DAMAGED}") from error
    check_losses(arrays, levels, layers, str(path))
    return arrays


def check_losses(
    arrays: Mapping[str, np.ndarray], levels: Levels, layers: Sequence[LayerInfo], what: str
) -> None:
    """StoreError unless the arrays are of the stated kinds and sizes and fit the store."""

    def require(good: bool, problem: str) -> None:
        if not good:
            raise StoreError(f"{what}: {problem}; run `comoe aggregate` again")

    counts = [layer.num_experts for layer in layers]
    sizes = {"L": len(levels), "X": sum(counts)}
    for name, (dtype, axes) in SHAPES.items():
        array = arrays.get(name)
        require(array is not None, f"{name} is missing")
        array = np.asarray(array)
        kind = np.dtype(dtype)
        good = array.dtype.kind == "U" if dtype == "U" else array.dtype == kind
        require(good, f"{name} must be {'text' if dtype == 'U' else kind.name}, is {array.dtype}")
        if axes[0] == "P":
            sizes.setdefault("P", len(array) if array.ndim else 0)
        want = tuple(sizes[axis] for axis in axes)
        require(array.shape == want, f"{name} must be of shape {list(want)}, is {array.shape}")
    require(sizes["P"] >= 1, "the curve needs at least one point")
    require(tuple(arrays["levels"].tolist()) == levels.names, f"levels must be {levels.names}")
    layer_of = np.repeat(np.arange(len(counts)), counts)
    expert_of = np.concatenate([np.arange(count) for count in counts])
    require(
        np.array_equal(arrays["layer"], layer_of) and np.array_equal(arrays["expert"], expert_of),
        "layer and expert must name every expert of every layer in order",
    )
    has = np.concatenate([layer.has_levels(levels) for layer in layers])
    require(
        bool((np.isfinite(arrays["loss"]) | ~has).all()),
        "loss must be finite where the expert has the level",
    )
    require(bool(np.isfinite(arrays["use"]).all()), "use must be finite")
    require(bool((arrays["floor"] < len(levels)).all()), f"floor must be less than {len(levels)}")
    chosen = arrays["curve_level"].astype(np.int64)
    require(bool((chosen < len(levels)).all()), f"curve_level must be less than {len(levels)}")
    require(
        bool(has[np.arange(len(has))[None, :], chosen].all()),
        "curve_level names a level that the expert does not have",
    )
    fraction, nbytes = arrays["curve_fraction"], arrays["curve_bytes"]
    require(
        bool(np.isfinite(fraction).all() and (np.diff(fraction) >= 0).all()),
        "curve_fraction must ascend",
    )
    require(bool((nbytes >= 0).all() and (np.diff(nbytes) >= 0).all()), "curve_bytes must ascend")
