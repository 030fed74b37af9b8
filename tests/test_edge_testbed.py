"""The testbed of bench/edge: series, relay, shaping, handovers, faults, and that nothing is left behind."""

import http.client
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

# ruff: noqa: E402
from bench.edge import series
from bench.edge.faulty import FAULTS, FaultyServer
from bench.edge.hosts import UE, Testbed, why_not
from bench.edge.replay import Replay
from bench.edge.series import Moment

missing = why_not()
needs_root = pytest.mark.skipif(missing is not None, reason=f"no testbed: {missing}")


def namespaces() -> str:
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout


@pytest.mark.parametrize("name", series.SHIPPED)
def test_shipped_series_are_what_the_generator_makes(name):
    shipped = (series.FOLDER / f"{name}.csv").read_text()
    assert shipped == series.text_of(series.made(name))
    moments = series.read(series.FOLDER / f"{name}.csv")
    assert moments[0].second == 0 and 60 <= len(moments) <= 120


def test_what_the_scripts_are_named_for_happens():
    read = {name: series.read(series.FOLDER / f"{name}.csv") for name in series.SHIPPED}
    cells = {name: {m.cell for m in moments} for name, moments in read.items()}
    assert cells["steady-5g"] == cells["congested-wifi"] == {0}
    assert cells["walking"] == {0, 1, -1}
    assert len(cells["car"]) > 4
    assert all(m.mbps == 0 for m in read["walking"] if m.cell < 0)


def test_reading_a_recording(tmp_path):
    path = tmp_path / "drive.csv"
    path.write_text(
        "second,download_mbps,ping_ms,cell,speed_kmh\n0,1.5,,0,3\n2,0.0,80,1,3\n3,7,,,4\n"
    )
    assert series.read(path) == [
        Moment(0, 1.5, series.DEFAULT_PING, 0),
        Moment(2, 0, 0.08, 1),
        Moment(3, 7, 0.08, -1),
    ]
    assert series.window(series.read(path), 1.0, 1.5) == [
        Moment(0, 1.5, series.DEFAULT_PING, 0),
        Moment(1, 0, 0.08, 1),
    ]


@pytest.mark.parametrize(
    "text, message",
    [
        ("second,download_mbps\n0,1\n", "line 2: expected the columns"),
        ("second,download_mbps,ping_ms,cell\n0,fast,,0\n", "line 2"),
        ("second,download_mbps,ping_ms,cell\n", "at least one line"),
        ("second,download_mbps,ping_ms,cell\n1,1,,0\n1,1,,0\n", "rise"),
    ],
)
def test_a_series_that_is_none_is_refused(tmp_path, text, message):
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        series.read(tmp_path / "bad.csv")


def test_busiest_window():
    moments = [Moment(s, 1, 0.01, 0 if s < 50 else s % 2) for s in range(100)]
    begin = series.busiest(moments, 20)
    assert 50 <= begin <= 80
    assert series.busiest([Moment(s, 1, 0.01, 0) for s in range(9)], 20) == 0


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_faulty_server_does_what_it_says(tmp_path, fault):
    data = os.urandom(1000)
    (tmp_path / "f").write_bytes(data)
    with FaultyServer(tmp_path, fault=fault, faults_left=1) as server:
        for turn in range(2):
            link = http.client.HTTPConnection(*server.server_address, timeout=1)
            link.request("GET", "/f", headers={"Range": "bytes=10-109"})
            body, status = b"", 0
            try:
                answer = link.getresponse()
                status = answer.status
                end = time.monotonic() + 1.5
                while time.monotonic() < end and (more := answer.read1(64)):
                    body += more
            except (http.client.HTTPException, OSError):
                pass
            link.close()
            good = status == 206 and body == data[10:110]
            assert good == (fault is None or turn == 1)
            if fault == "corrupt" and turn == 0:
                assert status == 206 and len(body) == 100


@needs_root
def test_hosts_rates_and_handovers():
    """A handover moves the carrier; a black hole loses frames though the carrier stays."""
    link = ["cat", "/sys/class/net/cell0/carrier", "/sys/class/net/cell1/carrier"]
    moments = [
        Moment(0, 8, 0.06, 4),
        Moment(0.3, 8, 0.06, 7),
        Moment(0.5, 0, 0.06, -1),
        Moment(0.7, 80, 0.06, 7),
    ]
    with Testbed(seconds=60) as bed:
        assert bed.ns(UE) in namespaces()

        def carriers() -> list[str]:
            return bed.run(UE, link, capture_output=True, text=True).stdout.split()

        replay = Replay(bed, moments)
        assert carriers() == ["1", "0"]
        replay.start()
        replay._thread.join(20)
        assert carriers() == ["0", "1"]
        replay.stop()
        assert [what for _, what in replay.log] == ["handover to cell 7", "link lost", "link back"]
        serve = [sys.executable, "-m", "http.server", "--bind", "10.77.1.1", "80"]
        bed.start("edge1", serve, cwd=str(ROOT / "bench"), stderr=subprocess.DEVNULL)
        times = ["curl", "-sf", "--retry", "20", "--retry-connrefused", "--retry-delay", "1"]
        times += ["-o", "/dev/null", "-w", "%{time_connect} %{http_code}", "http://10.77.1.1/"]
        connect, code = bed.run(UE, times, capture_output=True, text=True).stdout.split()
        assert code == "200" and float(connect) >= 0.06  # the relay's round trip
        out = subprocess.run(
            ["ip", "netns", "exec", bed.ns(UE), "curl", "-s", "-m", "2", "http://1.1.1.1/"]
        )
        assert out.returncode != 0  # no way out
    assert bed.ns(UE) not in namespaces()


@needs_root
@pytest.mark.parametrize("how", ["killed", "too long"])
def test_nothing_is_left_behind(how):
    seconds = 1 if how == "too long" else 60
    code = (
        "import sys, time; from bench.edge.hosts import Testbed\n"
        f"bed = Testbed(seconds={seconds}); print(bed.ns('ue'), flush=True); time.sleep(60)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    name = child.stdout.readline().strip()
    assert name.endswith("-ue")
    if how == "killed":
        child.send_signal(signal.SIGKILL)
    end = time.monotonic() + 20
    while name in namespaces() and time.monotonic() < end:
        time.sleep(0.1)
    assert name not in namespaces()
    child.kill()
    child.wait()
    child.stdout.close()
