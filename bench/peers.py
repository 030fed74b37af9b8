"""comoe beside other engines on identical weights: transformers, accelerate's disk offload, llama.cpp.

    python bench/peers.py                   # 40 minutes on 2 idle cores, 20 GB of disk, root for the memory limits
    python bench/peers.py --only "2 GiB"    # one case; --list shows them
    python bench/peers.py --small           # a tiny model, minutes: does everything still run?

Shape B: Qwen3-MoE, 16 layers of 64 experts, top 8, H = 1024, I = 512, vocabulary 50,257, 1.77 B parameters, random
weights, every expert as popular as any other: the worst case for caches. All peers are fed the same random ids: a prompt
of 128, then one token at a time; nothing is sampled. Each measurement is a process of its own in a memory cgroup of its
own, its files out of the page cache before it begins; peers of a case take turns, `--repeats` times. Perplexity is that
of the bundled trained model in the same formats, on the same held-out text and the same windows.

Rows are appended to bench/results/peers.csv as soon as they are measured; a second call goes on where the first stopped
(--run names a new set of rows). The goals are judged from the medians and printed at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peers_setup
from cgroup import CgroupError, MemoryGroup, drop_from_cache
from harness import RESULTS, write_rows
from peers_judge import NUMBERS, judge
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
GIB = 2**30
SHAPE_B = {"layers": 16, "experts": 64, "hidden": 1024, "intermediate": 512, "top_k": 8}
SMALL = {"layers": 2, "experts": 8, "hidden": 256, "intermediate": 256, "top_k": 2}
LIMIT_SECONDS = 600  # of one measurement
CEILING = "the machine"  # rows of what memory and disk give, beside the peers'
KILLED, LATE = "killed: does not fit", "not done after"
WINDOW, CONTEXT, TEXT_BYTES = 256, 64, 24_000
TIMING = {
    "warm_tokens": 4,
    "warm_seconds": 4.0,
    "most_warm_tokens": 64,
    "timed_tokens": 48,
    "least_tokens": 6,
    "timed_seconds": 8.0,
}
DISK = 20_000_000_000


@dataclass(frozen=True)
class Peer:
    """worker: transformers, accelerate, comoe or llama.  job: what only this peer's worker is told.  quality: the peer
    whose perplexity this one has (itself, unless the same weights are used in another way)."""

    name: str
    worker: str
    job: dict[str, Any] = field(default_factory=dict)
    quality: str = ""


def known_peers() -> dict[str, Peer]:
    from comoe.config import CoMoEConfig

    peers = [
        Peer(f"transformers {name}", "transformers", {"experts": name}, "transformers eager")
        for name in ("eager", "grouped_mm", "batched_mm")
    ]
    peers.append(Peer("accelerate, experts on disk", "accelerate", {}, "transformers eager"))
    for name in ("bf16", *peers_setup.FORMATS):
        peers.append(Peer(f"llama.cpp {name}", "llama", {"format": name}))
    # Held at one level, and with no more memory than that takes.
    at = {"memory": "600MB", "upgrade": False}
    ours: dict[str, dict[str, Any]] = {
        "exact": {"options": {"exact": True}},
        "8 bits": {"options": at, "level": "8"},
        "4 bits": {"options": at, "level": "4"},
        "quality=high": {"options": {"quality": "high"}},
        "as fits": {"options": {}},
    }
    peers += [Peer(f"comoe {name}", "comoe", job) for name, job in ours.items()]
    if {"dense", "compile"} <= set(CoMoEConfig.__dataclass_fields__):
        for name, job in ours.items():
            more = {"compile": True} | ({} if name == "exact" else {"dense": "bits8"})
            label = "compiled" if name == "exact" else "dense 8, compiled"
            options = {"options": {**job["options"], **more}}
            same = "comoe exact" if name == "exact" else ""
            peers.append(Peer(f"comoe {name}, {label}", "comoe", job | options, same))
    return {peer.name: peer for peer in peers}


@dataclass(frozen=True)
class Case:
    name: str
    cap: int | None  # bytes
    peers: tuple[str, ...]


def cases(peers: dict[str, Peer], half: int) -> list[Case]:
    """half: bytes of half of the weights in bf16."""

    def chosen(*starts: str) -> tuple[str, ...]:
        return tuple(name for start in starts for name in peers if name.startswith(start))

    llama, disk, exact = chosen("llama.cpp"), chosen("accelerate"), chosen("comoe exact")
    fine = exact + chosen("comoe 4 bits", "comoe quality=high")
    least = exact + chosen("comoe quality=high", "comoe as fits")
    everything = llama + chosen("transformers") + exact + chosen("comoe 8", "comoe 4")
    return [
        Case("resident", None, everything),
        Case("3 GiB", 3 * GIB, llama + disk + exact + chosen("comoe 8", "comoe 4")),
        Case("2 GiB", 2 * GIB, llama + disk + fine),
        Case("half of the weights", half, llama + fine),
        Case("1 GiB", 1 * GIB, llama + disk + least),
    ]


class Bench:
    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.console = Console(stderr=args.json, soft_wrap=True)
        self.models: Path = args.models.resolve()
        self.peers = known_peers()
        self.path = RESULTS / f"{args.out}.csv"
        self.llama: peers_setup.Llama | None = None

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False)

    # ---- what is measured, in which files ----------------------------------------------------------------------

    def set_up(self) -> None:
        from comoe.demo import model_folder

        peers_setup.room_for(self.models, 0 if self.ready() else self.needed())
        if not self.args.without_llama:
            self.llama = peers_setup.llama(self.args.llama, self.say)
        if not (self.models / "source" / "config.json").is_file():
            self.say("making the checkpoint")
            shape = SMALL if self.args.small else SHAPE_B
            make_checkpoint(self.models / "source", shape, 512 if self.args.small else 50_257)
        peers_setup.comoe_model(self.models / "source", self.models / "packed", self.say)
        peers_setup.comoe_model(model_folder(), self.models / "demo-packed", self.say)
        if self.llama is not None:
            for source, stem in ((self.models / "source", "b"), (model_folder(), "demo")):
                peers_setup.gguf(self.llama, source, self.models / stem, self.say)

    def ready(self) -> bool:
        return (self.models / "packed" / "config.json").is_file()

    def needed(self) -> int:
        return 200_000_000 if self.args.small else DISK

    def weights(self) -> int:
        """Bytes of the checkpoint in bf16."""
        return sum(f.stat().st_size for f in (self.models / "source").glob("*.safetensors"))

    def files(self, peer: Peer, demo: bool) -> Path:
        from comoe.demo import model_folder

        if peer.worker == "llama":
            stem = self.models / ("demo" if demo else "b")
            return peers_setup.gguf_file(stem, peer.job["format"])
        if peer.worker == "comoe":
            return self.models / ("demo-packed" if demo else "packed")
        return model_folder() if demo else self.models / "source"

    # ---- one measurement ---------------------------------------------------------------------------------------

    def measure(self, peer: Peer, cap: int | None, job: dict[str, Any], demo: bool) -> dict:
        """The worker's result, or {"error": why there is none}; with the cgroup's peak."""
        folder = self.files(peer, demo)
        job = job | peer.job | {"system": peer.worker, "folder": str(folder), "file": str(folder)}
        job |= {"threads": os.cpu_count(), "context_tokens": 512}
        job["blocks"] = cap is None  # under a limit a pass of its own would take some peers minutes
        # A level is held as asked; else what the limit leaves is used.
        if cap is not None and "level" not in peer.job:
            job["cap"] = cap
        if peer.worker == "comoe" and cap is None and "level" not in peer.job:
            job["options"] = {"memory": "1TB", **peer.job["options"]}
        scratch = self.models / "scratch"
        job["scratch"] = str(scratch)
        python, environment = sys.executable, dict(os.environ)
        script = HERE / "peers_worker.py"
        if peer.worker == "llama":
            python, script = str(self.llama.python), HERE / "peers_llama.py"
            environment |= self.llama.environment
        else:
            root = str(HERE.parent)
            environment["PYTHONPATH"] = os.pathsep.join(
                [root, *filter(None, [environment.get("PYTHONPATH")])]
            )
        drop_caches([folder])
        log = self.models / "worker.log"
        with MemoryGroup(cap) as group, log.open("w") as errors:
            worker = group.popen(
                [python, str(script), json.dumps(job)],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )
            try:
                out, _ = worker.communicate(timeout=self.args.limit)
            except subprocess.TimeoutExpired:
                out = ""
            finally:
                worker.kill()
                worker.wait()
            peak, killed = group.peak(), group.killed()
        shutil.rmtree(scratch, ignore_errors=True)
        if worker.returncode == 0 and out.strip():
            return json.loads(out.strip().splitlines()[-1]) | {"cgroup_peak": peak}
        if killed:
            why = KILLED
        elif worker.returncode == -9:
            why = f"{LATE} {self.args.limit} s"
        else:
            lines = log.read_text(errors="replace").strip().splitlines()
            why = lines[-1][-300:] if lines else f"exit status {worker.returncode}"
        return {"error": why, "cgroup_peak": peak}

    # ---- all of them -------------------------------------------------------------------------------------------

    def rows(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return [row for row in csv.DictReader(file) if row["run"] == self.args.run]

    def add(self, row: dict[str, Any]) -> None:
        empty = dict.fromkeys(COLUMNS, "")
        write_rows(self.args.out, [empty | {"run": self.args.run} | row])
        told = {k: row[k] for k in NUMBERS if row.get(k) not in ("", None)}
        said = row.get("error") or ", ".join(f"{k} {v:.4g}" for k, v in told.items())
        self.say(f"{row['case']} | {row['peer']} | {said}")

    def wanted(self) -> list[tuple[str, int | None, str, int]]:
        """(case, limit, peer, repeat) of every measurement, in order."""
        only = self.args.only
        known = [name for name, peer in self.peers.items() if peer.worker != "llama" or self.llama]
        if self.args.peers:
            known = [name for name in known if any(part in name for part in self.args.peers)]
        caps = cases(self.peers, self.weights() // 2)
        if self.args.small:
            caps = [Case("resident", None, tuple(self.peers)), Case("1 GiB", GIB, ("llama.cpp bf16", "comoe exact"))]  # fmt: skip
        found = []
        if not only or "perplexity" in only:
            found = [
                ("perplexity", None, name, 0)
                for name in known
                if self.peers[name].quality in ("", name)
            ]
        for case in caps:
            if only and case.name not in only:
                continue
            for repeat in range(self.args.repeats):
                found.append((case.name, None, CEILING, repeat))
                found += [(case.name, case.cap, name, repeat) for name in case.peers if name in known]  # fmt: skip
        return found

    def run(self) -> None:
        rows = self.rows()
        done = {(row["case"], row["peer"], row["repeat"]) for row in rows if not row["error"]}
        # What did not fit, or was not done in time, will not the next time either.
        failed = {(r["case"], r["peer"]) for r in rows if r["error"].startswith((KILLED, LATE))}
        wanted = self.wanted()
        began = time.monotonic()
        for number, (case, cap, name, repeat) in enumerate(wanted, 1):
            if (case, name, str(repeat)) in done or (case, name) in failed:
                continue
            if time.monotonic() - began > self.args.seconds:
                self.say("stopped; call again to go on")
                return
            minutes = (time.monotonic() - began) / 60
            self.say(f"[dim]{number}/{len(wanted)}, {minutes:.0f} min[/dim] {case}: {name}")
            if name == CEILING:
                self.add({"case": case, "peer": name, "repeat": repeat} | self.ceilings())
                continue
            peer = self.peers[name]
            if case == "perplexity":
                result = self.measure(peer, cap, self.text_job(peer), True)
            else:
                result = self.measure(peer, cap, self.speed_job(), False)
            row = {"case": case, "limit": cap or "", "peer": name, "repeat": repeat}
            if "error" in result:
                failed.add((case, name))
            comoe = result.pop("comoe", {})
            row["memory"] = comoe.get("memory", "")
            row["bits_per_weight"] = comoe.get("bits_per_weight", "")
            self.add(row | {name: result[name] for name in COLUMNS if name in result})

    def ceilings(self) -> dict[str, float]:
        """What memory and disk give now, to all threads and to large direct reads."""
        from comoe.doctor import disk_bandwidth, memory_read_bandwidth, native_module

        disk = disk_bandwidth(self.models, 256 << 20)
        return {
            "memory_bytes_per_second": round(memory_read_bandwidth(native_module())),
            "disk_bytes_per_second": round(disk["bytes_per_second"]),
        }

    def speed_job(self) -> dict[str, Any]:
        vocabulary = json.loads((self.models / "source" / "config.json").read_text())["vocab_size"]
        draw = random.Random(0)
        ids = [draw.randrange(vocabulary) for _ in range(128 + 256 + 17)]
        job = {"prompt": ids[:128], "steps": ids[128:384], "block_steps": ids[384:]} | TIMING
        return job | ({"warm_seconds": 0.5, "timed_seconds": 0.5} if self.args.small else {})

    def text_job(self, peer: Peer) -> dict[str, Any]:
        import comoe
        from comoe.demo import model_folder
        from comoe.evaluate import encode, plan_windows
        from comoe.heldout import held_out_text

        text = held_out_text(1_500 if self.args.small else TEXT_BYTES)
        ids, _ = encode(comoe.load_tokenizer(model_folder()), text)
        windows = plan_windows(len(ids), WINDOW, CONTEXT)
        job = {"text_ids": ids, "window": WINDOW, "context": CONTEXT}
        if peer.worker == "llama":
            job["windows"] = [(w.begin, w.first, w.end) for w in windows]
        if peer.worker == "comoe" and peer.name.startswith(("comoe quality", "comoe as fits")):
            # As 1 GiB for shape B: room for a third of the experts at 4 bits, so that it has to read.
            job["share"] = 1 / 3
        return job


COLUMNS = ("run", "case", "limit", "peer", "repeat", *NUMBERS)
COLUMNS += ("memory", "timed_tokens", "warm_tokens", "ran", "error")


def make_checkpoint(folder: Path, shape: dict[str, int], vocabulary: int) -> None:
    from comoe.synthetic import config_of, make_model

    heads = {"heads": max(shape["hidden"] // 128, 1), "kv_heads": max(shape["hidden"] // 256, 1)}
    config = config_of("qwen3-30b-a3b", **shape, **heads, vocab=vocabulary, tied=False)
    make_model(folder, config, popularity="uniform")


def drop_caches(folders: list[Path]) -> None:
    """Out of the page cache: the model's files, and as root all that nothing holds."""
    found = [f for folder in folders for f in ([folder] if folder.is_file() else folder.rglob("*"))]
    drop_from_cache(f for f in found if f.is_file())
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("1")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--models", type=Path, default=Path("peers-models"), help="scratch folder")
    parser.add_argument("--llama", type=Path, default=Path("peers-llama"), help="folder of llama.cpp's environment")  # fmt: skip
    parser.add_argument("--without-llama", action="store_true")
    parser.add_argument("--run", default=time.strftime("%Y-%m-%d"), help="name of this set of rows")
    parser.add_argument("--out", default="peers", help="rows go to bench/results/OUT.csv")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=int, default=LIMIT_SECONDS, help="seconds of one measurement")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no measurement after these")  # fmt: skip
    parser.add_argument("--only", action="append", help="a case; may be repeated")
    parser.add_argument("--peers", action="append", help="part of a peer's name; may be repeated")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--list", action="store_true", help="cases and peers")
    parser.add_argument("--table", action="store_true", help="only judge the rows that are there")
    parser.add_argument("--delete", action="store_true", help="remove the models afterwards")
    parser.add_argument("--json", action="store_true", help="the judged rows as JSON on standard output")  # fmt: skip
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that groups are removed
    bench = Bench(args)
    if args.list:
        for case in cases(bench.peers, 0):
            bench.say(f"{case.name}: {'; '.join(case.peers)}")
        return 0
    if not args.table:
        try:
            with MemoryGroup(None):
                pass
        except CgroupError as error:
            bench.say(f"peers: {error}")
            return 1
        if len(Path("/proc/swaps").read_text().splitlines()) > 1:
            bench.say(
                "peers: there is swap, which a limit of memory does not count; swapoff -a first"
            )
            return 1
        bench.set_up()
        bench.run()
    found = judge(bench.rows(), bench.peers)
    show(bench.console, found)
    if args.json:
        print(json.dumps(found, indent=1))
    if args.delete:
        shutil.rmtree(bench.models)
    return 0


def show(console: Console, found: dict[str, Any]) -> None:
    titles = ("peer", "decode/s", "prefill/s", "MoE ms", "experts ms", "peak GB", "RSS GB", "perplexity", "")  # fmt: skip
    for case in dict.fromkeys(row["case"] for row in found["rows"]):
        table = Table(title=case)
        for title in titles:
            table.add_column(title, justify="left" if title in ("peer", "") else "right")
        for row in found["rows"]:
            if row["case"] == case:
                table.add_row(*row["shown"])
        console.print(table)
    ran = {row["peer"]: row["ran"] for row in found["rows"] if row["ran"]}
    for name, what in ran.items():
        console.print(f"{name} ran: {what}", highlight=False, soft_wrap=True)
    for goal in found["goals"]:
        console.print(
            f"{goal['verdict']:>9}  {goal['goal']}: {goal['figures']}",
            highlight=False,
            soft_wrap=True,
        )


if __name__ == "__main__":
    sys.exit(main())
