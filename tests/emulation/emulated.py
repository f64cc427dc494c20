"""Compiles the .cu files as host C++: the ops of torch.ops.nnfast_emulated run CUDA kernels on the CPU.

How is in cuda_emulation.h. They live beside the real library, under their own namespace.
"""

import functools
import hashlib
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
sys.path.insert(0, str(CSRC))
import toolchain  # noqa: E402

from nnfast.core.op import OPS, Backend  # noqa: E402

_library = torch.library.Library("nnfast_emulated", "DEF")


def build() -> Path:
    """The compiled library, in a folder named after a digest of its sources."""
    sources = sorted(CSRC.glob("*/*.cu")) + sorted(HERE.glob("*.cu"))
    digest = hashlib.sha256(torch.__version__.encode())
    for file in [*sources, *sorted(CSRC.glob("*/*.h")), HERE / "cuda_emulation.h", Path(__file__)]:
        digest.update(file.read_bytes())
    folder = Path(tempfile.gettempdir(), f"nnfast-emulation-{os.getuid()}-{digest.hexdigest()[:16]}")
    library = folder / "emulated.so"
    if library.exists():
        return library
    folder.mkdir(exist_ok=True)
    includes = [f"-I{CSRC}", f"-I{HERE}", *(f"-isystem{path}" for path in include_paths())]
    flags = [*toolchain.CXX_FLAGS, "-O1", "-fPIC", "-Wall", "-DNNFAST_EMULATE_CUDA", *includes]

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.parent.name}.{os.getpid()}.o"
        toolchain.output(toolchain.get_cxx_compiler(), *flags, "-x", "c++", "-c", source, "-o", target)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    unfinished = library.with_suffix(f".{os.getpid()}")
    torch_lib = [f"-L{path}" for path in library_paths()]
    toolchain.output(
        toolchain.get_cxx_compiler(), "-shared", *objects, *torch_lib, "-ltorch_cpu", "-o", unfinished
    )
    unfinished.replace(library)
    return library


@functools.cache
def has_compiler() -> bool:
    """Whether the emulation can be built here."""
    try:
        return bool(toolchain.find_compiler())
    except (RuntimeError, OSError):
        return False


@functools.cache
def load_emulated():
    """torch.ops.nnfast_emulated, built once per state of the sources; skips without a compiler."""
    if not has_compiler():
        pytest.skip("no C++ compiler")
    _library.define("sum_blocks(Tensor x, bool dynamic) -> Tensor")
    _library.define("diverge(Tensor x, bool leave) -> ()")
    torch.ops.load_library(build())
    return torch.ops.nnfast_emulated


@functools.cache
def emulated_backend(name: str) -> Backend:
    """A `cuda` backend of an operation whose kernels run on cpu tensors."""
    backend = OPS[name].compiled_in(_library)
    load_emulated()
    return backend
