"""Every Triton kernel compiles for every architecture within its limits of registers, spills and memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nnfast.core.tuning import CONV_CONFIGS

PROGRAM = Path(__file__).with_name("triton_aot.py")
REGISTERS = {"fp64": 96, "batch_norm": 168, "convolution": 208}
"""Most registers of a thread; 64 (half occupancy at least) where none is said; batch norm is untuned.

Convolutions hold their sums, and hide memory by stages in flight: two blocks of 4 warps, or one of 8, fit."""
SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}
"""Kilobytes of shared memory that a block may have."""


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
    assert (
        len(reports) - len(focal) - len(norms) - len(convolutions) == 3 * 2 * 4 * 4
    )  # elementwise ops, directions, dtypes, targets
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


def test_nothing_spills(reports):
    assert [r for r in reports if r["spills"]] == []


def test_registers_leave_room_for_two_blocks_of_warps(reports):
    assert [r for r in reports if r["registers"] > limit(r)] == []


def test_shared_memory(reports):
    others = [r for r in reports if not r["case"].startswith("convolution")]
    assert [r for r in others if r["shared"] > 48 * 1024] == []


def test_offsets_have_64_bits(reports):
    """DeepSpeed#8590, fla#1080: a 32-bit product of program index and block wraps past 2**31 elements."""
    assert {r["offsets"] for r in reports} == {64}


def test_accesses_are_16_bytes_wide(reports):
    """Save float64 and batch norms on AMD, whose 64 lanes take 8 bytes each, still whole lines.

    Reductions store little.
    """
    elsewhere = (
        "softmax",
        "sigmoid",
        "convolution",
        *(f"batch_norm {n}" for n in ("statistics", "sums", "merge", "update")),
    )
    narrow = [r for r in reports if not r["wide"] and not r["case"].startswith(elsewhere)]
    on_amd = [r for r in narrow if r["target"] == "gfx942"]
    assert [r for r in narrow if r not in on_amd] == []
    assert [r for r in on_amd if not r["case"].endswith("fp64") and "batch_norm" not in r["case"]] == []


def test_convolutions(reports):
    """Every configuration on every architecture or, of those between, on AMD's and one of NVIDIA's."""
    found = [r for r in reports if r["case"].startswith("convolution")]
    assert [r for r in found if r["shared"] > SHARED[r["target"]] * 1024] == []
    for dtype, size in (("bf16", 2), ("fp32", 4), ("fp64", 8)):
        for kernel in ("forward", "input_gradient", "weight_gradient", "finish"):
            of_one = [r for r in found if {kernel, dtype} <= set(r["case"].split())]
            assert {r["target"] for r in of_one} == {"sm_80", "sm_90", "sm_100", "gfx942"}
        tiles = {f"{c.rows}x{c.columns}x{c.depth}" for c in CONV_CONFIGS[size]}
        of_forward = [r for r in found if {"forward", "prologue", dtype} <= set(r["case"].split())]
        for target in ("gfx942", "sm"):
            at = [r["case"].split() for r in of_forward if r["target"].startswith(target)]
            assert tiles <= {word for words in at for word in words}
    assert any("tf32" in r["case"].split() for r in found)


def test_loads_of_convolutions_are_16_bytes_wide(reports):
    """Of images with 16 channels and more; stores of sums and statistics are narrow."""
    epilogues = ("convolution forward bias", "convolution input_gradient")
    narrow = [r for r in reports if r["case"].startswith(epilogues) and not r["wide"]]
    assert [r for r in narrow if r["target"] != "gfx942"] == []
