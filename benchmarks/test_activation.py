"""Swish and Mish against the seed formulation, torch's own operator, torch.compile of it, and peers."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import nnfast
from benchmarks.runner import Result, both_ways, compare, forced, rotation
from nnfast.core.op import OPS
from tests.ops import TABLE, Case

CUDA = torch.cuda.is_available()
SIZES = [2**10, 2**13, 2**16, 2**20, 2**22, 2**24] + [2**26, 2**28, 2**30] * CUDA
QUICK_SIZES = [2**26] if CUDA else [2**10, 2**22]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
QUICK_DTYPES = [torch.bfloat16] if CUDA else [torch.float32, torch.bfloat16]
DIRECTIONS = ["forward", "forward+backward"]

# (op, direction, dtype) -> contender -> least ratio of its time to ours, 4M elements on two CPU threads
TARGETS = {
    ("mish", "forward", torch.float32): {"torch": 5.0, "compile": 5.0},
    ("mish", "forward+backward", torch.float32): {"torch": 4.0, "compile": 4.0},
    ("mish", "forward", torch.bfloat16): {"torch": 4.0},
    ("silu", "forward", torch.float32): {"torch": 1.2, "compile": 1.2},
    ("silu", "forward", torch.bfloat16): {"torch": 1.4, "compile": 1.2},
    ("silu", "forward+backward", torch.float32): {"torch": 1.15, "compile": 1.15},
}


def targets(case: Case, direction: str, dtype: torch.dtype, numel: int) -> dict[str, float]:
    """What is promised for a case on this machine."""
    if CUDA:
        least = {"torch": 1 / 1.03}
        return {**least, "seed": 3.0} if numel >= 2**26 else least
    if numel == 2**10 and direction == "forward" and dtype == torch.float32:
        return {"torch": 1 / 1.3, "compile": 1.0}
    return TARGETS.get((case.name, direction, dtype), {}) if numel == 2**22 else {}


def peers(case: Case) -> dict[str, Callable[[Tensor], Tensor]]:
    """Other libraries' implementations, those that are installed."""
    try:
        importlib.import_module("tests.torchvision_operators")  # timm imports torchvision
        timm = importlib.import_module("timm.layers.activations_me")
    except ImportError:
        return {}
    return {"timm": getattr(timm, {"mish": "mish_me", "silu": "swish_me"}[case.name])}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("case", [c for c in TABLE if c.family == "activation"], ids=lambda c: c.name)
def test_activation(case, numel, dtype, direction, device, quick, benchmark, record):
    if quick and (numel not in QUICK_SIZES or dtype not in QUICK_DTYPES):
        pytest.skip("not in --quick")
    torch._dynamo.reset()
    functions = {
        "nnfast": case.ours,
        "torch": case.torchs,
        "compile": torch.compile(case.torchs, fullgraph=True),
        "seed": case.seed,
        **peers(case),
    }
    grad = direction != "forward"
    x = torch.randn(numel, device=device).to(dtype).requires_grad_(grad)
    for name in ("cuda", "triton", "cpu"):  # what else could serve, for the table of thresholds
        backend = next(b for b in OPS[case.name].backends if b.name == name)
        if not backend.why_not(x) and not (name == "triton" and device == "cpu"):
            functions[name] = forced(case.ours, name)
    truth = case.truth(x.detach().double())
    for function in functions.values():
        tolerance = {"rtol": 2e-2, "atol": 1e-2} if dtype.itemsize == 2 else {"rtol": 1e-4, "atol": 1e-5}
        assert_close(function(x).detach().double(), truth, **tolerance)
    del truth

    moved = case.bytes_moved(direction, x)
    if grad:
        contenders = {name: both_ways(function) for name, function in functions.items()}
        inputs = rotation(lambda: (torch.randn_like(x).requires_grad_(), torch.randn_like(x)), moved, device)
    else:
        contenders, inputs = functions, rotation(lambda: torch.randn_like(x), moved, device)
    seconds = compare(contenders, inputs, device, 0.5 if quick else 2.0)
    flops = case.flops["forward"] * (2 if grad else 1) + case.flops["backward"] * grad
    record(
        Result(
            family="activation",
            op=case.name,
            case=f"{case.name} {direction} {str(dtype).removeprefix('torch.')} {numel:,}",
            direction=direction,
            dtype=str(dtype).removeprefix("torch."),
            numel=numel,
            backend=nnfast.explain(case.name, x).backend or "",
            seconds=seconds,
            bytes=moved,
            flops=flops * numel,
            targets=targets(case, direction, dtype, numel),
        ),
        benchmark,
    )
    benchmark.pedantic(contenders["nnfast"], args=(inputs[0],), rounds=5, warmup_rounds=1)
