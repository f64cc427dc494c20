"""Each .cu for each architecture, by nvcc: no warning, no spill, no local memory, 16-byte accesses."""

import importlib.util
import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

CSRC = Path(__file__).resolve().parents[2] / "csrc"
sys.path.insert(0, str(CSRC))
import toolchain  # noqa: E402

ARCHS = ("80", "90a", "100")
MOST_REGISTERS = 64  # 1024 threads a multiprocessor
SOURCES = {str(path.relative_to(CSRC)): path for path in sorted(CSRC.glob("*/*.cu"))}
CASES = [(source, arch) for source in SOURCES for arch in ARCHS]


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """(object file, what nvcc and ptxas said) of each case."""
    try:
        home, _, _ = toolchain.find_cuda()
    except (RuntimeError, OSError) as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("cuda")

    def compile_one(case):
        source, arch = case
        target = folder / f"{source.replace('/', '.')}.{arch}.cubin"
        flags = [
            *toolchain.NVCC_FLAGS,
            "-Werror",
            "all-warnings",
            "-Xptxas",
            "-v",
            f"-arch=sm_{arch}",
            f"-I{CSRC}",
        ]
        flags += [word for path in include_paths() for word in ("-isystem", path)]
        return target, toolchain.output(f"{home}/bin/nvcc", *flags, "-cubin", SOURCES[source], "-o", target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(CASES, pool.map(compile_one, CASES), strict=True))


@pytest.mark.parametrize(("source", "arch"), CASES)
def test_no_spills(objects, source, arch, record_property):
    _, said = objects[source, arch]
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    registers = [int(used) for used in re.findall(r"Used (\d+) registers", said)]
    record_property("registers", max(registers))
    print(f"{source} sm_{arch}: {len(registers)} kernels, {min(registers)} to {max(registers)} registers")
    assert set(frames) == {("0", "0", "0")}
    assert max(registers) <= MOST_REGISTERS


def find_cuobjdump():
    triton = importlib.util.find_spec("triton")
    inside = (
        [str(Path(folder, "backends/nvidia/bin")) for folder in triton.submodule_search_locations]
        if triton
        else []
    )
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=os.pathsep.join(inside))


@pytest.mark.parametrize(("source", "arch"), CASES)
def test_wide_accesses(objects, source, arch):
    cuobjdump = find_cuobjdump()
    if not cuobjdump:
        pytest.skip("no cuobjdump")
    code = toolchain.output(cuobjdump, "-sass", objects[source, arch][0])
    assert not re.findall(r"\b(?:LDL|STL)\b.*", code)
    kernels = dict(re.findall(r"Function : (\S+)(.*?)(?=Function :|\Z)", code, re.S))
    # Li1E is an element at a time. Merges of partial sums are a few kilobytes; sums of 8 half-width elements
    # exceed the registers.
    narrow = r"Li1E|strided|\d+merge_|reduce_gradientsINS_(4Half|8BFloat16)ELi4E"
    wide = {name: body for name, body in kernels.items() if not re.search(narrow, name)}
    assert wide
    for name, body in wide.items():
        assert re.search(r"LDG\.E\.128", body), name
        sums = re.search(r"forward_rows|reduce_moments", name)  # it writes a value a row or a column
        assert sums or re.search(r"STG\.E\.128", body), name
