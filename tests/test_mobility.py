"""A moving user: changes of the path are told, a fading link is foreseen, and the best increments come first."""

import math
import socket
import sys
import threading
import time
from pathlib import Path as FilePath

import numpy as np
import pytest

sys.path.insert(0, str(FilePath(__file__).parent.parent))

from bench.edge.faulty import FaultyServer
from comoe.policy.increments import NOTHING_HERE, by_value, nothing_loss
from comoe.policy.links import Links
from comoe.policy.mobility import Path, PathWatch, carriers
from comoe.policy.plan import LADDER, Sizes
from comoe.policy.snapshot import Estimate, Link
from comoe.tiers.source import open_source
from comoe.tiers.sources import Sources


def link(mbytes=5.0, rtt=0.02, samples=9):
    return Link(Estimate(mbytes * 1e6, 0.0, samples), Estimate(rtt, 0.0, samples))


def looks(watch, paths):
    return [watch.look(path) for path in paths]


def test_interfaces_sources_and_losses_are_told():
    watch = PathWatch()
    said = looks(
        watch,
        [
            Path(0, link(), "a", "wlan0"),
            Path(1, link(), "a", "wlan0"),
            Path(2, link(), "a", "wwan0"),
            *(Path(3 + i / 4, link(7.0), "b", "wwan0") for i in range(3)),
            Path(4, None, "", "wwan0"),
            Path(5, None, "", "wwan0"),
            Path(6, link(), "b", "wwan0"),
            Path(7, link(), "b", ""),
        ],
    )
    assert said == [
        None,
        None,
        "interface wlan0 -> wwan0",
        None,
        None,
        "source a -> b",
        "link lost",
        None,
        "link back",
        "interface wwan0 -> none",
    ]
    assert [what for _, what in watch.log] == [what for what in said if what]


def test_two_sources_alike_are_one_path():
    """Which of two equal servers is expected to answer first changes with every sample; nothing is to be done about
    it. Nor about one that is best for a moment."""
    rng = np.random.default_rng(0)
    watch = PathWatch()
    flapping = [Path(0, link(), "a", "eth0")]
    flapping += [
        Path(0.1 * i, link(5.0 * rng.uniform(0.95, 1.05)), "ab"[int(rng.integers(2))], "eth0")
        for i in range(1, 200)
    ]
    moment = [Path(30, link(9.0), "b", "eth0"), *(Path(31, link(), "a", "eth0"),) * 5]
    assert not any(looks(watch, flapping + moment))
    said = looks(watch, [Path(40 + i, link(9.0), "b", "eth0") for i in range(4)])
    assert said == [None, None, "source a -> b", None]


@pytest.mark.parametrize(
    "after, told", [(link(1.0), True), (link(5.0, 0.2), True), (link(4.0), False)]
)
def test_a_step_that_lasts_is_told_once(after, told):
    watch = PathWatch()
    said = looks(watch, [Path(t, link(), "a") for t in range(5)])
    said += looks(watch, [Path(5 + t, after, "a") for t in range(10)])
    assert sum(what is not None for what in said) == told
    if told:
        assert said.index(next(w for w in said if w)) == 7  # three looks, no less


def test_noise_and_one_outlier_are_no_step():
    rng = np.random.default_rng(0)
    watch = PathWatch()
    figures = 5.0 * rng.lognormal(0, 0.2, 500)
    figures[100] = 0.5
    assert looks(watch, [Path(t, link(b), "a") for t, b in enumerate(figures)]) == [None] * 500


def test_assumed_figures_are_compared_with_nothing():
    watch = PathWatch()
    assert looks(watch, [Path(0, link(50, samples=0), "a"), Path(1, link(1), "a")]) == [None, None]


def test_a_fading_link_is_foreseen():
    watch = PathWatch()
    for t in range(6):  # a third less every second: e^-4 in ten
        watch.look(Path(float(t), link(5.0 * math.exp(-0.5 * t)), "a"))
    assert watch.losing
    rng = np.random.default_rng(1)
    for t in range(200):
        watch.look(Path(10.0 + t, link(5.0 * rng.lognormal(0, 0.3)), "a"))
        assert not watch.losing
    rising = PathWatch()
    for t in range(6):
        rising.look(Path(float(t), link(0.1 * math.exp(0.5 * t)), "a"))
    assert not rising.losing


def test_carriers(tmp_path):
    for name, carrier in (("lo", "1"), ("eth0", "1"), ("wlan0", "0"), ("wwan0", "1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "carrier").write_text(carrier)
    (tmp_path / "odd").mkdir()
    assert carriers(str(tmp_path)) == "eth0+wwan0"
    assert carriers(str(tmp_path / "none")) == ""


def test_a_lost_interface_ends_what_was_under_way(tmp_path):
    """A source that has taken the request and says nothing is not waited for any longer."""
    (tmp_path / "f").write_bytes(bytes(range(100)))
    got = []
    with socket.create_server(("127.0.0.1", 0)) as silent, FaultyServer(tmp_path) as sound:
        first = f"http://127.0.0.1:{silent.getsockname()[1]}"
        links = Links([first, sound.url])
        links.hedge_after = lambda *args: math.inf
        sources = Sources([open_source(first), open_source(sound.url)], links=links)
        links.order = lambda nbytes, without=(): [n for n in (first, sound.url) if n not in without and not links.stats()[n]["failures"]]  # fmt: skip
        fetch = threading.Thread(
            target=sources.fetch,
            args=("f", 10, 5, lambda view: got.append(bytes(view)) or True),
        )
        fetch.start()
        time.sleep(0.3)
        assert not got
        sources.path_changed(lost=True)
        fetch.join(2.0)
        assert not fetch.is_alive() and got == [bytes(range(10, 15))]
        sources.close()


# ---- increments by value ----------------------------------------------------------------------

X = 3
SIZES = Sizes(
    LADDER,
    np.arange(X * 5, dtype=np.int32).reshape(X, 5),
    np.tile(np.array([200, 100, 100, 400, 1600]), X),
    np.array([X]),
)
LOSS = np.tile([0.16, 0.04, 0.01, 0.0001, 0.0], (X, 1))


def order(here=(), target=2, scale=(1.0, 1.0, 1.0), loss=LOSS):
    present = np.zeros(X * 5, bool)
    present[list(here)] = True
    return by_value(SIZES, loss, np.array(scale), present, np.full(X, target)).tolist()


def test_the_most_valuable_come_first_and_each_expert_climbs_in_order():
    # Per byte: nothing -> 2 bits 0.0056, 2 -> 3 bits 0.0012, 3 -> 4 bits 0.0003; expert 1 is used ten times as much.
    got = order(scale=(1.0, 10.0, 0.1))
    assert sorted(got) == [0, 1, 2, 5, 6, 7, 10, 11, 12]
    assert got[:4] == [5, 6, 0, 7]
    for expert in range(X):
        mine = [i for i in got if i // 5 == expert]
        assert mine == sorted(mine)
    assert got[-1] == 12


def test_what_is_here_is_not_asked_for_and_what_is_not_aimed_at_neither():
    assert order(here=[0, 1, 5, 10, 11, 12], target=1) == [6]
    assert order(here=range(15), target=2) == []
    assert order(here=[0, 5, 10], target=4) == [4, 9, 14]


def test_shared_records_and_levels_that_do_not_exist():
    sizes = Sizes(
        LADDER, np.array([[0, 1, 2, -1, -1], [0, 3, 4, -1, -1]], np.int32),
        np.array([200, 100, 100, 100, 100]), np.array([2]),
    )  # fmt: skip
    loss = np.array([[0.16, np.nan, 0.01, np.nan, np.nan]] * 2)
    got = by_value(sizes, loss, np.ones(2), np.zeros(5, bool), np.array([2, 2])).tolist()
    assert got[0] == 0 and sorted(got) == [0, 1, 2, 3, 4]
    assert nothing_loss(loss).tolist() == pytest.approx([0.16 * NOTHING_HERE] * 2)
