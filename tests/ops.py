"""The table of operations that tests and benchmarks iterate: a new operation is a new row of `TABLE`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import nnfast
from nnfast.activation import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Sample:
    """Named arguments of one call; the metric says what an error is measured against.

    "norm": the largest error over the largest magnitude of the truth; for values that cross zero.
    "relative": the largest error of an element over that element; for tails, where every digit counts.
    """

    name: str
    make: Callable[[], Tensor]
    metric: str = "norm"

    def __call__(self, dtype: torch.dtype, device: str) -> Tensor:
        """x in dtype on device, the same at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make().to(dtype).to(device)

    def error(self, result: Tensor, truth: Tensor) -> float:
        """Error of result against a float64 truth in this sample's metric; infinite where only one is NaN."""
        result, truth = result.detach().double().cpu(), truth.detach().double().cpu()
        if not torch.equal(result.isnan(), truth.isnan()):
            return float("inf")
        difference = (result - truth).nan_to_num(nan=0.0).abs()
        if not difference.numel():
            return 0.0
        tiny = torch.finfo(torch.float32).tiny
        if self.metric == "relative":
            return float((difference / truth.abs().clamp(min=tiny)).max())
        return float(difference.max() / truth.abs().max().clamp(min=tiny))


@dataclass(frozen=True)
class Case:
    """One operation: ours, torch's, the seed formulation, the truth, its samples and what it moves."""

    name: str
    ours: Callable[..., Tensor]
    torchs: Callable[..., Tensor]
    module: type[torch.nn.Module]
    torch_module: type[torch.nn.Module]
    seed: Callable[[Tensor], Tensor]
    truth: Callable[[Tensor], Tensor]
    operators: tuple[str, ...]
    samples: tuple[Sample, ...]
    flops: dict[str, int] = field(default_factory=dict)
    """Floating-point operations of an element, exponential and division counted as one each."""

    def bytes_moved(self, direction: str, x: Tensor) -> int:
        """Bytes that any implementation must move through memory for x: inputs once, outputs once."""
        passes = {"forward": 2, "backward": 3, "forward+backward": 5}[direction]
        return passes * x.numel() * x.element_size()


def _seed_silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def _seed_mish(x: Tensor) -> Tensor:
    return x * torch.tanh(F.softplus(x))


_ACTIVATION_SAMPLES = (
    Sample("small", lambda: torch.tensor([[-2.5, -1.0, -0.3], [0.2, 1.1, 3.0]])),
    Sample("body", lambda: torch.randn(7, 11, 13) * 4),
    Sample("tail", lambda: torch.linspace(-80, -6, 500), "relative"),
    Sample("large", lambda: torch.cat([torch.linspace(6, 100, 400), torch.logspace(2, 4, 50)]), "relative"),
    Sample(
        "near zero",
        lambda: torch.cat([torch.logspace(-30, -2, 200), -torch.logspace(-30, -2, 200)]),
        "relative",
    ),
)


def _activation(name: str, module: type, torch_module: type, seed: Any, flops: dict[str, int]) -> Case:
    return Case(
        name=name,
        ours=getattr(nnfast.functional, name),
        torchs=getattr(F, name),
        module=module,
        torch_module=torch_module,
        seed=seed,
        truth=getattr(reference, name),
        operators=(name, f"{name}_", f"{name}_backward"),
        samples=_ACTIVATION_SAMPLES,
        flops=flops,
    )


TABLE = (
    _activation("silu", nnfast.SiLU, torch.nn.SiLU, _seed_silu, {"forward": 4, "backward": 8}),
    _activation("mish", nnfast.Mish, torch.nn.Mish, _seed_mish, {"forward": 8, "backward": 14}),
)
