"""Turns a Hugging Face checkpoint folder into a packed one: dense weights as they are, experts in a store.

All work is done in `DST.partial`, which becomes DST by a rename at the very end. A run that was
interrupted is continued after its last whole layer when it is started again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from comoe.config import format_bytes

SHARD_BYTES = 4_000_000_000
SLACK_BYTES = 64_000_000  # room beyond the sizes known beforehand: small files, file system tables
SOURCE_FILE = ".comoe-source"
WEIGHT_SUFFIXES = {
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".ckpt",
}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)

Progress = Callable[[int, int], None]  # bytes done, bytes in all


class PackError(ValueError):
    """Packing cannot start or go on; the message says what to do."""


def is_packed(folder: str | os.PathLike) -> bool:
    """True for a folder that `pack` has finished."""
    from comoe.store.format import EXPERTS_FOLDER, MANIFEST_FILE

    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
        quantization = config.get("quantization_config") or {}
        return (
            quantization.get("quant_method") == "comoe"
            and (folder / EXPERTS_FOLDER / MANIFEST_FILE).is_file()
        )
    except (OSError, ValueError, AttributeError):
        return False


def pack(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    *,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> Path:
    """Pack checkpoint folder `src` into the new folder `dst`, and return it.

    progress(done, total): called as bytes are written. overwrite: replace what is at `dst`; without it
    a finished pack of the same source is left alone and returned, anything else there is an error.

    Holds one layer of experts in memory at a time. Raises CheckpointError or UnsupportedModelError for
    what is wrong with `src`, PackError for `dst`, StoreError for the disk.
    """
    from comoe.hf.checkpoint import Checkpoint

    src, dst = Path(src), Path(os.path.abspath(dst))
    if dst == src.resolve() or src.resolve() in dst.parents:
        raise PackError(
            f"pack: {dst} is the source folder or lies in it; choose another destination"
        )
    checkpoint = Checkpoint(src)
    mark = checkpoint.fingerprint()
    if dst.exists() and not overwrite:
        if _same_pack(dst, mark):
            _complete(dst)
            return dst
        raise PackError(
            f"pack: {dst} exists and is not a pack of this checkpoint; choose another folder or overwrite it "
            "(overwrite=True, --overwrite)"
        )
    partial = dst.with_name(dst.name + ".partial")
    with _locked(partial):
        _start_or_resume(partial, mark)
        _Packing(checkpoint, mark, partial, progress or (lambda done, total: None)).run()
        _publish(partial, dst, mark, overwrite)
    return dst


class _Packing:
    """One run: writes everything into `folder`, what is there already excepted."""

    def __init__(self, checkpoint, mark: str, folder: Path, progress: Progress) -> None:
        from comoe.hf.convert import layer_spec
        from comoe.store.writer import layer_file_bytes

        self.checkpoint, self.mark, self.folder = checkpoint, mark, folder
        self.specs = [
            layer_spec(block.spec, checkpoint.exact_dtype(i))
            for i, block in enumerate(checkpoint.blocks)
        ]
        self.layer_bytes = [
            layer_file_bytes(spec, block.name)
            for spec, block in zip(self.specs, checkpoint.blocks, strict=True)
        ]
        self.progress = progress
        self.done = 0
        self.total = sum(self.layer_bytes) + checkpoint.dense_bytes

    def run(self) -> None:
        self._check_space()
        with _disk_errors(self.folder):
            self._copy_small_files()
            self._write_dense()
        self._write_experts()

    def _advance(self, nbytes: int) -> None:
        self.done = min(self.done + nbytes, self.total)
        self.progress(self.done, self.total)

    def _check_space(self) -> None:
        present = sum(p.stat().st_size for p in self.folder.rglob("*") if p.is_file())
        needed = self.total + SLACK_BYTES - present
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise PackError(
                f"pack: {self.folder.parent} has {format_bytes(free)} free, packing needs "
                f"{format_bytes(needed)} more; make room or choose another disk"
            )

    def _copy_small_files(self) -> None:
        for path in sorted(self.checkpoint.folder.iterdir()):
            hidden = path.name.startswith(".")
            weights = path.suffix in WEIGHT_SUFFIXES or path.name.endswith(".index.json")
            if path.is_file() and not hidden and not weights and path.name != "config.json":
                shutil.copyfile(path, self.folder / path.name)
        if not any((self.folder / name).exists() for name in TOKENIZER_FILES):
            warnings.warn(
                f"pack: {self.checkpoint.folder} has no tokenizer; the packed model will take token ids only",
                stacklevel=2,
            )
        unused = self.checkpoint.unused
        if unused:
            warnings.warn(
                f"pack: {len(unused)} tensors that {type(self.checkpoint.model).__name__} does not use are "
                f"left out, e.g. {unused[0]}",
                stacklevel=2,
            )
        config = json.loads((self.checkpoint.folder / "config.json").read_text())
        if self.checkpoint.quantizer is not None and not config.get("torch_dtype"):
            config.setdefault("dtype", "bfloat16")
        config["quantization_config"] = {"quant_method": "comoe", "format": 1}
        if not config.get("architectures"):
            config["architectures"] = [type(self.checkpoint.model).__name__]
        (self.folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    def _write_dense(self) -> None:
        from comoe.hf.safetensors_io import write_file

        shards: list[list] = [[]]
        for entry in self.checkpoint.dense:
            if shards[-1] and sum(e.nbytes for e in shards[-1]) + entry.nbytes > SHARD_BYTES:
                shards.append([])
            shards[-1].append(entry)
        names = ["model.safetensors"]
        if len(shards) > 1:
            names = [
                f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
            ]
        for name, shard in zip(names, shards, strict=True):
            if (self.folder / name).exists():  # whole: it got its name by a rename
                self._advance(sum(entry.nbytes for entry in shard))
            else:
                write_file(self.folder / name, [(e.name, e) for e in shard], self._advance)
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": self.checkpoint.dense_bytes},
                "weight_map": {
                    e.name: n for n, shard in zip(names, shards, strict=True) for e in shard
                },
            }
            path = self.folder / "model.safetensors.index.json"
            path.write_text(json.dumps(index, indent=2) + "\n")

    def _write_experts(self) -> None:
        from comoe.hf.convert import to_arrays
        from comoe.store import StoreWriter
        from comoe.store.sums import file_sums

        def arrays(block_idx: int) -> Iterator:
            yield from to_arrays(self.checkpoint.load_experts(block_idx))

        writer = StoreWriter(self.folder)
        for i, block in enumerate(self.checkpoint.blocks):
            writer.add_layer(
                block.name, self.specs[i], arrays(i), fingerprint=self.mark, on_bytes=self._advance
            )
        writer.finish(
            model_type=self.checkpoint.config.model_type,
            source=self.checkpoint.folder.name,
            dense_bytes=self.checkpoint.dense_bytes,
            fingerprint=self.mark,
            files=file_sums(self.folder),
        )


def _same_pack(dst: Path, mark: str) -> bool:
    from comoe.store import Store, StoreError

    if not is_packed(dst):
        return False
    try:
        return Store.open(dst).manifest.extra.get("fingerprint") == mark
    except StoreError:
        return False


def _complete(dst: Path) -> None:
    """Adds the checksums of the files beside the experts, which older versions did not write."""
    from comoe.store import Store
    from comoe.store.sums import FILES_KEY, add_file_sums

    if FILES_KEY not in Store.open(dst).manifest.extra:
        add_file_sums(dst)


@contextlib.contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """One process per destination. The folder itself is locked, so nothing stale can be left."""
    while True:
        try:
            partial.mkdir(parents=True, exist_ok=True)
            fd = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise PackError(
                f"pack: cannot write to {partial}: {error}; choose another folder"
            ) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise PackError(
                f"pack: another process is packing into {partial}; wait for it, or stop it"
            ) from None
        # Another process may have published the folder between the two calls.
        if partial.exists() and os.stat(partial).st_ino == os.fstat(fd).st_ino:
            break
        os.close(fd)
    try:
        yield
    finally:
        os.close(fd)


def _start_or_resume(partial: Path, mark: str) -> None:
    """Leaves `partial` holding work of this very source, or nothing."""
    source = partial / SOURCE_FILE
    try:
        same = source.read_text() == mark
    except OSError:
        same = False
    if not same:
        for path in partial.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        with _disk_errors(partial):
            source.write_text(mark)


def _publish(partial: Path, dst: Path, mark: str, overwrite: bool) -> None:
    (partial / SOURCE_FILE).unlink()
    old = None
    if dst.exists():
        if not overwrite and not _same_pack(dst, mark):
            raise PackError(f"pack: {dst} appeared while packing; the new pack is in {partial}")
        old = dst.with_name(dst.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        dst.rename(old)
    partial.rename(dst)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PackError(
            f"pack: cannot write to {folder}: {error}; make room or mend the disk, then run again: what is "
            "finished is kept"
        ) from error
