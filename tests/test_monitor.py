"""The monitor with sensors that lie, clocks that jump, and a limit on what it may cost."""

import ctypes
import dataclasses
import math

import psutil
import pytest
import torch

from comoe.policy.monitor import MOST_NOTES, SHARE, SLOW_EVERY, Monitor
from comoe.policy.nvml import Nvml
from comoe.policy.sensors import Readings, SystemSensors
from comoe.policy.snapshot import Estimate, Link

GOOD = Readings(4e9, 16e9, 2e9, 0.0, False, 0.5)
NAN = float("nan")


class FakeSensors:
    def __init__(self, readings=GOOD):
        self.readings = readings
        self.reads = self.slow_reads = 0

    def read(self, *, slow):
        self.reads += 1
        self.slow_reads += slow
        return self.readings


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def sensors():
    return FakeSensors()


@pytest.fixture
def monitor(sensors, clock):
    return Monitor(sensors, clock=clock, timer=lambda: 0.0)


def test_a_snapshot_has_what_the_sensors_say(monitor):
    snapshot = monitor.poll()
    assert (snapshot.host_free, snapshot.host_total, snapshot.device_free) == (4e9, 16e9, 2e9)
    assert (snapshot.power, snapshot.battery, snapshot.pressure) == ("battery", 0.5, 0.0)
    assert snapshot.dense is None and not snapshot.tiers
    with pytest.raises(dataclasses.FrozenInstanceError):
        snapshot.host_free = 1


def test_polls_between_samples_read_nothing(monitor, sensors, clock):
    first = monitor.poll()
    for _ in range(1000):
        clock.now += 0.0999 / 1000
        assert monitor.poll() is first
    assert sensors.reads == 1
    clock.now += 0.001
    assert monitor.poll() is not first
    assert sensors.reads == 2


@pytest.mark.parametrize("cost", [1e-5, 1e-3, 0.05])
def test_sampling_keeps_to_its_share_whatever_a_sample_costs(sensors, clock, cost):
    """A timer that says that every sample takes `cost`; polled as often as decoding would."""
    ticks = iter(range(10**9))
    monitor = Monitor(sensors, clock=clock, timer=lambda: cost * next(ticks))
    begin = clock.now
    while clock.now - begin < 100:
        clock.now += 0.01
        monitor.poll()
    assert monitor.seconds <= SHARE * 100 + cost
    assert monitor.seconds == pytest.approx(cost * sensors.reads)
    assert SHARE < 0.005
    assert sensors.reads > 100 * min(0.8 / 0.11, 0.8 * SHARE / cost)  # nor does it sleep
    assert sensors.slow_reads <= sensors.reads // SLOW_EVERY + 1


@pytest.mark.parametrize(
    ("change", "field", "kept"),
    [
        ({"host_free": NAN}, "host_free", 4e9),
        ({"host_free": -1}, "host_free", 4e9),
        ({"host_free": 17e9}, "host_free", 4e9),  # more than there is
        ({"host_free": None}, "host_free", 4e9),
        ({"host_total": 0}, "host_total", 16e9),
        ({"host_total": math.inf}, "host_total", 16e9),
        ({"device_free": -5.0}, "device_free", 2e9),
        ({"device_free": NAN}, "device_free", 2e9),
        ({"stalled": NAN}, "pressure", 0.0),
        ({"stalled": -1e9}, "pressure", 0.0),
        ({"stalled": math.inf}, "pressure", 0.0),
        ({"battery": 7.0}, "battery", None),
        ({"battery": NAN}, "battery", None),
    ],
)
def test_absurd_readings_are_ignored_and_counted(monitor, sensors, clock, change, field, kept):
    monitor.poll()
    sensors.readings = dataclasses.replace(GOOD, **change)
    for _ in range(SLOW_EVERY):
        clock.now += 1.0
        snapshot = monitor.poll()
    assert getattr(snapshot, field) == kept
    assert sum(monitor.ignored.values()) >= 1


def test_without_any_sensor_there_is_still_a_snapshot(clock):
    snapshot = Monitor(FakeSensors(Readings()), clock=clock).poll()
    assert (snapshot.host_free, snapshot.host_total, snapshot.device_free) == (None, None, None)
    assert (snapshot.pressure, snapshot.power, snapshot.battery) == (0.0, "mains", None)


def test_pressure_is_the_share_of_time_since_the_last_sample(monitor, sensors, clock):
    monitor.poll()
    clock.now += 2.0
    sensors.readings = dataclasses.replace(GOOD, stalled=0.5)
    assert monitor.poll().pressure == pytest.approx(0.25)
    clock.now += 1.0
    sensors.readings = dataclasses.replace(GOOD, stalled=9.5)  # of several tasks
    assert monitor.poll().pressure == 1.0


def test_a_clock_that_jumps_back_neither_blocks_nor_runs_backwards(monitor, sensors, clock):
    times = [monitor.poll().time]
    for clock.now in (1001.0, 501.0, 502.0, 503.0, NAN, 504.0):
        times.append(monitor.poll().time)
    assert times == sorted(times)
    assert times[-1] - times[0] == 4  # the jump is not counted
    assert sensors.reads >= 4
    assert monitor.ignored["clock"] >= 2


def test_sensors_are_read_again_after_a_jump_forward(monitor, sensors, clock):
    monitor.poll()
    clock.now += 1e9
    monitor.poll()
    assert sensors.reads == 2


@pytest.mark.parametrize(
    ("num_bytes", "seconds", "requests"),
    [
        (-1, 1, 1),
        (0, 1, 1),
        (1e6, 0, 1),
        (1e6, -1, 1),
        (NAN, 1, 1),
        (1e6, NAN, 1),
        (math.inf, 1, 1),
        (1e6, math.inf, 1),
        (1e6, 1e-12, 1),  # a clock that stood still
        (1, 1e6, 1),
        (1e6, 1e-3, 0),
        (1e6, 1e-3, -3),
    ],
)
def test_absurd_transfers_teach_nothing(sensors, clock, num_bytes, seconds, requests):
    prior = Link(Estimate(1e9), Estimate(1e-4))
    monitor = Monitor(sensors, prior={"disk": prior}, clock=clock)
    monitor.note_transfer("disk", num_bytes, seconds, requests)
    monitor.note_network("far", num_bytes, seconds, requests)
    snapshot = monitor.sample()
    assert snapshot.tiers["disk"].bandwidth.mean == 1e9
    assert snapshot.tiers["disk"].bandwidth.samples == 0
    assert not snapshot.sources
    assert monitor.ignored == {"disk": 1, "far": 1}


def test_work_teaches_speeds(monitor):
    for _ in range(10):
        for _ in range(5):
            monitor.note_transfer("disk", 1e6, 2e-3)
            monitor.note_network("http://far", 1e5, 0.1)
            monitor.note_compute("4", 1e6, 2e-4)
            monitor.note_dense(0.02, tokens=2)
        monitor.sample()
    for absurd in (0.0, -1.0, NAN, math.inf):
        monitor.note_compute("4", 1e6, absurd)
        monitor.note_compute("4", absurd, 1e-3)
        monitor.note_dense(absurd)
    snapshot = monitor.sample()
    disk, far = snapshot.tiers["disk"], snapshot.sources["http://far"]
    assert 1e6 / disk.bandwidth.mean + disk.latency.mean == pytest.approx(2e-3, rel=0.01)
    assert 1e5 / far.bandwidth.mean + far.latency.mean == pytest.approx(0.1, rel=0.01)
    assert snapshot.compute["4"].mean == pytest.approx(2e-10)
    assert snapshot.dense.mean == pytest.approx(0.01)
    assert snapshot.dense.samples == disk.bandwidth.samples == 50
    assert monitor.ignored == {"4": 8, "dense": 4}


def test_what_one_sample_learns_from_is_bounded(monitor):
    assert monitor.listening
    for i in range(10_000):
        monitor.note_transfer("disk", 1e6, 1e-3 if i < MOST_NOTES else 1e-2)
        assert monitor.listening == (i < MOST_NOTES - 1)
    disk = monitor.sample().tiers["disk"]
    assert disk.bandwidth.samples == MOST_NOTES  # the first
    assert 1e6 / disk.bandwidth.mean + disk.latency.mean == pytest.approx(1e-3, rel=0.01)
    assert monitor.listening  # again
    for _ in range(3):
        for _ in range(MOST_NOTES):
            monitor.note_transfer("disk", 1e6, 1e-2)
        disk = monitor.sample().tiers["disk"]
    assert 1e6 / disk.bandwidth.mean + disk.latency.mean == pytest.approx(1e-2, rel=0.01)


def test_a_snapshot_does_not_change_when_more_is_learnt(monitor):
    monitor.note_transfer("disk", 1e6, 1e-3)
    before = monitor.sample()
    known = before.tiers["disk"]
    for _ in range(20):
        monitor.note_transfer("disk", 1e6, 1.0)
    assert before.tiers["disk"] is known
    assert monitor.sample().tiers["disk"].bandwidth.mean < known.bandwidth.mean / 10


# ---- this machine's sensors --------------------------------------------------------------------


def test_the_machine_itself():
    found = SystemSensors().read(slow=True)
    assert 0 < found.host_free <= found.host_total <= psutil.virtual_memory().total
    assert found.device_free is None  # not asked


def test_a_cgroup_limits_what_is_free(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/job\n")
    group = tmp_path / "sys/fs/cgroup/job"
    group.mkdir(parents=True)
    for name, text in (
        ("memory.max", "9000000"),
        ("memory.current", "7000000"),
        ("memory.stat", "inactive_file 1000000"),
    ):
        (group / name).write_text(text + "\n")
    found = SystemSensors(root=tmp_path).read(slow=False)
    assert (found.host_free, found.host_total) == (3_000_000, 9_000_000)
    (group / "memory.current").write_text("12000000\n")  # over it, as while it is being lowered
    assert SystemSensors(root=tmp_path).read(slow=False).host_free == 0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("some avg10=1.00 avg60=0.00 avg300=0.00 total=2500000\nfull avg10=0 total=1\n", 2.5),
        ("", None),
        ("some nonsense\n", None),
    ],
)
def test_pressure_file(tmp_path, text, seconds):
    (tmp_path / "proc/pressure").mkdir(parents=True)
    (tmp_path / "proc/pressure/memory").write_text(text)
    assert SystemSensors(root=tmp_path).read(slow=False).stalled == seconds


def test_unreadable_sensors_are_none(monkeypatch, tmp_path):
    def refuse(*_):
        raise PermissionError("sensor")

    monkeypatch.setattr(psutil, "virtual_memory", refuse)
    monkeypatch.setattr(psutil, "sensors_battery", refuse, raising=False)
    found = SystemSensors(device=10**6, root=tmp_path).read(slow=True)
    assert found == Readings()
    # And the cgroup's own lines may be anything.
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("nonsense\n")
    monkeypatch.undo()
    assert SystemSensors(root=tmp_path).read(slow=False).host_free is None


class FakeNvml:
    """The calls of libnvidia-ml that are used; `codes`: what a call returns if not 0."""

    def __init__(self, **codes):
        self.codes, self.calls = codes, []

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append(name)
            if name == "nvmlDeviceGetMemoryInfo" and name not in self.codes:
                found = ctypes.cast(arguments[1], ctypes.POINTER(ctypes.c_ulonglong * 3)).contents
                found[0], found[1], found[2] = 8000, 3000, 5000
            return self.codes.get(name, 0)

        return call


def test_nvml():
    assert Nvml(0, FakeNvml()).memory() == (3000, 8000)
    library = FakeNvml()
    Nvml("GPU-1234", library)
    assert library.calls == ["nvmlInit_v2", "nvmlDeviceGetHandleByUUID"]
    with pytest.raises(OSError, match="nvmlInit_v2 failed with code 9"):
        Nvml(0, FakeNvml(nvmlInit_v2=9))
    unified = Nvml(0, FakeNvml(nvmlDeviceGetMemoryInfo=3))
    with pytest.raises(OSError, match="code 3"):
        unified.memory()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_nvml_of_a_real_device():
    free, total = Nvml(0).memory()
    assert 0 < free <= total
    assert SystemSensors(device=0).read(slow=False).device_free is not None
