"""bench/peers.py: goals judged from rows, equal timing for all, limits that hold, and a small run from end to end."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"
sys.path.insert(0, str(BENCH))

import limits  # noqa: E402
from cgroup import CgroupError, MemoryGroup  # noqa: E402
from peers import COLUMNS, known_peers  # noqa: E402
from peers_judge import judge  # noqa: E402
from peers_timing import timed_decode  # noqa: E402

MB = 1 << 20


def row(case, peer, repeat=0, **values):
    given = {"case": case, "peer": peer, "repeat": repeat, **values}
    return {**dict.fromkeys(COLUMNS, ""), **{name: str(value) for name, value in given.items()}}


def rows_with(rung_perplexity, speed):
    rows = [
        row("perplexity", "transformers eager", perplexity=10.0),
        row("perplexity", "comoe 4 bits", perplexity=rung_perplexity),
        row("2 GiB", "llama.cpp bf16", decode_tokens_per_second=2.0),
    ]
    for repeat, factor in enumerate((0.1, 1, 1)):  # the median is `speed`
        rows.append(row("2 GiB", "comoe 4 bits", repeat, decode_tokens_per_second=speed * factor))
    return rows


@pytest.mark.parametrize(
    ("perplexity", "speed", "verdict"),
    [(10.09, 24.1, "met"), (10.09, 23.9, "MISSED"), (10.11, 100, "not known")],
)
def test_a_goal_counts_rungs_that_are_good_enough_only(perplexity, speed, verdict):
    goals = judge(rows_with(perplexity, speed), known_peers())["goals"]
    (goal,) = [g for g in goals if "within 1 %" in g["goal"]]
    assert goal["verdict"] == verdict


def test_a_peer_that_was_killed_is_shown_as_such():
    (shown,) = judge([row("1 GiB", "llama.cpp bf16", error="killed: does not fit")], {})["rows"]
    assert shown["shown"][-1] == "killed: does not fit"
    assert shown["decode_tokens_per_second"] is None


def test_every_peer_has_a_perplexity_of_its_own_or_anothers():
    peers = known_peers()
    for peer in peers.values():
        assert not peer.quality or peers[peer.quality].quality in ("", peer.quality), peer.name


def job(**changes):
    timing = {"warm_tokens": 2, "warm_seconds": 0, "most_warm_tokens": 9, "timed_tokens": 5}
    return {"steps": range(100), "least_tokens": 3, "timed_seconds": 1e9} | timing | changes


def test_timed_tokens_are_those_after_the_warm_ones():
    fed = []

    def feed(token):
        fed.append(token)
        return 0.5 if token < 2 else 0.25

    result = timed_decode(feed, job())
    assert fed == list(range(7))
    assert result["decode_tokens_per_second"] == 4.0
    assert (result["warm_tokens"], result["timed_tokens"]) == (2, 5)


def test_a_slow_peer_stops_at_the_least_number_of_tokens():
    assert timed_decode(lambda _: 60.0, job(timed_seconds=10))["timed_tokens"] == 3


def test_a_group_writes_the_limit_of_cgroup_version_1(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("5:devices:/\n4:memory:/jobs/a\n0::/\n")
    own = tmp_path / "sys/fs/cgroup/memory/jobs/a"
    own.mkdir(parents=True)
    with MemoryGroup(123 * MB, root=tmp_path) as group:
        assert group.folder.parent == own
        limit = group.folder / "memory.limit_in_bytes"
        assert limit.read_text() == str(123 * MB)
        limit.unlink()  # a real group's files go with it
    assert not group.folder.exists()


def test_a_group_that_cannot_be_made_says_why(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/cgroup.controllers").write_text("cpu io\n")
    with pytest.raises(CgroupError, match="no memory controller"), MemoryGroup(1, root=tmp_path):
        pass


@pytest.fixture
def real_groups():
    try:
        with MemoryGroup(None):
            pass
    except (CgroupError, OSError) as error:
        pytest.skip(str(error))


def test_a_process_beyond_its_limit_is_killed(real_groups):
    program = "x = bytearray({}); x[::4096] = b'1' * len(x[::4096])"
    for size, killed in ((8, False), (200, True)):
        with MemoryGroup(64 * MB) as group:
            process = group.popen([sys.executable, "-c", program.format(size * MB)])
            process.wait(60)
            assert group.killed() == killed == (process.returncode != 0)
            assert size * MB < group.peak() or killed
            assert group.peak() <= 64 * MB


@pytest.mark.slow
def test_a_small_run_writes_rows_and_goes_on_where_it_stopped(tmp_path, real_groups):
    out = tmp_path / "rows"
    command = [sys.executable, BENCH / "peers.py", "--small", "--without-llama", "--json"]
    command += ["--models", tmp_path / "models", "--out", out, "--run", "a", "--repeats", "1"]
    command += ["--peers", "comoe exact", "--peers", "comoe 4 bits"]
    command += ["--only", "resident", "--only", "perplexity"]
    first = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    with out.with_suffix(".csv").open() as file:
        rows = [row for row in csv.DictReader(file) if "compiled" not in row["peer"]]
    assert not any(row["error"] for row in rows)
    resident = [row for row in rows if row["case"] == "resident"]
    assert [row["peer"] for row in resident] == ["the machine", "comoe exact", "comoe 4 bits"]
    assert all(float(row["decode_tokens_per_second"]) > 0 for row in resident[1:])
    assert float(resident[1]["experts_seconds_per_token"]) > 0
    judged = {(r["case"], r["peer"]): r for r in json.loads(first.stdout)["rows"]}
    exact, coarse = (
        judged["resident", name]["perplexity"] for name in ("comoe exact", "comoe 4 bits")
    )
    assert exact < coarse < 1.2 * exact
    before = out.with_suffix(".csv").read_bytes()
    second = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    assert out.with_suffix(".csv").read_bytes() == before
    assert second.stdout == first.stdout


def test_the_performance_page_has_the_rows_figures():
    """`python bench/limits.py` makes them."""
    text = limits.PAGE.read_text()
    assert limits.page(text) == text
