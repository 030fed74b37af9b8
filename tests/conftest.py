"""Fixtures that several tests share: the bundled model, packed once per run."""

import os
import signal
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel's module is imported

DEMO = Path(__file__).resolve().parent.parent / "comoe" / "demo_model"


@pytest.fixture
def ctrl_c():
    """Children heed SIGINT, also where the tests run in the background of a shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    return DEMO


@pytest.fixture(scope="session")
def packed_demo(tmp_path_factory) -> Path:
    import comoe

    return comoe.pack(DEMO, tmp_path_factory.mktemp("packed") / "demo")


@pytest.fixture
def cli(capsys):
    """Runs a command of comoe in this process: (exit status, standard output, standard error)."""
    from comoe.cli import main

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return status, out, err

    return call


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Copies of remote stores go into the test's own folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def server(packed_demo):
    """The bundled model, packed, on a web server of the test's own."""
    from range_server import RangeServer

    with RangeServer(packed_demo) as server:
        yield server


@pytest.fixture(scope="module")
def host(packed_demo):
    """Its experts, ready to be served to other machines."""
    from comoe.serve.host import ExpertHost

    host = ExpertHost(packed_demo, 40_000_000)
    host.runtime.wait_ready()
    yield host
    host.close()
