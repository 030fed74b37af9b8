"""Bytes over HTTP from a real nginx on loopback: clients side by side, and comoe's own ways against curl.

python bench/bench_remote.py [--json] [--rounds 5] [--megabytes 256]

Needs nginx and curl; says so and ends without. Other clients are timed where they are installed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from edge.fetching import several
from harness import interleave, quantiles, write_rows

from comoe import _C
from comoe.tiers.buffers import block
from comoe.tiers.source import Transfer, open_source

STEPS = (64 << 10, 1 << 20, 16 << 20)
CONFIG = """
worker_processes 1; daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 64; }}
http {{ access_log off; sendfile on; keepalive_requests 1000000;
  client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  server {{ listen 127.0.0.1:{port}; root {folder}/www; }} }}
"""


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def nginx(folder: Path) -> Iterator[str]:
    """Serves folder/www until the block is left; gives its URL."""
    port = free_port()
    (folder / "nginx.conf").write_text(CONFIG.format(folder=folder, port=port))
    program = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
    server = subprocess.Popen(
        [program, "-c", folder / "nginx.conf", "-p", folder], stderr=subprocess.DEVNULL
    )
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(200):
            if (
                subprocess.run(["curl", "-sfI", f"{url}/big.bin"], capture_output=True).returncode
                == 0
            ):
                break
            time.sleep(0.05)
        yield url
    finally:
        server.terminate()
        server.wait()


def clients(url: str, nbytes: int, step: int) -> dict[str, Callable[[], None]]:
    """Ways to read the file in ranges of `step`, one after the other, over one connection."""
    path, ranges = "big.bin", [(at, min(at + step, nbytes)) for at in range(0, nbytes, step)]
    source = open_source(url)

    def http_client() -> None:
        for begin, end in ranges:
            view = block(step)[: end - begin]
            source.read_into(path, begin, view, Transfer("", end - begin, lambda *_: None), nbytes)

    found: dict[str, Callable[[], None]] = {"comoe (http.client)": http_client}
    whole = f"{url}/{path}"
    with contextlib.suppress(ImportError):
        import urllib3

        pool = urllib3.PoolManager()

        def with_urllib3() -> None:
            for begin, end in ranges:
                answer = pool.request("GET", whole, headers={"Range": f"bytes={begin}-{end - 1}"})
                assert len(answer.data) == end - begin

        found["urllib3"] = with_urllib3
    with contextlib.suppress(ImportError):
        import httpx2

        client = httpx2.Client()

        def with_httpx() -> None:
            for begin, end in ranges:
                answer = client.get(whole, headers={"Range": f"bytes={begin}-{end - 1}"})
                assert len(answer.content) == end - begin

        found["httpx2"] = with_httpx
    with contextlib.suppress(ImportError):
        import aiohttp  # noqa: F401
        import fsspec

        system = fsspec.filesystem("http")

        def with_fsspec() -> None:
            for begin, end in ranges:
                assert len(system.cat_file(whole, start=begin, end=end)) == end - begin

        found["fsspec (aiohttp)"] = with_fsspec
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true", help="append to bench/results/remote.csv")
    args, _ = parser.parse_known_args()
    if not (shutil.which("nginx", path="/usr/sbin:/usr/bin") and shutil.which("curl")):
        print("bench_remote: skipped: it needs nginx and curl")
        return
    nbytes, rows = args.megabytes << 20, []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        folder.chmod(0o755)
        (folder / "www").mkdir()
        data = np.random.default_rng(0).integers(0, 256, nbytes, np.uint8)
        data.tofile(folder / "www" / "big.bin")
        crcs = {at: _C.crc32c(data[at : at + (2 << 20)]) for at in range(0, nbytes, 2 << 20)}
        with nginx(folder) as url:

            def curl() -> None:
                subprocess.run(["curl", "-s", "-o", "/dev/null", f"{url}/big.bin"], check=True)

            for step in (*STEPS, 0):
                variants = clients(url, nbytes, step) if step else {}
                if not step:
                    for threads in (1, 2, 4):
                        variants[f"comoe, verified, {threads} threads"] = several(
                            url, nbytes, crcs, threads
                        )
                variants["curl, whole file"] = curl
                times = interleave(variants, args.rounds)
                ceiling = quantiles(times["curl, whole file"])[1]
                for name, seconds in times.items():
                    low, middle, high = quantiles(seconds)
                    rows.append(
                        {
                            "client": name,
                            "range_kib": step >> 10 or 2048,
                            "gb_per_second": round(nbytes / middle / 1e9, 3),
                            "p20": round(nbytes / high / 1e9, 3),
                            "p80": round(nbytes / low / 1e9, 3),
                            "of_curl": round(ceiling / middle, 3),
                        }
                    )
                    if not args.json:
                        row = rows[-1]
                        print(
                            f"{name:28s} {row['range_kib']:6d} KiB | {row['gb_per_second']:.2f} GB/s "
                            f"({row['p20']:.2f} to {row['p80']:.2f}) | {row['of_curl']:.0%} of curl",
                            flush=True,
                        )
    if args.json:
        print(json.dumps(rows, indent=2))
    if args.write:
        write_rows("remote", rows)


if __name__ == "__main__":
    main()
