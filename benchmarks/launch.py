"""Whether kernels can be launched here: `python -m benchmarks.launch`.

At run time Triton compiles a stub for each kernel, which takes a C compiler and Python's headers.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import traceback
from pathlib import Path

import torch

import nnfast


def main() -> int:
    """Launch one kernel of each kind, and say what is missing."""
    failed, device = 0, "cuda" if torch.cuda.is_available() else "cpu"
    for backend in ("triton", "cuda") if device == "cuda" else ("cpu",):
        try:
            with nnfast.backend(backend):
                y = nnfast.functional.silu(torch.ones(8, device=device)).tolist()
            print(f"{backend}: silu(1) is {y[0]:.4f}")
        except Exception as error:
            traceback.print_exc(file=sys.stdout)
            print(f"{backend}: {type(error).__name__}: {str(error).splitlines()[0]}")
            failed += 1
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    header = Path(sysconfig.get_path("include"), "Python.h")
    print(f"C compiler: {compiler or 'MISSING: Triton cannot launch a kernel'}")
    print(f"Python's headers: {header if header.exists() else f'MISSING: there is no {header}'}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
