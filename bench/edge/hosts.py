"""A user's device, cells and edge servers as network namespaces on this machine.

    ue                         cell0                       edge0
    cell0 10.77.0.2 -- veth -- ue | relay | core -- veth -- eth0 10.77.0.1
    cell1 10.77.1.2 -- ...        cell1                    edge1: eth0 10.77.1.1
    direct 10.77.9.2 -------------- veth, unshaped -------- edge0: direct 10.77.9.1

A cell shapes both directions with `tc tbf`, and its relay holds every frame for half of the round trip. Nothing
leaves the namespaces: they have no way out. A watchdog process removes everything when the run ends, is killed,
or takes longer than it may. Needs root, ip and tc; `why_not()` says what is missing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

RELAY = Path(__file__).with_name("relay.py")
UE = "ue"
SLOWEST = 0.01  # Mbit/s; below it a shaper needs minutes for a frame
BURST_SECONDS, LEAST_BURST = 0.004, 16_000  # of a shaper's bucket
QUEUE_SECONDS, LEAST_QUEUE = 0.1, 64_000  # of frames that wait in front of a shaper
WATCHDOG = """
timeout "$1" cat >/dev/null
shift
for name in "$@"; do ip netns pids "$name" 2>/dev/null | xargs -r kill -9; done
for name in "$@"; do ip netns del "$name" 2>/dev/null; done
exit 0
"""


def why_not() -> str | None:
    """Why no testbed can be made here; None if one can."""
    if os.geteuid() != 0:
        return "network namespaces need root; run as root"
    for tool in ("ip", "tc", "timeout"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed (iproute2, coreutils)"
    name = f"comoe-{os.getpid()}-try"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode != 0:
        return f"network namespaces cannot be made here: {made.stderr.strip()}"
    try:
        veth = ["ip", "-n", name, "link", "add", "try0", "type", "veth", "peer", "name", "try1"]
        shape = ["tc", "-n", name, "qdisc", "add", "dev", "try0", "root", "tbf"]
        for command in (veth, [*shape, "rate", "1mbit", "burst", "16kb", "latency", "50ms"]):
            tried = subprocess.run(command, capture_output=True, text=True)
            if tried.returncode != 0:
                return f"`{' '.join(command[3:])}` does not work here: {tried.stderr.strip()}"
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return None


class Cell:
    """One way from the device to a server. `set` changes it while it is in use."""

    def __init__(self, bed: Testbed, idx: int):
        self._bed, self.idx, self.name = bed, idx, f"cell{idx}"
        self.server = f"10.77.{idx}.1"
        self.relay = bed.start(
            self.name, [sys.executable, str(RELAY), "ue", "core"], stdin=subprocess.PIPE
        )
        self._shaped: tuple[float, float] | None = None
        self.passes, self.up = True, True

    def set(self, mbps: float, rtt: float, uplink: float | None = None) -> None:
        """Mbit/s towards the device, and from it (default: a fifth); rtt: seconds."""
        down = max(mbps, SLOWEST)
        up = max(down / 5 if uplink is None else uplink, SLOWEST)
        verb = "add" if self._shaped is None else "change"
        if self._shaped != (down, up):
            for interface, rate in (("ue", down), ("core", up)):
                bytes_per_second = rate * 1e6 / 8
                burst = int(max(bytes_per_second * BURST_SECONDS, LEAST_BURST))
                queue = int(max(bytes_per_second * QUEUE_SECONDS, LEAST_QUEUE))
                run("tc", "-n", self._bed.ns(self.name), "qdisc", verb, "dev", interface, "root",
                    "tbf", "rate", f"{int(rate * 1e6)}bit", "burst", str(burst), "limit", str(queue))  # fmt: skip
            self._shaped = (down, up)
        self._tell(f"delay {rtt / 2:.6f}")

    def black_hole(self, on: bool) -> None:
        """Frames are lost without anybody being told, as when a radio link fades."""
        if self.passes == on:
            self.passes = not on
            self._tell("drop" if on else "pass")

    def carrier(self, on: bool) -> None:
        """The device's interface loses its carrier, or has it again: what an operating system sees."""
        if self.up != on:
            self.up = on
            state = "up" if on else "down"
            run("ip", "-n", self._bed.ns(self.name), "link", "set", "ue", state)

    def _tell(self, command: str) -> None:
        if self.relay.poll() is not None:
            raise RuntimeError(f"the relay of {self.name} has ended with {self.relay.returncode}")
        self.relay.stdin.write(f"{command}\n".encode())
        self.relay.stdin.flush()


class Testbed:
    """Use as a context manager. seconds: after which everything is removed, whatever goes on."""

    __test__ = False  # not pytest's

    def __init__(self, *, cells: int = 2, seconds: int = 600):
        self._prefix = f"comoe-{os.getpid()}-"
        self._processes: list[subprocess.Popen] = []
        names = [UE, *(f"{kind}{i}" for i in range(cells) for kind in ("cell", "edge"))]
        self._names = [self.ns(name) for name in names]
        self._watchdog = subprocess.Popen(
            ["bash", "-c", WATCHDOG, "watchdog", str(seconds), *self._names],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        self.cells: list[Cell] = []
        try:
            for name in self._names:
                run("ip", "netns", "add", name)
                run("ip", "-n", name, "link", "set", "lo", "up")
            # As where an interface that is down takes its addresses along: no route leads over it.
            rule = "echo 1 > /proc/sys/net/ipv4/conf/all/ignore_routes_with_linkdown"
            run("ip", "netns", "exec", self.ns(UE), "sh", "-c", rule)
            for i in range(cells):
                self._cable(UE, f"cell{i}", f"cell{i}", "ue", f"10.77.{i}.2/24", None)
                self._cable(f"cell{i}", "core", f"edge{i}", "eth0", None, f"10.77.{i}.1/24")
                self.cells.append(Cell(self, i))
            self._cable(UE, "direct", "edge0", "direct", "10.77.9.2/24", "10.77.9.1/24")
        except BaseException:
            self.close()
            raise

    def ns(self, host: str) -> str:
        """The namespace of a host: "ue", "edge0", ..."""
        return self._prefix + host

    def _cable(
        self, one: str, end: str, other: str, far: str, address: str | None, far_address: str | None
    ) -> None:
        run("ip", "link", "add", end, "netns", self.ns(one), "type", "veth",
            "peer", "name", far, "netns", self.ns(other))  # fmt: skip
        for host, interface, ip in ((one, end, address), (other, far, far_address)):
            ns = self.ns(host)
            switch = f"/proc/sys/net/ipv6/conf/{interface}/disable_ipv6"
            run("ip", "netns", "exec", ns, "sh", "-c", f"echo 1 > {switch} 2>/dev/null || true")
            if ip is not None:
                run("ip", "-n", ns, "addr", "add", ip, "dev", interface)
            run("ip", "-n", ns, "link", "set", interface, "up")

    def start(self, host: str, command: list[str], **options) -> subprocess.Popen:
        """A process on a host, ended with the testbed."""
        line = ["ip", "netns", "exec", self.ns(host), *command]
        process = subprocess.Popen(line, **options)
        self._processes.append(process)
        return process

    def run(self, host: str, command: list[str], **options) -> subprocess.CompletedProcess:
        """A command on a host, to its end; raises CalledProcessError if it fails."""
        line = ["ip", "netns", "exec", self.ns(host), *command]
        return subprocess.run(line, check=True, **options)

    def close(self) -> None:
        """Ends every process on the hosts and removes these."""
        self._watchdog.stdin.close()
        self._watchdog.wait()
        for process in self._processes:
            process.wait()
            if process.stdin is not None:
                process.stdin.close()

    def __enter__(self) -> Testbed:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
