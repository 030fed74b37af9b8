"""What comoe's way of fetching gets through the testbed from nginx, beside curl on the same file.

    python -m bench.edge.throughput [--mb 64] [--rounds 5] [--json] [--write]

Two links: an unshaped veth, and 100 Mbit/s with 20 ms. `comoe` is the whole way of a record: merged ranges of 2 MiB in four
threads, each verified by its checksum; `raw` a plain socket that reads the whole answer into one buffer. All take turns.
The share of the link counts payload against the shaper's rate, which counts headers of frames too.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from bench.edge.fetching import NAME, STEP, several
from bench.edge.hosts import UE, Testbed, why_not
from bench.edge.servers import Nginx
from bench.harness import interleave, write_rows
from comoe import _C

LINKS = {"veth": "10.77.9.1", "100 Mbit/s": "10.77.0.1"}
LINK_BYTES = 12.5e6  # of the second, per second


def raw(url: str) -> None:
    parts = urlsplit(url)
    buffer = bytearray(1 << 20)
    with socket.create_connection((parts.hostname, 80)) as link:
        link.sendall(f"GET {parts.path} HTTP/1.0\r\nHost: {parts.hostname}\r\n\r\n".encode())
        while link.recv_into(buffer):
            pass


def client(url: str, file: Path, rounds: int) -> None:
    """On the device: prints the seconds of each way, in turns."""
    data = np.fromfile(file, np.uint8)
    crcs = {at: _C.crc32c(data[at : at + STEP]) for at in range(0, len(data), STEP)}
    whole = f"{url}/{NAME}"
    ways = {
        "curl": lambda: subprocess.run(["curl", "-sf", "-o", "/dev/null", whole], check=True),
        "raw": lambda: raw(whole),
        "comoe": several(url, len(data), crcs),
    }
    times = interleave(ways, rounds)
    print(json.dumps({name: list(seconds) for name, seconds in times.items()}))


def measure(mbytes: int, rounds: int, links: list[str]) -> list[dict]:
    """A row per link and way."""
    rows = []
    with tempfile.TemporaryDirectory() as folder, Testbed(seconds=600) as bed:
        root = Path(folder) / "www"
        root.mkdir()
        file = root / NAME
        file.write_bytes(np.random.default_rng(0).bytes(mbytes * 1_000_000))
        Nginx(bed, "edge0", root, Path(folder) / "nginx")
        bed.cells[0].set(100, 0.02)
        for link in links:
            command = [sys.executable, "-m", "bench.edge.throughput", "--rounds", str(rounds)]
            command += ["--client", f"http://{LINKS[link]}", "--file", str(file)]
            done = bed.run(UE, command, capture_output=True, text=True)
            seconds = {name: statistics.median(t) for name, t in json.loads(done.stdout).items()}
            for name, took in seconds.items():
                speed = mbytes * 1e6 / took
                rows.append(
                    {
                        "link": link,
                        "client": name,
                        "megabytes": mbytes,
                        "mb_per_second": round(speed / 1e6, 2),
                        "of_curl": round(seconds["curl"] / took, 3),
                        "of_link": round(speed / LINK_BYTES, 3) if link != "veth" else "",
                    }
                )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mb", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--link", action="append", choices=LINKS)
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--write", action="store_true", help="append to bench/results/edge_throughput.csv"
    )
    parser.add_argument("--client", help=argparse.SUPPRESS)  # the part that runs on the device
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client:
        client(args.client, args.file, args.rounds)
        return 0
    missing = why_not()
    if missing:
        print(f"skipped: {missing}")
        return 0
    rows = measure(args.mb, args.rounds, args.link or list(LINKS))
    if args.json:
        print(json.dumps(rows))
    else:
        for row in rows:
            share = f" | {row['of_link']:.1%} of the link" if row["of_link"] else ""
            print(
                f"{row['link']:12s} {row['client']:6s} {row['mb_per_second']:8.1f} MB/s | "
                f"{row['of_curl']:.0%} of curl{share}"
            )
    if args.write:
        write_rows("edge_throughput", rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
