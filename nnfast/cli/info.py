"""Show what is installed, what was built, and which backend serves each operation on each device.

Whatever is missing is named with its reason.
"""

from __future__ import annotations

import argparse
import os
import platform
from typing import Any

import torch

from .. import __version__
from ..core import extension, product
from ..core.op import BACKENDS, OPS, forced, triton_why_not
from ._text import facts, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None: `nnfast info` shows everything."""


def run(_: argparse.Namespace) -> int:
    """Print it."""
    print(facts(_versions() + _devices() + _library()))
    for device in ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]:
        print(f"\n{_operations(device)}")
    return 0


def _versions() -> list[tuple[str, str]]:
    cuda, hip = torch.version.cuda, torch.version.hip
    toolkit = f"with CUDA {cuda}" if cuda else f"with ROCm {hip}" if hip else "without CUDA"
    return [
        ("nnfast", __version__),
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", f"{torch.__version__}, built {toolkit}"),
        ("triton", _triton()),
    ]


def _triton() -> str:
    if missing := triton_why_not("cuda"):
        return missing
    from ..core import triton

    return triton.VERSION + (", interpreted (TRITON_INTERPRET=1)" if triton.INTERPRETED else "")


def _devices() -> list[tuple[str, str]]:
    found = [("cpu", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")]
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        found.append(
            (f"cuda:{i}", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB")
        )
    if len(found) == 1:
        found.append(("cuda", "torch sees no device"))
    return found


def _library() -> list[tuple[str, str]]:
    """The compiled library: loaded or why not, what is in it, and what the build left out."""
    built: dict[str, Any] = dict(extension.build_facts())
    left_out = built.pop("left_out", {})
    lines = [("library", extension.ERROR or f"{extension.PATH.name} is loaded")]
    if not built and not left_out and extension.ERROR:
        lines.append(("build", "left no record: setup.py has not run in this tree"))
    if compiler := built.get("compiler"):
        lines.append(("compiler", str(compiler)))
    if built.get("cuda"):
        archs = ", ".join(built.get("cuda_archs") or ["not recorded"])
        lines.append(("CUDA kernels", f"built by CUDA {built.get('cuda_version')} for {archs}"))
    lines.append(
        (
            "products",
            f"torch's: {missing}" if (missing := product.missing()) else "ours, large ones on the CPU",
        )
    )
    lines += [("left out", f"{part.upper()} kernels: {reason}") for part, reason in left_out.items()]
    if name := forced():
        source = " by NNFAST_BACKEND" if os.environ.get("NNFAST_BACKEND") == name else ""
        return [*lines, ("forced", f"backend {name!r}{source}")]
    return [*lines, ("forced", "no backend; the best one serves")]


def _operations(device: str) -> str:
    """Operation x backend on a device; numbered reasons below."""
    try:
        calls = [(name, op, op.example(device)) for name, op in sorted(OPS.items())]
    except RuntimeError as error:  # a device in use, out of memory, or too old for this torch
        return f"Operations on {device}: not known, for it gives no memory: {str(error).splitlines()[0]}"
    notes: dict[str, int] = {}
    rows = []
    for name, op, args in calls:
        found = op.explain(*args)
        cells = dict.fromkeys(BACKENDS, "-")
        for b in op.backends:
            why_not, reasons = b.why_not(*args), found.reasons[b.name]
            if b.name == found.backend:
                cells[b.name] = "serves"
            elif not why_not and all("comes first" in reason for reason in reasons):
                cells[b.name] = "available"
            else:
                number = notes.setdefault((why_not or reasons)[0], len(notes) + 1)
                cells[b.name] = f"{'no' if why_not else 'available'} [{number}]"
        shape = next(arg.shape for arg in args if isinstance(arg, torch.Tensor))
        rows.append([name, "x".join(map(str, shape)), *cells.values()])
    title = f"Operations on {device}, float32:"
    lines = [title, table(["", "of", *BACKENDS], rows, left=2 + len(BACKENDS))]
    if notes:
        lines.append(facts([(f"[{number}]", note) for note, number in notes.items()]))
    return "\n".join(lines)
