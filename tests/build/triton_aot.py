"""Compile every Triton kernel with every shipped configuration ahead of time, and report its resources.

Run as a program (not under the interpreter): prints one JSON line a kernel. `test_triton_aot.py` reads them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nnfast.activation import kernels as activation
from nnfast.core.tuning import pointwise_config

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ELEMENT_SIZES = {"fp16": 2, "bf16": 2, "fp32": 4, "fp64": 8}


def cases() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int]]:
    """Of every kernel: name, function, types of its arguments, its constants, warps."""
    for dtype, size in ELEMENT_SIZES.items():
        config = pointwise_config(size)
        for name in ("silu", "mish"):
            constants = {"ACTIVATION": name, "BLOCK": config.block}
            for direction, pointers in (
                ("forward", ("x_ptr", "y_ptr")),
                ("backward", ("grad_ptr", "x_ptr", "out_ptr")),
            ):
                types = {**dict.fromkeys(pointers, f"*{dtype}"), "size": "i64"}
                kernel = getattr(activation, f"{direction}_kernel")
                yield f"{name} {direction} {dtype}", kernel, types, constants, config.num_warps


def compile_case(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int, target: GPUTarget
) -> Any:
    """As the launcher compiles it for tensors at 16-byte addresses and a size that nothing divides."""
    signature = {**types, **dict.fromkeys(constants, "constexpr")}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind.startswith("*")
    }
    return triton.compile(ASTSource(kernel, signature, constants, aligned), target, {"num_warps": warps})


def resources(compiled: Any) -> dict[str, Any]:
    """Registers, bytes spilt to local memory, shared memory, and how wide the accesses are."""
    return {"offsets": _offset_bits(compiled.asm["ttir"]), **_machine_code(compiled)}


def _offset_bits(ttir: str) -> int:
    """Bits of the narrowest integers that a pointer is moved by."""
    return min(int(bits) for bits in re.findall(r"tt\.addptr .*, tensor<\d+xi(\d+)>", ttir))


def _machine_code(compiled: Any) -> dict[str, Any]:
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        return {
            "registers": int(re.findall(r"\.vgpr_count:\s+(\d+)", text)[0]),
            "spills": sum(map(int, re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", text))),
            "shared": compiled.metadata.shared,
            "wide": "global_load_dwordx4" in text and "global_store_dwordx4" in text,
        }
    ptx = compiled.asm["ptx"]
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    return {
        "registers": int(re.findall(r"REG:(\d+)", usage)[0]),
        "spills": sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", usage))),
        "shared": compiled.metadata.shared,
        "wide": bool(
            re.search(r"ld\.global\.v[24]\.b(32|64)", ptx) and re.search(r"st\.global\.v[24]\.b(32|64)", ptx)
        ),
    }


def main() -> None:
    """Print a JSON line for every kernel, configuration and target."""
    for name, kernel, types, constants, warps in cases():
        for target, gpu in TARGETS.items():
            compiled = compile_case(kernel, types, constants, warps, gpu)
            print(json.dumps({"case": name, "target": target, "warps": warps, **resources(compiled)}))
            sys.stdout.flush()


if __name__ == "__main__":
    main()
