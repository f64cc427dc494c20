"""`nnfast info` in every state of an installation."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nnfast
from nnfast.cli import info, main
from nnfast.core import extension
from nnfast.core.op import OPS


@pytest.fixture
def show(capsys):
    def run() -> str:
        assert main(["info"]) == 0
        return capsys.readouterr().out

    return run


def line(text: str, label: str) -> str:
    """The text beside a label."""
    (found,) = (x for x in text.splitlines() if x.split()[: len(label.split())] == label.split())
    return found.strip().removeprefix(label).strip()


def test_versions(show):
    text = show()
    assert line(text, "nnfast") == nnfast.__version__
    assert line(text, "Python").startswith(".".join(map(str, sys.version_info[:3])))
    assert line(text, "torch").startswith(torch.__version__)
    assert f"{torch.get_num_threads()} threads" in text
    assert max(map(len, text.splitlines())) <= 110


def test_every_operation_has_a_server(show):
    text = show()
    for name in OPS:
        assert "serves" in line(text, name).split() or torch.cuda.is_available()


def test_library_not_built(show, monkeypatch):
    monkeypatch.setattr(extension, "ERROR", "_C.so was not built")
    monkeypatch.setattr(extension, "build_facts", dict)
    text = show()
    assert line(text, "library") == "_C.so was not built"
    assert "setup.py has not run" in line(text, "build")


def test_library_cannot_be_loaded(show, monkeypatch):
    monkeypatch.setattr(extension, "ERROR", "_C.so cannot be loaded: undefined symbol: aoti_torch_x")
    assert line(show(), "library") == "_C.so cannot be loaded: undefined symbol: aoti_torch_x"


def test_library_loaded_with_everything(show, monkeypatch):
    facts = {
        "compiler": "g++ 12.2.0",
        "cpu": True,
        "cuda": True,
        "cuda_version": "13.0",
        "cuda_archs": ["8.0", "9.0a", "10.0+PTX"],
        "left_out": {},
    }
    monkeypatch.setattr(extension, "ERROR", "")
    monkeypatch.setattr(extension, "build_facts", lambda: facts)
    text = show()
    assert line(text, "library") == "_C.so is loaded"
    assert line(text, "compiler") == "g++ 12.2.0"
    assert line(text, "CUDA kernels") == "built by CUDA 13.0 for 8.0, 9.0a, 10.0+PTX"
    assert "left out" not in text


def test_left_out_with_its_reason(show, monkeypatch):
    facts = {"cpu": True, "cuda": False, "left_out": {"cuda": "nvcc was not found"}}
    monkeypatch.setattr(extension, "ERROR", "")
    monkeypatch.setattr(extension, "build_facts", lambda: facts)
    assert line(show(), "left out") == "CUDA kernels: nvcc was not found"
    assert facts["left_out"]  # build_facts is cached: info must not change it


def test_no_triton(show, monkeypatch):
    reason = "triton cannot be imported: ModuleNotFoundError: No module named 'triton'"
    monkeypatch.setattr(info, "triton_why_not", lambda device: reason)
    assert line(show(), "triton") == reason


def test_forced_backend(show):
    with nnfast.backend("reference"):
        text = show()
    assert line(text, "forced") == "backend 'reference'"
    assert line(text, "mish").split()[-1] == "serves"
    assert "'reference' is forced" in text


def test_device_without_memory(show, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("CUDA error: out of memory\nand more")

    monkeypatch.setattr(info.torch, "empty", refuse)
    assert "it gives no memory: CUDA error: out of memory\n" in show()


def test_gpu_that_cannot_be_used(show, monkeypatch):
    class Properties:
        name, major, minor, total_memory = "Imagined GPU", 9, 0, 80 * 2**30

    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr(
        info.torch, "empty", lambda *size, device, **kwargs: empty(*size, device="meta", **kwargs)
    )
    text = show()
    assert line(text, "cuda:0") == "Imagined GPU, sm_90, 80 GiB"
    assert "Operations on cuda:0" in text


@pytest.mark.parametrize("backend", ["aten", "triton"])
def test_as_a_module_in_a_fresh_process(backend):
    """As `python -m nnfast info`, with a backend forced that may not be able to serve."""
    root = Path(nnfast.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "nnfast", "info"],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(root), "NNFAST_BACKEND": backend},
        capture_output=True,
        text=True,
        cwd="/",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert line(done.stdout, "forced") == f"backend {backend!r} by NNFAST_BACKEND"
