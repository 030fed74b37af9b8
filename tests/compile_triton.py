"""Compiles every Triton kernel for GPUs that need not be there, and prints what each takes as JSON.

    python tests/compile_triton.py 80 90

Run in a process of its own: where TRITON_INTERPRET is set the kernels cannot be compiled.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from comoe_kernels import dequant_matmul as dequant
from comoe_kernels import merged_lowrank_matmul as merged
from comoe_kernels import paged_expert_ffn as ffn

POINTERS = {
    "x": "*bf16",
    "token": "*i32",
    "offsets": "*i32",
    "member": "*i32",
    "out": "*fp32",
    "shrunk": "*fp32",
    "pages": "*i64",
    "u_pages": "*i64",
    "chosen": "*i32",
    "weights": "*fp32",
    "items": "*i32",
    "levels": "*i32",
    "level_of": "*i32",
    "sorted_pairs": "*i32",
    "hidden_out": "*bf16",
    "a": "*bf16",
    "pair_out": "*fp32",
    "page_table": "*i64",
    "first_page": "*i64",
    "records": "*i32",
}


def resources(
    kernel, constants: dict[str, object], arch: int, num_warps: int, **types: str
) -> dict[str, int]:
    """Registers, bytes of stack (spilled registers lie there) and of shared memory."""
    signature = {
        name: "constexpr" if name in constants else {**POINTERS, **types}.get(name, "i32")
        for name in kernel.arg_names
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    target = GPUTarget("cuda", arch, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": num_warps})
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        report = subprocess.run(command, text=True, capture_output=True, check=True).stdout
    return {
        "registers": int(re.search(r"REG:(\d+)", report)[1]),
        "stack": int(re.search(r"STACK:(\d+)", report)[1]),
        "shared": compiled.metadata.shared,
    }


def expert_ffn_rows(arch: int) -> list[dict[str, object]]:
    rows = []
    for form, up, down in (
        ("decode", ffn.DECODE_UP, ffn.DECODE_DOWN),
        ("prefill", ffn.PREFILL, ffn.PREFILL),
    ):
        common = {
            "BLOCK_K": 8,
            "SORTED": form == "prefill",
            "WIDE": False,
            "WIDE_EXACT": False,
            "HALF": False,
        }
        for kernel, (block_t, row_block, warps), more in (
            (ffn._ffn_up_kernel, up, {"GATED": True, "ACT": 0}),
            (ffn._ffn_down_kernel, down, {}),
        ):
            constants = {**common, "BLOCK_T": block_t, "ROWS": row_block, **more}
            out = "*fp32" if form == "prefill" else "*bf16"
            used = resources(kernel, constants, arch, warps, out=out)
            name = f"paged_expert_ffn {kernel.__name__.strip('_')} {form}"
            rows.append({"kernel": name, "arch": arch, "bits": "all", **used})
    used = resources(ffn._combine_kernel, {"BLOCK": 256}, arch, 4, out="*bf16")
    rows.append({"kernel": "paged_expert_ffn combine", "arch": arch, "bits": "all", **used})
    return rows


def main() -> None:
    rows = []
    for arch in map(int, sys.argv[1:]):
        for bits in (2, 4, 8):
            common = {"BITS": bits, "WIDE": False}
            for form, (block_t, row_block, warps) in (
                ("decode", dequant.DECODE),
                ("prefill", dequant.PREFILL),
            ):
                constants = {**common, "BLOCK_T": block_t, "ROWS": row_block, "SPLIT_K": 1}
                used = resources(dequant._dequant_matmul_kernel, constants, arch, warps)
                rows.append(
                    {"kernel": f"dequant_matmul {form}", "arch": arch, "bits": bits, **used}
                )
            constants = {
                **common,
                "BLOCK_T": merged.BLOCK_T,
                "ROWS": merged.ROW_BLOCK,
                "SPLIT_K": merged.SPLIT_K,
            }
            used = resources(merged._merged_lowrank_kernel, constants, arch, merged.NUM_WARPS)
            rows.append({"kernel": "merged_lowrank_matmul", "arch": arch, "bits": bits, **used})
        rows += expert_ffn_rows(arch)
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
