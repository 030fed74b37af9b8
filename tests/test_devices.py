"""Device profiles: complete, sourced, plausible; typos are named."""

import json
from importlib import resources

import numpy as np
import pytest

from comoe.policy.costs import Costs
from comoe.policy.devices import (
    ACCELERATOR,
    NUMBERS,
    DeviceError,
    device_names,
    load_device,
    measured_device,
    parse_device,
)
from comoe.policy.plan import LADDER, Sizes

WANTED = {
    "jetson-orin-nano",
    "jetson-agx-orin",
    "rpi5",
    "laptop-4060",
    "desktop-4090",
    "phone",
    "server-h200",
}
RAW = json.loads((resources.files("comoe") / "data" / "devices.json").read_text())
SIZES = Sizes(
    LADDER,
    np.arange(60, dtype=np.int32).reshape(12, 5),
    np.array([2, 1, 1, 4, 16] * 12, np.int64) << 18,
    np.array([8, 4], np.int64),
)
WEIGHTS = np.full(12, float(1 << 20))


@pytest.mark.parametrize("name", sorted(RAW))
def test_every_profile_is_complete_and_every_figure_has_its_source(name):
    device = load_device(name)
    figures = [key for key in NUMBERS if RAW[name].get(key) is not None]
    assert set(RAW[name]["sources"]) == set(figures)
    assert all(len(source) > 10 for source in RAW[name]["sources"].values())
    assert device.title
    # Slower is further away: a figure off by a unit would break this.
    assert device.disk_bandwidth < device.memory_bandwidth <= device.compute_bandwidth
    assert 1e8 < device.disk_bandwidth < 2e10
    assert 1e-6 < device.link("disk").latency.mean < 1e-2
    assert 4e9 <= device.memory <= 2e12
    assert device.disk_joules_per_byte > device.memory_joules_per_byte


def test_the_devices_that_were_asked_for_are_there():
    assert set(device_names()) >= WANTED


def test_costs_of_every_profile_order_the_levels():
    for name in device_names():
        device = load_device(name)
        costs = Costs.from_profile(
            device, SIZES, WEIGHTS, 10**9, tier=device.tier_of(1e9), num_layers=24
        )
        assert (np.diff(costs.compute, axis=1) >= 0).all()
        assert costs.dense > 1e9 / device.compute_bandwidth
        assert costs.joules_per_second == device.watts


def test_an_accelerator_computes_from_its_own_memory():
    laptop, pi = load_device("laptop-4060"), load_device("rpi5")
    assert (laptop.compute_memory, laptop.compute_bandwidth) == (8e9, 256e9)
    assert list(laptop.tiers) == ["host", "disk"]
    assert (laptop.tier_of(10e9), laptop.tier_of(20e9), pi.tier_of(1e9)) == ("host", "disk", "disk")
    assert laptop.joules_per_byte("host") < laptop.joules_per_byte("disk")
    with pytest.raises(DeviceError, match="rpi5 has no tier 'host'"):
        pi.link("host")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("rpi-5", "rpi5"),
        ("jetson-orin-nanno", "jetson-orin-nano"),
        ("laptop4060", "laptop-4060"),
        ("H200", "server-h200"),
        ("mesured", "measured"),
    ],
)
def test_a_wrong_name_is_told_the_nearest(name, near):
    with pytest.raises(DeviceError, match=f"no profile '{name}'; did you mean {near}\\?"):
        load_device(name)


def test_a_name_like_no_other_is_told_all():
    with pytest.raises(DeviceError, match="no profile 'zzzz'; Known are .*rpi5.*measured"):
        load_device("zzzz")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"memroy": 1}, "no figure 'memroy'; did you mean memory?"),
        ({"disk_bandwith": 1}, "did you mean disk_bandwidth?"),
        ({"watts": None}, "watts: expected a number above 0, got None"),
        ({"memory": "8GB"}, "memory: expected a number above 0, got '8GB'"),
        ({"memory": -1}, "memory: expected a number above 0"),
        ({"flops": float("nan")}, "flops: expected a number above 0"),
        ({"flops": True}, "flops: expected a number above 0"),
        ({"kernel_share": 1.5}, "kernel_share: expected a share"),
        ({"link_bandwidth": 1e9}, "has link_bandwidth but lacks accelerator_memory"),
    ],
)
def test_a_wrong_profile_is_refused(change, match):
    with pytest.raises(DeviceError, match=match.replace("?", "\\?")):
        parse_device("mine", RAW["rpi5"] | change)


def test_a_missing_figure_is_named(tmp_path):
    profile = {k: v for k, v in RAW["rpi5"].items() if k not in ("watts", "flops")}
    with pytest.raises(DeviceError, match="mine lacks flops, watts; add them"):
        parse_device("mine", profile)
    path = tmp_path / "devices.json"
    path.write_text(json.dumps({"mine": RAW["rpi5"], "broken": 3}))
    assert load_device("mine", path).memory == 8e9
    with pytest.raises(DeviceError, match="broken: expected an object"):
        load_device("broken", path)
    for text in ("[]", "{"):
        path.write_text(text)
        with pytest.raises(DeviceError, match="not JSON|expected an object"):
            load_device("mine", path)


def report(**bandwidth):
    known = {"memory_read": 3e10, "disk": {"bytes_per_second": 2e9, "latency_seconds": 1e-4}}
    return {
        "cpu": {"model": "Some CPU", "cores": 2},
        "memory": {"total": 24e9, "available": 20e9},
        "bandwidth": known | bandwidth,
    }


def test_this_machine_as_doctor_measured_it():
    device = measured_device(report())
    assert (device.name, device.memory, device.memory_bandwidth) == ("measured", 24e9, 3e10)
    assert device.link("disk").bandwidth.mean == 2e9
    assert not any(getattr(device, name) for name in ACCELERATOR)
    overheads = {"step": 1e-3, "layer": 2e-3, "deciding": 3e-3, "wait": 4e-3}
    device = measured_device(report(), overheads)
    assert (device.step_overhead, device.layer_overhead) == (1e-3, 2e-3)
    assert (device.deciding_overhead, device.disk_latency) == (3e-3, 4e-3)
    with pytest.raises(DeviceError, match="native module; build it"):
        measured_device(report(memory_read=None))
