"""Cold disk reads: the engine's readers against a raw O_DIRECT reader, interleaved.

One line per reader: median, 20th and 80th percentile over the rounds, GB/s of payload, and its share of the
best raw reader of the same run (the ceiling). Each turn reads a piece of the file that no other turn of the
round reads. Checks first: what the engine read has the checksum it should have (verify is on).

    python bench/bench_disk.py [--file-mb 2048] [--rounds 7] [--record-mb 9.44]
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import random
import statistics
import subprocess
import time
from pathlib import Path

import numpy as np
from kernel import Ceiling, Kernel

from comoe import _C

ROOT = Path(__file__).resolve().parent.parent
PAGE = 72 * 1024  # the page size of a Qwen3-30B expert: weights / 64


def make_file(path: Path, num_bytes: int, extent: int, record: int) -> list[int]:
    """Random records; returns their checksums."""
    rng = np.random.default_rng(0)
    crcs = []
    with open(path, "wb") as f:
        for _ in range(num_bytes // extent):
            data = rng.integers(0, 256, record, dtype=np.uint8)
            crcs.append(_C.crc32c(data))
            f.write(data)
            f.write(bytes(extent - record))
        f.flush()
        os.fsync(f.fileno())
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return crcs


def read_plainly(path: Path) -> None:
    """As any program reads a file that the page cache does not have."""
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        block = bytearray(1 << 20)
        while file.readinto(block):
            pass
        # What it leaves in the page cache would slow the direct reads that come next.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def raw_read(path: Path, begin: int, end: int, depth: int) -> float:
    """GB/s of plain O_DIRECT reads of 1 MiB by `depth` native threads into one buffer each."""
    return (end - begin) / _C.raw_read_seconds(str(path), begin, end, 1 << 20, depth) / 1e9


class EngineReader:
    """Reads records through a session, as a MoE layer does, in a pool far smaller than the file."""

    def __init__(self, path: Path, extent: int, record: int, crcs: list[int], **kwargs):
        slab = PAGE * 256  # 18 MiB, whole huge pages
        budget = max(96 << 20, 6 * extent) // slab * slab
        self.engine = _C.Engine(PAGE, slab, budget, level_masks=[1], **kwargs)
        file = self.engine.add_file(str(path))
        count = len(crcs)
        self.engine.add_records(
            np.full(count, file, np.int32),
            np.arange(count, dtype=np.int64) * extent,
            np.full(count, record, np.int64),
            np.array(crcs, np.uint32),
        )
        self.engine.add_experts(np.arange(count, dtype=np.int32))
        self.record = record
        self.read(0, min(count, budget // extent))  # touches every page of the pool

    def read(self, begin: int, end: int) -> float:
        self.engine.evict(np.arange(begin, end, dtype=np.int32))
        before = self.engine.stats()["bytes_read"]
        zeros = np.zeros(end - begin, np.uint8)
        start = time.perf_counter()
        session = self.engine.session(np.arange(begin, end, dtype=np.int32), zeros, zeros)
        while (ready := session.next()) is not None:
            for need, _ in ready:
                session.done(need)
        seconds = time.perf_counter() - start
        assert self.engine.stats()["bytes_read"] - before == (end - begin) * self.record
        return (end - begin) * self.record / seconds / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, default=ROOT / "build" / "bench")
    parser.add_argument("--file-mb", type=int, default=3072)
    parser.add_argument("--turn-mb", type=int, default=160)
    parser.add_argument("--record-mb", type=float, default=9.44)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--csv", type=Path, default=ROOT / "bench" / "results" / "disk.csv")
    args = parser.parse_args()

    record = int(args.record_mb * 1e6)
    extent = (record + 4095) // 4096 * 4096
    args.dir.mkdir(parents=True, exist_ok=True)
    path = args.dir / "disk.bin"
    crcs = make_file(path, args.file_mb << 20, extent, record)
    per_turn = max(1, (args.turn_mb << 20) // extent)

    readers = {}
    for depth in (1, 2, 4, 8, 16, 32):
        readers[f"raw O_DIRECT, {depth} in flight"] = lambda b, e, d=depth: raw_read(
            path, b * extent, e * extent, d
        )
    for io in ("threads", "uring"):
        for depth in args.depths:
            engine = EngineReader(
                path, extent, record, crcs, io=io, io_threads=depth, uring_depth=depth
            )
            readers[f"engine {io}, {depth} in flight"] = engine.read
    buffered = EngineReader(path, extent, record, crcs, io="threads", io_threads=4, direct=False)
    readers["engine buffered, 4 in flight"] = buffered.read

    places = len(crcs) // per_turn
    if places < len(readers):
        raise SystemExit(
            f"--file-mb: {len(readers)} turns need {len(readers) * args.turn_mb} MB a round"
        )
    rates: dict[str, list[float]] = {name: [] for name in readers}
    rng = random.Random(0)
    for _ in range(args.rounds):
        order = list(readers)
        rng.shuffle(order)
        for name, place in zip(order, rng.sample(range(places), len(order)), strict=True):
            rates[name].append(readers[name](place * per_turn, (place + 1) * per_turn))
    path.unlink()

    def summary(values: list[float]) -> tuple[float, float, float]:
        cuts = statistics.quantiles(values, n=5)
        return statistics.median(values), cuts[0], cuts[3]

    best_raw = max(statistics.median(v) for name, v in rates.items() if name.startswith("raw"))
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()
    rows = []
    for name, values in rates.items():
        median, p20, p80 = summary(values)
        rows.append(
            [
                name,
                f"{record / 1e6:.2f}",
                f"{median:.3f}",
                f"{p20:.3f}",
                f"{p80:.3f}",
                f"{median / best_raw:.3f}",
            ]
        )
        print(
            f"{name:32} | {median:.3f} GB/s (p20 {p20:.3f}, p80 {p80:.3f}) | {median / best_raw:.0%} of best raw"
        )
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    with open(args.csv, "w", newline="") as f:
        writer = csv.writer(f)
        header = ["reader", "record_mb", "gb_per_s", "p20", "p80", "share_of_best_raw"]
        writer.writerow([*header, "rounds", "machine", "kernel", "commit"])
        for row in rows:
            writer.writerow(
                [*row, args.rounds, f"{os.cpu_count()} cores", platform.release(), commit]
            )


def test_disk_read(bench, tmp_path):
    """Records into the pool, verified, from a file that is in no cache."""
    record, count = int(9.44e6), 16
    extent = (record + 4095) // 4096 * 4096
    path = tmp_path / "records.bin"
    crcs = make_file(path, count * extent, extent, record)
    engine = EngineReader(path, extent, record, crcs)
    whole = count * extent
    bench(
        Kernel(
            "disk read",
            f"{count} records of 9.44 MB, {engine.engine.stats()['io']}",
            lambda: engine.read(0, count),
            count * record,
            ceiling=Ceiling(
                "raw O_DIRECT, 8 in flight", lambda: raw_read(path, 0, whole, 8), whole
            ),
            rival_name="read() and readahead",
            rival=lambda: read_plainly(path),
            rival_share=whole / (count * record),
            error=0.0,
            error_of="(bits, CRC-32C)",
        )
    )


if __name__ == "__main__":
    main()
