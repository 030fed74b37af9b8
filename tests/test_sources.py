"""Sources of bytes over HTTP and fsspec: what a server may do wrong is found, named, and tried elsewhere."""

from __future__ import annotations

import base64
import threading
import time

import numpy as np
import pytest
from range_server import FAULTS, RangeServer

from comoe.tiers import source as kinds
from comoe.tiers import sources as several
from comoe.tiers.http_source import LEAST_PART, MOST_PART, PART_SECONDS, fitting_part
from comoe.tiers.source import SourceError, Transfer, open_source
from comoe.tiers.sources import NoSourceError, Sources
from comoe.tiers.urls import below, is_url, redacted

SIZE = 300_000


@pytest.fixture
def folder(tmp_path):
    data = np.random.default_rng(5).integers(0, 256, SIZE, np.uint8)
    data.tofile(tmp_path / "data.bin")
    (tmp_path / "manifest.json").write_text("the version")
    return tmp_path


@pytest.fixture
def server(folder):
    with RangeServer(folder) as server:
        yield server


def read(source, offset=1000, nbytes=50_000, size=SIZE, path="data.bin"):
    view = memoryview(bytearray(nbytes))
    source.read_into(path, offset, view, Transfer(source.name, nbytes, lambda *_: None), size)
    return bytes(view)


def wanted(folder, offset, nbytes):
    return (folder / "data.bin").read_bytes()[offset : offset + nbytes]


def test_ranges_over_one_connection(server, folder):
    source = open_source(server.url)
    for offset, nbytes in ((0, 1), (1000, 50_000), (SIZE - 1, 1), (0, SIZE)):
        assert read(source, offset, nbytes) == wanted(folder, offset, nbytes)
    assert server.connections == 1
    assert source.read_all("manifest.json", 100, Transfer("", 0, lambda *_: None)) == b"the version"
    with pytest.raises(kinds.BadAnswer, match="more than the 5 it may have"):
        source.read_all("manifest.json", 5, Transfer("", 0, lambda *_: None))
    source.close()


EXPECTED = {
    "corrupt": None,  # only a checksum tells
    "truncate": (kinds.BadAnswer, "ends after|cut off"),
    "long_length": (kinds.BadAnswer, "50,000 bytes expected, 50,007 sent"),
    "short_length": (kinds.BadAnswer, "50,000 bytes expected, 49,993 sent"),
    "wrong_range": (kinds.BadAnswer, "bytes 1000-50999 asked for, got 'bytes 1001-50999/300000'"),
    "ignore_range": (kinds.Refused, "does not serve byte ranges"),
    "reset": (kinds.SourceError, "data.bin"),
    "garbage": (kinds.BadAnswer, "not an HTTP answer"),
    "404": (kinds.Gone, "status 404.*is the URL that of a packed folder"),
    "416": (kinds.Changed, "the file was exchanged"),
    "500": (kinds.Busy, "status 500"),
    "503": (kinds.Busy, "status 503"),
    "loop": (kinds.BadAnswer, "redirects go round in circles"),
}


def test_parts_grow_with_a_fast_link_and_shrink_with_a_slow_one():
    fast = [LEAST_PART]
    for _ in range(10):
        fast.append(fitting_part(fast[-1], 1e-4))
    assert fast[1] == 2 * LEAST_PART and fast[-1] == MOST_PART
    slow = MOST_PART
    for _ in range(10):
        slow = fitting_part(slow, 1.0)
    assert slow == LEAST_PART
    assert fitting_part(MOST_PART, 2 * PART_SECONDS) == MOST_PART


def test_every_fault_is_listed():
    assert set(EXPECTED) == set(FAULTS)


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named_and_leave_no_harm(server, folder, fault):
    source = open_source(server.url)
    server.fault = lambda *_: fault
    if EXPECTED[fault] is not None:
        kind, text = EXPECTED[fault]
        with pytest.raises(kind, match=text):
            read(source)
    server.fault = lambda *_: None
    assert read(source) == wanted(folder, 1000, 50_000)
    source.close()


def test_nobody_there():
    with RangeServer(None) as gone:
        url = gone.url
    with pytest.raises(kinds.Unreachable, match="refused"):
        read(open_source(url))


def test_exchanged_file_is_noticed(server, folder):
    source = open_source(server.url)
    read(source)
    server.etag_salt = "another"
    with pytest.raises(kinds.Changed, match="ETag"):
        read(source)
    source.forget("data.bin")
    assert read(source) == wanted(folder, 1000, 50_000)
    with pytest.raises(kinds.Changed, match="300000 bytes now, it had 299999"):
        read(source, size=SIZE - 1)


def test_credentials_stay_out_of_sight_and_at_home(folder):
    secret = "Basic " + base64.b64encode(b"ann:s3 cret").decode()
    with RangeServer(folder, secret=secret) as server:
        url = server.url.replace("//", "//ann:s3%20cret@") + "?token=hush"
        source = open_source(url)
        assert read(source) == wanted(folder, 1000, 50_000)
        assert source.name == server.url
        wrong = open_source(server.url.replace("//", "//ann:wr0ng@") + "/?token=hush")
        with pytest.raises(kinds.Refused, match="credentials") as error:
            read(wrong)
        text = f"{error.value}{error.value!r}{wrong.name}"
        assert not any(word in text for word in ("ann:", "wr0ng", "hush", "s3"))

        # A redirect to another server takes no secrets along.
        with RangeServer(folder) as other:
            server.redirect = other.url
            assert read(source) == wanted(folder, 1000, 50_000)
            assert other.seen_headers and "Authorization" not in other.seen_headers[0]


def test_headers_from_the_configuration_of_fsspec(server, folder, monkeypatch):
    from fsspec.config import conf

    monkeypatch.setitem(conf, "http", {"client_kwargs": {"headers": {"X-Key": "k"}}})
    read(open_source(server.url))
    assert server.seen_headers[-1]["X-Key"] == "k"


def test_urls():
    assert is_url("https://host/x") and is_url("hf://user/repo") and is_url("simplecache::s3://b/x")
    assert not any(is_url(x) for x in ("folder/x", "user/repo", "C:\\x", 7, "./a://b"))
    assert redacted("https://u:p@host:8/a?sig=1#f") == "https://host:8/a"
    assert below("https://u:p@h/a/?sig=1", "x y.bin") == "https://u:p@h/a/x%20y.bin?sig=1"


def test_fsspec_reads_ranges(folder):
    source = open_source(f"file://{folder}")
    assert read(source) == wanted(folder, 1000, 50_000)
    assert source.read_all("manifest.json", 100, Transfer("", 0, lambda *_: None)) == b"the version"
    with pytest.raises(kinds.Gone, match="no such file"):
        read(source, path="other.bin")
    with pytest.raises(kinds.BadAnswer, match="50,000 bytes asked for"):
        read(source, offset=SIZE - 10)
    with pytest.raises(ValueError, match="fsspec cannot open it"):
        open_source("nosuchprotocol://u:secret@host/x")


# ---- several ------------------------------------------------------------------------------------


class Caller:
    """Accepts only the right bytes."""

    def __init__(self, folder, offset=1000, nbytes=50_000):
        self.right = wanted(folder, offset, nbytes)
        self.offset, self.nbytes = offset, nbytes
        self.got = 0

    def accept(self, view) -> bool:
        if bytes(view) != self.right:
            return False
        self.got += 1
        return True

    def fetch(self, sources, **options):
        options = {"size": SIZE, **options}
        sources.fetch("data.bin", self.offset, self.nbytes, self.accept, **options)
        assert self.got >= 1


def sources_of(*servers, patience=10.0):
    sources = Sources([open_source(server.url) for server in servers], patience=patience)
    assert sources.pin("manifest.json") == b"the version"
    return sources


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_source_is_left_for_another(folder, fault):
    with RangeServer(folder) as bad, RangeServer(folder) as good:
        sources = sources_of(bad, good)
        bad.fault = lambda path, *_: fault if path == "data.bin" else None
        for _ in range(8):
            Caller(folder).fetch(sources)
        sources.close()
        assert sources.links.stats()[good.url]["transfers"] == 8


@pytest.mark.parametrize("fault", [f for f in FAULTS if f not in ("ignore_range", "404")])
def test_a_passing_fault_of_the_only_source(server, folder, fault):
    sources = sources_of(server)
    left = [2]

    def once(path, *_):
        left[0] -= 1
        return fault if left[0] >= 0 else None

    server.fault = once
    Caller(folder).fetch(sources)
    sources.close()
    assert left[0] < 0


def test_when_nobody_can(folder):
    with RangeServer(folder) as one, RangeServer(folder) as two:
        sources = sources_of(one, two, patience=0.5)
        one.fault = lambda *_: "500"
        two.fault = lambda path, *_: "404" if path == "data.bin" else None
        with pytest.raises(NoSourceError, match="status 500") as error:
            Caller(folder).fetch(sources)
        assert "status 404" in str(error.value)
        one.fault = two.fault = lambda path, *_: "corrupt" if path == "data.bin" else None
        with pytest.raises(NoSourceError, match="wrong checksum"):
            Caller(folder).fetch(sources, patience=lambda: 60.0)  # more attempts are of no use
        sources.close()


def test_another_version_is_not_used(folder, tmp_path_factory):
    newer = tmp_path_factory.mktemp("newer")
    (newer / "manifest.json").write_text("another version")
    np.zeros(SIZE, np.uint8).tofile(newer / "data.bin")
    with RangeServer(folder) as old, RangeServer(newer) as new:
        sources = sources_of(old, new)
        Caller(folder).fetch(sources)
        old.fault = lambda *_: "500"
        with pytest.raises(NoSourceError, match="another version of the store"):
            Caller(folder).fetch(sources, patience=lambda: 0.3)
        sources.close()
    # The only server gets another version while it is in use: the checksum and then the manifest tell.
    with RangeServer(folder) as server:
        sources = sources_of(server, patience=2.0)
        Caller(folder).fetch(sources)
        server.folder = newer
        with pytest.raises(NoSourceError, match="another version of the store"):
            Caller(folder).fetch(sources)
        sources.close()


def test_another_etag_of_the_same_bytes_is_accepted(server, folder):
    sources = sources_of(server)
    Caller(folder).fetch(sources)
    server.etag_salt = "from another node"
    Caller(folder).fetch(sources)
    sources.close()


@pytest.mark.parametrize("fault", ["slow", "slow_head"])
def test_what_is_dragged_out_is_ended(folder, fault, monkeypatch):
    monkeypatch.setattr(several, "SLOW_SECONDS", 0.3)
    with RangeServer(folder) as server:
        sources = sources_of(server, patience=20.0)
        left = [1]

        def once(path, *_):
            left[0] -= 1
            return fault if left[0] >= 0 else None

        server.fault = once
        Caller(folder).fetch(sources)
        assert sources.retries >= 1
        sources.close()


def test_a_late_request_is_asked_for_elsewhere(folder):
    with RangeServer(folder) as one, RangeServer(folder) as two:
        sources = sources_of(one, two)
        for _ in range(10):
            Caller(folder).fetch(sources)
        release = threading.Event()
        late = [True]

        def delay(path):
            if path == "data.bin" and late and late.pop():
                release.wait(20)  # whichever is asked first
            return 0.0

        one.delay = two.delay = delay
        Caller(folder).fetch(sources)  # comes, though the first never answers
        release.set()
        assert sources.hedges == 1 and sources.hedges_won == 1
        sources.close()


def test_a_link_that_falls_silent_and_comes_back(folder):
    with RangeServer(folder) as server:
        sources = sources_of(server, patience=30.0)
        for _ in range(5):
            Caller(folder).fetch(sources)
        silent = threading.Event()
        server.delay = lambda _: float(silent.wait(20) and 0)
        caller = Caller(folder)
        thread = threading.Thread(target=caller.fetch, args=(sources,))
        thread.start()
        give_up = time.monotonic() + 20
        while sources.links.is_up() and time.monotonic() < give_up:
            time.sleep(0.01)
        assert not sources.links.is_up()  # noticed long before any timeout
        server.delay = lambda _: 0.0  # new connections are answered; the old one stays silent
        thread.join(20)
        assert not thread.is_alive() and caller.got and sources.links.is_up()
        silent.set()
        sources.close()


def test_cancelled_and_closed(server, folder):
    sources = sources_of(server)
    with pytest.raises(SourceError, match="nobody wants it"):
        Caller(folder).fetch(sources, wanted=lambda: False)
    hold = threading.Event()
    server.delay = lambda _: float(hold.wait(20) and 0)
    failed = []

    def run():
        try:
            Caller(folder).fetch(sources)
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    while not sources._running:
        time.sleep(0.005)
    sources.close()
    thread.join(10)
    hold.set()
    assert not thread.is_alive() and failed


def test_two_sources_with_one_name_are_refused(server):
    with pytest.raises(ValueError, match="expected every source once"):
        Sources([open_source(server.url), open_source(server.url)])
