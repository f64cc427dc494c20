"""Choosing, forcing and explaining backends."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading

import pytest
import torch

import nnfast
from nnfast.core import op as core
from nnfast.core.op import Backend, Op


@pytest.fixture
def toy():
    """An operation whose `cpu` backend refuses odd numbers and is not worth it below 10."""
    made = Op(
        "toy",
        [
            Backend("cuda", lambda n: "cuda", lambda n: ["no such device", "not built"]),
            Backend("cpu", lambda n: "cpu", lambda n: ["odd"] * (n % 2), lambda n: ["small"] * (n < 10)),
            Backend("aten", lambda n: "aten"),
        ],
    )
    yield made
    del core.OPS["toy"]


def test_first_backend_without_a_reason_serves(toy):
    assert [toy(n) for n in (2, 12, 13)] == ["aten", "cpu", "aten"]


def test_a_forced_backend_serves_though_not_worth_it(toy):
    with nnfast.backend("cpu"):
        assert toy(2) == "cpu"


def test_forced_and_impossible_raises_with_every_reason(toy):
    with nnfast.backend("cuda"), pytest.raises(nnfast.BackendError) as error:
        toy(2)
    assert str(error.value) == (
        "nnfast.toy: backend 'cuda' is forced and cannot serve (2)\n  cuda: no such device\n  cuda: not built"
    )
    with (
        nnfast.backend("triton"),
        pytest.raises(nnfast.BackendError, match="toy has no such backend; it has cuda, cpu"),
    ):
        toy(2)


def test_blocks_nest_and_unwind_after_errors():
    assert core.forced() is None

    def fail():
        with nnfast.backend("aten"):
            assert core.forced() == "aten"
            raise ZeroDivisionError

    with nnfast.backend("cpu"):
        with pytest.raises(ZeroDivisionError):
            fail()
        assert core.forced() == "cpu"
    assert core.forced() is None
    assert core._forced_in_compile is None


def test_one_block_object_is_reentrant():
    block = nnfast.backend("cpu")
    with block, block:
        assert core.forced() == "cpu"
    assert core.forced() is None


def test_as_decorator():
    @nnfast.backend("reference")
    def inside():
        return core.forced()

    assert (inside(), core.forced()) == ("reference", None)


def test_the_choice_stays_in_its_thread():
    seen = []
    entered, checked = threading.Event(), threading.Event()

    def other():
        with nnfast.backend("reference"):
            entered.set()
            checked.wait(10)
            seen.append(core.forced())

    thread = threading.Thread(target=other)
    thread.start()
    entered.wait(10)
    assert core.forced() is None
    with nnfast.backend("aten"):
        checked.set()
        thread.join()
        assert (core.forced(), seen) == ("aten", ["reference"])
    assert core._forced_in_compile is None  # though the blocks were left in the order they were entered


def test_unknown_name():
    with pytest.raises(ValueError, match="'cudnn'; the backends are folded, cuda, triton, cpu"):
        nnfast.backend("cudnn")


def _python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, timeout=120
    )


def test_environment_variable():
    code = "import nnfast, torch; print(nnfast.explain('mish', torch.zeros(1 << 20)).backend)"
    assert _python(code, NNFAST_BACKEND="reference").stdout == "reference\n"
    failed = _python(code, NNFAST_BACKEND="gpu")
    assert "ValueError: NNFAST_BACKEND: unknown backend 'gpu'; the backends are" in failed.stderr


def test_explain(toy):
    explanation = nnfast.explain("toy", 3)
    assert explanation.backend == "aten"
    assert explanation.reasons == {"cuda": ["no such device", "not built"], "cpu": ["odd"], "aten": []}
    assert str(explanation).splitlines() == [
        "nnfast.toy(3): served by aten",
        "  cuda      no such device; not built",
        "  cpu       odd",
        "  aten      serves",
    ]
    with nnfast.backend("cpu"):
        assert nnfast.explain("toy", 2).reasons["aten"] == ["'cpu' is forced"]
        assert nnfast.explain("toy", 3).backend is None


@pytest.mark.parametrize("named", ["mish", nnfast.functional.mish, nnfast.Mish, nnfast.Mish()])
def test_explain_takes_names_functions_and_modules(named):
    assert nnfast.explain(named, torch.zeros(3)).op == "mish"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    ("layout", "described"),
    [(torch.strided, r"\(float32\[2, \*, 5\] on cpu\)"), (torch.jagged, r"\(float32\[2, j\d+, 5\] on cpu\)")],
)
def test_nested_tensors_are_described(layout, described):
    x = torch.nested.nested_tensor([torch.zeros(3, 5), torch.zeros(4, 5)], layout=layout)
    found = nnfast.explain("silu", x)
    assert found.backend == "aten"
    assert re.search(described, str(found))
    assert any("nested" in reason for reason in found.reasons["cpu"])
    with nnfast.backend("cpu"), pytest.raises(nnfast.BackendError, match=described):
        nnfast.functional.silu(x)


def test_explain_unknown_operation():
    with pytest.raises(ValueError, match="'gelu' is no operation of nnfast; the operations are silu, mish"):
        nnfast.explain("gelu", torch.zeros(3))


@pytest.mark.parametrize("numel", [1, 100, 1 << 10, 1 << 12, 1 << 14, 1 << 18, 1 << 21])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("op", ["silu", "mish"])
def test_explain_tells_what_runs(op, numel, grad, monkeypatch):
    """The shortcut for small tensors and `explain` never disagree."""
    ran = []
    made = core.OPS[op]

    def spy(backend):
        def run(*args, **kwargs):
            ran.append(backend.name)
            return backend.run(*args, **kwargs)

        return Backend(backend.name, run, backend.why_not, backend.not_worth)

    monkeypatch.setattr(made, "backends", tuple(map(spy, made.backends)))
    x = torch.zeros(numel, requires_grad=grad)
    getattr(nnfast.functional, op)(x)
    assert (ran or ["aten"]) == [nnfast.explain(op, x).backend]
