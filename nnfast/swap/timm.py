"""timm's own activations: timm.layers.activations and activations_me, as get_act_layer hands them out."""

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
"""The rule. SwishMe and the two Mish never compute in place, and keep no `inplace`."""
