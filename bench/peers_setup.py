"""What bench/peers.py needs before it can measure: llama.cpp built in an environment of its own, and one model in
the formats of all peers. Each step is skipped where its result is there already."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGE = "llama-cpp-python==0.3.36"
NEEDS = ("numpy", "typing_extensions", "diskcache", "jinja2")  # of the package itself
# Built with GCC 12, the AMX path of Q4 and Q8 crashes (tile configuration).
NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
CMAKE_ARGS = (
    "-GNinja",
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DLLAVA_BUILD=OFF",
    f"-DCMAKE_C_FLAGS={NO_AMX}",
    f"-DCMAKE_CXX_FLAGS={NO_AMX}",
)
FORMATS = ("Q8_0", "Q4_K_M")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Llama:
    """python: of an environment with what the package needs.  package: its unpacked source, which is used as it is.
    library: the folder of the library built from it."""

    python: Path
    package: Path
    library: Path

    @property
    def source(self) -> Path:
        """llama.cpp's own, with the converter."""
        return self.package / "vendor" / "llama.cpp"

    @property
    def environment(self) -> dict[str, str]:
        return {"LLAMA_CPP_LIB_PATH": str(self.library), "PYTHONPATH": str(self.package)}


def llama(folder: Path, say: Say) -> Llama:
    """Builds llama.cpp's library from the source package of llama-cpp-python in `folder`; minutes on two cores."""
    folder = folder.resolve()
    python, build = folder / "v" / "bin" / "python", folder / "build"
    if not python.exists():
        say(f"making an environment in {folder / 'v'}")
        _run([sys.executable, "-m", "venv", folder / "v"])
        _run([python, "-m", "pip", "install", "-q", *NEEDS, "cmake", "ninja", "scikit-build-core"])
    if not list((folder / "src").glob("llama_cpp_python-*.tar.gz")):
        alone = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "-d", folder / "src"]
        _run([python, "-m", "pip", "download", "-q", PACKAGE, *alone])
    found = Llama(python, _source(folder), build / "bin")
    if not (found.library / "libllama.so").exists():
        say(f"building {PACKAGE} in {build} (minutes)")
        # Only `libllama` is needed, a third of the whole build.
        tools = {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
        _run(["cmake", "-S", found.package, "-B", build, *CMAKE_ARGS], env=tools)
        _run(["cmake", "--build", build, "--target", "llama", "-j", os.cpu_count()], env=tools)
    return found


def _source(folder: Path) -> Path:
    """The unpacked source package."""
    archive = next((folder / "src").glob("llama_cpp_python-*.tar.gz"))
    unpacked = folder / "src" / archive.name.removesuffix(".tar.gz")
    if not unpacked.is_dir():
        with tarfile.open(archive) as packed:
            packed.extractall(folder / "src", filter="data")
    return unpacked


def comoe_model(source: Path, packed: Path, say: Say) -> None:
    if not (packed / "config.json").is_file():
        import comoe

        say(f"packing {source} into {packed}")
        comoe.pack(source, packed, overwrite=True)


def gguf(peer: Llama, source: Path, stem: Path, say: Say) -> None:
    """stem-bf16.gguf by llama.cpp's converter, and from it the FORMATS."""
    first = gguf_file(stem, "bf16")
    if not first.exists():
        say(f"converting {source} to {first.name}")
        part = first.with_suffix(".part")
        converter = [sys.executable, HERE / "peers_convert.py", peer.source]
        _run([*converter, source, part, "--outtype", "bf16"])
        part.rename(first)
    for name in FORMATS:
        out = gguf_file(stem, name)
        if not out.exists():
            say(f"quantizing to {out.name}")
            part = out.with_suffix(".part")
            job = {"quantize": name, "source": str(first), "out": str(part)}
            job["threads"] = os.cpu_count()
            _run([peer.python, HERE / "peers_llama.py", json.dumps(job)], env=peer.environment)
            part.rename(out)


def gguf_file(stem: Path, name: str) -> Path:
    return stem.with_name(f"{stem.name}-{name}.gguf")


def room_for(folder: Path, nbytes: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise OSError(
            f"{folder}: {free / 1e9:.1f} GB free, {nbytes / 1e9:.1f} GB needed; give another folder with --models"
        )


def _run(command: list, *, env: dict[str, str] | None = None) -> None:
    """Raises RuntimeError with the end of the output if it fails."""
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        words = " ".join(str(part) for part in command[:4])
        raise RuntimeError(f"{words} ... failed:\n{done.stdout[-2000:]}")
