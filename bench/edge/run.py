"""The moving user: contenders read a text while a link is replayed (what is asked of them: docs/edge.md).

    python -m bench.edge.run [--script walking] [--series FILE] [--contender comoe] [--seconds 60] [--json]

Every script and contender runs by itself on the same testbed: nginx at both cells' edge servers, links shaped, the
device in its own namespace. Without --script and --series all scripts are run. Plots go to --out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from bench.edge import series
from bench.edge.hosts import UE, Testbed, why_not
from bench.edge.replay import Replay
from bench.edge.servers import Nginx, wait_for_port

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "bench" / "results"
CONTENDERS = ("comoe", "demand", "demand4", "once", "local", "perfect")
FAULTS = ("killed", "slow", "corrupted", "truncated")
SCRIPTS = (*series.SHIPPED, "cut", *FAULTS)
TOKENS = 400  # of the text, again and again


def reference(store: Path, out: Path) -> None:
    """ids and log-probabilities of the exact model, token by token as the contenders read them."""
    import torch

    import comoe
    from bench.edge.worker import WINDOW
    from comoe.heldout import held_out_text

    tokenizer = comoe.load_tokenizer(store)
    ids = tokenizer(held_out_text())["input_ids"][2000 : 2000 + TOKENS]
    model = comoe.load(store, exact=True)
    logp = np.zeros((TOKENS, model.config.vocab_size), np.float16)
    with torch.inference_mode():
        for begin in range(0, TOKENS, WINDOW):
            # Contenders start a context anew at the same places of the text.
            some = ids[max(begin, 0) : begin + WINDOW]
            found = model(torch.tensor([some])).logits[0].float().log_softmax(-1)
            logp[begin : begin + len(some)] = found.half().numpy()
    model.comoe.close()
    np.savez(out, ids=np.array(ids), logp=logp)


def moments_of(name: str, begin: float, seconds: float, path: Path | None) -> list[series.Moment]:
    if path is not None:
        whole = series.read(path)
        return series.window(whole, series.busiest(whole, seconds), seconds)
    if name in series.SHIPPED:
        return series.window(series.read(series.FOLDER / f"{name}.csv"), begin, seconds)
    steady = series.window(series.read(series.FOLDER / "steady-5g.csv"), 0, seconds)
    if name == "cut":
        # After a third of the time nothing, after two thirds as before.
        return [
            m if not seconds / 3 <= m.second < 2 * seconds / 3 else series.Moment(m.second, 0, m.rtt, -1)
            for m in steady
        ]  # fmt: skip
    return steady


class Servers:
    """An nginx at each edge, and what scripts do to the first one."""

    def __init__(self, bed: Testbed, store: Path, work: Path):
        self._bed, self._store = bed, store
        self.nginx = [Nginx(bed, f"edge{i}", store, work) for i in range(len(bed.cells))]

    def events(self, script: str, seconds: float) -> list[tuple]:
        third = seconds / 3
        if script == "killed":
            return [
                (third, "server killed", self.nginx[0].kill),
                (2 * third, "server back", self.nginx[0].start),
            ]
        if script == "slow":
            return [
                (third, "server slow", lambda: self.nginx[0].restart(20_000)),
                (2 * third, "server quick again", self.nginx[0].restart),
            ]
        if script in ("corrupted", "truncated"):
            fault = {"corrupted": "corrupt", "truncated": "truncate"}[script]
            return [(third, f"bodies {script}", lambda: self._break(fault))]
        return []

    def _break(self, fault: str) -> None:
        self.nginx[0].kill()
        command = [sys.executable, "-m", "bench.edge.faulty", str(self._store), "--fault", fault]
        process = self._bed.start("edge0", [*command, "--share", "0.5"], cwd=str(ROOT))
        wait_for_port(self._bed, "edge0", 80, process)


def play(
    args: argparse.Namespace,
    store: Path,
    truth: Path,
    script: str,
    contender: str,
    path: Path | None,
) -> dict:
    """One contender through one script."""
    seconds = args.seconds
    moments = moments_of(script, args.begin, seconds, path)
    if contender == "perfect":  # what the memory allows when all that it holds is here
        moments = [series.Moment(0.0, 1000.0, 0.001, 0)]
    limit = int(seconds) + 240
    with tempfile.TemporaryDirectory() as folder, Testbed(seconds=limit) as bed:
        work = Path(folder)
        servers = Servers(bed, store, work)
        both = script in ("killed", "slow", "corrupted", "truncated")
        for cell in bed.cells:
            cell.set(1000, 0.001)
        env = {**os.environ, "XDG_CACHE_HOME": str(work / "cache"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "bench.edge.worker", "comoe" if contender == "perfect" else contender,
                   "--memory", args.memory, "--reference", str(truth), "--seconds", str(seconds)]  # fmt: skip
        for cell in bed.cells:
            command += ["--url", f"http://{cell.server}"]
        if args.quality:
            command += ["--quality", args.quality]
        errors = open(work / "stderr", "w+")  # noqa: SIM115
        worker = bed.start(
            UE, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            env=env, cwd=str(ROOT),
        )  # fmt: skip
        ready = worker.stdout.readline()
        if not ready:
            errors.seek(0)
            raise RuntimeError(f"{contender}: the worker ended: {errors.read()[-2000:]}")
        events = servers.events(script, seconds) if path is None else []
        replay = Replay(bed, moments, events)
        if both:  # both servers can be reached: the cells' only difference is the script's
            for cell in bed.cells:
                cell.carrier(True)
                cell.set(moments[0].mbps, moments[0].rtt)
        time.sleep(0.3)
        replay.start()
        worker.stdin.write("\n")
        worker.stdin.flush()
        told = worker.stdout.readline()
        replay.stop()
        errors.seek(0)
        said = errors.read()
        if not told:
            raise RuntimeError(f"{contender}: the worker ended: {said[-2000:]}")
        worker.stdin.close()
        worker.wait(90)
        worker.stdout.close()
        errors.close()
    result = json.loads(told)
    return {
        "script": script if path is None else path.stem,
        "contender": contender,
        "moments": [[m.second, m.mbps, 1e3 * m.rtt, m.cell] for m in moments],
        "events": replay.log,
        "said": [line for line in said.splitlines() if line.startswith("comoe:")][-20:],
        **result,
        **figures(result["tokens"]),
    }


def figures(tokens: list[dict]) -> dict:
    ms = np.array([t["ms"] for t in tokens])
    return {
        "median_ms": float(np.median(ms)),
        "p95_ms": float(np.percentile(ms, 95)),
        "worst_ms": float(ms.max()),
        "mean_ms": float(ms.mean()),
        "stalls_250ms": int((ms > 250).sum()),
        "kl": float(np.mean([t["kl"] for t in tokens])),
        "count": len(tokens),
    }


def plot(results: list[dict], script: str, out: Path) -> Path:
    """Bandwidth, time per token, bits here, and loss, over time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(4, 1, figsize=(9, 9), sharex=True)
    shown = [r for r in results if r["script"] == script]
    moments = shown[0]["moments"]
    axes[0].step([m[0] for m in moments], [m[1] for m in moments], where="post", color="black")
    axes[0].set_ylabel("Mbit/s")
    for second, what in shown[0]["events"]:
        axes[0].axvline(second, color="grey", lw=0.5)
        axes[0].annotate(what, (second, 0), fontsize=5, rotation=90)
    for r in shown:
        t = [x["t"] for x in r["tokens"]]
        axes[1].plot(t, [x["ms"] for x in r["tokens"]], lw=0.7, label=r["contender"])
        axes[2].plot(t, [x["bits"] for x in r["tokens"]], lw=0.9)
        kl = np.convolve([x["kl"] for x in r["tokens"]], np.ones(20) / 20, "same")
        axes[3].plot(t, kl, lw=0.9)
    axes[1].set_yscale("log")
    axes[1].set_ylabel("ms per token")
    axes[1].legend(fontsize=7)
    axes[2].set_ylabel("bits per weight here")
    axes[3].set_ylabel("KL to exact (20 tokens)")
    axes[3].set_yscale("symlog", linthresh=1e-3)
    axes[3].set_xlabel("seconds")
    path = out / f"edge-{script}.png"
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, help="A packed folder; default: the bundled model.")
    parser.add_argument("--script", action="append", choices=SCRIPTS)
    parser.add_argument("--series", action="append", type=Path, default=[])
    parser.add_argument("--contender", action="append", choices=CONTENDERS)
    parser.add_argument("--memory", default="19MB")
    parser.add_argument("--quality")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument(
        "--begin", type=float, default=0, help="Where in a shipped series to begin."
    )
    parser.add_argument("--reference", type=Path, help="npz of the exact model; made if missing.")
    parser.add_argument("--out", type=Path, default=Path("edge-out"))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true", help="Write bench/results/edge.json.")
    args = parser.parse_args()
    missing = why_not()
    if missing:
        print(f"skipped: {missing}")
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    scripts = [(name, None) for name in args.script or ([] if args.series else SCRIPTS)]
    scripts += [(path.stem, path) for path in args.series]
    with tempfile.TemporaryDirectory() as folder:
        store = args.store
        if store is None:
            import comoe

            store = comoe.pack(ROOT / "comoe" / "demo_model", Path(folder) / "packed")
        truth = args.reference or Path(folder) / "reference.npz"
        if not truth.exists():
            reference(store, truth)
        results = []
        for script, path in scripts:
            for contender in args.contender or CONTENDERS:
                result = play(args, store, truth, script, contender, path)
                results.append(result)
                print(
                    f"{result['script']:16s} {contender:8s} median {result['median_ms']:7.2f} ms  p95 "
                    f"{result['p95_ms']:8.2f}  worst {result['worst_ms']:8.1f}  KL {result['kl']:.4f}  "
                    f"tokens {result['count']}  stalls {result['stalls_250ms']}",
                    file=sys.stderr,
                    flush=True,
                )
            plot(results, results[-1]["script"], args.out)
    if args.write:
        rows = [
            {k: v for k, v in r.items() if k not in ("tokens", "moments", "events")}
            for r in results
        ]
        found = {"memory": args.memory, "seconds": args.seconds, "begin": args.begin, "rows": rows}
        (RESULTS / "edge.json").write_text(json.dumps(found, indent=1, default=float) + "\n")
    (args.out / "edge.json").write_text(json.dumps(results, default=float))
    if args.json:
        print(json.dumps(results, default=float))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
