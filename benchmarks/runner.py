"""Times contenders against each other, interleaved, and keeps what it found as result lines.

A comparison is a ratio of medians from one run: each round times every contender once, in turn, so that a
noisy machine hits all of them alike. On a GPU inputs rotate past the cache.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import nnfast
from nnfast.core import product

ROOT = Path(__file__).parents[1]
CACHE_BYTES = {"cpu": 0, "cuda": 256 << 20}
"""Inputs rotate until they exceed this: twice and more of a GPU's cache; nothing on a CPU."""

Contender = Callable[[Any], Any]


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def _timed(run: Contender, inputs: Sequence[Any], calls: int, device: str) -> float:
    """Seconds a call takes, over `calls` calls."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for i in range(calls):
            run(inputs[i % len(inputs)])
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / calls
    began = time.perf_counter()
    for i in range(calls):
        run(inputs[i % len(inputs)])
    return (time.perf_counter() - began) / calls


def compare(
    contenders: dict[str, Contender],
    inputs: Sequence[Any],
    device: str,
    seconds: float = 2.0,
    rounds: int = 15,
) -> dict[str, float]:
    """Median seconds a call of each contender, interleaved.

    Args:
        contenders: name -> function of one input.
        inputs: equal inputs to rotate through.
        device: "cpu" or "cuda".
        seconds: about how long to measure, all contenders together.
        rounds: how often each is timed; at least 5.
    """
    calls = {}
    for name, run in contenders.items():
        for _ in range(3):  # warm up: compile, fill caches
            run(inputs[0])
        synchronize(device)
        once = max(_timed(run, inputs, 2, device), 1e-7)
        calls[name] = max(1, int(seconds / rounds / len(contenders) / once))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    for _ in range(rounds):
        for name in order:
            times[name].append(_timed(contenders[name], inputs, calls[name], device))
        order = order[1:] + order[:1]
    return {name: statistics.median(found) for name, found in times.items()}


def rotation(make: Callable[[], Any], bytes_each: int, device: str) -> list[Any]:
    """As many fresh inputs as it takes to leave the device's cache behind; one on a CPU."""
    return [make() for _ in range(min(64, 1 + CACHE_BYTES[device] // max(bytes_each, 1)))]


def forced(function: Callable[..., Tensor], backend: str) -> Callable[..., Tensor]:
    """function, with a backend forced in every call."""

    def run(*args: Tensor) -> Tensor:
        with nnfast.backend(backend):
            return function(*args)

    return run


def both_ways(function: Callable[[Tensor], Tensor]) -> Callable[[tuple[Tensor, Tensor]], Tensor]:
    """Forward and backward of function: from (x, upstream gradient) to the gradient of x."""

    def run(pair: tuple[Tensor, Tensor]) -> Tensor:
        x, grad = pair
        return torch.autograd.grad(function(x), x, grad)[0]

    return run


@functools.cache
def limits(device: str) -> dict[str, float]:
    """What this device can do in this run: bytes a second of a copy (read + written), FLOP/s of a product.

    Of torch's product or, where ours are the faster ones, of ours.
    """
    if device == "cuda":
        size, side, dtype = 1 << 30, 8192, torch.bfloat16
    else:
        size, side, dtype = 1 << 26, 1536, torch.float32
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    contenders = {"copy": lambda _: target.copy_(source), "matmul": lambda _: a @ b}
    if device == "cpu" and not product.missing():
        contenders["ours"] = lambda _: product.product(a, b)
    found = compare(contenders, [None], device, 1.0)
    best = min(seconds for name, seconds in found.items() if name != "copy")
    return {"copy_bytes_per_s": 2 * size / found["copy"], "matmul_flop_per_s": 2 * side**3 / best}


@functools.cache
def machine(device: str) -> dict[str, str]:
    """The device and the software, as far as they matter for a figure."""
    found = {"device": _cpu_name(), "driver": "", "threads": str(torch.get_num_threads())}
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found = {"device": torch.cuda.get_device_name(), "driver": _said(query), "threads": ""}
    try:
        from triton import __version__ as triton_version
    except ImportError:
        triton_version = ""
    return {
        **found,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{names[0] if names else platform.processor()} x{len(names) or 1} ({capability})"


BUILT_ON = {"conv_bn_act": ("activation", "convolution"), "convolution": ("activation",)}
"""Families whose kernels others run too."""


def digest(family: str) -> str:
    """Fingerprint of the sources that a family's figures depend on; those of whole models, on all."""
    package = Path(nnfast.__file__).parent
    whole = hashlib.sha256()
    names = ("common", "core", family, *BUILT_ON.get(family, ()))
    folders = [place / name for name in names for place in (ROOT / "csrc", package)]
    for folder in [ROOT / "csrc", package] if family == "models" else folders:
        base = folder.parent if family == "models" else folder.parents[1]
        for file in sorted(f for f in folder.rglob("*") if f.suffix in (".h", ".cpp", ".cu", ".py")):
            whole.update(file.relative_to(base).as_posix().encode() + b"\0" + file.read_bytes())
    return whole.hexdigest()[:16]


def commit() -> str:
    """What NNFAST_COMMIT says, of a copy without git; else the checkout's commit, + if it is changed."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12"]
    return os.environ.get("NNFAST_COMMIT") or _said(command)


def _said(command: list[str]) -> str:
    """What a command prints; "" if there is no such program."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


@dataclass
class Result:
    """One line of a results file: a case, its contenders' median seconds, and what produced them."""

    family: str
    op: str
    case: str
    direction: str
    dtype: str
    numel: int
    backend: str
    seconds: dict[str, float]
    bytes: int
    flops: int
    targets: dict[str, float] = field(default_factory=dict)
    """contender -> least ratio of its time to ours that is promised."""
    limits: dict[str, float] = field(default_factory=dict)
    machine: dict[str, str] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    """contender -> bytes at the peak of a call, where they are counted."""
    commit: str = ""
    digest: str = ""
    date: str = ""

    def __post_init__(self) -> None:
        if not self.machine:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            self.limits, self.machine = limits(device), machine(device)
            self.commit, self.digest = commit(), digest(self.family)
            self.date = time.strftime("%Y-%m-%d", time.gmtime())

    def ratio(self, contender: str) -> float:
        """How many times longer the contender takes than ours."""
        return self.seconds[contender] / self.seconds["nnfast"]

    @property
    def bandwidth(self) -> float:
        """Bytes a second that ours moves, of those that must be moved."""
        return self.bytes / self.seconds["nnfast"]

    @property
    def _floors(self) -> tuple[float, float]:
        """Seconds that moving the bytes and computing the FLOPs take at the limits of this device."""
        copy, product = self.limits["copy_bytes_per_s"], self.limits["matmul_flop_per_s"]
        return self.bytes / copy, self.flops / product

    @property
    def share(self) -> float:
        """What is reached of the limit that lies nearer, copy bandwidth or matrix product of the same run."""
        return max(self._floors) / self.seconds["nnfast"]

    @property
    def rate(self) -> str:
        """GB/s, or TFLOP/s where computing takes longer than moving."""
        moving, computing = self._floors
        if moving >= computing:
            return f"{self.bandwidth / 1e9:.1f} GB/s"
        return f"{self.flops / self.seconds['nnfast'] / 1e12:.3g} TFLOP/s"

    def missed(self) -> list[str]:
        """The targets that this result misses, in words."""
        return [
            f"{self.ratio(name):.2f}x {name}, promised {least:g}x"
            for name, least in self.targets.items()
            if self.ratio(name) < least
        ]

    @property
    def stale(self) -> bool:
        """Whether the kernels have changed since."""
        return self.digest != digest(self.family)

    def line(self) -> str:
        """As it is kept."""
        return json.dumps(asdict(self))


def load(path: Path) -> list[Result]:
    """The results of a file."""
    return [Result(**json.loads(line)) for line in path.read_text().splitlines()]


def table(results: Sequence[Result]) -> str:
    """The results as a Markdown table."""
    columns = ("seed", "torch", "compile")
    head = [
        "case",
        "backend",
        "time",
        "rate",
        "of limit",
        *(f"vs {name}" for name in columns),
        "memory vs seed",
    ]
    rows = [[*head, "target"]]
    for r in results:
        ratios = [f"{r.ratio(name):.2f}x" if name in r.seconds else "" for name in columns]
        memory = f"{r.memory['nnfast'] / r.memory['seed']:.0%}" if r.memory.get("seed") else ""
        verdict = "; ".join(r.missed()) or ("met" if r.targets else "")
        stale = " (stale)" if r.stale else ""
        rows.append(
            [
                r.case + stale,
                r.backend,
                human(r.seconds["nnfast"]),
                r.rate,
                f"{r.share:.0%}",
                *ratios,
                memory,
                verdict,
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def human(seconds: float) -> str:
    """Seconds with three digits and a unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.0f} ns"
