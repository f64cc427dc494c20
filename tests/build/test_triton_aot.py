"""Every Triton kernel compiles for every architecture within its limits of registers, spills and memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nnfast.core.tuning import CONV_CONFIGS, CONV_INPUT_WIDEST

PROGRAM = Path(__file__).with_name("triton_aot.py")
REGISTERS = {"fp64": 96, "batch_norm": 168, "convolution": 208, "attention": 512}
"""Most registers of a thread; 64 (half occupancy at least) where none is said; batch norm is untuned.

Convolutions hold their sums, and hide memory by stages in flight: two blocks of 4 warps, or one of 8, fit.
Attention keeps its accumulators in them, a program or two to a multiprocessor; on AMD 512 are a thread's.
"""

SHARED = {
    "convolution": {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64},
    "attention": {"sm_80": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64},
}
"""KB of shared memory that a block may take; 48 where none is said. Attention's on sm_80 is what smaller
devices of its kind have too."""


def limit(report: dict) -> int:
    return max(REGISTERS.get(word, 64) for word in report["case"].split())


@pytest.fixture(scope="module")
def reports() -> list[dict]:
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": str(root), "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, PROGRAM], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_and_target_is_compiled(reports):
    assert {r["target"] for r in reports} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    focal = [r for r in reports if r["case"].startswith("softmax")]
    norms = [r for r in reports if r["case"].startswith("batch_norm")]
    convolutions = [r for r in reports if r["case"].startswith("convolution")]
    others = len(reports) - len(focal) - len(norms) - len(of_attention(reports)) - len(convolutions)
    # elementwise ops in both directions and ways of rotary embedding; dtypes, targets
    assert others == (3 * 2 + 3) * 4 * 4
    for kernel in ("statistics", "forward", "sums", "backward"):
        for layout in ("innermost", "contiguous"):
            for dtype in ("bf16", "fp32", "fp64"):
                found = [r for r in norms if {kernel, layout, dtype} <= set(r["case"].split())]
                assert len(found) == (2 if kernel == "statistics" else 3) * 4  # variants, targets
    assert len([r for r in norms if {"merge", "update"} & set(r["case"].split())]) == 2 * 3 * 4
    for direction in ("forward", "backward"):
        for layout in ("rows", "spatial"):
            for dtype in ("bf16", "fp32", "fp64"):
                found = [r for r in focal if {direction, layout, dtype} <= set(r["case"].split())]
                sizes = {r["case"] for r in found}
                assert len(sizes) >= {"rows": 6, "spatial": 2}[layout]
                assert {r["case"] for r in found if r["target"] == "gfx942"} == sizes
                assert {r["case"] for r in found if r["target"] != "gfx942"} == sizes
                at = [{r["case"] for r in found if r["target"] == sm} for sm in ("sm_80", "sm_90", "sm_100")]
                assert len(set.intersection(*at)) >= 2


def of_attention(reports: list[dict], *words: str) -> list[dict]:
    return [r for r in reports if {"attention", *words} <= set(r["case"].split())]


def test_attention_is_compiled_for_every_target_kernel_and_kind_of_call(reports):
    for kernel in ("forward", "grad_q", "grad_kv", "grad_bias"):
        for target in SHARED["attention"]:
            found = [
                r["case"].split() for r in of_attention(reports, kernel, "bf16") if r["target"] == target
            ]
            assert "terms" in {case[2] for case in found}
            heads = {case[3] for case in found if case[2] == "plain"}
            assert heads == (set() if kernel == "grad_bias" else {"64", "128", "256"})
        for dtype in ("fp32", "fp64"):
            assert {r["case"].split()[3] for r in of_attention(reports, kernel, dtype)} == {"64", "256"}


def test_attention_multiplies_on_tensor_cores(reports):
    """Half types, in large tiles by each architecture's own instruction, and tf32; true float32 does not."""
    own = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}
    for report in of_attention(reports):
        dtype, target = report["case"].split()[-1], report["target"]
        _, kernel, kind, head, *_ = report["case"].split()
        large = kernel == "forward" or (
            kind == "plain" and head != "256"
        )  # else tiles may be too small for it
        if target in own and dtype == "bf16" and large:
            assert report["tensor_cores"] == [own[target]], report
        if target in own and dtype in ("bf16", "tf32"):
            assert report["tensor_cores"], report
        if target in own and dtype == "fp32":
            assert not report["tensor_cores"], report


def test_attention_loads_by_the_copy_engine(reports):
    for report in of_attention(reports):
        *_, dtype = words = report["case"].split()
        expected = report["target"] in ("sm_90", "sm_100") and dtype in ("fp16", "bf16")
        if report["target"] != "gfx942":
            assert report["copy_engine"] == (expected and "grad_bias" not in words), report


def test_nothing_spills(reports):
    """Save attention in float64 with heads of 256, which is for checking gradients."""
    large = of_attention(reports, "256", "fp64")
    assert [r for r in reports if r["spills"] and r not in large] == []


def test_registers_leave_room_for_two_blocks_of_warps(reports):
    assert [r for r in reports if r["registers"] > limit(r)] == []


def test_shared_memory(reports):
    for report in reports:
        limits = SHARED.get(report["case"].split()[0], {})
        assert report["shared"] <= limits.get(report["target"], 48) * 1024, report


def test_offsets_have_64_bits(reports):
    """DeepSpeed#8590, fla#1080: a 32-bit product of program index and block wraps past 2**31 elements.

    Attention counts with 32 bits within a tile, whose rows are not far apart, and with 64 to where it begins.
    """
    assert {r["offsets"] for r in reports if not r["case"].startswith("attention")} == {64}


def test_accesses_are_16_bytes_wide(reports):
    """Save float64, batch norms, attention and rotations on AMD: 64 lanes of 8 bytes are whole lines too.

    Reductions store little.
    """
    elsewhere = (
        "attention grad_bias",
        "softmax",
        "sigmoid",
        "convolution",
        *(f"batch_norm {n}" for n in ("statistics", "sums", "merge", "update")),
    )
    narrow = [r for r in reports if not r["wide"] and not r["case"].startswith(elsewhere)]
    on_amd = [r for r in narrow if r["target"] == "gfx942"]
    assert [r for r in narrow if r not in on_amd] == []
    exempt = ("batch_norm", "attention", "rotary")
    others = [r for r in on_amd if not r["case"].endswith("fp64") and not r["case"].startswith(exempt)]
    assert others == []


def test_convolutions(reports):
    """Every configuration on every architecture or, of those between, on AMD's and one of NVIDIA's."""
    found = [r for r in reports if r["case"].startswith("convolution") and not of_boxes(r)]
    for dtype, size in (("bf16", 2), ("fp32", 4), ("fp64", 8)):
        for kernel in ("forward", "input_gradient", "weight_gradient", "finish", "finish_input_gradient"):
            of_one = [r for r in found if {kernel, dtype} <= set(r["case"].split())]
            assert {r["target"] for r in of_one} == {"sm_80", "sm_90", "sm_100", "gfx942"}
        tiles = {f"{c.rows}x{c.columns}x{c.depth}" for c in CONV_CONFIGS[size]}
        of_forward = [r for r in found if {"forward", "prologue", dtype} <= set(r["case"].split())]
        for target in ("gfx942", "sm"):
            at = [r["case"].split() for r in of_forward if r["target"].startswith(target)]
            assert tiles <= {word for words in at for word in words}
    assert any("tf32" in r["case"].split() for r in found)


def of_boxes(report: dict) -> bool:
    return {"convolution", "boxes"} <= set(report["case"].split())


def test_boxes_of_convolutions_come_by_the_copy_engine(reports):
    """Every configuration with steps of 64; they meet in the architecture's own matrix product."""
    own = {"sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}
    found = [r for r in reports if of_boxes(r)]
    for report in found:
        assert report["copy_engine"], report
        assert report["tensor_cores"] == [own[report["target"]]], report
    for target in own:
        cases = [r["case"].split() for r in found if r["target"] == target]
        for kernel in ("forward", "input_gradient"):
            for c in CONV_CONFIGS[2]:
                if c.depth == 64 and (kernel == "forward" or c.columns <= CONV_INPUT_WIDEST):
                    assert any({kernel, f"{c.rows}x{c.columns}x{c.depth}"} <= set(case) for case in cases)
        assert any({"weight_gradient", "1x64"} <= set(case) for case in cases)
    others = [r for r in reports if r["case"].startswith("convolution") and not of_boxes(r)]
    assert not any(r.get("copy_engine") for r in others)


def test_loads_of_convolutions_are_16_bytes_wide(reports):
    """Of images with 16 channels and more; stores of sums and statistics are narrow."""
    epilogues = ("convolution forward bias", "convolution input_gradient")
    narrow = [
        r for r in reports if r["case"].startswith(epilogues) and "split" not in r["case"] and not r["wide"]
    ]
    assert [r for r in narrow if r["target"] != "gfx942"] == []
