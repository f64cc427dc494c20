"""Every way to install: with nvcc, without, without a compiler, editable, and with tools that do not work.

Each builds a copy of the repository into a folder of its own and asks a fresh process what the result can do.
"""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "csrc"))
import toolchain  # noqa: E402

PYTHON_ONLY, COMPILED = "py3-none-any", r"py3-none-(linux|manylinux|macosx)\w+"
NO_CUDA = {"CUDA_HOME": "/nonexistent"}

# Run in a fresh process: what the library registers and computes, and on which instruction set.
USE_LIBRARY = """
import json, sys, torch
library = torch.library.Library("nnfast", "DEF")
for name in ("silu", "mish"):
    library.define(f"{name}(Tensor x) -> Tensor")
    library.define(f"{name}_(Tensor(a!) x) -> ()")
    library.define(f"{name}_backward(Tensor grad, Tensor x) -> Tensor")
torch.ops.load_library(sys.argv[1])
errors, has = {}, torch._C._dispatch_has_kernel_for_dispatch_key
torch.manual_seed(0)
for name in ("silu", "mish"):
    theirs = getattr(torch.nn.functional, name)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        x, grad = (4 * torch.randn(100_003)).to(dtype), torch.randn(100_003).to(dtype)
        exact = x.double().requires_grad_()
        theirs(exact).backward(grad.double())
        pairs = (
            (getattr(torch.ops.nnfast, name)(x), theirs(exact).detach()),
            (getattr(torch.ops.nnfast, name + "_backward")(grad, x), exact.grad),
        )
        error = max(float((y.double() - t).abs().max() / t.abs().max()) for y, t in pairs)
        errors[f"{name} {dtype}"] = error / torch.finfo(dtype).eps
ops = [name + suffix for name in ("silu", "mish") for suffix in ("", "_", "_backward")]
print(json.dumps({
    "errors": errors,
    "cpu": all(has("nnfast::" + op, "CPU") for op in ops),
    "cuda": all(has("nnfast::" + op, "CUDA") for op in ops),
}))
"""


def run(*command, env=None, cwd=None):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("NNFAST", "CUDA_HOME"))}
    kept.pop("TORCH_CUDA_ARCH_LIST", None)
    return subprocess.run(
        [str(word) for word in command], env=kept | (env or {}), cwd=cwd, text=True, capture_output=True
    )


def copy_repository(to):
    """With the compiled sources of one family: which tools build what is the same for all."""
    to.mkdir()
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, to)
    for name in ("csrc", "nnfast"):
        ignore = shutil.ignore_patterns("__pycache__", "*.so", "_build.json")
        shutil.copytree(ROOT / name, to / name, ignore=ignore)
    for source in (to / "csrc").glob("*/*.c*"):
        if source.parent.name != "activation":
            source.unlink()
    return to


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def use(library, isa="avx512"):
    done = run(sys.executable, "-c", USE_LIBRARY, library, env={"NNFAST_CPU_ISA": isa})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


class Wheel:
    def __init__(self, folder, env, change=None):
        source = copy_repository(folder / "source")
        if change:
            change(source)
        pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-v"]
        self.done = run(*pip, "-w", folder, source, env=env)
        self.log = self.done.stdout + self.done.stderr
        self.lines = re.findall(r"nnfast: \w+ kernels left out: .*", self.log)
        if self.done.returncode == 0:
            (wheel,) = folder.glob("*.whl")
            self.tag = "-".join(wheel.stem.split("-")[2:])
            zipfile.ZipFile(wheel).extractall(folder / "unpacked")
            (package,) = {path.parent for path in (folder / "unpacked").rglob("_build.json")}
            self.facts = json.loads((package / "_build.json").read_text())
            self.library = package / "_C.so"
            self.files = {str(path.relative_to(package)) for path in package.rglob("*") if path.is_file()}


def needs(action):
    try:
        return action()
    except (RuntimeError, OSError) as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A wheel with CPU and, where nvcc is, CUDA kernels."""
    needs(toolchain.find_compiler)
    return Wheel(tmp_path_factory.mktemp("compiled"), {"TORCH_CUDA_ARCH_LIST": "9.0"})


def test_with_nvcc(compiled):
    _, version, _ = needs(toolchain.find_cuda)
    assert re.fullmatch(COMPILED, compiled.tag), compiled.log
    assert {"_C.so", "_build.json", "py.typed"} <= compiled.files
    assert not [name for name in compiled.files if name.endswith((".cu", ".h", ".cpp", ".o"))]
    assert compiled.facts.pop("compiler")
    assert compiled.facts == {
        "cpu": True,
        "cuda": True,
        "cuda_version": version,
        "cuda_archs": ["9.0"],
        "left_out": {},
    }
    assert compiled.lines == []
    assert use(compiled.library)["cuda"]


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_the_cpu_kernels_compute(compiled, isa):
    result = use(compiled.library, isa)
    assert result["cpu"]
    assert max(result["errors"].values()) < 4, result["errors"]


def test_an_unknown_instruction_set_is_an_error(compiled):
    done = run(sys.executable, "-c", USE_LIBRARY, compiled.library, env={"NNFAST_CPU_ISA": "mmx"})
    assert "NNFAST_CPU_ISA is 'mmx'; it takes generic, avx2 or avx512" in done.stderr


def test_the_library_needs_only_the_stable_abi():
    """Of the checkout's own, which has all families."""
    library = ROOT / "nnfast/_C.so"
    if not (library.exists() and shutil.which("nm")):
        pytest.skip("no nm" if library.exists() else f"{library.name} was not built")
    symbols = run("nm", "-D", library).stdout.splitlines()
    names = {line.split()[-1]: line.split()[-2] for line in symbols}
    assert not [name for name in names if re.match(r"_?Py", name)]
    outside = {name for name, kind in names.items() if kind in "Uw" and "@" not in name}
    compiler_own = {name for name in outside if name.startswith("_ITM_")} | {"__gmon_start__"}
    torch_own = outside - compiler_own
    assert not [name for name in torch_own if not re.match(r"(aoti_)?torch_\w+$", name)]
    assert not [name for name in names if re.search(r"3c10|2at|N5torch", name) and names[name] in "Uw"]
    assert "aoti_torch_get_current_cuda_stream" not in names


STREAM = """
#include "common/stream.h"
extern "C" const char* found(long* stream) {
  static std::string message;
  try {
    *stream = long(nnfast::cuda::current_stream(5));
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}
"""
STREAM_OF_TORCH = """
extern "C" int aoti_torch_get_current_cuda_stream(int device, void** stream) {
  *stream = (void*)(1000l + device);
  return 0;
}
"""
USE_STREAM = """
import ctypes, sys
loaded = [ctypes.CDLL(path) for path in sys.argv[1:]]  # as Python loads: for itself
stream = ctypes.c_long()
loaded[-1].found.restype = ctypes.c_char_p
message = loaded[-1].found(ctypes.byref(stream)).decode()
print(message or stream.value)
"""


def test_the_current_stream_is_found_in_torchs_library(tmp_path):
    """Which is loaded for torch alone, under its name, or not there."""
    needs(toolchain.find_compiler)
    for name, source in (("ours.so", STREAM), ("libtorch_cuda.so", STREAM_OF_TORCH)):
        (tmp_path / "some.cpp").write_text(source)
        flags = ["-std=c++20", "-shared", "-fPIC", "-I", ROOT / "csrc", f"-Wl,-soname,{name}"]
        files = ["-o", tmp_path / name, tmp_path / "some.cpp", "-ldl"]
        run(toolchain.get_cxx_compiler(), *flags, *files)
    ours, torchs = tmp_path / "ours.so", tmp_path / "libtorch_cuda.so"
    done = run(sys.executable, "-c", USE_STREAM, torchs, ours)
    assert done.stdout == "1005\n", done.stderr
    done = run(sys.executable, "-c", USE_STREAM, ours)
    assert "is not in libtorch_cuda.so" in done.stdout


def test_without_nvcc(tmp_path):
    needs(toolchain.find_compiler)
    wheel = Wheel(tmp_path, NO_CUDA)
    assert re.fullmatch(COMPILED, wheel.tag), wheel.log
    assert (wheel.facts["cpu"], wheel.facts["cuda"], wheel.facts["cuda_archs"]) == (True, False, [])
    assert wheel.facts["left_out"] == {"cuda": "[Errno 2] No such file or directory: '/nonexistent/bin/nvcc'"}
    assert wheel.lines == ["nnfast: CUDA kernels left out: " + wheel.facts["left_out"]["cuda"]]
    result = use(wheel.library)
    assert result["cpu"]
    assert not result["cuda"]


def broken(tmp_path):
    return script(tmp_path / "tools/bin/nvcc", "echo 'tool: fatal error: no licence' >&2; exit 1\n")


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        (lambda tmp_path: {"CXX": "/nonexistent/c++"}, "No such file or directory: '/nonexistent/c++'"),
        (lambda tmp_path: {"CXX": broken(tmp_path)}, "nvcc fails: tool: fatal error: no licence"),
        (lambda tmp_path: {"NNFAST_EXTENSION": "0"}, "NNFAST_EXTENSION=0"),
    ],
    ids=["no compiler", "broken compiler", "switched off"],
)
def test_pure_python(tmp_path, env, reason):
    wheel = Wheel(tmp_path, env(tmp_path))
    assert wheel.tag == PYTHON_ONLY, wheel.log
    assert "_C.so" not in wheel.files
    assert {name for name, done in wheel.facts.items() if done} == {"left_out"}
    assert len(wheel.lines) == 2
    assert all(reason in why for why in wheel.facts["left_out"].values())
    assert set(wheel.facts["left_out"]) == {"cpu", "cuda"}


def test_broken_nvcc(tmp_path):
    needs(toolchain.find_compiler)
    broken(tmp_path)
    wheel = Wheel(tmp_path, {"CUDA_HOME": str(tmp_path / "tools")})
    assert wheel.facts["cpu"], wheel.log
    assert wheel.facts["left_out"]["cuda"].endswith("bin/nvcc fails: tool: fatal error: no licence")


def test_cuda_sources_that_do_not_compile(tmp_path):
    needs(toolchain.find_cuda)
    wheel = Wheel(
        tmp_path, {}, lambda source: (source / "csrc/activation/cuda.cu").write_text("#error on purpose\n")
    )
    assert (wheel.facts["cpu"], wheel.facts["cuda"]) == (True, False), wheel.log
    (line,) = wheel.lines
    log = Path(line.split()[-1])
    assert "on purpose" in log.read_text()
    log.unlink()


@pytest.mark.parametrize(
    ("switch", "env"), [("NNFAST_CUDA", NO_CUDA), ("NNFAST_EXTENSION", {"CXX": "/nonexistent/c++"})]
)
def test_insisting_on_what_cannot_be_built_is_an_error(tmp_path, switch, env):
    wheel = Wheel(tmp_path, {switch: "1", **env})
    assert wheel.done.returncode != 0
    assert f"nnfast: {switch}=1, but [Errno 2] No such file or directory: '/nonexistent/" in wheel.log


def test_editable(tmp_path):
    needs(toolchain.find_compiler)
    source = copy_repository(tmp_path / "source")
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (packages / "ours.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    pip = [sys.executable, "-m", "pip", "--python", tmp_path / "venv/bin/python", "install"]
    done = run(*pip, "--no-build-isolation", "--no-deps", "-e", source, env={"NNFAST_CUDA": "0"})
    assert done.returncode == 0, done.stderr
    facts = json.loads((source / "nnfast/_build.json").read_text())
    assert (facts["cpu"], facts["left_out"]) == (True, {"cuda": "NNFAST_CUDA=0"})
    assert use(source / "nnfast/_C.so")["cpu"]
    where = "import importlib.util as u; print(u.find_spec('nnfast').submodule_search_locations[0])"
    assert Path(run(tmp_path / "venv/bin/python", "-c", where, cwd="/").stdout.strip()) == source / "nnfast"
