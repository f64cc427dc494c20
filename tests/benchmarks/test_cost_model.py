"""The cost model of ResNet-50's convolutions: known figures, and that each step of ours takes no longer."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.cost_model import COLUMNS, PASSES, RESNET50, Device, Layer, table
from benchmarks.runner import ROOT

LAYER = next(x for x in RESNET50 if x.name == "conv2 3x3 64")


def test_figures_of_a_layer():
    assert LAYER.flops(256) == pytest.approx(59.2e9, rel=1e-3)
    assert LAYER.result_bytes(256) / Device().bytes_per_s == pytest.approx(23.9e-6, rel=1e-3)
    assert LAYER.tiles(256) == 256 * 56 * 56 // 128
    assert Layer("", 1, 64, 64, 1, 2, 28, "inner").bytes(1) == 2 * (2 * 28 * 28 * 64 + 64 * 64)


def test_resnet50_is_whole():
    """53 convolutions of 4.09 GFLOP of multiplications and additions as one an image, by its authors."""
    assert sum(x.count for x in RESNET50) == 53
    assert sum(x.count * x.flops(1) for x in RESNET50) / 2 == pytest.approx(4.09e9, rel=0.01)


def test_passes_of_a_basic_block():
    """13 by torch, 7 by ours, 5 with statistics in the epilogue, 3 with the norm in the prologue."""
    both = [a + b for a, b in zip(PASSES["inner"], PASSES["last"], strict=True)]
    assert [int(p) for p in both] == [13, 7, 5, 3]


def test_bounds_fall():
    """Save for whole waves, which cuDNN's tiles are not asked for."""
    ideal = Device(multiprocessors=1)
    for layer in RESNET50:
        bounds = layer.bounds(256, ideal)
        assert len(bounds) == len(COLUMNS)
        assert list(bounds) == sorted(bounds, reverse=True), layer.name


def test_it_prints():
    command = [sys.executable, "-m", "benchmarks.cost_model", "--batch", "8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == table(8, Device())
    assert len(done.stdout.splitlines()) == len(RESNET50) + 2
