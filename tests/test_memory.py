from __future__ import annotations

import subprocess
import sys

import numpy as np
import psutil
import pytest

from comoe import memory

MB = 1_000_000


def test_rss_follows_what_is_taken_and_given_back():
    before = memory.rss()
    block = np.ones(50 * MB, np.uint8)
    assert 45 * MB < memory.rss() - before < 80 * MB
    del block
    assert memory.rss() - before < 20 * MB


def test_rss_agrees_with_psutil():
    assert abs(memory.rss() - psutil.Process().memory_info().rss) < 4 * MB


def test_peak_stays_when_memory_is_given_back():
    block = np.ones(50 * MB, np.uint8)
    high = memory.rss()
    del block
    assert memory.peak_rss() >= high - 2 * MB
    if memory.reset_peak():
        assert memory.peak_rss() < high - 30 * MB


def test_peak_of_another_process_is_its_own():
    """A child must not be charged with what its parent had (getrusage's maxrss is)."""
    block = np.ones(200 * MB, np.uint8)
    child = subprocess.Popen(
        [sys.executable, "-c", "print('up', flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        child.stdout.readline()
        assert 1 * MB < memory.peak_rss(child.pid) < 100 * MB
    finally:
        child.communicate(b"\n")
    assert block[0] == 1
    with pytest.raises(OSError):
        memory.peak_rss(child.pid)


def test_holes_are_given_back():
    blocks = [np.ones(64_000, np.uint8) for _ in range(2000)]  # below the size that is mapped alone
    high = memory.rss()
    blocks = blocks[::8]
    memory.give_back_free()
    assert high - memory.rss() > 0.6 * 2000 * 64_000
    assert all(block.all() for block in blocks)


def left_by_holes(keep: bool) -> int:
    """Bytes that go when every other large block is freed, in a process of its own: free chunks that a
    heap has already are used again whatever is set."""
    code = f"""
import numpy as np
from comoe import memory
memory.keep_freed({keep})
blocks = [np.ones(4_000_000, np.uint8) for _ in range(20)]
full = memory.rss()
blocks[:] = blocks[1::2]
print(full - memory.rss())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_what_is_not_kept_goes_at_once():
    """A hole between two blocks in use, as large as glibc keeps after larger ones were freed."""
    assert left_by_holes(keep=True) < 10 * MB
    assert left_by_holes(keep=False) > 30 * MB


def _group(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def _cgroup_of(root, text):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(text)


def test_cgroup_v2_takes_the_tightest_of_the_groups_above(tmp_path):
    _cgroup_of(tmp_path, "0::/app/job\n")
    top = tmp_path / "sys/fs/cgroup"
    _group(
        top / "app/job", memory__max="max", memory__current="100", memory__stat="inactive_file 40"
    )
    _group(
        top / "app",
        memory__max="1000",
        memory__current="300",
        memory__stat="anon 9\ninactive_file 100",
    )
    assert memory.cgroup_limit(tmp_path) == (1000, 200)
    _group(top / "app/job", memory__max="900")
    assert memory.cgroup_limit(tmp_path) == (1000, 200)  # 800 left there, 840 in the inner one
    _group(top / "app/job", memory__max="500")
    assert memory.cgroup_limit(tmp_path) == (500, 60)


def test_cgroup_v1(tmp_path):
    _cgroup_of(tmp_path, "9:cpu,cpuacct:/x\n4:memory:/x\n")
    group = tmp_path / "sys/fs/cgroup/memory/x"
    _group(
        group,
        memory__limit_in_bytes="700",
        memory__usage_in_bytes="80",
        memory__stat="total_inactive_file 30",
    )
    assert memory.cgroup_limit(tmp_path) == (700, 50)
    _group(group, memory__limit_in_bytes=str(2**63 - 4096))
    assert memory.cgroup_limit(tmp_path) is None


def test_cgroup_of_a_container_whose_path_is_the_hosts(tmp_path):
    _cgroup_of(tmp_path, "0::/docker/abc\n")
    top = tmp_path / "sys/fs/cgroup"
    _group(top, memory__max="1000", memory__current="300", memory__stat="inactive_file 0")
    assert memory.cgroup_limit(tmp_path) == (1000, 300)


def test_no_cgroup_is_no_limit(tmp_path):
    assert memory.cgroup_limit(tmp_path) is None


def test_available_is_less_than_total():
    assert 0 < memory.available() < memory.total() <= psutil.virtual_memory().total


def test_a_limit_bounds_available(monkeypatch):
    monkeypatch.setattr(memory, "cgroup_limit", lambda: (500 * MB, 200 * MB))
    assert memory.available() == 300 * MB
    assert memory.total() == 500 * MB
    monkeypatch.setattr(memory, "cgroup_limit", lambda: (500 * MB, 600 * MB))
    assert memory.available() == 0
