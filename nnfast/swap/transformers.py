"""transformers' own activations: transformers.activations, as ACT2FN hands them out."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from ..activation.module import Mish, SiLU
from .rule import Proposal, known, new_class


def modules(module: nn.Module) -> list[Proposal]:
    """SiLUActivation and MishActivation, which calls the function in its `act`."""
    found = _silu(module)
    if (type(module).__module__, type(module).__name__) == ("transformers.activations", "MishActivation"):
        reasons = [] if vars(module).get("act") is F.mish else ["its act is not torch.nn.functional.mish"]
        found = new_class(module, Mish, reasons)
    return found


_silu = known({"transformers.activations.SiLUActivation": SiLU})
