"""Writes a store layer by layer: each file appears whole or not at all, and a rerun resumes."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from comoe import _C
from comoe.policy.plan import LADDER, Levels
from comoe.store import format as fmt
from comoe.store.added import AddedRecord, check_payload, record_table
from comoe.store.checks import check_levels, parse_layer_header
from comoe.store.format import LayerInfo, LayerSpec, StoreError
from comoe.store.part_file import PartFile
from comoe.store.reader import Store

Arrays = Sequence[np.ndarray]


class Payloads(tuple):
    """An expert that is coded already: the payloads of records 0..4, uint8 arrays."""


def copied_experts(store: Store, layer_idx: int) -> Iterator[Payloads]:
    """Every expert of a layer of another store as it is there, its checksums verified."""
    for expert in range(store.layers[layer_idx].num_experts):
        yield Payloads(
            np.frombuffer(store.payload(layer_idx, expert, r), np.uint8)
            for r in range(fmt.NUM_RECORDS)
        )


def layer_file(layer_idx: int) -> str:
    return f"layer-{layer_idx:05d}.bin"


def layer_header_bytes(spec: LayerSpec, name: str, num_records: int = fmt.NUM_RECORDS) -> int:
    table = spec.num_experts * num_records * fmt.RECORD.itemsize
    return fmt.LAYER_HEADER.itemsize + table + len(name.encode())


def layer_file_bytes(spec: LayerSpec, name: str = "") -> int:
    """Size of the file of a layer with the ladder alone, known before any weight is read."""
    expert = sum(fmt.padded(int(n)) for n in fmt.ladder_records(spec.geometry)["nbytes"])
    return fmt.padded(layer_header_bytes(spec, name)) + spec.num_experts * expert


def place(records: np.ndarray, begin: int) -> int:
    """Gives every record its offset, from `begin` on: expert by expert, the ladder and then what was
    added, a shared one at its first owner. Returns the end of the last extent."""
    shared, at = {}, begin
    for record in records.reshape(-1):
        shared_id = int(record["shared_id"])
        if record["nbytes"] == 0 or record["kind"] == fmt.ALIAS or shared_id in shared:
            continue
        record["offset"] = at
        if shared_id >= 0:
            shared[shared_id] = at
        at += fmt.padded(int(record["nbytes"]))
    for record in records.reshape(-1):
        if record["shared_id"] >= 0:
            record["offset"] = shared[int(record["shared_id"])]
    return at


def manifest_text(manifest: dict) -> bytes:
    """The manifest with its checksum filled in."""
    text = json.dumps({**manifest, "crc32c": "00000000"}, indent=1)
    crc = _C.crc32c(text.encode())
    return text.replace('"crc32c": "00000000"', f'"crc32c": "{crc:08x}"', 1).encode()


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
        experts: Iterable[tuple[Arrays, ...] | Payloads],
        *,
        added: Sequence[Sequence[AddedRecord | None]] | None = None,
        fingerprint: str | bytes = b"",
        on_bytes: Callable[[int], object] = lambda nbytes: None,
    ) -> LayerInfo:
        """Encodes and writes one layer; `experts` is not touched if the layer is already there.

        experts: (matrices, biases) of each, or (matrices, biases, scales) where matrices are codes.
            Matrices: canonical orientation, float32, uint16 holding the bits of bfloat16 or float16, or
            uint8 codes, for mxfp4 two in a byte. Biases: the same type, float32 beside codes. Scales:
            see csrc/ladder/codec.h. Or `Payloads` (see `copied_experts`), which are copied.
        added: for each expert its records 5, 6, ...; None where it has no such record. What they say
            (kinds, sizes, sharing) belongs to the fingerprint; what their payloads say does not, so
            `fingerprint` must change with that.
        on_bytes(n) is called as n more bytes are written, and for a skipped layer with all of them.
        """
        layer_idx = len(self.layers)
        path = self.folder / layer_file(layer_idx)
        if added is None:
            added = [()] * spec.num_experts
        records = record_table(name, spec, added)
        mark = fmt.fingerprint_of(fingerprint) + name.encode()
        if records.shape[1] > fmt.NUM_RECORDS:
            mark += records.tobytes()
        mark = fmt.fingerprint_of(mark)
        done = self._finished(path, name, spec, layer_idx, mark)
        if done is not None:
            self.skipped += 1
            on_bytes(done.file_bytes)
        else:
            self._write_layer(path, name, spec, experts, added, records, layer_idx, mark, on_bytes)
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
        levels: Levels = LADDER,
        **extra,
    ) -> Path:
        """Writes the manifest, last. Other keys are kept in it as they are.

        levels: what an expert may be, coarsest first, `exact` last.
        """
        from comoe import __version__

        if not self.layers:
            raise StoreError("StoreWriter: a store needs at least one MoE layer, got none")
        check_levels(levels, self.layers, "StoreWriter.finish")
        manifest = {
            "format": fmt.MANIFEST_FORMAT,
            "version": fmt.VERSION,
            "crc32c": "00000000",
            "comoe_version": __version__,
            "model_type": model_type,
            "source": source,
            "page_bytes": page_bytes
            or fmt.choose_page_bytes(
                max(layer.geometry.num_weights for layer in self.layers),
                fmt.sizes_at_levels(self.layers, levels),
            ),
            "dense_bytes": int(dense_bytes),
            "expert_bytes": sum(layer.file_bytes for layer in self.layers),
            "levels": [
                {"name": level, "mask": mask}
                for level, mask in zip(levels.names, levels.masks, strict=True)
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
        text = manifest_text(manifest)
        path = self.folder / fmt.MANIFEST_FILE
        with PartFile(path, len(text)) as part:
            part.write(text, 0)
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

    def _write_layer(
        self, path, name, spec, experts, added, records, layer_idx, mark, on_bytes
    ) -> None:
        header_bytes = layer_header_bytes(spec, name, records.shape[1])
        data_offset = fmt.padded(header_bytes)
        end = place(records, data_offset)
        written_shared: dict[int, int] = {}  # shared id -> its checksum
        ladder = slice(fmt.NUM_RECORDS)

        def put(expert: int, buffer: ExpertBuffer) -> int:
            for record, payload in zip(records[expert, ladder], buffer.payloads, strict=True):
                record["crc32c"] = _C.crc32c(payload)
            part.write(buffer.memory, int(records[expert, 0]["offset"]))
            nbytes = len(buffer.memory)
            for record in records[expert, ladder]:  # what is an alias's original
                if record["shared_id"] >= 0:
                    written_shared[int(record["shared_id"])] = int(record["crc32c"])
            return nbytes + put_added(expert)

        def put_added(expert: int) -> int:
            nbytes = 0
            for i, source in enumerate(added[expert]):
                record = records[expert, fmt.NUM_RECORDS + i]
                shared_id = int(record["shared_id"])
                if source is None or source.alias_of is not None or shared_id in written_shared:
                    continue
                where = f"layer {name!r}, expert {expert}, record {fmt.NUM_RECORDS + i}"
                payload = check_payload(source.payload, int(record["nbytes"]), where)
                record["crc32c"] = _C.crc32c(payload)
                if shared_id >= 0:
                    written_shared[shared_id] = int(record["crc32c"])
                part.write(memoryview(payload), int(record["offset"]))
                nbytes += fmt.padded(len(payload))
            return nbytes

        buffers = [ExpertBuffer(records[0, ladder]["nbytes"]) for _ in range(2)]
        # One thread writes an expert while the next one is encoded. It ends before the file is closed.
        with PartFile(path, end) as part, ThreadPoolExecutor(1) as behind:
            written, pending = 0, None
            for source in experts:
                if written == spec.num_experts:
                    raise StoreError(
                        f"layer {name!r} must have {spec.num_experts} experts, got more"
                    )
                buffer = buffers[written % 2]
                if isinstance(source, Payloads):
                    buffer.copy(source, f"layer {name!r}, expert {written}")
                else:
                    self._encode(name, written, spec, buffer, *source)
                if pending:
                    on_bytes(pending.result())
                pending = behind.submit(put, written, buffer)
                written += 1
            if written != spec.num_experts:
                raise StoreError(
                    f"layer {name!r} must have {spec.num_experts} experts, got {written}"
                )
            on_bytes(pending.result())
            for record in records.reshape(-1):
                if record["shared_id"] >= 0:
                    record["crc32c"] = written_shared[int(record["shared_id"])]
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

    def copy(self, payloads: Payloads, where: str) -> None:
        if len(payloads) != len(self.payloads):
            raise StoreError(
                f"{where}: expected {len(self.payloads)} payloads, got {len(payloads)}"
            )
        for r, (to, payload) in enumerate(zip(self.payloads, payloads, strict=True)):
            to[:] = check_payload(payload, len(to), f"{where}, record {r}")
