"""Real nginx as a static edge server."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from pathlib import Path

from bench.edge.hosts import Testbed

NGINX = shutil.which("nginx") or "/usr/sbin/nginx"
CONFIG = """
daemon off;
user root;
worker_processes 1;
pid {work}/nginx.pid;
error_log {work}/error.log warn;
events {{ worker_connections 256; }}
http {{
    client_body_temp_path {work}/body;
    proxy_temp_path {work}/proxy;
    fastcgi_temp_path {work}/fastcgi;
    uwsgi_temp_path {work}/uwsgi;
    scgi_temp_path {work}/scgi;
    access_log off;
    sendfile on;
    tcp_nopush on;
    keepalive_timeout 75;
    keepalive_requests 100000;
    default_type application/octet-stream;
    server {{
        listen {port};
        root {root};
        {extra}
    }}
}}
"""


class Nginx:
    """One nginx on a host of the testbed, serving `root`. limit: bytes/s per connection, 0: none."""

    def __init__(
        self, bed: Testbed, host: str, root: Path, work: Path, *, port: int = 80, limit: int = 0
    ):
        self._bed, self._host, self._root, self._work = bed, host, Path(root).resolve(), work
        self.port = port
        self._process: subprocess.Popen | None = None
        self.start(limit)

    def start(self, limit: int = 0) -> None:
        work = self._work / f"{self._host}-{self.port}"
        work.mkdir(parents=True, exist_ok=True)
        extra = f"limit_rate {limit};" if limit else ""
        config = work / "nginx.conf"
        config.write_text(CONFIG.format(work=work, port=self.port, root=self._root, extra=extra))
        self._process = self._bed.start(
            self._host, [NGINX, "-e", str(work / "error.log"), "-c", str(config)]
        )
        wait_for_port(self._bed, self._host, self.port, self._process)

    def kill(self) -> None:
        """At once, as when a machine loses its power: workers too."""
        children = subprocess.run(
            ["pgrep", "-P", str(self._process.pid)], capture_output=True, text=True
        ).stdout.split()
        self._process.kill()
        subprocess.run(["kill", "-9", *children], capture_output=True) if children else None
        self._process.wait()

    def restart(self, limit: int = 0) -> None:
        self.kill()
        self.start(limit)


def wait_for_port(
    bed: Testbed, host: str, port: int, process: subprocess.Popen, seconds: float = 15.0
) -> None:
    """Until somebody listens on the host's port."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"the server on {host}:{port} ended with {process.returncode}")
        table = bed.run(host, ["cat", "/proc/net/tcp"], capture_output=True, text=True).stdout
        if any(f":{port:04X} " in line and " 0A " in line for line in table.splitlines()):
            return
        time.sleep(0.05)
    raise TimeoutError(f"no server on {host}:{port} after {seconds:g} s")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
