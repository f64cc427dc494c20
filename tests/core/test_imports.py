"""Who imports whom: the arrows of the design, and that nothing missing keeps nnfast from importing."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import nnfast

ROOT = Path(nnfast.__file__).parent
FAMILIES = {path.parent.name for path in ROOT.glob("*/reference.py")}
ALLOWED_BETWEEN_FAMILIES = {
    ("convolution", "activation"),
    ("conv_bn_act", "activation"),
    ("conv_bn_act", "convolution"),
}


def imported(path: Path) -> set[str]:
    """Absolute names of what a file imports, at its top or inside its functions."""
    package = ["nnfast", *path.relative_to(ROOT).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


FILES = sorted(ROOT.rglob("*.py"))


def room(name: str) -> str:
    parts = name.split(".")
    return parts[1] if parts[0] == "nnfast" and len(parts) > 1 else ""


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows(path):
    here = path.relative_to(ROOT).parts[0] if path.parent != ROOT else ""
    names = imported(path)
    rooms = {room(name) for name in names}
    if here == "core":
        assert rooms <= {"", "core"}, "core imports no family"
    if here in FAMILIES:
        others = rooms & FAMILIES - {here}
        assert {(here, other) for other in others} <= ALLOWED_BETWEEN_FAMILIES
        assert not rooms & {"swap", "cli", "functional"}
        inside = {
            name.split(".")[2]
            for name in names
            if name.startswith(f"nnfast.{here}.") and name.count(".") >= 2
        }
        assert (
            inside
            <= {
                "blocks": {"fold", "links", "module", "op", "replay"},
                "replay": {"fold", "notes"},
                "links": {"fold", "module", "op", "reference"},
                "chunked": {"reference"},
                "fold": {"notes"},
                "notes": set(),
                "linear": {"op", "reference"},
                "module": {"linear", "op", "positional"},
                "encoder": {"multihead", "op"},
                "multihead": {"module", "op"},
                "self_attention": {"module", "op"},
                "positional": {"rotary"},
                "rotary": {"kernels", "reference"},
                "op": {"chunked", "kernels", "reference", "rotary", "sdpa", "winograd"},
                "kernels": set(),
                "reference": set(),
                "sdpa": {"reference"},
                "winograd": {"reference"},
                "__init__": set(),
            }[path.stem]
        )
    if any(name.split(".")[0] == "triton" for name in names):
        assert path.relative_to(ROOT).as_posix() == "core/triton.py", "only core/triton.py imports triton"


def _python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, timeout=120
    )


def test_import_loads_no_triton_and_no_compiler():
    code = "import sys, torch; b = set(sys.modules); import nnfast; print(sorted(set(sys.modules) - b))"
    loaded = set(ast.literal_eval(_python(code, TRITON_INTERPRET="0").stdout))
    assert "nnfast.swap.timm" in loaded
    assert not {"triton", "torch._dynamo", "torch._inductor", "timm", "transformers", "matplotlib"} & loaded


def test_import_costs_little():
    code = "import time, torch; t = time.perf_counter(); import nnfast; print(time.perf_counter() - t)"
    start = time.perf_counter()
    seconds = min(float(_python(code).stdout) for _ in range(2))
    assert seconds < 0.2 * (time.perf_counter() - start)


@pytest.mark.parametrize(
    "broken", ["raise ImportError('none')", "raise RuntimeError('libcuda is too old')", "1/0"]
)
def test_without_triton(broken, tmp_path):
    (tmp_path / "triton.py").write_text(broken)
    code = (
        "import nnfast, torch; e = nnfast.explain('mish', torch.zeros(9)); print(e.reasons['triton']);"
        "print(float(nnfast.functional.mish(torch.ones(())))); assert torch.ops.nnfast.mish.triton"
    )
    done = _python(code, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT.parent)]))
    assert "triton cannot be imported" in done.stdout, done.stderr
    assert "0.865" in done.stdout


def test_without_the_library(tmp_path):
    """A library that is not one: nnfast imports, serves, and tells the loader's words."""
    code = f"""
import importlib.util, sys, pathlib, torch
import nnfast.core.extension as e
e.PATH = pathlib.Path({str(tmp_path / "_C.so")!r})
print(e._load())
e.PATH.write_bytes(b"not a library")
print(e._load())
"""
    done = _python(code)
    assert "_C.so was not built" in done.stdout, done.stderr
    assert "_C.so cannot be loaded:" in done.stdout
