"""Reads and writes safetensors files by plain positional reads.

Not by the safetensors library's memory map, because mapped pages count as resident: a pack would seem
to need the whole model. Tensors are copied from file to file without passing through torch.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
COPY_BYTES = 8 << 20

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}


class CheckpointError(ValueError):
    """A source checkpoint that cannot be read; the message says what to do."""


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies."""

    path: Path
    name: str
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = DTYPES.get(self.dtype)
        if dtype is None:
            raise CheckpointError(f"{self.path}: tensor {self.name} has unknown type {self.dtype}")
        return dtype

    def read(self) -> torch.Tensor:
        dtype = self.torch_dtype
        if self.nbytes == 0:
            return torch.empty(self.shape, dtype=dtype)
        # Memory of its own, which goes back to the system with the tensor: malloc would keep what a
        # layer's hundreds of tensors leave (with layers of 805 MB a pack took 2.4 of them at its peak, now 1.7).
        data = mmap.mmap(-1, self.nbytes)
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            got = file.readinto(data)
        if got != self.nbytes:
            raise CheckpointError(
                f"{self.path}: tensor {self.name}: expected {self.nbytes} bytes, got {got}: the file "
                "was cut short while it was read. Download it again."
            )
        return torch.frombuffer(data, dtype=dtype).view(self.shape)


@dataclass(frozen=True)
class MadeTensor:
    """A tensor that is made when it is written, of known type and shape."""

    name: str
    torch_dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.torch_dtype.itemsize


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Entries of a safetensors file; raises CheckpointError if the file is damaged."""

    def damaged(why: str) -> CheckpointError:
        return CheckpointError(f"{path}: not a whole safetensors file: {why}. Download it again.")

    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise damaged(f"it has {size} bytes, and its header says it has {length} itself")
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise damaged(f"its header is not JSON ({error})") from error
    entries = {}
    try:
        for name, info in header.items():
            if name == "__metadata__":
                continue
            begin, end = info["data_offsets"]
            if not 0 <= begin <= end:
                raise damaged(f"tensor {name} has offsets {begin}..{end}")
            if 8 + length + end > size:
                raise damaged(f"tensor {name} ends at byte {8 + length + end} of {size}")
            shape = tuple(int(n) for n in info["shape"])
            dtype = DTYPES.get(info["dtype"])
            if dtype is not None and math.prod(shape) * dtype.itemsize != end - begin:
                raise damaged(
                    f"tensor {name} of shape {shape} and type {info['dtype']} has {end - begin} bytes"
                )
            entries[name] = TensorEntry(
                path, name, info["dtype"], shape, 8 + length + begin, end - begin
            )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise damaged(f"its header lacks fields ({error!r})") from error
    return entries


def write_file(
    path: Path,
    tensors: Iterable[tuple[str, TensorEntry | MadeTensor | torch.Tensor]],
    advance: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Write a safetensors file; entries are copied byte for byte, in chunks."""
    tensors = list(tensors)
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in tensors:
        if isinstance(tensor, TensorEntry):
            dtype = tensor.dtype
        else:
            dtype = names[tensor.torch_dtype if isinstance(tensor, MadeTensor) else tensor.dtype]
        shape, nbytes = tuple(tensor.shape), tensor.nbytes
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors start aligned
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in tensors:
            if isinstance(tensor, TensorEntry):
                _copy(tensor, out, advance)
            else:
                if isinstance(tensor, MadeTensor):
                    tensor = tensor.read()
                out.write(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))
                advance(tensor.nbytes)
        out.flush()
        os.fsync(out.fileno())
    os.replace(part, path)


def _copy(entry: TensorEntry, out, advance: Callable[[int], None]) -> None:
    with open(entry.path, "rb") as file:
        file.seek(entry.offset)
        left = entry.nbytes
        while left:
            chunk = file.read(min(left, COPY_BYTES))
            if not chunk:
                raise CheckpointError(
                    f"{entry.path}: cut short while it was read. Download it again."
                )
            out.write(chunk)
            left -= len(chunk)
            advance(len(chunk))
