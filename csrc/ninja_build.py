"""Writes and runs a build.ninja for the native code; used by setup.py and by the Makefile.

Sources compile with one set of flags, plus those of their instruction set: a file whose name ends in
`_avx2`, `_avx512` or `_vnni` gets that set's flags and is only reached through run-time dispatch.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

CSRC = Path(__file__).resolve().parent
ISA_FLAGS = {
    "_avx2": "-mavx2 -mfma -mf16c",
    "_avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c",
    "_vnni": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vbmi -mavx512vnni -mavx512bf16 -mfma -mf16c",
}
BASE_FLAGS = "-std=c++17 -O3 -g1 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-unused-parameter -pthread"
SANITIZERS = {
    "": "",
    "address": "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer",
    "thread": "-fsanitize=thread -fno-omit-frame-pointer",
}


def is_x86(machine: str) -> bool:
    return machine in ("x86_64", "AMD64", "i686")


def engine_sources(machine: str) -> list[Path]:
    """All C++ sources except bindings and tests, without the x86 ones on other machines."""
    found = sorted(p for p in CSRC.rglob("*.cpp") if "tests" not in p.parts and p.name != "bindings.cpp")
    return [p for p in found if is_x86(machine) or not any(p.stem.endswith(s) for s in ISA_FLAGS)]


def source_flags(source: Path) -> str:
    return next((flags for suffix, flags in ISA_FLAGS.items() if source.stem.endswith(suffix)), "")


def find_nvcc() -> str | None:
    """nvcc, if a CUDA toolkit is here; COMOE_CUDA=0 builds without it."""
    if os.environ.get("COMOE_CUDA", "1") == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    candidate = Path(home, "bin", "nvcc") if home else None
    return str(candidate) if candidate and candidate.exists() else shutil.which("nvcc")


def cuda_arch_flags() -> str:
    """COMOE_CUDA_ARCHS ("80;90"), else the present GPU's, else 80 and 90 with PTX."""
    archs = os.environ.get("COMOE_CUDA_ARCHS", "")
    if not archs and shutil.which("nvidia-smi"):
        query = subprocess.run(
            ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"], capture_output=True, text=True
        )
        if query.returncode == 0:
            archs = ";".join(sorted({line.strip().replace(".", "") for line in query.stdout.splitlines() if line.strip()}))
    names = archs.split(";") if archs else ["80", "90"]
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in names]
    if not archs:
        flags.append("-gencode=arch=compute_90,code=compute_90")
    return " ".join(flags)


def write_ninja(
    build_dir: Path,
    objects: dict[Path, str],
    links: dict[Path, list[Path]],
    *,
    cxx: str,
    link_flags: str,
    cuda_sources: list[Path] | None = None,
    nvcc: str | None = None,
) -> None:
    """objects: source -> extra flags; links: output -> its sources (an output ending in .so is shared)."""
    lines = [
        "ninja_required_version = 1.5",
        f"cxx = {cxx}",
        "rule cxx",
        "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule nvcc",
        f"  command = {nvcc} $flags -c $in -o $out",
        "rule link",
        "  command = $cxx $in -o $out $flags",
    ]

    def object_of(source: Path) -> Path:
        return build_dir / "obj" / (str(source.relative_to(CSRC)).replace("/", "__") + ".o")

    def escape(path: Path) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    for source, flags in objects.items():
        lines += [f"build {escape(object_of(source))}: cxx {escape(source)}", f"  flags = {flags}"]
    for source in cuda_sources or []:
        flags = f"-std=c++17 -O3 -lineinfo -Xcompiler -fPIC {cuda_arch_flags()}"
        lines += [f"build {escape(object_of(source))}: nvcc {escape(source)}", f"  flags = {flags}"]
    for output, sources in links.items():
        inputs = " ".join(escape(object_of(s)) for s in sources)
        shared = "-shared " if output.suffix == ".so" else ""
        lines += [f"build {escape(output)}: link {inputs}", f"  flags = {shared}{link_flags}"]
    build_dir.mkdir(parents=True, exist_ok=True)
    (build_dir / "build.ninja").write_text("\n".join(lines) + "\n")


def run_ninja(build_dir: Path, *targets: str) -> None:
    ninja = shutil.which("ninja") or str(Path(sys.executable).parent / "ninja")
    subprocess.run([ninja, "-C", str(build_dir), *targets], check=True)


def build_extension(build_dir: Path, output: Path) -> None:
    """Compiles csrc into the Python module `output` (comoe/_C...so)."""
    import sysconfig

    import pybind11

    machine = platform.machine()
    include = f"-I{shlex.quote(pybind11.get_include())} -I{shlex.quote(sysconfig.get_paths()['include'])}"
    nvcc = find_nvcc()
    cuda_sources = sorted(CSRC.rglob("*.cu")) if nvcc else []
    cuda_define = " -DCOMOE_CUDA=1" if cuda_sources else ""
    sources = engine_sources(machine)
    objects = {s: f"{BASE_FLAGS}{cuda_define} {source_flags(s)}" for s in sources}
    bindings = CSRC / "bindings.cpp"
    objects[bindings] = f"{BASE_FLAGS}{cuda_define} {include}"
    link_flags = "-pthread -Wl,--gc-sections"
    if cuda_sources:
        lib = Path(nvcc).resolve().parent.parent / "lib64"
        link_flags += f" -L{shlex.quote(str(lib))} -lcudart_static -ldl -lrt"
    write_ninja(
        build_dir,
        objects,
        {output: [*sources, bindings, *cuda_sources]},
        cxx=os.environ.get("CXX", "c++"),
        link_flags=link_flags,
        cuda_sources=cuda_sources,
        nvcc=nvcc,
    )
    run_ninja(build_dir)


def build_tests(build_dir: Path, sanitizer: str = "", cxx: str | None = None, machine: str | None = None) -> list[Path]:
    """Compiles each csrc/tests/test_*.cpp with the engine into a program of its own; returns them."""
    machine = machine or platform.machine()
    flags = f"{BASE_FLAGS} {SANITIZERS[sanitizer]}" + (" -O1" if sanitizer else "")
    sources = engine_sources(machine)
    tests = sorted((CSRC / "tests").glob("test_*.cpp"))
    objects = {s: f"{flags} {source_flags(s)}" for s in [*sources, *tests]}
    links = {build_dir / t.stem: [*sources, t] for t in tests}
    write_ninja(
        build_dir, objects, links, cxx=cxx or os.environ.get("CXX", "c++"),
        link_flags=f"-pthread {SANITIZERS[sanitizer]}" + (" -static" if machine != platform.machine() else ""),
    )
    run_ninja(build_dir)
    return list(links)


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description="build and run the native tests")
    parser.add_argument("--build-dir", type=Path, default=CSRC.parent / "build" / "native")
    parser.add_argument("--sanitizer", choices=sorted(SANITIZERS), default="")
    parser.add_argument("--cxx", default=None)
    parser.add_argument("--machine", default=None)
    parser.add_argument("--runner", default="", help="command put before each test program (an emulator)")
    args = parser.parse_args()
    for program in build_tests(args.build_dir.resolve(), args.sanitizer, args.cxx, args.machine):
        print(f"== {program.name}", flush=True)
        subprocess.run([*shlex.split(args.runner), str(program)], check=True)
