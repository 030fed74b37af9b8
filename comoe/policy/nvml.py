"""Free memory of an NVIDIA device from the driver's own library, without creating a CUDA context."""

from __future__ import annotations

import ctypes

_LIBRARY = "libnvidia-ml.so.1"


class _Memory(ctypes.Structure):
    """nvmlMemory_t of nvml.h; bytes."""

    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


class Nvml:
    """One device. device: its number as NVML counts them, which CUDA_VISIBLE_DEVICES does not change, or
    its UUID ("GPU-..."). Raises OSError where there is no driver or no such device."""

    def __init__(self, device: int | str, library: ctypes.CDLL | None = None):
        self._library = ctypes.CDLL(_LIBRARY) if library is None else library
        self._call("nvmlInit_v2")
        self._handle = ctypes.c_void_p()
        if isinstance(device, str):
            name = ctypes.c_char_p(device.encode())
            self._call("nvmlDeviceGetHandleByUUID", name, ctypes.byref(self._handle))
        else:
            number = ctypes.c_uint(device)
            self._call("nvmlDeviceGetHandleByIndex_v2", number, ctypes.byref(self._handle))

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes. Raises OSError, also where memory is the host's (Jetson)."""
        found = _Memory()
        self._call("nvmlDeviceGetMemoryInfo", self._handle, ctypes.byref(found))
        return found.free, found.total

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            raise OSError(f"{name} failed with code {code}; nvidia-smi says more")
