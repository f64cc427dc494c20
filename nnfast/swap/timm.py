"""timm's own: activations as get_act_layer hands them out, and BatchNormAct2d."""

from __future__ import annotations

from typing import Any

from ..activation.module import Mish, Swish
from .rule import known

modules = known(
    {
        "timm.layers.activations.Swish": Swish,
        "timm.layers.activations.Mish": Mish,
        "timm.layers.activations_me.SwishMe": Swish,
        "timm.layers.activations_me.MishMe": Mish,
    }
)
"""The rule of the activations. SwishMe and the two Mish never compute in place, and keep no `inplace`."""


def is_norm_act(module: object) -> bool:
    """It is timm's BatchNormAct2d, whose forward is a batch norm's, then `drop`, then `act`."""
    cls: Any = getattr(type(module), "swapped_from", type(module))
    named = (cls.__module__, cls.__qualname__) == ("timm.layers.norm_act", "BatchNormAct2d")
    return named and cls.forward.__module__ == cls.__module__
