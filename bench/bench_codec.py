"""The ladder codec: weight error against plain rounding at equal bits, and speed.

    python bench/bench_codec.py [--checkpoint FOLDER] [--groups] [--skip-speed]

Error is mean squared error / mean square of the weights. Bits count everything: codes, scales, zeros,
tables, headers. The rivals are group-wise round-to-nearest between a group's least and largest weight:
`plain` with scale and zero in fp16, `plain-intzero` with scale in fp16 and a zero of b bits (the range
then includes 0). Each rival gets the largest group for which it has not fewer bits than the ladder, so
equal bits are rounded in its favour. `--groups` compares group sizes of our own coding (in numpy).
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from harness import interleave, quantiles, write_rows
from kernel import Kernel, memory_copy

from comoe import _C
from comoe.store import LayerSpec, StoreWriter
from comoe_kernels import ladder_codec as codec
from comoe_kernels.ladder_codec import FP32, LEVEL_BITS, Shape

BOUNDS = {2: 0.75, 3: 0.9, 4: 1.0, 8: 1.1}
DEMO = Path(__file__).resolve().parent.parent / "comoe" / "demo_model"


def synthetic() -> Iterator[tuple[str, list[np.ndarray]]]:
    size = (768, 2048)
    for name, draw in {
        "gaussian": lambda rng: rng.standard_normal(size),
        "student-t df 5": lambda rng: rng.standard_t(5, size),
        "student-t df 4": lambda rng: rng.standard_t(4, size),
        "laplace": lambda rng: rng.laplace(size=size),
        "uniform": lambda rng: rng.uniform(-1, 1, size),
    }.items():
        yield name, [draw(np.random.default_rng(seed)).astype(np.float32) for seed in range(2)]


def expert_matrices(folder: Path) -> list[np.ndarray]:
    """All expert matrices of a checkpoint, as fp32 [rows, cols]."""
    import torch
    from safetensors import safe_open

    found = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                if ".experts." in key and len(file.get_slice(key).get_shape()) in (2, 3):
                    tensor = file.get_tensor(key).to(torch.float32).numpy()
                    found += [tensor] if tensor.ndim == 2 else list(tensor)
    return found


def ladder_errors(matrices: list[np.ndarray]) -> dict[int, tuple[float, float]]:
    """Bits of a level -> (bits per weight with all parameters, squared error summed)."""
    out = {b: [0.0, 0.0] for b in LEVEL_BITS}
    for w in matrices:
        rows, cols = w.shape
        shape = Shape(cols, rows, gated=False, exact_dtype=FP32)
        payloads = _C.encode_expert([w, np.zeros((cols, rows), np.float32)], [], FP32, False)
        tiles, blocks, groups = shape.tiles(0)
        fixed = 64 + tiles * groups * 32
        for level, b in enumerate(LEVEL_BITS):
            planes = sum(tiles * blocks * shape.block_bytes(r) for r in range(level + 1))
            out[b][0] += 8 * (fixed + planes)
            out[b][1] += float(((codec.decode_ref(shape, payloads, level, 0) - w) ** 2).sum())
    weights = sum(w.size for w in matrices)
    return {b: (bits / weights, error) for b, (bits, error) in out.items()}


def plain_error(matrices: list[np.ndarray], bits: int, group: int, int_zero: bool) -> float:
    """Squared error of rounding to nearest, summed; a group may run on into the next row."""
    total, top = 0.0, 2**bits - 1
    for w in matrices:
        flat = w.reshape(-1)
        # The last group is filled up with its own last weight: that changes neither range nor error.
        x = np.pad(flat, (0, -flat.size % group), mode="edge").reshape(-1, group)
        low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
        if int_zero:
            low, high = np.minimum(low, 0), np.maximum(high, 0)
        scale = ((high - low) / top).astype(np.float16).astype(np.float32)
        scale[scale == 0] = np.finfo(np.float32).tiny
        if int_zero:
            zero = np.clip(np.rint(-low / scale), 0, top)
            got = (np.clip(np.rint(x / scale) + zero, 0, top) - zero) * scale
        else:
            low = low.astype(np.float16).astype(np.float32)
            got = np.clip(np.rint((x - low) / scale), 0, top) * scale + low
        total += float(((got - x).reshape(-1)[: flat.size] ** 2).sum())
    return total


def compare(name: str, matrices: list[np.ndarray]) -> list[dict[str, object]]:
    rows = []
    energy = sum(float((w.astype(np.float64) ** 2).sum()) for w in matrices)
    for bits, (total_bits, error) in ladder_errors(matrices).items():
        row = {
            "weights": name,
            "bits": bits,
            "total_bits": round(total_bits, 4),
            "error": error / energy,
        }
        text = f"{name:16s} {bits} bits ({total_bits:.3f} in all) | error {error / energy:.3e}"
        for rival, int_zero, params in (("plain", False, 32), ("plain-intzero", True, 16 + bits)):
            group = max(1, int(params / (total_bits - bits)))
            plain = plain_error(matrices, bits, group, int_zero)
            row[f"{rival} group"], row[f"{rival} error"] = group, plain / energy
            row[f"vs {rival}"] = round(error / plain, 4)
            text += f" | {error / plain:.3f}x {rival} (group {group})"
        row["bound"] = BOUNDS[bits]
        verdict = "ok" if row["vs plain"] <= BOUNDS[bits] else "TOO HIGH"
        print(f"{text} | bound {BOUNDS[bits]:.2f}x {verdict}", flush=True)
        rows.append(row)
    return rows


def group_error(w: np.ndarray, group: int) -> dict[int, float]:
    """Squared error per level of our coding with another group size; same arithmetic, in numpy."""
    x = w.reshape(-1, group)
    low, high = np.minimum(x.min(1), 0), np.maximum(x.max(1), 0)
    log = np.log2((high - low) / 255)
    step = np.ptp(log) / 255
    scale = np.exp2(log.min() + step * np.ceil((log - log.min()) / step - 1e-4))[:, None]
    zero = np.rint(-low[:, None] / scale)
    code = np.clip(np.rint(x / scale + zero), 0, 255).astype(np.int64)
    weight = np.broadcast_to(scale**2, code.shape).reshape(-1)
    errors = {}
    for bits in LEVEL_BITS:
        bin_ = code >> (8 - bits)
        if bits == 8:
            value = code
        else:
            mass = np.bincount(bin_.reshape(-1), weight, 2**bits)
            total = np.bincount(bin_.reshape(-1), weight * code.reshape(-1), 2**bits)
            value = np.rint(total / np.maximum(mass, 1e-30))[bin_]
        errors[bits] = float((((value - zero) * scale - x) ** 2).sum())
    return errors


def compare_groups() -> list[dict[str, object]]:
    """Error if each size were paid for in bits: scaled to 0.125 bit of parameters at 6.02 dB per bit."""
    rows = []
    for name, (w, *_) in synthetic():
        energy = float((w.astype(np.float64) ** 2).sum())
        for group in (64, 128, 256):
            params = 16 / group
            row = {"weights": name, "group": group, "params_bits": params}
            for bits, error in group_error(w, group).items():
                row[f"error {bits}"] = error / energy
                row[f"at equal bits {bits}"] = error / energy * 4 ** (params - 0.125)
            rows.append(row)
            cells = " | ".join(
                f"{b}: {row[f'error {b}']:.3e} -> {row[f'at equal bits {b}']:.3e}"
                for b in LEVEL_BITS
            )
            print(f"{name:16s} group {group:3d} ({params:.4f} bit) | {cells}", flush=True)
    return rows


def cpu_seconds(run: Callable[[], object], repeats: int) -> float:
    """Of all threads per call: what the machine's other work does not change much."""
    start = time.process_time()
    for _ in range(repeats):
        run()
    return (time.process_time() - start) / repeats


def speed(repeats: int) -> list[dict[str, object]]:
    """Encoding, checksums and packing to disk, beside a copy in memory and a plain file of equal size."""
    rng = np.random.default_rng(0)
    rows = []
    for hidden, intermediate in ((2048, 768), (768, 3072)):
        shapes = [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]
        expert = [
            (rng.standard_normal(s, np.float32).view(np.uint32) >> 16).astype(np.uint16)
            for s in shapes
        ]
        payloads = _C.encode_expert(expert, [], 1, True)
        weights, total = sum(w.size for w in expert), sum(p.size for p in payloads)
        spec = LayerSpec(12, hidden, intermediate)
        block = np.concatenate([np.frombuffer(p, np.uint8) for p in payloads])
        with tempfile.TemporaryDirectory(dir=os.environ.get("COMOE_BENCH_DIR")) as folder:

            def pack(folder=folder, expert=expert, spec=spec):
                StoreWriter(folder).add_layer(
                    "x",
                    spec,
                    ((expert, []) for _ in range(spec.num_experts)),
                    fingerprint=os.urandom(8),
                )

            def plain_file(folder=folder, block=block, spec=spec):
                with open(Path(folder, "plain"), "wb", buffering=0) as file:
                    for _ in range(spec.num_experts):
                        file.write(block)
                    os.fsync(file.fileno())

            times = interleave(
                {
                    "encode": lambda expert=expert: _C.encode_expert(expert, [], 1, True),
                    "copy": lambda block=block: block.copy(),
                    "crc32c": lambda block=block: _C.crc32c(block),
                    "pack": pack,
                    "plain_file": plain_file,
                },
                repeats,
            )
        encode_cpu = cpu_seconds(
            lambda expert=expert: _C.encode_expert(expert, [], 1, True), repeats
        )
        with tempfile.TemporaryDirectory(dir=os.environ.get("COMOE_BENCH_DIR")) as folder:
            pack_cpu = cpu_seconds(lambda folder=folder, pack=pack: pack(folder), repeats)
        crc_cpu = cpu_seconds(lambda block=block: _C.crc32c(block), repeats)
        low, encode, high = quantiles(times["encode"])
        median = {name: float(np.median(t)) for name, t in times.items()}
        rate = spec.num_experts * weights / median["pack"]
        disk = spec.num_experts * total
        print(
            f"encode H={hidden} I={intermediate} bf16 | {weights / encode / 1e6:.0f} M weights/s "
            f"({weights / high / 1e6:.0f}..{weights / low / 1e6:.0f}), {weights / encode_cpu / 1e6:.0f} per CPU second | "
            f"crc32c {total / crc_cpu / 1e9:.1f} GB per CPU second, {crc_cpu / encode_cpu:.1%} of encoding | pack to disk {rate / 1e6:.0f} M weights/s ({spec.num_experts * weights / pack_cpu / 1e6:.0f} per CPU second), "
            f"{disk / median['pack'] / 1e6:.0f} MB/s of {disk / median['plain_file'] / 1e6:.0f} for a plain file"
        )
        rows.append(
            {
                "hidden": hidden,
                "intermediate": intermediate,
                "encode_weights_per_s": round(weights / encode),
                "encode_p20": round(weights / high),
                "encode_p80": round(weights / low),
                "encode_per_cpu_s": round(weights / encode_cpu),
                "copy_bytes_per_s": round(total / median["copy"]),
                "crc32c_bytes_per_s": round(total / median["crc32c"]),
                "crc32c_bytes_per_cpu_s": round(total / crc_cpu),
                "pack_weights_per_s": round(rate),
                "pack_per_cpu_s": round(spec.num_experts * weights / pack_cpu),
                "pack_bytes_per_s": round(disk / median["pack"]),
                "plain_file_bytes_per_s": round(disk / median["plain_file"]),
            }
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        action="append",
        help="folder of safetensors (default: the demo model)",
    )
    parser.add_argument("--groups", action="store_true", help="compare group sizes too")
    parser.add_argument("--skip-speed", action="store_true")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--device", default="cpu", choices=["cpu"], help="the codec runs on the CPU"
    )
    args = parser.parse_args()

    rows = [row for name, matrices in synthetic() for row in compare(name, matrices)]
    for folder in args.checkpoint or [DEMO]:
        matrices = expert_matrices(folder)
        if matrices:
            rows += compare(folder.name, matrices)
        else:
            print(f"{folder.name:16s} n/a: no expert matrices in {folder}")
    write_rows("codec", rows)
    if args.groups:
        write_rows("codec_groups", compare_groups())
    if not args.skip_speed:
        write_rows("codec_speed", speed(args.repeats))
    late = [row for row in rows if row["vs plain"] > row["bound"]]
    return 1 if late else 0


def test_encode(bench):
    """One expert to all its rungs; the error is that of its 4 bits against rounding with a scale per group."""
    rng = np.random.default_rng(0)
    hidden, intermediate = 2048, 768
    shapes = [(intermediate, hidden)] * 2 + [(hidden, intermediate)]
    values = [rng.standard_normal(s, np.float32) for s in shapes]
    expert = [(v.view(np.uint32) >> 16).astype(np.uint16) for v in values]
    sample = [values[0][:64]]
    ours = ladder_errors(sample)[4][1]
    rounded = plain_error(sample, 4, 128, int_zero=True)
    payloads = _C.encode_expert(expert, [], 1, True)
    nbytes = sum(v.size * 2 for v in values) + sum(len(p) for p in payloads)

    def torch_rounding():
        for v in values:
            groups = torch.from_numpy(v).view(-1, 128)
            low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
            scale = (high - low) / 15
            ((groups - low) / scale).round_().clamp_(0, 15).to(torch.uint8)

    bench(
        Kernel(
            "codec pack",
            f"H={hidden} I={intermediate} bf16 to all rungs",
            lambda: _C.encode_expert(expert, [], 1, True),
            nbytes,
            ceiling=memory_copy(),
            rival_name="torch: 4 bits only, min and max",
            rival=torch_rounding,
            error=ours / rounded,
            error_of="of plain 4-bit rounding",
        )
    )


if __name__ == "__main__":
    raise SystemExit(main())
