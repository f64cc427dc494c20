"""Builds nnfast/_C.so as far as this machine's tools allow; nnfast/_build.json says what was built.

NNFAST_EXTENSION and NNFAST_CUDA decide by hand: 0 leaves a part out, 1 insists on it.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import torch.utils.cpp_extension as cpp
from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

sys.path.insert(0, "csrc")
import toolchain

SWITCHES = {"cpu": ["NNFAST_EXTENSION"], "cuda": ["NNFAST_CUDA", "NNFAST_EXTENSION"]}
FLAGS = {"cxx": toolchain.CXX_FLAGS, "nvcc": toolchain.NVCC_FLAGS}


class _BuildExt(cpp.BuildExtension.with_options(no_python_abi_suffix=True)):
    def attempt(self, part, action, *args):
        """action(*args). Where it fails: None and one line, or the end where the part is insisted on."""
        try:
            if off := [name for name in SWITCHES[part] if os.environ.get(name) == "0"]:
                raise RuntimeError(f"{off[0]}=0")
            return action(*args)
        except (RuntimeError, OSError) as error:
            if os.environ.get(SWITCHES[part][0]) == "1":
                raise SystemExit(f"nnfast: {SWITCHES[part][0]}=1, but {error}") from None
            self.facts["left_out"][part] = str(error)
            print(f"nnfast: {part.upper()} kernels left out: {error}", flush=True)

    def build_extensions(self):
        self.facts["compiler"] = self.attempt("cpu", toolchain.find_compiler)
        cuda = self.attempt("cuda", lambda: toolchain.find_compiler() and toolchain.find_cuda())
        if cuda and self.attempt("cuda", self.compile, *cuda):
            self.facts |= {"cpu": True, "cuda": True, "cuda_version": cuda[1], "cuda_archs": cuda[2]}
        elif self.facts["compiler"] and self.attempt("cpu", self.compile):
            self.facts["cpu"] = True
        else:
            self.extensions.clear()

    def compile(self, cuda_home="", version="", archs=()):
        library = self.extensions[0]
        library.sources = sorted(map(str, Path("csrc").glob("*/*.c*" if cuda_home else "*/*.cpp")))
        library.libraries = ["torch_cpu"] + ["cudart_static", "dl", "rt"] * bool(cuda_home)
        library.library_dirs = [*cpp.library_paths(), f"{cuda_home}/lib64"]
        cpp.CUDA_HOME, os.environ["TORCH_CUDA_ARCH_LIST"] = cuda_home, ";".join(archs)
        file, log = tempfile.mkstemp(prefix="nnfast-build-", suffix=".log")
        ours = os.dup(1), os.dup(2)
        os.dup2(file, 1), os.dup2(file, 2)
        try:
            super().build_extensions()
        except Exception as error:
            os.write(file, f"{error}\n".encode())
            raise RuntimeError(f"they do not compile; the compiler's output is in {log}") from error
        finally:
            os.dup2(ours[0], 1), os.dup2(ours[1], 2)
        return not Path(log).unlink()

    def run(self):
        self.facts = {"cpu": False, "cuda": False, "cuda_version": None, "cuda_archs": [], "left_out": {}}
        super().run()
        library = Path(self.get_ext_fullpath("nnfast._C"))
        self.extensions or library.unlink(missing_ok=True)  # of an earlier build
        library.with_name("_build.json").write_text(json.dumps(self.facts, indent=1))


class _Wheel(bdist_wheel):
    def get_tag(self):
        built = self.get_finalized_command("build_ext").extensions
        return "py3", "none", super().get_tag()[2] if built else "any"


LIBRARY = cpp.CppExtension("nnfast._C", [], include_dirs=[str(toolchain.CSRC)], extra_compile_args=FLAGS)
setup(ext_modules=[LIBRARY], cmdclass={"build_ext": _BuildExt, "bdist_wheel": _Wheel})
