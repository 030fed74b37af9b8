"""The local cache of remote stores: never believes bytes that are not there, keeps its size, is shared."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from range_server import RangeServer
from store_helpers import write_tiny_store

from comoe import _C
from comoe.store import Store, StoreError
from comoe.store import sums as file_sums
from comoe.tiers import cache as stored
from comoe.tiers import pull as pulling
from comoe.tiers.remote_store import RemoteStore
from comoe.tiers.sources import NoSourceError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def packed(tmp_path) -> Path:
    folder = tmp_path / "served"
    folder.mkdir()
    write_tiny_store(folder)
    (folder / "config.json").write_text('{"a": 1}')
    np.random.default_rng(1).integers(0, 256, 100_000, np.uint8).tofile(
        folder / "model.safetensors"
    )
    file_sums.add_file_sums(folder)
    return folder


@pytest.fixture
def server(packed):
    with RangeServer(packed) as server:
        yield server


@pytest.fixture
def base(tmp_path) -> Path:
    return tmp_path / "cache"


def payloads(folder: Path) -> list[bytes]:
    store = Store.open(folder)
    return [
        store.payload(layer, expert, record)
        for layer, info in enumerate(store.layers)
        for expert in range(info.num_experts)
        for record in range(info.records.shape[1])
    ]


def test_a_pulled_store_is_the_store(server, packed, base):
    remote = RemoteStore.open(server.url, base=base)
    first = sum(end - begin for path, begin, end in server.requests if path.endswith(".bin"))
    steps = []
    pulled = pulling.pull(remote, progress=lambda done, total: steps.append((done, total)))
    remote.close()
    assert pulled.fetched == pulled.bytes == steps[-1][0] == steps[-1][1]
    assert payloads(remote.folder) == payloads(packed)
    for name in ("config.json", "model.safetensors"):
        assert (remote.folder / name).read_bytes() == (packed / name).read_bytes()
    # Merged: far fewer requests than increments.
    layer_requests = [r for r in server.requests if r[0].endswith(".bin")]
    assert len(layer_requests) < len(remote.cache.extents) / 2
    assert first < sum(path.stat().st_size for path in (packed / "experts").glob("*.bin"))
    # And all of it is here: no source is needed any more.
    server.down()
    again = RemoteStore.open(server.url, base=base, patience=0.3)
    assert "refused" in again.offline or again.offline
    assert pulling.pull(again).fetched == 0
    again.close()


def test_up_to_a_level_then_the_rest(server, base):
    remote = RemoteStore.open(server.url, base=base)
    names = remote.store.levels.names
    low = pulling.pull(remote, names[0])
    assert 0 < low.bytes == sum(remote.store.level_bytes(i, 0)[0] for i in range(2))
    some = pulling.pull(remote, names[1])
    assert some.fetched == some.bytes - low.bytes
    rest = pulling.pull(remote)
    assert rest.fetched == rest.bytes - some.bytes and pulling.pull(remote).fetched == 0
    with pytest.raises(ValueError, match="--up-to: expected one of"):
        pulling.pull(remote, "bits17")
    remote.close()


def test_the_index_is_only_a_hint(server, packed, base):
    remote = RemoteStore.open(server.url, base=base)
    remote.cache._entries["here"][:] = (
        1  # as if a machine had lost power before the bytes were written
    )
    remote.close()
    again = RemoteStore.open(server.url, base=base)
    pulled = pulling.pull(again)
    again.close()
    assert pulled.fetched == pulled.bytes and payloads(again.folder) == payloads(packed)


CHILD = """
    import sys
    from comoe.tiers.remote_store import RemoteStore
    from comoe.tiers.pull import pull
    from pathlib import Path
    remote = RemoteStore.open(sys.argv[1], base=Path(sys.argv[2]))
    print("open", flush=True)
    pulled = pull(remote)
    remote.close()
    print(pulled.fetched, pulled.bytes, flush=True)
"""


def child(url: str, base: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CHILD), url, str(base)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_killed_at_any_moment(server, packed, base):
    """kill -9 while files, headers and increments come: what is believed afterwards is right."""
    rng = np.random.default_rng(3)
    for kill_after in (3, 8, 16, 30):
        begin = len(server.requests)
        process = child(server.url, base)
        server.delay = lambda _: 0.005
        give_up = time.monotonic() + 30
        while len(server.requests) < begin + kill_after and process.poll() is None:
            assert time.monotonic() < give_up
            time.sleep(0.001)
        time.sleep(float(rng.random()) * 0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        server.delay = lambda _: 0.0
        for folder in stored.stores(base):
            entries = Store.open(folder) if (folder / stored.INDEX_FILE).exists() else None
            if entries is None:
                continue
            cache = stored.StoreCache(folder, entries.layers)
            for which in np.flatnonzero(cache.here()).tolist():
                assert _C.crc32c(cache.read(which)) == cache.extents.crc[which]
            cache.close()
    remote = RemoteStore.open(server.url, base=base)
    pulling.pull(remote)
    remote.close()
    assert payloads(remote.folder) == payloads(packed)


def test_two_processes_share(server, packed, base):
    both = [child(server.url, base) for _ in range(2)]
    out = [process.communicate(timeout=60)[0].split() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    (folder,) = stored.stores(base)
    assert payloads(folder) == payloads(packed)
    dense = [r for r in server.requests if r[0] == "model.safetensors"]
    assert len(dense) == 1  # the second waited for the first, and found it there
    assert all(int(words[2]) == int(out[0][2]) for words in out)


def test_the_limit_holds_and_the_least_worth_goes(server, base):
    remote = RemoteStore.open(server.url, base=base)
    pulling.pull(remote)
    cache = remote.cache
    whole = stored.disk_bytes(remote.folder)
    values = np.linspace(0, 1, len(cache.extents), dtype=np.float32)
    np.random.default_rng(2).shuffle(values)
    cache.value(values)
    cache._entries["pulled"] = 0  # as if it had come by use
    kept = int(0.5 * cache.extents.on_disk.sum())
    freed = stored.evict(base, kept, cache)
    assert freed >= kept
    # File systems keep a block or two of their own for a file with more holes.
    assert stored.disk_bytes(remote.folder) <= whole - kept + 8 * 4096
    here = cache.here()
    assert values[here].min() >= values[~here].max()
    # What is punched out reads as wrong, whatever an index says, and comes again.
    gone = int(np.flatnonzero(~here)[0])
    assert _C.crc32c(cache.read(gone)) != cache.extents.crc[gone]
    remote.close()
    limited = RemoteStore.open(server.url, base=base, limit=stored.disk_bytes(remote.folder) + 9000)
    with pytest.raises(StoreError, match="no room for all of it"):
        pulling.pull(limited)
    assert stored.disk_bytes(remote.folder) <= stored.disk_bytes(limited.folder)
    limited.close()


def test_stores_in_use_stay(server, base):
    remote = RemoteStore.open(server.url, base=base)
    assert stored.in_use(remote.folder) and stored.remove_store(remote.folder) == 0
    assert stored.evict(base, 1 << 40) == 0 and remote.folder.exists()
    remote.close()
    assert not stored.in_use(remote.folder)
    assert stored.evict(base, 1 << 40) > 0 and stored.stores(base) == []


def test_a_limit_is_remembered(base):
    assert stored.read_limit(base) is None
    stored.set_limit(base, 5000)
    assert stored.read_limit(base) == 5000
    stored.set_limit(base, None)
    assert stored.read_limit(base) is None


def test_a_disk_that_fails_is_done_without(server, base, monkeypatch):
    remote = RemoteStore.open(server.url, base=base)

    def broken(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(remote.cache, "_write", broken)
    with pytest.raises(StoreError, match="no room"):
        pulling.pull(remote)
    assert not remote.cache.here().any()
    remote.close()


# ---- opening --------------------------------------------------------------------------------------


def test_corrupt_bodies_of_what_is_beside_the_experts(server, packed, base):
    bad = {}

    def fault(path, begin, end):
        bad[path] = bad.get(path, 0) + 1
        return "corrupt" if bad[path] == 1 and path != "experts/manifest.json" else None

    server.fault = fault
    remote = RemoteStore.open(server.url, base=base)
    remote.close()
    for name in ("config.json", "model.safetensors"):
        assert (remote.folder / name).read_bytes() == (packed / name).read_bytes()


def test_a_corrupt_manifest(server, base):
    server.fault = lambda path, *_: "corrupt" if path.endswith("manifest.json") else None
    with pytest.raises(NoSourceError, match=f"^{server.url}: experts/manifest.json: damaged"):
        RemoteStore.open(server.url, base=base, patience=1.0)
    server.fault = lambda *_: None
    RemoteStore.open(server.url, base=base).close()


def test_not_a_store(server, base):
    with pytest.raises(NoSourceError, match="is the URL that of a packed folder"):
        RemoteStore.open(server.url + "/experts", base=base, patience=0.5)


def test_a_store_without_checksums_of_its_files(server, packed, base):
    import json

    from comoe.store.writer import manifest_text

    path = packed / "experts" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["files"]
    path.write_bytes(manifest_text(manifest))
    with pytest.raises(StoreError, match="no checksums of the files beside it.*comoe pack"):
        RemoteStore.open(server.url, base=base)
    file_sums.add_file_sums(packed)
    RemoteStore.open(server.url, base=base).close()


@pytest.mark.parametrize(
    "files",
    [
        7,
        {"chunk_bytes": 1, "sums": {"a": {"bytes": 1, "crc32c": ["0"]}}},
        {"chunk_bytes": 4096, "sums": {}},
        {"chunk_bytes": 4096, "sums": {"../a": {"bytes": 1, "crc32c": ["0"]}}},
        {"chunk_bytes": 4096, "sums": {"a": {"bytes": 5000, "crc32c": ["0"]}}},
        {"chunk_bytes": 4096, "sums": {"a": {"bytes": -1, "crc32c": []}}},
        {"chunk_bytes": 4096, "sums": {"a": {"bytes": 1, "crc32c": ["zz"]}}},
        {"chunk_bytes": 4096, "sums": {"a": 3}},
    ],
)
def test_hostile_lists_of_files(server, packed, base, files):
    import json

    from comoe.store.writer import manifest_text

    path = packed / "experts" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"] = files
    path.write_bytes(manifest_text(manifest))
    with pytest.raises(StoreError, match="files"):
        RemoteStore.open(server.url, base=base)


def test_only_what_describes_the_experts(server, base):
    remote = RemoteStore.open(server.url, base=base, dense=False)
    remote.close()
    assert Store.open(remote.folder).layers and not (remote.folder / "model.safetensors").exists()
    RemoteStore.open(server.url, base=base).close()
    assert (remote.folder / "model.safetensors").exists()
