"""The compiled library: the one place that loads it, and that knows why it is not loaded.

It registers kernels for operators whose schemas the families define in Python, so every operator exists
without it.
"""

from __future__ import annotations

import ctypes
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .op import constant

PATH = Path(__file__).parent.parent / "_C.so"


def _load() -> str:
    if not PATH.exists():
        return f"{PATH.name} was not built"
    try:
        torch.ops.load_library(str(PATH))
    except OSError as error:
        return f"{PATH.name} cannot be loaded: {error}"
    return ""


ERROR = _load()
"""Why the library is not loaded, in the loader's words; "" if it is."""


@functools.cache
def function(name: str) -> Callable[..., int] | None:
    """A plain C function of the library, called with Python's lock held; None where there is none."""
    return None if ERROR else getattr(ctypes.PyDLL(str(PATH)), name, None)


@functools.cache
def build_facts() -> dict[str, Any]:
    """What the build wrote down: toolkit, architectures, what was left out and why. {} if it never ran."""
    path = PATH.with_name("_build.json")
    facts: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return facts


@constant
def why_not(operator: str, device: str) -> str:
    """Why the library has no kernel of `operator` ("silu") for `device` ("CPU" or "CUDA"); "" if it has."""
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"nnfast::{operator}", device):
        return ""
    left_out = build_facts().get("left_out", {}).get(device.lower())
    return f"nnfast was built without {device} kernels: {ERROR or left_out or 'the library has none'}"
