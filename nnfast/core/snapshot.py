"""Tensors computed from parameters, kept as long as the parameters stay what they were."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

Source = Tensor | None


class Snapshot:
    """What tensors were when something was computed from them."""

    __slots__ = ("probes", "sources", "states")

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = tuple(sources)
        self.states = [_state(t) for t in self.sources]
        with torch.inference_mode(False), torch.no_grad():
            self.probes = [_probe(t) for t in self.sources]

    def holds(self, sources: Sequence[Source]) -> bool:
        """They are the same tensors, and unchanged."""
        for now, then, state in zip(sources, self.sources, self.states, strict=True):
            if now is not then or (now is not None and _state(now) != state):
                return False
        return all(probe is None or torch.equal(*probe) for probe in self.probes)


def _state(source: Source) -> tuple[int, int] | None:
    """What changes when a tensor's values do."""
    return None if source is None else (source._version, source.data_ptr())


def _probe(source: Source) -> tuple[Tensor, Tensor] | None:
    """A few elements and what they are now: not all writes move the version counter, as those to `.data`."""
    if source is None or not (source.is_cpu and source.is_floating_point() and source.numel()):
        return None
    flat = (
        source.data.flatten() if source.is_contiguous() else source.data.as_strided((source.numel(),), (1,))
    )
    view = flat[:: max(flat.numel() // 32, 1)]
    return view, view.clone()


def hooked(module: nn.Module) -> bool:
    """Somebody watches the module's calls."""
    state = vars(module)
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    )
