"""Import, packaging and the parts of the build that can go wrong on someone else's machine."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from comoe import _C

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "csrc"))
import make_stub  # noqa: E402
import ninja_build  # noqa: E402


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light_and_touches_no_gpu():
    """No torch, no transformers, no CUDA library; the native module opens the driver when first asked."""
    code = """
import sys, comoe
assert not {'torch', 'transformers', 'numpy', 'comoe._C'} & set(sys.modules)
import comoe._C, comoe.config, comoe.memory, comoe.cli
assert not {'torch', 'transformers'} & set(sys.modules)
print(open('/proc/self/maps').read())
"""
    maps = run_python(code)
    assert "_C." in maps
    assert not re.search(r"lib(cuda|nvidia|cudart|torch)", maps)


def test_native_module_needs_no_cuda_library():
    needed = subprocess.run(["ldd", _C.__file__], capture_output=True, text=True).stdout
    assert "libstdc++" in needed
    assert not re.search(r"libcu|libtorch|libgomp", needed)


def test_no_gpu_is_an_empty_list_and_a_reason():
    devices, why = _C.cuda_devices()
    assert isinstance(devices, list)
    assert bool(devices) != bool(why)
    if not devices:
        with pytest.raises(RuntimeError, match=r"cuda_copy_bandwidth|cudaGetDeviceCount"):
            _C.cuda_copy_bandwidth(0)


@pytest.mark.gpu
@pytest.mark.skipif(not _C.cuda_devices()[0], reason="no CUDA device")
def test_gpu_is_described_and_measured():
    for device in _C.cuda_devices()[0]:
        assert device["capability"] >= (5, 0)
        assert device["total_bytes"] > 1 << 30
        assert device["num_sms"] > 0
        assert _C.cuda_copy_bandwidth(device["index"], 64 << 20, 3) > 1e8
    with pytest.raises(ValueError, match="index: expected 0 <= index < "):
        _C.cuda_copy_bandwidth(99)
    with pytest.raises(ValueError, match="expected bytes > 0"):
        _C.cuda_copy_bandwidth(0, 0)


def members(tree: ast.Module) -> dict[str, list[str]]:
    """name -> parameter names, of every function and method."""
    found: dict[str, list[str]] = {}

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                found[prefix + node.name] = []
                visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.FunctionDef):
                found[prefix + node.name] = [
                    a.arg for a in (*node.args.args, *node.args.kwonlyargs)
                ]
            elif isinstance(node, ast.AnnAssign):
                found[prefix + node.target.id] = []

    visit(tree.body, "")
    return found


def test_stub_matches_the_native_module():
    """When this fails: python csrc/make_stub.py"""
    written = members(ast.parse((ROOT / "comoe/_C.pyi").read_text()))
    assert written == members(ast.parse(make_stub.stub(_C)))


def test_source_distribution_has_what_a_build_needs(tmp_path):
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    sources = {
        str(p.relative_to(ROOT))
        for p in (ROOT / "csrc").rglob("*")
        if p.suffix in (".cpp", ".h", ".cu", ".py") and "__pycache__" not in p.parts
    }
    assert sources <= names
    assert {
        "pyproject.toml",
        "setup.py",
        "comoe/_C.pyi",
        "comoe/py.typed",
        "LICENSE",
        "README.md",
    } <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def requirement_lines(version: str) -> dict[str, str]:
    """name -> pinned version, for a Python version such as "3.10"."""
    found = {}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        line = line.removesuffix('; platform_machine == "x86_64"')
        match = re.fullmatch(r'([a-z0-9-]+)==([\w.]+)(?:; python_version (<|>=) "3\.11")?', line)
        assert match, line
        name, pin, relation = match.groups()
        old = tuple(map(int, version.split("."))) < (3, 11)
        if relation is None or (relation == "<") == old:
            assert name not in found, line
            found[name] = pin
    return found


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13"])
def test_pins_meet_what_pyproject_asks(version):
    pins = requirement_lines(version)
    asked = re.findall(
        r'^\s+"([a-z-]+)>=([\d.]+)",$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    )
    assert len(asked) >= 9
    for name, least in asked:
        have = [int(part) for part in pins[name].split(".")]
        assert have >= [int(part) for part in least.split(".")], name


# ---- ninja_build ------------------------------------------------------------------------------------


def fake_nvcc(folder: Path, *, compiles: bool) -> Path:
    script = folder / "nvcc"
    status = 0 if compiles else 1
    script.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        '  *-dryrun*) echo \'#$ LIBRARIES=  "-L/x y/lib/stubs" "-L/x y/lib"\' >&2;;\n'
        "  *--list-gpu-code*) echo sm_80; echo sm_90;;\n"
        f"  *) echo 'unsupported GNU version' >&2; exit {status};;\n"
        "esac\n"
    )
    script.chmod(0o755)
    return script


def test_nvcc_that_cannot_compile_is_left_out_aloud(tmp_path, monkeypatch, capsys):
    fake_nvcc(tmp_path, compiles=False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("COMOE_CUDA", "auto")
    assert ninja_build.find_nvcc(tmp_path / "build") is None
    assert "WITHOUT CUDA" in capsys.readouterr().err
    monkeypatch.setenv("COMOE_CUDA", "1")
    with pytest.raises(ninja_build.BuildError, match="(?s)cannot compile.*unsupported GNU version"):
        ninja_build.find_nvcc(tmp_path / "build")
    monkeypatch.setenv("COMOE_CUDA", "0")
    assert ninja_build.find_nvcc(tmp_path / "build") is None
    monkeypatch.setenv("COMOE_CUDA", "yes")
    with pytest.raises(ninja_build.BuildError, match="expected auto, 0 or 1, got 'yes'"):
        ninja_build.find_nvcc(tmp_path / "build")


def test_nvcc_is_asked_where_its_libraries_are(tmp_path):
    nvcc = fake_nvcc(tmp_path, compiles=True)
    assert ninja_build.cuda_library_flags(str(nvcc)) == "'-L/x y/lib' -lcudart_static -ldl -lrt"


def test_architectures(tmp_path, monkeypatch):
    nvcc = str(fake_nvcc(tmp_path, compiles=True))

    def flags(wish: str, gpus: str | None) -> str:
        monkeypatch.setenv("COMOE_CUDA_ARCHS", wish)
        query = tmp_path / "nvidia-smi"
        query.unlink(missing_ok=True)
        if gpus is not None:
            query.write_text(f"#!/bin/sh\nprintf '{gpus}'\n")
            query.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        return re.sub(
            r"-gencode=arch=compute_(\w+),code=", r"\1:", ninja_build.cuda_arch_flags(nvcc)
        )

    assert flags("", None) == "80:sm_80 90:sm_90 90:compute_90"
    assert flags("", "9.0\\n9.0\\n") == "90:sm_90"
    assert flags("", "8.0\\n9.0\\n") == "80:sm_80 90:sm_90"
    # A GPU that this nvcc does not know gets PTX.
    assert flags("", "12.0\\n") == "80:sm_80 90:sm_90 90:compute_90"
    assert flags("80;90a", "9.0\\n") == "80:sm_80 90a:sm_90a"
    with pytest.raises(ninja_build.BuildError, match="expected a list such as '80;90', got '8.0'"):
        flags("8.0", None)


def test_other_machines_get_no_x86_sources():
    names = {p.name for p in ninja_build.engine_sources("aarch64")}
    assert "kernels_portable.cpp" in names
    assert not [name for name in names if re.search(r"avx|vnni", name)]
    assert [p for p in ninja_build.engine_sources("x86_64") if "avx2" in p.name]


def test_missing_tools_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ninja_build.BuildError, match=r"no C\+\+ compiler.*apt-get install g\+\+"):
        ninja_build.find_cxx()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(ninja_build.BuildError, match="there is no ninja"):
        ninja_build.run_ninja(tmp_path)


def test_makefile_names_what_is_wrong_with_the_python(tmp_path):
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    for name in ("pyproject.toml", "setup.py", "requirements.txt"):
        (tmp_path / name).touch()
    old = tmp_path / "python2"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = subprocess.run(
        ["make", "build", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "comoe needs Python 3.10 or later" in done.stderr
    assert str(old) in done.stderr


@pytest.mark.parametrize("held, remade", [('exec "{}" "$@"', False), ("echo /usr 3.9", True)])
def test_makefile_heeds_the_python_that_it_is_given(tmp_path, held, remade):
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    for name in ("pyproject.toml", "setup.py", "requirements.txt"):
        (tmp_path / name).touch()
    (tmp_path / ".venv/bin").mkdir(parents=True)
    for stamp in (".python", ".packages", ".installed"):
        (tmp_path / ".venv" / stamp).touch()
    python = tmp_path / ".venv/bin/python"
    python.write_text(f"#!/bin/sh\n{held.format(sys.executable)}\n")
    python.chmod(0o755)
    command = ["make", "-n", "build", f"PYTHON={sys.executable}", "PACKAGES=numpy==2.2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ("-m venv --clear .venv" in done.stdout) == remade
    assert done.stdout.count("pip install -q  numpy==2.2") == 1


def test_makefile_arm_needs_its_tools(tmp_path):
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    (tmp_path / ".venv").mkdir()
    for stamp in (".python", ".packages"):
        (tmp_path / ".venv" / stamp).touch()
    (tmp_path / "requirements.txt").touch()
    os.utime(tmp_path / "requirements.txt", (1, 1))
    os.utime(tmp_path / ".venv/.python", (1, 1))
    command = ["make", "test-arm", "AARCH64_CXX=no-such-compiler"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "apt-get install g++-aarch64-linux-gnu qemu-user" in done.stderr
