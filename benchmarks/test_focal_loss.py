"""Focal loss against the seed formulation, torch's best, torch.compile of it, and torchvision's.

Forward and backward, mean over rows for softmax, sum for sigmoid as RetinaNet has it. `torch` is the quickest
way to the same result with torch's own functions.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import nnfast
from benchmarks.runner import Result, compare, forced, rotation
from nnfast.core.op import OPS
from tests.ops import seed_focal, seed_sigmoid_focal

CUDA = torch.cuda.is_available()
DTYPES = [torch.float32, torch.bfloat16]
SOFTMAX = [(65536, 10), (16384, 1000), (1024, 32000)]
SOFTMAX += [(1 << 24, 2), (1 << 20, 80), (8192, 50257), (4096, 131072)] * CUDA
SIGMOID = [(8, 100_000, 80)]
LINEAR = [(4096, 512, 32000)] + [(8192, 4096, 131072)] * CUDA

# shape -> contender -> least ratio of its time to ours, float32 on two CPU threads
TARGETS = {
    (65536, 10): {"compile": 3.0, "seed": 5.0},
    (16384, 1000): {"compile": 2.5, "seed": 3.0},
    (1024, 32000): {"compile": 2.5, "seed": 3.0},
    (8, 100_000, 80): {"compile": 2.0, "torchvision": 4.0},
    (4096, 512, 32000): {"seed": 1 / 1.05, "unfused": 1 / 1.05},
}
ON_CUDA = {
    "softmax": {"compile": 1.5, "seed": 6.0},
    "sigmoid": {"torchvision": 5.0, "compile": 1.3},
    "linear": {"seed": 1 / 1.05, "unfused": 1 / 1.05},
}
LEAST_MEMORY = 10 if CUDA else 5
"""How many times more memory the logits in one piece take, at least."""


def targets(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, float]:
    """What is promised for a case on this machine."""
    if CUDA:
        return ON_CUDA[kind]
    return TARGETS[shape] if dtype == torch.float32 else {}


def torch_softmax(x: Tensor, target: Tensor) -> Tensor:
    """With torch's functions: one log-softmax, and the loss from the true class alone."""
    log_p = x.log_softmax(1).gather(1, target.unsqueeze(1)).squeeze(1)
    return ((1 - log_p.exp()) ** 2 * -log_p).mean()


def torch_sigmoid(x: Tensor, target: Tensor) -> Tensor:
    """With torch's functions: the cross entropy gives p_t too."""
    ce = F.binary_cross_entropy_with_logits(x, target, reduction="none")
    return ((0.25 * target + 0.75 * (1 - target)) * (1 - torch.exp(-ce)) ** 2 * ce).sum()


def _softmax(x: Tensor, target: Tensor) -> Tensor:
    return nnfast.functional.softmax_focal_loss(x, target)


def _sigmoid(x: Tensor, target: Tensor) -> Tensor:
    return nnfast.functional.sigmoid_focal_loss(x, target, reduction="sum")


def peers() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Other libraries' sigmoid focal loss, those that are installed."""
    try:
        importlib.import_module("tests.torchvision_operators")
        ops = importlib.import_module("torchvision.ops")
    except ImportError:
        return {}
    return {"torchvision": lambda x, t: ops.sigmoid_focal_loss(x, t, reduction="sum")}


@dataclass(frozen=True)
class Kind:
    """One of the losses: ours, the seed's, torch's, peers; and how many passes over the logits it needs."""

    op: str
    ours: Callable[[Tensor, Tensor], Tensor]
    seed: Callable[[Tensor, Tensor], Tensor]
    torchs: Callable[[Tensor, Tensor], Tensor]
    peers: Callable[[], dict[str, Callable[[Tensor, Tensor], Tensor]]]
    passes: int
    """Logits read twice and their gradient written, and what else is as large."""
    flops: int


KINDS = {
    "softmax": Kind(
        "softmax_focal_loss", _softmax, lambda x, t: seed_focal(x, t).mean(), torch_softmax, dict, 3, 6
    ),
    "sigmoid": Kind(
        "sigmoid_focal_loss",
        _sigmoid,
        lambda x, t: seed_sigmoid_focal(x, t).sum(),
        torch_sigmoid,
        peers,
        5,
        40,
    ),
}


def gradient(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[tuple[Tensor, Tensor]], Tensor]:
    """Forward and backward: from (x, targets) to the gradient of x."""

    def run(inputs: tuple[Tensor, Tensor]) -> Tensor:
        return torch.autograd.grad(function(*inputs), inputs[0])[0]

    return run


CASES = [("softmax", shape) for shape in SOFTMAX] + [("sigmoid", shape) for shape in SIGMOID]
QUICK = CASES[:2] + CASES[-1:] * CUDA


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("name", "shape"), CASES, ids=str)
def test_focal_loss(name, shape, dtype, device, quick, benchmark, record):
    if quick and (dtype != torch.float32 or (name, shape) not in QUICK):
        pytest.skip("not in --quick")
    torch._dynamo.reset()
    kind = KINDS[name]

    def make() -> tuple[Tensor, Tensor]:
        x = torch.randn(shape, device=device).to(dtype).requires_grad_()
        if name == "softmax":
            return x, torch.randint(shape[1], shape[:1], device=device)
        return x, (torch.rand(shape, device=device) < 0.02).to(dtype)

    functions = {
        "nnfast": kind.ours,
        "seed": kind.seed,
        "torch": kind.torchs,
        "compile": torch.compile(kind.seed, fullgraph=True),
        "compiled torch": torch.compile(kind.torchs, fullgraph=True),
        **kind.peers(),
    }
    inputs = make()
    for backend in ("cuda", "triton", "cpu"):  # what else could serve
        found = next(b for b in OPS[kind.op].backends if b.name == backend)
        if not found.why_not(*inputs) and not (backend == "triton" and device == "cpu"):
            functions[backend] = forced(kind.ours, backend)
    contenders = {key: gradient(function) for key, function in functions.items()}
    exact = inputs[0].detach().double().requires_grad_(), inputs[1]
    if name == "sigmoid":
        exact = exact[0], inputs[1].double()
    truth = gradient(kind.seed)(exact)
    for run in contenders.values():
        scale = float(truth.abs().max())
        assert_close(
            run(inputs).double(), truth, rtol=0, atol=scale * (2e-2 if dtype.itemsize == 2 else 1e-4)
        )
    del truth, exact
    x = inputs[0]
    moved = kind.passes * x.nbytes
    rounds = 15 if CUDA or x.numel() < 1 << 25 else 5  # of a second and more
    seconds = compare(contenders, rotation(make, moved, device), device, 1.0 if quick else 3.0, rounds)
    record(
        Result(
            family="focal_loss",
            op=kind.op,
            case=f"{kind.op} {'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}",
            direction="forward+backward",
            dtype=str(dtype).removeprefix("torch."),
            numel=x.numel(),
            backend=nnfast.explain(kind.op, *inputs).backend or "",
            seconds=seconds,
            bytes=moved,
            flops=kind.flops * x.numel(),
            targets=targets(name, shape, dtype),
        ),
        benchmark,
    )
    benchmark.pedantic(contenders["nnfast"], args=(inputs,), rounds=3, warmup_rounds=1)


class Peak(TorchDispatchMode):
    """Most bytes alive at once of what operations return; each storage once, the inputs' not at all."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.given = {t.untyped_storage().data_ptr() for t in inputs}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.given:
                    self.alive[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: found for key, found in self.alive.items() if not found[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return result


def peak_bytes(run: Callable[[Any], Any], inputs: Any, device: str) -> int:
    """Most memory at once that a call takes beyond its inputs."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(inputs)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with Peak(inputs) as peak:
        run(inputs)
    return peak.most


@pytest.mark.parametrize("shape", LINEAR, ids=str)
def test_linear_focal_loss(shape, device, quick, benchmark, record, record_property):
    if quick:
        pytest.skip("not in --quick")
    torch._dynamo.reset()
    rows, features, classes = shape
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def make() -> tuple[Tensor, Tensor, Tensor]:
        x = torch.randn(rows, features, device=device).to(dtype).requires_grad_()
        weight = (torch.randn(classes, features, device=device) / features**0.5).to(dtype).requires_grad_()
        return x, weight, torch.randint(classes, (rows,), device=device)

    functions = {
        "nnfast": nnfast.functional.linear_focal_loss,
        "seed": lambda x, w, t: seed_focal(F.linear(x, w), t).mean(),
        "unfused": lambda x, w, t: nnfast.functional.softmax_focal_loss(F.linear(x, w), t),
    }
    contenders = {
        key: lambda inputs, f=function: torch.autograd.grad(f(*inputs), inputs[:2])
        for key, function in functions.items()
    }
    inputs = make()
    expected = contenders["seed"](inputs)
    for run in contenders.values():
        for ours, theirs in zip(run(inputs), expected, strict=True):
            assert_close(ours, theirs, rtol=0, atol=float(theirs.abs().max()) * (2e-2 if CUDA else 1e-4))
    del expected
    peaks = {key: peak_bytes(run, inputs, device) for key, run in contenders.items()}
    record_property("peak_bytes", peaks)
    assert peaks["seed"] >= LEAST_MEMORY * peaks["nnfast"], peaks
    assert peaks["unfused"] >= LEAST_MEMORY * peaks["nnfast"], peaks
    x, weight, _ = inputs
    seconds = compare(contenders, [inputs], device, 3.0, rounds=5)
    megabytes = {key: f"{peak / 2**20:.0f}" for key, peak in peaks.items()}
    record(
        Result(
            family="focal_loss",
            op="linear_focal_loss",
            case=f"linear_focal_loss {rows}x{features}->{classes} {str(dtype).removeprefix('torch.')}, "
            f"peak {megabytes['nnfast']} MiB (seed {megabytes['seed']})",
            direction="forward+backward",
            dtype=str(dtype).removeprefix("torch."),
            numel=rows * classes,
            backend=nnfast.explain("linear_focal_loss", *inputs).backend or "",
            seconds=seconds,
            bytes=2 * (x.nbytes + 2 * weight.nbytes),
            flops=6 * rows * features * classes,
            targets=targets("linear", shape, dtype),
        ),
        benchmark,
    )
    benchmark.pedantic(contenders["nnfast"], args=(inputs,), rounds=1)
