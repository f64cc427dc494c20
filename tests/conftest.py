"""Set-up of every test: Triton's interpreter where there is no GPU, and the fixtures that run a backend."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, so before nnfast

import nnfast
from nnfast.core.op import OPS, triton_why_not
from tests.ops import DTYPES, TABLE

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def pytest_configure() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1" and not triton_why_not("cpu"):
        _round_in_interpreter()


def _round_in_interpreter() -> None:
    """Triton's interpreter truncates float32 to bfloat16 where hardware rounds: round there too."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(data, source, target, mode):
        if source == tl.float32 and target == tl.bfloat16:
            values = torch.from_numpy(data.view("float32").copy())
            return values.to(torch.bfloat16).view(torch.uint16).numpy()
        return convert(data, source, target, mode)

    interpreter._convert_float = rounded


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`case` becomes every row of the table, with `run` every backend that serves it on every device."""
    names = metafunc.fixturenames
    if "run" in names:
        rows = [
            pytest.param(case, Run(backend.name, device), id=f"{case.name}-{backend.name}-{device}")
            for case in TABLE
            for device in DEVICES
            for backend in OPS[case.name].backends
            if not backend.why_not(case.samples[0](torch.float32, device))
        ]
        metafunc.parametrize(("case", "run"), rows)
    elif "case" in names:
        metafunc.parametrize("case", TABLE, ids=lambda case: case.name)
    if "dtype" in names:
        metafunc.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
    if "device" in names:
        metafunc.parametrize("device", DEVICES)


class Run:
    """One backend on one device."""

    def __init__(self, backend: str, device: str) -> None:
        self.backend, self.device = backend, device

    @contextmanager
    def forced(self) -> Iterator[None]:
        with nnfast.backend(self.backend):
            yield

    def __call__(self, function: Callable[..., torch.Tensor], *args, **kwargs) -> torch.Tensor:
        with self.forced():
            return function(*args, **kwargs)
