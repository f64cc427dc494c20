"""What this machine can compile, for setup.py and the tests. RuntimeError or OSError says what is missing."""

import os
import re
import subprocess
from pathlib import Path

import torch
from torch.utils.cpp_extension import get_cxx_compiler

CSRC = Path(__file__).resolve().parent
COMMON = ["-std=c++20", "-O3", "-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
NUMERIC = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
CXX_FLAGS = [*COMMON, *NUMERIC, "-g0", "-fvisibility=hidden", "-Wno-psabi"]
NVCC_FLAGS = [*COMMON, "-Xcompiler=-fvisibility=hidden"]


def output(*command):
    """What the command prints."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        lines = done.stdout.strip().splitlines() or [f"exit status {done.returncode}"]
        line = next((line for line in lines if "error" in line.lower()), lines[-1])
        raise RuntimeError(f"{command[0]} fails: {line}")
    return done.stdout


def find_compiler():
    """The first line of the C++ compiler's --version, after it has compiled one of our headers."""
    compiler = get_cxx_compiler()
    output(compiler, "-std=c++20", "-x", "c++", "-c", CSRC / "common/check.h", "-o", os.devnull)
    return output(compiler, "--version").splitlines()[0]


def find_cuda():
    """CUDA's folder, its version, the architectures to build for; nvcc has compiled one of our headers."""
    home = os.environ.get("CUDA_HOME") or next(map(str, sorted(Path("/usr/local").glob("cuda*"))), None)
    if not home:  # an nvcc on PATH may be a wrapper: it says itself where it lives
        home = re.search(r"TOP=(\S+)", output("nvcc", "--dryrun", "-x", "cu", os.devnull))[1]
    nvcc = f"{home}/bin/nvcc"
    output(nvcc, "-std=c++20", f"-I{CSRC}", "-x", "cu", "-c", CSRC / "common/scalar.h", "-o", os.devnull)
    known, gpus = output(nvcc, "--list-gpu-code"), range(torch.cuda.device_count())
    archs = {"{}.{}".format(*torch.cuda.get_device_capability(i)) for i in gpus} or {"8.0", "9.0a", "10.0"}
    archs = [arch for arch in archs if "sm_" + arch.rstrip("a").replace(".", "") in known]
    *others, newest = sorted(archs, key=lambda arch: float(arch.rstrip("a")))
    version = re.search(r"release (\d+\.\d+)", output(nvcc, "--version"))[1]
    asked_for = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";").split(";")
    return home, version, [arch for arch in asked_for if arch] or [*others, f"{newest}+PTX"]
