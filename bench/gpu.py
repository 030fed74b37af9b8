"""Everything on one CUDA device: ceilings, expert FFN over pages, its rivals, the data plane. Under 8 minutes.

    python bench/gpu.py [--quick] [--json] [--write]        or: make bench-gpu [BENCH_ARGS=--quick]

Each FFN row is checked against the dense reference before it is timed. Cold: every launch of a graph has its own
routing, drawn over all experts, so that weights come from memory and not from the cache. Ceilings (device copy,
pinned host to device, dense bf16 matmul) are measured in the same run. Rows of --write are appended to
bench/results/gpu.csv as they are measured. Rivals run in a graph where they can be captured, and say where not.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from harness import write_rows

from comoe_kernels.ladder_codec import Shape, decode_ref

# (name, H, I, E, K, gated): one MoE layer
SHAPES = (
    ("qwen3-30b-a3b", 2048, 768, 128, 8, True),
    ("olmoe", 2048, 1024, 64, 8, True),
    ("switch-base-128", 768, 3072, 128, 1, False),
    ("mixtral-8x7b", 4096, 14336, 8, 2, True),
)
LEVEL_NAMES = {0: "2-bit", 1: "3-bit", 2: "4-bit", 3: "8-bit", 4: "bf16"}
LAUNCHES = 16  # with a routing of their own in one graph
NATIVE = Path(__file__).resolve().parent.parent / "build" / "native-gpu" / "test_gpu_plane"


def ranged(name: str):
    """An NVTX range where there is a GPU: the timeline then says what ran (bench/profile.md)."""
    return torch.cuda.nvtx.range(name) if torch.cuda.is_available() else nullcontext()


def seconds(run, repeats: int = 20) -> float:
    """Median of device times of `run`."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    return float(np.median(times))


def in_graph(runs) -> tuple[object, str]:
    """(a call that does all of `runs`, "graph"), or one by one where they cannot be captured."""

    def one_by_one():
        for run in runs:
            run()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        one_by_one()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            one_by_one()
    except RuntimeError as error:
        torch.cuda.synchronize()
        return one_by_one, f"no graph ({str(error).splitlines()[0][:60]})"
    return graph.replay, "graph"


class PackedLayer:
    """E random experts at one level in pages of random order on the device."""

    def __init__(self, rng, shape: Shape, E: int, level: int) -> None:
        from comoe_kernels.paged_expert_ffn import PageTables

        self.shape, self.level = shape, level
        self.page = max(shape.num_weights // 64 // 4096, 1) * 4096
        records = [4] if level == 4 else list(range(level + 1))
        counts = {r: -(-shape.record_bytes(r) // self.page) for r in records}
        total = E * sum(counts.values())
        self.arena = torch.empty((total + 1) * self.page, dtype=torch.uint8, device="cuda")
        base = -self.arena.data_ptr() % 4096
        pages = self.arena[base : base + total * self.page].view(total, self.page)
        order = torch.from_numpy(rng.permutation(total))
        table, first, at = [], torch.zeros(E, 5, dtype=torch.int64), 0
        self.slots = {}
        for e in range(E):
            for r in records:
                slots = order[at : at + counts[r]]
                first[e, r], at = at, at + counts[r]
                table.append(slots)
                self.slots[e, r] = slots
                self._fill(rng, pages, slots, r)
        self.pages = pages
        addresses = (torch.cat(table) * self.page + pages.data_ptr()).cuda()
        self.tables = PageTables(
            addresses,
            first.flatten().cuda(),
            torch.arange(E * 5, dtype=torch.int32, device="cuda").view(E, 5),
            self.page,
        )

    def _fill(self, rng, pages, slots, record: int) -> None:
        shape, on_device = self.shape, slots.cuda()
        nbytes = len(slots) * self.page
        if record == 4:
            values = torch.randn(nbytes // 2, device="cuda", dtype=torch.bfloat16)
            values *= shape.hidden**-0.5
            pages[on_device] = values.view(torch.uint8).view(len(slots), self.page)
            return
        data = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device="cuda")
        if record == 0:
            head = np.zeros(shape.blocks_offset(0, 0), np.uint8)
            tables = [np.linspace(16, 240, 1 << b).astype(np.uint8) for b in (2, 3, 4)]
            header = np.concatenate([np.array([-13, 0.01], np.float32).view(np.uint8), *tables])
            for m in range(len(shape.matrices)):
                head[64 * m : 64 * m + len(header)] = header
            params = head[shape.params_offset(0) :]
            params[:] = rng.integers(0, 256, params.size)
            whole = params[: params.size // 32 * 32].reshape(-1, 2, 16)
            whole[:, 1] = rng.integers(100, 156, whole[:, 1].shape)
            data[: head.size] = torch.from_numpy(head).cuda()
        pages[on_device] = data.view(len(slots), self.page)

    def dense(self, e: int) -> list[torch.Tensor]:
        payloads = [np.zeros(0, np.uint8)] * 5
        for r in [4] if self.level == 4 else range(self.level + 1):
            raw = self.pages[self.slots[e, r].cuda()].flatten().cpu().numpy()
            payloads[r] = raw[: self.shape.record_bytes(r)]
        out = []
        for m in range(len(self.shape.matrices)):
            matrix = torch.from_numpy(
                np.ascontiguousarray(decode_ref(self.shape, payloads, self.level, m))
            )
            out.append(
                matrix.view(torch.bfloat16).float()
                if matrix.dtype == torch.uint16
                else matrix.float()
            )
        return out


def routing(rng, T: int, K: int, E: int):
    chosen = torch.from_numpy(np.stack([rng.permutation(E)[:K] for _ in range(T)]).astype(np.int32))
    return chosen.cuda(), torch.rand(T, K, device="cuda")


def ffn_call(layer: PackedLayer, x, chosen, weights, activation: str):
    from comoe_kernels.paged_expert_ffn import DECODE_TOKENS, paged_expert_ffn

    E = layer.tables.records.shape[0]
    used = chosen.unique().to(torch.int32)
    if len(x) > DECODE_TOKENS:
        items = torch.arange(E, dtype=torch.int32, device="cuda")
        levels = torch.full((E,), -1, dtype=torch.int32, device="cuda")
        levels[used.long()] = layer.level
    else:
        items = torch.full((chosen.numel(),), -1, dtype=torch.int32, device="cuda")
        items[: used.numel()] = used
        levels = torch.full_like(items, layer.level)
    out = torch.empty_like(x)
    return lambda: paged_expert_ffn(
        x, layer.shape, layer.tables, chosen, weights, items, levels, activation=activation, out=out
    )


def check(layer: PackedLayer, x, chosen, weights, activation: str) -> float:
    from comoe_kernels.paged_expert_ffn import paged_expert_ffn_ref

    experts = {int(e): layer.dense(int(e)) for e in chosen.unique()}
    want = paged_expert_ffn_ref(x.cpu(), experts, chosen.cpu(), weights.cpu(), activation)
    got = ffn_call(layer, x, chosen, weights, activation)().float().cpu()
    error = float((got - want).norm() / want.norm())
    if not error < 1.5e-2:
        raise SystemExit(f"wrong result, not timed: relative error {error} at {layer.level}")
    return error


def rivals(H: int, inter: int, E: int):
    """transformers' ways to compute the same layer in bf16, by name."""
    from transformers.integrations import moe
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = SimpleNamespace(
        num_experts=E,
        hidden_size=H,
        moe_intermediate_size=inter,
        hidden_act="silu",
        _experts_implementation="eager",
    )
    with torch.device("cuda"):
        module = Qwen3MoeExperts(config).bfloat16()
    for p in module.parameters():
        torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    module.requires_grad_(False)
    return {
        "eager": module.forward,
        "grouped_mm": lambda *a: moe.grouped_mm_experts_forward(module, *a),
        "batched_mm": lambda *a: moe.batched_mm_experts_forward(module, *a),
    }


class Rows:
    def __init__(self, args) -> None:
        self.rows, self.args = [], args
        self.device = torch.cuda.get_device_name()

    def add(self, what: str, value: float | None, unit: str, **more: object) -> None:
        known = {
            "shape": "",
            "T": "",
            "level": "",
            "how": "",
            "ceiling": "",
            "of_ceiling": "",
            "err": "",
        }
        row = {"what": what, "value": value, "unit": unit, **known, **more, "device": self.device}
        self.rows.append(row)
        text = "n/a" if value is None else f"{value:,.2f}"
        details = " ".join(f"{k}={v}" for k, v in more.items() if v != "")
        print(f"{what:42} {text:>12} {unit:8} {details}", file=sys.stderr, flush=True)
        if self.args.write:
            write_rows("gpu", [row])


def ceilings(rows: Rows) -> tuple[float, float]:
    """Device copy in bytes read and written per second, dense bf16 FLOP/s; host to device as a row."""
    a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_(0, 255)
    b = torch.empty_like(a)
    copy = 2 * a.numel() / seconds(lambda: b.copy_(a))
    rows.add("device copy (read + written)", copy / 1e9, "GB/s")
    host = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)
    part = b[: host.numel()]
    h2d = host.numel() / seconds(lambda: part.copy_(host, non_blocking=True), 7)
    rows.add("pinned host to device, 256 MiB", h2d / 1e9, "GB/s")
    m = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    n = torch.randn_like(m)
    out = torch.empty_like(m)
    flops = 2 * 8192**3 / seconds(lambda: torch.mm(m, n, out=out), 10)
    rows.add("dense bf16 matmul 8192", flops / 1e12, "TFLOP/s")
    return copy, flops


def ffn(rows: Rows, copy: float, flops: float, quick: bool) -> None:
    rng = np.random.default_rng(0)
    for name, H, inter, E, K, gated in SHAPES[:1] if quick else SHAPES:
        shape = Shape(H, inter, gated=gated)
        activation = "silu" if gated else "relu"
        per_level = {}
        for level in (4, 3, 2):
            layer = PackedLayer(rng, shape, E, level)
            x = torch.randn(1, H, device="cuda", dtype=torch.bfloat16)
            error = check(layer, x, *routing(rng, 1, K, E), activation)
            records = [4] if level == 4 else range(level + 1)
            expert_bytes = sum(shape.record_bytes(r) for r in records)
            for T in (1, 8):
                x = torch.randn(T, H, device="cuda", dtype=torch.bfloat16)
                drawn = [routing(rng, T, K, E) for _ in range(LAUNCHES)]
                calls = [ffn_call(layer, x, c, w, activation) for c, w in drawn]
                read = np.mean([len(c.unique()) for c, _ in drawn]) * expert_bytes
                run, how = in_graph(calls)
                with ranged(f"expert {name} T={T} {LEVEL_NAMES[level]}"):
                    took = seconds(run) / LAUNCHES
                per_level[T, level] = took
                rows.add(
                    "expert FFN decode",
                    took * 1e6,
                    "us",
                    shape=name,
                    T=T,
                    level=LEVEL_NAMES[level],
                    how=how,
                    ceiling=f"{read / 1e6:.1f} MB",
                    of_ceiling=f"{read / took / copy:.2f}",
                    err=f"{error:.1e}",
                )
            if level in (4, 2):
                T = 512 if quick else 4096
                x = torch.randn(T, H, device="cuda", dtype=torch.bfloat16)
                call = ffn_call(layer, x, *routing(rng, T, K, E), activation)
                took = seconds(call, 5)
                useful = 2 * T * K * shape.num_weights
                rows.add(
                    "expert FFN prefill",
                    took * 1e3,
                    "ms",
                    shape=name,
                    T=T,
                    level=LEVEL_NAMES[level],
                    how="launches",
                    of_ceiling=f"{useful / took / flops:.2f}",
                )
            del layer
        for T in (1, 8):
            ratio = per_level[T, 4] / per_level[T, 2]
            rows.add("4-bit over bf16, decode", ratio, "x", shape=name, T=T)
        if gated:
            rival_rows(rows, rng, name, H, inter, E, K, 512 if quick else 4096)
        torch.cuda.empty_cache()


def rival_rows(
    rows: Rows, rng, name: str, H: int, inter: int, E: int, K: int, prefill: int
) -> None:
    try:
        known = rivals(H, inter, E)
    except (ImportError, TypeError, AttributeError, torch.OutOfMemoryError) as error:
        rows.add("transformers", None, "", shape=name, how=str(error)[:80])
        return
    for T in (1, 8, prefill):
        x = torch.randn(T, H, device="cuda", dtype=torch.bfloat16)
        drawn = [routing(rng, T, K, E) for _ in range(LAUNCHES if T <= 8 else 1)]
        for rival, forward in known.items():
            if rival == "batched_mm" and T > 8:
                continue  # it copies the weights of every pair
            calls = [partial(forward, x, c.long(), w.bfloat16()) for c, w in drawn]
            try:
                run, how = in_graph(calls)
                took = seconds(run, 5) / len(calls)
            except Exception as error:  # whatever a rival cannot do here
                rows.add(f"transformers {rival}", None, "us", shape=name, T=T, how=str(error)[:80])
                torch.cuda.synchronize()
                continue
            rows.add(
                f"transformers {rival}", took * 1e6, "us", shape=name, T=T, level="bf16", how=how
            )


def data_plane(rows: Rows) -> None:
    """gate_prefetch, request latency and copies through pages, from the native program."""
    if not NATIVE.exists():
        rows.add("data plane", None, "", how="python csrc/ninja_build.py --gpu --build-only")
        return
    done = subprocess.run([str(NATIVE), "--measure"], capture_output=True, text=True, timeout=240)
    if done.returncode:
        rows.add("data plane", None, "", how=(done.stderr or done.stdout)[-80:].strip())
    for line in done.stdout.splitlines():
        if line.startswith("csv,"):
            _, what, value, unit, share = line.split(",")
            rows.add(what, float(value), unit, of_ceiling=share)


def eager_router(rows: Rows) -> None:
    """What gate_prefetch replaces: linear, softmax, topk, normalise."""
    for name, H, _, E, K, _ in SHAPES:
        x = torch.randn(1, H, device="cuda", dtype=torch.bfloat16)
        weight = torch.randn(E, H, device="cuda", dtype=torch.bfloat16)

        def router(x=x, weight=weight, K=K):
            p = torch.nn.functional.linear(x, weight).softmax(-1, dtype=torch.float32)
            top, index = p.topk(K, -1)
            return top / top.sum(-1, keepdim=True), index

        rows.add("eager router", seconds(router) * 1e6, "us", shape=name, T=1, how="launches")
        run, how = in_graph([router] * LAUNCHES)
        rows.add("eager router", seconds(run) / LAUNCHES * 1e6, "us", shape=name, T=1, how=how)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="one shape, short prefill: under a minute"
    )
    parser.add_argument("--json", action="store_true", help="rows on standard output")
    parser.add_argument("--write", action="store_true", help="append to bench/results/gpu.csv")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench/gpu.py: there is no CUDA device here (or torch was built without CUDA)")
    begin = time.time()
    rows = Rows(args)
    with torch.inference_mode():
        copy, flops = ceilings(rows)
        data_plane(rows)
        eager_router(rows)
        ffn(rows, copy, flops, args.quick)
    print(f"{len(rows.rows)} rows in {time.time() - begin:.0f} s", file=sys.stderr)
    if args.json:
        print(json.dumps(rows.rows, indent=1))


if __name__ == "__main__":
    main()
