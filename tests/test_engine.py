"""The engine through its binding: arguments, exceptions, threads, Ctrl-C. Its logic is tested in csrc/tests."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from comoe import _C

PAGE = 4096
SLAB = 8 * PAGE
MASKS = [0b1, 0b11, 0b111, 0b1111, 0b10000]
SIZES = [9000, 4097, 4096, 20001, 70000]
NUM_EXPERTS = 6
UINT8_0 = np.zeros(1, np.uint8)


class Store:
    def __init__(self, path):
        rng = np.random.default_rng(0)
        self.path = path
        self.payloads = []
        self.offsets = []
        at = 0
        with open(path, "wb") as f:
            for i in range(NUM_EXPERTS * len(SIZES)):
                data = rng.integers(0, 256, SIZES[i % len(SIZES)], dtype=np.uint8)
                self.payloads.append(data)
                self.offsets.append(at)
                f.write(data)
                at += (data.size + 4095) // 4096 * 4096
                f.seek(at)
            f.truncate(at)
        self.crcs = [_C.crc32c(p) for p in self.payloads]

    def table(self, file=0):
        return (
            np.full(len(self.payloads), file, np.int32),
            np.array(self.offsets, np.int64),
            np.array([p.size for p in self.payloads], np.int64),
            np.array(self.crcs, np.uint32),
        )

    def engine(self, slabs=8, **kwargs):
        engine = _C.Engine(PAGE, SLAB, slabs * SLAB, level_masks=MASKS, **kwargs)
        assert engine.add_records(*self.table(engine.add_file(str(self.path)))) == 0
        assert engine.add_experts(np.arange(len(self.payloads), dtype=np.int32)) == 0
        return engine


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "layer-00000.bin")


def session(engine, experts, low, high):
    levels = (np.asarray(level, np.uint8) for level in (low, high))
    return engine.session(np.asarray(experts, np.int32), *levels)


def serve(store, engine, experts, low, high):
    s = session(engine, experts, low, high)
    levels = {}
    while (ready := s.next()) is not None:
        for need, level in ready:
            for r in range(len(SIZES)):
                if MASKS[level] >> r & 1:
                    record = experts[need] * len(SIZES) + r
                    got = engine.read_pages(record, SIZES[r])
                    np.testing.assert_array_equal(got, store.payloads[record])
            levels[need] = level
            s.done(need)
    return levels


def test_crc32c():
    assert _C.crc32c(b"123456789") == 0xE3069283
    assert _C.crc32c(b"6789", seed=_C.crc32c(b"12345")) == 0xE3069283
    assert _C.crc32c(b"") == 0
    with pytest.raises(ValueError, match="expected contiguous memory"):
        _C.crc32c(np.zeros(10, np.uint8)[::2])


@pytest.mark.parametrize("io", ["auto", "threads", "uring"])
@pytest.mark.parametrize("direct", [True, False])
def test_every_level_comes_whole_and_in_waves(store, io, direct):
    engine = store.engine(slabs=3, io=io, direct=direct)  # one exact expert fits, no more
    experts = [5, 0, 3, 1, 4, 2]
    low = [4, 0, 1, 2, 3, 4]
    for _ in range(2):
        levels = serve(store, engine, experts, low, [4] * 6)
        assert sorted(levels) == list(range(6))
        assert all(low[need] <= level <= 4 for need, level in levels.items())
    stats = engine.stats()
    assert stats["mapped_bytes"] <= stats["budget_bytes"] == 3 * SLAB
    assert stats["waves"] > 0 and stats["evictions"] > 0
    assert stats["bytes_read"] == stats["demand_bytes"] > 0
    if not direct:
        assert stats["buffered_reads"] > 0
    assert stats["io"] in (("uring", "threads") if io != "threads" else ("threads",))
    engine.close()


def test_hits_and_prefetch_are_counted(store):
    engine = store.engine(slabs=20)
    engine.request(np.array([0, 1, 1], np.int32), 1, 2)
    assert engine.wait_idle(30.0)
    assert engine.resident().tolist()[:3] == [2, 2, 0]
    assert serve(store, engine, [0], [0], [3]) == {0: 1}  # the highest that is here
    assert serve(store, engine, [0], [0], [1]) == {0: 1}
    assert serve(store, engine, [1], [0], [3]) == {0: 0}
    stats = engine.stats()
    assert (stats["partial_hits"], stats["hits"], stats["misses"]) == (1, 1, 1)
    assert stats["prefetch_bytes"] == stats["prefetch_used_bytes"] == SIZES[0] + SIZES[1]
    assert stats["coalesced"] == 1
    # Evicted unused, a prefetch is wasted.
    engine.request(np.array([10], np.int32), 1)
    assert engine.wait_idle(30.0)
    assert engine.evict(np.array([10, 11], np.int32)) == 3 * PAGE
    assert engine.stats()["wasted_prefetch_bytes"] == SIZES[0]


def test_value_and_pin_decide_what_stays(store):
    engine = store.engine(slabs=3)
    everything = np.arange(NUM_EXPERTS * len(SIZES), dtype=np.int32)
    values = np.zeros(everything.size, np.float32)
    values[0], values[5] = -1, 2
    engine.set_value(everything, values)
    engine.pin(np.array([10], np.int32), True)
    for expert in (1, 2, 0):
        serve(store, engine, [expert], [0], [0])
    serve(store, engine, [3], [3], [3])  # 11 pages of 24, with 9 used
    serve(store, engine, [4], [1], [1])  # 5 more: the least valued goes
    resident = engine.resident()
    assert resident[0] == 0 and resident[5] == 2 and resident[10] == 2
    with pytest.raises(_C.BudgetError, match="must stay for the largest need"):
        engine.pin(np.array([4, 9], np.int32), True)


def test_errors_say_what_to_do(store):
    engine = store.engine()
    ids = np.array([0], np.int32)
    with pytest.raises(TypeError, match=r"session: experts: expected .*int32.* got int64"):
        engine.session(np.array([0]), UINT8_0, UINT8_0)
    with pytest.raises(TypeError, match=r"request: ids: .*got <class 'list'>"):
        engine.request([0], 1)
    with pytest.raises(ValueError, match=r"min_levels: .*with 1 entries, got shape \(2,\)"):
        engine.session(ids, np.zeros(2, np.uint8), UINT8_0)
    with pytest.raises(ValueError, match="strided"):
        engine.evict(np.zeros(4, np.int32)[::2])
    with pytest.raises(ValueError, match="1-D"):
        engine.evict(np.zeros((1, 1), np.int32))
    with pytest.raises(ValueError, match=r"ids\[0\]: expected a record in \[0, 30\), got 30"):
        engine.evict(np.array([30], np.int32))
    with pytest.raises(ValueError, match="only a session demands"):
        engine.request(ids, 0)
    with pytest.raises(ValueError, match="priority: expected 0"):
        engine.request(ids, 3)
    with pytest.raises(ValueError, match="min_level <= want_level"):
        session(engine, [0], [2], [1])
    with pytest.raises(ValueError, match="want_level < 5"):
        session(engine, [0], [0], [5])
    with pytest.raises(ValueError, match=r"an expert in \[0, 6\), got 6"):
        session(engine, [6], [0], [0])
    with pytest.raises(ValueError, match=r"multiple of 5 ids .* got 4"):
        engine.add_experts(np.zeros(4, np.int32))
    with pytest.raises(
        ValueError, match=r"record 1 of expert 0: expected -1 or a record in \[0, 30\)"
    ):
        engine.add_experts(np.array([0, 30, 0, 0, 0], np.int32))
    without_exact = engine.add_experts(np.array([0, 1, 2, 3, -1], np.int32))
    with pytest.raises(ValueError, match="has no level from 4 to 4; plan a level that it has"):
        session(engine, [without_exact], [4], [4])
    with pytest.raises(ValueError, match="has handed out"):
        session(engine, [0], [0], [0]).done(0)
    with pytest.raises(ValueError, match="is not resident"):
        engine.read_pages(4, 10)
    with pytest.raises(ValueError, match="values.*1 entries"):
        engine.set_value(ids, np.zeros(2, np.float32))
    with pytest.raises(RuntimeError, match="missing.bin: No such file"):
        engine.add_file("missing.bin")
    with pytest.raises(ValueError, match="ends after the file"):
        engine.add_records(
            np.zeros(5, np.int32),
            np.full(5, 1 << 40, np.int64),
            np.ones(5, np.int64),
            np.zeros(5, np.uint32),
        )
    with pytest.raises(ValueError, match="multiple of 4096"):
        _C.Engine(1000, 1000, 1000, level_masks=[1])
    with pytest.raises(_C.BudgetError, match="at least one slab"):
        _C.Engine(PAGE, SLAB, SLAB - 1, level_masks=[1])


def test_budget(store):
    engine = store.engine(slabs=20)
    assert engine.minimum_budget() == SLAB
    assert engine.minimum_budget(4) == 3 * SLAB
    with pytest.raises(ValueError, match="level: expected 0 to 4"):
        engine.minimum_budget(5)
    with pytest.raises(_C.BudgetError, match=f"at least {SLAB}"):
        engine.set_budget(SLAB - 1)
    serve(store, engine, list(range(6)), [4] * 6, [4] * 6)
    assert engine.stats()["mapped_bytes"] > 3 * SLAB
    engine.set_budget(3 * SLAB)
    assert engine.stats()["mapped_bytes"] <= 3 * SLAB
    serve(store, engine, list(range(6)), [4] * 6, [4] * 6)
    small = store.engine(slabs=1)
    with pytest.raises(_C.BudgetError, match="raise the budget"):
        session(small, [0], [4], [4]).next()
    assert serve(store, small, [0], [0], [4]) == {0: 0}  # still usable

    s = session(engine, [0], [4], [4])
    (held,) = s.next()
    engine.set_budget(20 * SLAB)
    serve(store, engine, [1, 2], [4, 4], [4, 4])
    s2 = session(engine, [1, 2], [4, 4], [4, 4])
    while s2.next():
        pass
    with pytest.raises(RuntimeError, match="still in use by open sessions"):
        engine.set_budget(3 * SLAB, timeout=0.05)
    s.done(held[0])
    del s2
    engine.set_budget(3 * SLAB)
    assert engine.stats()["mapped_bytes"] <= 3 * SLAB


def test_a_damaged_record_is_an_error_and_nothing_else_is_lost(store):
    store.crcs[5] ^= 1
    engine = store.engine()
    with pytest.raises(
        _C.ReadError, match=r"record 5 from .*layer-00000.bin.*wrong checksum"
    ) as raised:
        serve(store, engine, [1], [0], [0])
    assert isinstance(raised.value, OSError)
    serve(store, engine, [0, 2], [4, 1], [4, 1])
    engine.request(np.array([5], np.int32), 1)  # silent
    assert engine.wait_idle(30.0)
    assert engine.stats()["failed_prefetches"] == 1
    trusting = store.engine(verify=False)
    serve(store, trusting, [1], [0], [0])


def test_a_disk_that_goes_away_is_an_error(store):
    engine = store.engine()
    serve(store, engine, [0], [1], [1])
    os.truncate(store.path, 4096)
    with pytest.raises(_C.ReadError, match="truncated"):
        serve(store, engine, [1], [0], [0])
    serve(store, engine, [0], [1], [1])  # what is here is still good


def test_closed_engine(store):
    engine = store.engine()
    s = session(engine, [0], [1], [1])
    ready = s.next()
    engine.close()
    engine.close()
    with pytest.raises(_C.EngineClosed, match="make a new one"):
        session(engine, [0], [0], [0])
    np.testing.assert_array_equal(engine.read_pages(0, 100), store.payloads[0][:100])
    s.done(ready[0][0])
    s.close()
    assert s.next() is None


def test_threads_share_an_engine_that_fits_one_need(store):
    engine = store.engine(slabs=3)
    errors = []

    def work(seed):
        rng = np.random.default_rng(seed)
        try:
            for _ in range(30):
                experts = rng.choice(6, int(rng.integers(1, 6)), replace=False).tolist()
                low = rng.integers(0, 5, len(experts)).tolist()
                serve(store, engine, experts, low, [4] * len(experts))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "deadlock"
    assert not errors
    assert engine.stats()["sessions"] == 0


CTRL_C = """
import sys, threading, time
import numpy as np
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_engine import Store, session, serve
store = Store(Path({path!r}))
engine = store.engine(slabs=3)
holder = session(engine, [0], [4], [4])
held = holder.next()
waiting = session(engine, [1], [4], [4])  # there is room for one
print("waiting", flush=True)
try:
    waiting.next()
except KeyboardInterrupt:
    holder.done(held[0][0])
    assert len(waiting.next()) == 1  # it goes on as if nothing had been
    print("interrupted", flush=True)
"""


def test_ctrl_c_ends_a_wait(tmp_path, ctrl_c):
    code = CTRL_C.format(tests=os.path.dirname(__file__), path=str(tmp_path / "data.bin"))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "waiting\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0 and out == "interrupted\n"


def test_waiting_leaves_python_free(store):
    """A session that waits must not hold the GIL: the thread that can end the wait is a Python one."""
    engine = store.engine(slabs=3)
    holder = session(engine, [0], [4], [4])
    held = holder.next()
    waiting = session(engine, [1], [4], [4])
    timer = threading.Timer(0.05, lambda: holder.done(held[0][0]))
    timer.start()
    assert len(waiting.next()) == 1
    timer.join()
