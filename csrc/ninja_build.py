"""Writes and runs a build.ninja for the native code; used by setup.py and by the Makefile.

Sources compile with one set of flags, plus those of their instruction set: a file whose name ends in
`_avx2`, `_avx512` or `_vnni` gets that set's flags and is only reached through run-time dispatch.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

CSRC = Path(__file__).resolve().parent
ISA_FLAGS = {
    "_avx2": "-mavx2 -mfma -mf16c",
    "_avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c",
    "_vnni": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vbmi -mavx512vnni -mavx512bf16 -mgfni -mfma -mf16c",
}
BASE_FLAGS = (
    "-std=c++17 -O3 -g1 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-unused-parameter -pthread"
)
# A kernel that spills registers is an error: each of ours is on the way of every token.
CUDA_FLAGS = (
    "-std=c++17 -O3 -lineinfo -Xcompiler -fPIC,-fvisibility=hidden -Xptxas -warn-spills,-Werror"
)
SANITIZERS = {
    "": "",
    "address": "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer",
    "thread": "-fsanitize=thread -fno-omit-frame-pointer",
}


class BuildError(RuntimeError):
    """Something about this machine or its settings; the text says what to do."""


def is_x86(machine: str) -> bool:
    return machine in ("x86_64", "AMD64", "i686")


def engine_sources(machine: str) -> list[Path]:
    """All C++ sources except bindings and tests, without the x86 ones on other machines."""
    found = sorted(p for p in CSRC.rglob("*.cpp") if p.parent.name not in ("tests", "bindings"))
    return [p for p in found if is_x86(machine) or not any(p.stem.endswith(s) for s in ISA_FLAGS)]


def source_flags(source: Path) -> str:
    return next((flags for suffix, flags in ISA_FLAGS.items() if source.stem.endswith(suffix)), "")


def find_nvcc(build_dir: Path) -> str | None:
    """nvcc, if a CUDA toolkit that works is here. COMOE_CUDA=0 builds without it, =1 insists on it."""
    wish = os.environ.get("COMOE_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise BuildError(f"COMOE_CUDA: expected auto, 0 or 1, got {wish!r}")
    if wish == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = ([os.path.join(home, "bin")] if home else []) + [None, "/usr/local/cuda/bin"]
    nvcc = next((found for place in places if (found := shutil.which("nvcc", path=place))), None)
    if nvcc is None:
        if wish == "1":
            raise BuildError(
                "COMOE_CUDA=1, but there is no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda"
            )
        return None
    trouble = nvcc_trouble(nvcc, build_dir)
    if trouble and wish == "1":
        raise BuildError(f"COMOE_CUDA=1, but {nvcc} cannot compile:\n{trouble}")
    if trouble:
        print(
            f"comoe: built WITHOUT CUDA, since {nvcc} cannot compile:\n{trouble}", file=sys.stderr
        )
    return None if trouble else nvcc


def nvcc_trouble(nvcc: str, build_dir: Path) -> str:
    """Why nvcc cannot compile here (half an installation, a host compiler it does not know), or nothing."""
    probe, passed = build_dir / "probe.cu", build_dir / "probe.ok"
    # Two seconds, so remembered for this nvcc and host compiler.
    key = f"{nvcc} {os.stat(nvcc).st_mtime_ns} {os.environ.get('CXX', '')}"
    if passed.exists() and passed.read_text() == key:
        return ""
    build_dir.mkdir(parents=True, exist_ok=True)
    probe.write_text(
        "#include <cuda_runtime.h>\n__global__ void f() {}\nint main() { f<<<1, 1>>>(); }\n"
    )
    command = [nvcc, "-c", str(probe), "-o", str(build_dir / "probe.o"), *nvcc_host_compiler()]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        return (result.stderr or result.stdout)[-2000:] or f"exit status {result.returncode}"
    passed.write_text(key)
    return ""


def nvcc_host_compiler() -> list[str]:
    return ["-ccbin", os.environ["CXX"]] if os.environ.get("CXX") else []


def cuda_library_flags(nvcc: str) -> str:
    """Where the static runtime lies: asked of nvcc, which may be a wrapper far from its toolkit."""
    query = subprocess.run(
        [nvcc, "-dryrun", "-x", "cu", os.devnull], capture_output=True, text=True
    )
    line = next((s for s in query.stderr.splitlines() if s.startswith("#$ LIBRARIES=")), None)
    if line is None:
        raise BuildError(
            f"{nvcc} -dryrun names no LIBRARIES; COMOE_CUDA=0 builds without CUDA:\n{query.stderr}"
        )
    folders = [word for word in shlex.split(line.partition("=")[2]) if not word.endswith("stubs")]
    return " ".join([*map(shlex.quote, folders), "-lcudart_static", "-ldl", "-lrt"])


def cuda_arch_flags(nvcc: str) -> str:
    """COMOE_CUDA_ARCHS ("80;90"), else the present GPUs', else 80 and 90 with PTX for what comes after."""
    archs = [a.strip() for a in os.environ.get("COMOE_CUDA_ARCHS", "").split(";") if a.strip()]
    wrong = [a for a in archs if not re.fullmatch(r"[1-9][0-9]{1,2}[af]?", a)]
    if wrong:
        raise BuildError(
            f"COMOE_CUDA_ARCHS: expected a list such as '80;90', got {';'.join(wrong)!r}"
        )
    ptx = [] if archs else ["90"]
    if not archs and shutil.which("nvidia-smi"):
        query = subprocess.run(
            ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"],
            capture_output=True,
            text=True,
        )
        caps = (
            re.findall(r"^\s*(\d+)\.(\d+)\s*$", query.stdout, re.MULTILINE)
            if query.returncode == 0
            else []
        )
        present = sorted({major + minor for major, minor in caps}, key=int)
        known = subprocess.run(
            [nvcc, "--list-gpu-code"], capture_output=True, text=True
        ).stdout.split()
        # A GPU newer than this nvcc runs the PTX below instead.
        archs = [a for a in present if f"sm_{a}" in known]
        ptx = [] if archs and archs == present else ptx
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs or ["80", "90"]]
    flags += [f"-gencode=arch=compute_{a},code=compute_{a}" for a in ptx]
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
        f"  command = {nvcc} -MD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx $in -o $out $flags",
    ]

    def object_of(source: Path) -> Path:
        return build_dir / "obj" / (str(source.relative_to(CSRC)).replace("/", "__") + ".o")

    def escape(path: Path) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    for source, flags in objects.items():
        lines += [f"build {escape(object_of(source))}: cxx {escape(source)}", f"  flags = {flags}"]
    cuda_flags = (
        f"{CUDA_FLAGS} {cuda_arch_flags(nvcc)} {shlex.join(nvcc_host_compiler())}" if nvcc else ""
    )
    for source in cuda_sources or []:
        lines += [
            f"build {escape(object_of(source))}: nvcc {escape(source)}",
            f"  flags = {cuda_flags}",
        ]
    for output, sources in links.items():
        inputs = " ".join(escape(object_of(s)) for s in sources)
        shared = "-shared " if output.suffix == ".so" else ""
        lines += [f"build {escape(output)}: link {inputs}", f"  flags = {shared}{link_flags}"]
    build_dir.mkdir(parents=True, exist_ok=True)
    (build_dir / "build.ninja").write_text("\n".join(lines) + "\n")


def run_ninja(build_dir: Path, *targets: str) -> None:
    beside = shutil.which("ninja", path=str(Path(sys.executable).parent))
    ninja = beside or shutil.which("ninja")
    if ninja is None:
        raise BuildError("there is no ninja: run 'make build', or 'pip install ninja' first")
    jobs = os.environ.get("MAX_JOBS", "")
    quiet = [] if sys.stdout.isatty() else ["--quiet"]
    command = [ninja, *quiet, "-C", str(build_dir), *(["-j", jobs] if jobs else []), *targets]
    result = subprocess.run(command)
    if result.returncode:
        raise BuildError(
            f"the native code did not compile (above); {shlex.join(command)} repeats it"
        )


def find_cxx() -> str:
    wish = os.environ.get("CXX")
    if wish:
        return wish
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return name
    raise BuildError(
        "there is no C++ compiler; on Debian and Ubuntu: apt-get install g++ (or set CXX)"
    )


def build_extension(build_dir: Path, output: Path) -> None:
    """Compiles csrc into the Python module `output` (comoe/_C...so)."""
    import sysconfig

    import pybind11

    machine = platform.machine()
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if not header.exists():
        raise BuildError(f"{header} is missing; on Debian and Ubuntu: apt-get install python3-dev")
    include = (
        f"-I{shlex.quote(pybind11.get_include())} -I{shlex.quote(sysconfig.get_paths()['include'])}"
    )
    nvcc = find_nvcc(build_dir)
    cuda_sources = sorted((CSRC / "cuda").glob("*.cu")) if nvcc else []
    cuda_define = " -DCOMOE_CUDA=1" if cuda_sources else ""
    sources = engine_sources(machine)
    objects = {s: f"{BASE_FLAGS}{cuda_define} {source_flags(s)}" for s in sources}
    bindings = sorted((CSRC / "bindings").glob("*.cpp"))
    objects.update({s: f"{BASE_FLAGS}{cuda_define} {include}" for s in bindings})
    link_flags = "-pthread -Wl,--gc-sections -ldl"
    if cuda_sources:
        link_flags += " " + cuda_library_flags(nvcc)
    write_ninja(
        build_dir,
        objects,
        {output: [*sources, *bindings, *cuda_sources]},
        cxx=find_cxx(),
        link_flags=link_flags,
        cuda_sources=cuda_sources,
        nvcc=nvcc,
    )
    run_ninja(build_dir)


def build_tests(
    build_dir: Path, sanitizer: str = "", cxx: str | None = None, machine: str | None = None
) -> list[Path]:
    """Compiles each csrc/tests/test_*.cpp with the engine into a program of its own; returns them."""
    machine = machine or platform.machine()
    flags = f"{BASE_FLAGS} {SANITIZERS[sanitizer]}"
    sources = engine_sources(machine)
    tests = sorted((CSRC / "tests").glob("test_*.cpp"))
    objects = {s: f"{flags} {source_flags(s)}" for s in [*sources, *tests]}
    links = {build_dir / t.stem: [*sources, t] for t in tests}
    # Another machine's programs are static: its C library need not be installed where they are emulated.
    static = " -static" if machine != platform.machine() else ""
    write_ninja(
        build_dir,
        objects,
        links,
        cxx=cxx or find_cxx(),
        link_flags=f"-pthread {SANITIZERS[sanitizer]}{static} -ldl",
    )
    run_ninja(build_dir)
    return list(links)


def build_gpu_tests(build_dir: Path) -> list[Path]:
    """Compiles each csrc/gpu_tests/test_*.cu with the engine and the kernels; returns them."""
    nvcc = find_nvcc(build_dir)
    if nvcc is None:
        raise BuildError("--gpu needs nvcc: put it on PATH or set CUDA_HOME, and leave COMOE_CUDA")
    sources = engine_sources(platform.machine())
    kernels = sorted((CSRC / "cuda").glob("*.cu"))
    tests = sorted((CSRC / "gpu_tests").glob("test_*.cu"))
    write_ninja(
        build_dir,
        {s: f"{BASE_FLAGS} -DCOMOE_CUDA=1 {source_flags(s)}" for s in sources},
        {build_dir / t.stem: [*sources, *kernels, t] for t in tests},
        cxx=find_cxx(),
        link_flags=f"-pthread -ldl {cuda_library_flags(nvcc)}",
        cuda_sources=[*kernels, *tests],
        nvcc=nvcc,
    )
    run_ninja(build_dir)
    return [build_dir / t.stem for t in tests]


def run_tests(programs: list[Path], runner: list[str]) -> list[str]:
    """Runs each program; returns the names of those that failed."""
    failed = []
    for program in programs:
        print(f"== {program.name}", flush=True)
        if subprocess.run([*runner, str(program)]).returncode:
            failed.append(program.name)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description="build and run the native tests")
    parser.add_argument("names", nargs="*", help="only these (test_engine); else all")
    parser.add_argument("--build-dir", type=Path, default=None)
    parser.add_argument("--sanitizer", choices=sorted(SANITIZERS), default="")
    parser.add_argument("--cxx", default=None, help="a cross compiler; with --machine and --runner")
    parser.add_argument("--machine", default=None, help="as uname -m says it: aarch64")
    parser.add_argument(
        "--runner", default="", help="command put before each test program (an emulator)"
    )
    parser.add_argument("--gpu", action="store_true", help="those of csrc/gpu_tests, with nvcc")
    parser.add_argument(
        "--build-only", action="store_true", help="for another machine, or a sanitizer"
    )
    args = parser.parse_args()
    build_dir = (
        args.build_dir
        or CSRC.parent
        / "build"
        / f"native-{args.machine or args.sanitizer or ('gpu' if args.gpu else 'plain')}"
    )
    runner = shlex.split(args.runner)
    if args.sanitizer == "thread" and not runner and shutil.which("setarch"):
        # GCC 12's TSan does not know the address layout of kernels with 32 random bits.
        runner = ["setarch", "-R"]
    if args.gpu:
        programs = build_gpu_tests(build_dir.resolve())
    else:
        programs = build_tests(build_dir.resolve(), args.sanitizer, args.cxx, args.machine)
    unknown = set(args.names) - {p.name for p in programs}
    if unknown or not programs:
        raise BuildError(
            f"no native test {', '.join(sorted(unknown))}; there are: {' '.join(p.name for p in programs)}"
        )
    if args.build_only:
        return
    failed = run_tests([p for p in programs if not args.names or p.name in args.names], runner)
    if failed:
        raise BuildError(f"native tests that failed: {' '.join(failed)}")


if __name__ == "__main__":
    try:
        main()
    except BuildError as error:
        sys.exit(f"error: {error}")
