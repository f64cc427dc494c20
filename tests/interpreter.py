"""Triton's interpreter, mended: its bfloat16, and its speed."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import torch


@functools.cache
def mend() -> None:
    """Once a process, before a kernel runs."""
    _round_in_interpreter()
    _multiply_in_interpreter()
    _patch_language_once()


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


def _multiply_in_interpreter() -> None:
    """Triton's interpreter multiplies the bits of bfloat16 matrices as integers: widen them."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    multiply = interpreter.InterpreterBuilder.create_dot

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        values = (handle.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(values, tl.float32)

    def multiplied(self, a, b, *args):
        return multiply(self, widened(a), widened(b), *args)

    interpreter.InterpreterBuilder.create_dot = multiplied


def _patch_language_once() -> None:
    """The interpreter walks triton.language at every call of a function, most of its time: once is enough.

    It stays patched, as nothing is compiled in this process; what compiles ahead of time has its own.
    """
    from triton.runtime import interpreter

    patch = functools.cache(interpreter._patch_lang)

    def patched(function):
        patch(function)
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = patched
