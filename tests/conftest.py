"""Set-up of every test: Triton's interpreter where there is no GPU, and the fixtures that run a backend."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, so before nnfast

import nnfast
from nnfast.core.op import OPS, triton_why_not
from tests import interpreter
from tests.emulation.emulated import CSRC, emulated_backend, has_compiler
from tests.ops import DTYPES, TABLE, Case

_T = TypeVar("_T")

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
ON_LAST_DEVICE = [pytest.mark.gpu] * (DEVICES[-1] == "cuda")
"""Marks of a file that runs on the last of the devices alone."""


def pytest_configure() -> None:
    if not triton_why_not("cpu"):
        interpreter.mend()
    torch.backends.cudnn.allow_tf32 = False  # torch's default for convolutions; errors are those of float32


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if "cuda" in [p.device if isinstance(p, Run) else p for p in parameters if isinstance(p, (Run, str))]:
            item.add_marker(pytest.mark.gpu)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`case` becomes every row of the table, with `run` every backend that serves it on every device."""
    names = metafunc.fixturenames
    needed = {trait for mark in metafunc.definition.iter_markers("trait") for trait in mark.args}
    named = {name for mark in metafunc.definition.iter_markers("only") for name in mark.args}
    table = [c for c in TABLE if needed <= c.traits and (not named or {c.family, c.name} & named)]
    if "run" in names:
        rows = [
            pytest.param(case, run, id=f"{case.label}-{run}")
            for case in table
            for device in DEVICES
            for run in runs(case, device)
        ]
    elif "case" in names:
        metafunc.parametrize("case", table, ids=lambda case: case.label)
    if "run" in names and "dtype" in names:
        rows = [
            pytest.param(*row.values, dtype, id=f"{row.id}-{str(dtype).removeprefix('torch.')}")
            for row in rows
            for dtype in DTYPES
            if row.values[0].takes(row.values[1].backend, dtype)
        ]
        metafunc.parametrize(("case", "run", "dtype"), rows)
    elif "run" in names:
        metafunc.parametrize(("case", "run"), rows)
    elif "dtype" in names:
        metafunc.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
    if "device" in names:
        metafunc.parametrize("device", DEVICES)


def runs(case: Case, device: str) -> list[Run]:
    """What can be forced for an operation on a device; on the cpu the emulated CUDA kernels too.

    What fails is no refusal: it stays, so that its tests fail rather than the collection.
    """
    found = []
    for backend in OPS[case.name].backends:
        try:
            Run(backend.name, device)(case.ours, case.example(torch.float32, device))
        except nnfast.BackendError:
            continue
        except Exception as error:
            warnings.warn(f"{case.label}-{backend.name}-{device}: {error!r}", stacklevel=1)
        found.append(Run(backend.name, device))
    emulated = device == "cpu" and (CSRC / case.family / "cuda.cu").exists() and has_compiler()
    return found + [Run("cuda", "cpu", emulated=True)] * emulated


class Run:
    """One backend on one device; emulated: the CUDA kernels, compiled for the host."""

    def __init__(self, backend: str, device: str, emulated: bool = False) -> None:
        self.backend, self.device, self.emulated = backend, device, emulated

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}{'-emulated' * self.emulated}"

    @property
    def slow(self) -> bool:
        """Whether Python or the emulation steps through the kernels, or each new shape of one is compiled."""
        return self.emulated or self.backend == "triton"

    def share(self, combinations: Iterable[_T], turn: int, turns: int) -> list[_T]:
        """All of what a test loops over; where slow, this turn's part: turns together have everything once.

        Turns are another parameter of the test's, chosen such that kernels do not depend on both at once.
        """
        combinations = list(combinations)
        return combinations[turn::turns] if self.slow else combinations

    @contextmanager
    def forced(self) -> Iterator[None]:
        ops = [OPS[case.name] for case in TABLE if (CSRC / case.family / "cuda.cu").exists()]
        ops = ops if self.emulated else []
        before = {op: op.backends for op in ops}
        for op in ops:
            op.backends = (emulated_backend(op.name), *op.backends[1:])
        try:
            with nnfast.backend(self.backend):
                yield
        finally:
            for op, backends in before.items():
                op.backends = backends

    def __call__(self, function: Callable[..., torch.Tensor], *args, **kwargs) -> torch.Tensor:
        with self.forced():
            return function(*args, **kwargs)
