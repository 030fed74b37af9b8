"""Writes a store layer by layer: each file appears whole or not at all, and a rerun resumes."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from comoe import _C
from comoe.store import format as fmt
from comoe.store.checks import parse_layer_header
from comoe.store.format import LayerInfo, LayerSpec, StoreError
from comoe.store.part_file import PartFile

Arrays = Sequence[np.ndarray]


def layer_file(layer_idx: int) -> str:
    return f"layer-{layer_idx:05d}.bin"


def layer_header_bytes(spec: LayerSpec, name: str) -> int:
    table = spec.num_experts * fmt.NUM_RECORDS * fmt.RECORD.itemsize
    return fmt.LAYER_HEADER.itemsize + table + len(name.encode())


def layer_file_bytes(spec: LayerSpec, name: str = "") -> int:
    """Size of the file of a layer, known before any weight is read."""
    expert = sum(fmt.padded(int(n)) for n in fmt.ladder_records(spec.geometry)["nbytes"])
    return fmt.padded(layer_header_bytes(spec, name)) + spec.num_experts * expert


def build_header(
    spec: LayerSpec, name: str, layer_idx: int, fingerprint: bytes, records: np.ndarray
) -> bytes:
    """Header, record table [E, R] and name of a layer file, checksum filled in, not yet padded."""
    encoded = name.encode()
    header = np.zeros((), fmt.LAYER_HEADER)
    header["magic"] = fmt.LAYER_MAGIC
    header["version"] = fmt.VERSION
    header["records_offset"] = fmt.LAYER_HEADER.itemsize
    header["name_offset"] = fmt.LAYER_HEADER.itemsize + records.nbytes
    header["name_bytes"] = len(encoded)
    header["header_bytes"] = fmt.LAYER_HEADER.itemsize + records.nbytes + len(encoded)
    extents = -(-records["nbytes"].astype(np.int64) // fmt.ALIGNMENT) * fmt.ALIGNMENT
    header["file_bytes"] = (records["offset"].astype(np.int64) + extents).max()
    header["num_experts"], header["num_records"] = records.shape
    header["record_bytes"] = fmt.RECORD.itemsize
    for field in ("hidden", "intermediate", "gated", "biased", "alpha", "limit"):
        header[field] = getattr(spec, field)
    activation = spec.activation
    header["activation"] = (
        fmt.NO_ACTIVATION if activation is None else fmt.ACTIVATIONS.index(activation)
    )
    header["exact_dtype"] = spec.exact_dtype_code
    header["layer_idx"] = layer_idx
    header["block_rows"], header["block_cols"], header["group_cols"] = 16, 32, 128
    header["fingerprint"] = fingerprint
    text = header.tobytes() + records.tobytes() + encoded
    header["header_crc32c"] = _C.crc32c(text)
    return header.tobytes() + text[fmt.LAYER_HEADER.itemsize :]


class StoreWriter:
    """Writes `folder`/experts. Layers in order of appearance, then `finish`.

        writer = StoreWriter(folder)
        for name, spec, experts in layers:       # experts: (matrices, biases) of each, in order
            writer.add_layer(name, spec, experts, fingerprint="file and size and date of the source")
        writer.finish(model_type="qwen3_moe", source="Qwen/Qwen3-30B-A3B", dense_bytes=...)

    An interrupted run leaves at most one `.part` file beside whole layers, and no manifest, so nothing
    takes it for a store. Running it again skips the layers that are whole and of the same source.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder) / fmt.EXPERTS_FOLDER
        self.layers: list[LayerInfo] = []
        self.skipped = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Until `finish`, what is here is not a store, also when an older one is replaced.
            (self.folder / fmt.MANIFEST_FILE).unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(
                f"StoreWriter: cannot write to {self.folder}: {error}; choose another folder"
            ) from error

    def add_layer(
        self,
        name: str,
        spec: LayerSpec,
        experts: Iterable[tuple[Arrays, ...]],
        *,
        fingerprint: str | bytes = b"",
        on_bytes: Callable[[int], object] = lambda nbytes: None,
    ) -> LayerInfo:
        """Encodes and writes one layer; `experts` is not touched if the layer is already there.

        Each expert is (matrices, biases), or (matrices, biases, scales) where matrices are codes. Matrices:
        canonical orientation, float32, uint16 holding the bits of bfloat16 or float16, or uint8 codes,
        for mxfp4 two in a byte. Biases: the same type, float32 beside codes. Scales: see
        csrc/ladder/codec.h.
        on_bytes(n) is called as n more bytes are written, and for a skipped layer with all of them.
        """
        layer_idx = len(self.layers)
        path = self.folder / layer_file(layer_idx)
        mark = fmt.fingerprint_of(fmt.fingerprint_of(fingerprint) + name.encode())
        done = self._finished(path, name, spec, layer_idx, mark)
        if done is not None:
            self.skipped += 1
            on_bytes(done.file_bytes)
        else:
            self._write_layer(path, name, spec, experts, layer_idx, mark, on_bytes)
            done = self._finished(path, name, spec, layer_idx, mark)
            if done is None:
                raise StoreError(
                    f"StoreWriter: {path} does not read back as written; check the disk, then run again"
                )
        self.layers.append(done)
        return done

    def finish(
        self,
        *,
        model_type: str,
        source: str,
        dense_bytes: int,
        page_bytes: int | None = None,
        **extra,
    ) -> Path:
        """Writes the manifest, last. Other keys are kept in it as they are."""
        from comoe import __version__

        if not self.layers:
            raise StoreError("StoreWriter: a store needs at least one MoE layer, got none")
        manifest = {
            "format": fmt.MANIFEST_FORMAT,
            "version": fmt.VERSION,
            "crc32c": "00000000",
            "comoe_version": __version__,
            "model_type": model_type,
            "source": source,
            "page_bytes": page_bytes
            or fmt.choose_page_bytes([layer.geometry for layer in self.layers]),
            "dense_bytes": int(dense_bytes),
            "expert_bytes": sum(layer.file_bytes for layer in self.layers),
            "levels": [
                {"name": level, "mask": mask}
                for level, mask in zip(fmt.LEVEL_NAMES, fmt.LEVEL_MASKS, strict=True)
            ],
            "layers": [
                {
                    "name": layer.name,
                    "file": layer.file,
                    "bytes": layer.file_bytes,
                    "header_crc32c": f"{layer.header_crc32c:08x}",
                }
                for layer in self.layers
            ],
            **extra,
        }
        text = json.dumps(manifest, indent=1)
        crc = _C.crc32c(text.encode())
        text = text.replace('"crc32c": "00000000"', f'"crc32c": "{crc:08x}"', 1)
        path = self.folder / fmt.MANIFEST_FILE
        with PartFile(path, len(text)) as part:
            part.write(text.encode(), 0)
            part.publish()
        # Layers that an older, longer store left behind.
        for stale in self.folder.glob("layer-*.bin*"):
            if stale.name not in {layer.file for layer in self.layers}:
                stale.unlink()
        return path

    def _finished(
        self, path: Path, name: str, spec: LayerSpec, layer_idx: int, mark: bytes
    ) -> LayerInfo | None:
        """The layer, if its file is whole and is what would be written."""
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                info = parse_layer_header(file, size, path.name)
        except (OSError, StoreError):
            return None
        same = all(
            getattr(info, f) == getattr(spec, f)
            for f in LayerSpec.__dataclass_fields__
            if f not in ("alpha", "limit")
        )
        same &= np.float32(spec.alpha) == np.float32(info.alpha) and np.float32(
            spec.limit
        ) == np.float32(info.limit)
        return (
            info
            if same
            and info.name == name
            and info.fingerprint == mark
            and info.layer_idx == layer_idx
            else None
        )

    def _write_layer(self, path, name, spec, experts, layer_idx, mark, on_bytes) -> None:
        records = np.tile(fmt.ladder_records(spec.geometry), (spec.num_experts, 1))
        extents = -(-records["nbytes"].astype(np.int64) // fmt.ALIGNMENT) * fmt.ALIGNMENT
        data_offset = fmt.padded(layer_header_bytes(spec, name))
        ends = data_offset + np.cumsum(extents.reshape(-1)).reshape(extents.shape)
        records["offset"] = ends - extents

        def put(expert: int, buffer: ExpertBuffer) -> int:
            for record, payload in zip(records[expert], buffer.payloads, strict=True):
                record["crc32c"] = _C.crc32c(payload)
            part.write(buffer.memory, int(records[expert, 0]["offset"]))
            return len(buffer.memory)

        buffers = [ExpertBuffer(records[0]["nbytes"]) for _ in range(2)]
        # One thread writes an expert while the next one is encoded. It ends before the file is closed.
        with PartFile(path, int(ends[-1, -1])) as part, ThreadPoolExecutor(1) as behind:
            written, pending = 0, None
            for expert in experts:
                if written == spec.num_experts:
                    raise StoreError(
                        f"layer {name!r} must have {spec.num_experts} experts, got more"
                    )
                buffer = buffers[written % 2]
                self._encode(name, written, spec, buffer, *expert)
                if pending:
                    on_bytes(pending.result())
                pending = behind.submit(put, written, buffer)
                written += 1
            if written != spec.num_experts:
                raise StoreError(
                    f"layer {name!r} must have {spec.num_experts} experts, got {written}"
                )
            on_bytes(pending.result())
            part.write(build_header(spec, name, layer_idx, mark, records), 0)
            part.publish()
        on_bytes(data_offset)

    @staticmethod
    def _encode(
        name: str,
        expert: int,
        spec: LayerSpec,
        buffer: ExpertBuffer,
        matrices: Arrays,
        biases: Arrays,
        scales: Arrays = (),
    ) -> None:
        shape = matrices[0].shape if len(matrices) else None
        wanted = spec.intermediate, spec.hidden // 2 if spec.exact_dtype == "mxfp4" else spec.hidden
        if shape != wanted or bool(len(biases)) != spec.biased:
            raise StoreError(
                f"layer {name!r}, expert {expert}: expected matrix 0 of shape {wanted} "
                f"{'with' if spec.biased else 'without'} biases, got {shape} {'with' if len(biases) else 'without'}"
            )
        try:
            _C.encode_expert(
                list(matrices),
                list(biases),
                spec.exact_dtype_code,
                spec.gated,
                buffer.payloads,
                list(scales),
            )
        except (ValueError, TypeError) as error:
            raise StoreError(f"layer {name!r}, expert {expert}: {error}") from error


class ExpertBuffer:
    """Memory for one expert as it lies in the file: extents one after the other, aligned for direct writes."""

    def __init__(self, nbytes: np.ndarray):
        ends = np.cumsum([fmt.padded(int(n)) for n in nbytes])
        self.memory = memoryview(mmap.mmap(-1, int(ends[-1])))  # zeros, and so the padding stays
        whole = np.frombuffer(self.memory, np.uint8)
        starts = [0, *ends[:-1]]
        self.payloads = [whole[a : a + int(n)] for a, n in zip(starts, nbytes, strict=True)]
