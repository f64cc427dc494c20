"""The functions behind nnfast's modules."""

from .activation.module import mish, silu, swish

__all__ = ["mish", "silu", "swish"]
