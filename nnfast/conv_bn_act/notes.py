"""What a module did while it was watched: its folded convolutions, and the modules called between them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn


class Folding(NamedTuple):
    """A folded convolution: how it was run, on what, and its result."""

    how: Any
    found: Any
    conv: nn.Module
    bn: nn.Module
    x: Tensor
    residual: Tensor | None
    act: str
    slope: float
    result: Tensor


class Call(NamedTuple):
    """A call of a module, and its result."""

    module: nn.Module
    x: Tensor
    result: Tensor


Notes = list[Folding | Call]

_THREAD = threading.local()


def taken() -> Notes | None:
    """The notes of this thread; None if nobody watches."""
    return getattr(_THREAD, "notes", None)


@contextmanager
def watching() -> Iterator[Notes]:
    """Notes what happens in this thread; not what is watched by itself within."""
    before = taken()
    notes: Notes = []
    _THREAD.notes = notes
    try:
        yield notes
    finally:
        _THREAD.notes = before


def call(module: Any, x: Any) -> Any:
    """module(x), noted as one call whatever it does."""
    notes = taken()
    if notes is None:
        return module(x)
    with watching():
        y = module(x)
    notes.append(Call(module, x, y))
    return y
