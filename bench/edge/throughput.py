"""What curl gets through the testbed from nginx, and what `read` gets beside it.

    python -m bench.edge.throughput [--mb 64] [--rounds 5] [--json]

Two links: an unshaped veth, and 100 Mbit/s with 20 ms. `raw` is a plain socket that reads the same answer into one
buffer; the share of the link counts payload against the shaper's rate, which counts headers of frames too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np

from bench.edge.hosts import UE, Testbed, why_not
from bench.edge.servers import Nginx

RAW = """
import socket, sys, time
host, path, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
buffer = bytearray(1 << 20)
for _ in range(rounds):
    begin = time.perf_counter()
    with socket.create_connection((host, 80)) as link:
        link.sendall(f"GET {path} HTTP/1.0\\r\\nHost: {host}\\r\\n\\r\\n".encode())
        total = 0
        while (got := link.recv_into(buffer)):
            total += got
    print(total / (time.perf_counter() - begin))
"""


def curl(bed: Testbed, url: str) -> float:
    """Bytes/s."""
    command = ["curl", "-sf", "-o", "/dev/null", "-w", "%{speed_download}", url]
    return float(bed.run(UE, command, capture_output=True, text=True).stdout)


def raw(bed: Testbed, host: str, path: str) -> float:
    command = [sys.executable, "-c", RAW, host, path, "1"]
    return float(bed.run(UE, command, capture_output=True, text=True).stdout)


def measure(mbytes: int, rounds: int) -> dict:
    """Medians in MB/s by link."""
    with tempfile.TemporaryDirectory() as folder, Testbed(seconds=300) as bed:
        root = Path(folder) / "www"
        root.mkdir()
        rng = np.random.default_rng(0)
        (root / "file").write_bytes(rng.bytes(mbytes * 1_000_000))
        Nginx(bed, "edge0", root, Path(folder) / "nginx")
        bed.cells[0].set(100, 0.02)
        result = {}
        for name, host in (("veth", "10.77.9.1"), ("100 Mbit/s", "10.77.0.1")):
            got: dict[str, list[float]] = {"curl": [], "raw": []}
            for _ in range(rounds):
                got["curl"].append(curl(bed, f"http://{host}/file"))
                got["raw"].append(raw(bed, host, "/file"))
            result[name] = {who: statistics.median(speeds) / 1e6 for who, speeds in got.items()}
        return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mb", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    missing = why_not()
    if missing:
        print(f"skipped: {missing}")
        return 0
    result = measure(args.mb, args.rounds)
    if args.json:
        print(json.dumps(result))
    else:
        for link, speeds in result.items():
            print(f"{link:12s} curl {speeds['curl']:8.1f} MB/s | raw {speeds['raw']:8.1f} MB/s")
        print(f"share of the link: curl {result['100 Mbit/s']['curl'] / 12.5:.1%}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
