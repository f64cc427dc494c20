"""The functions behind nnfast's modules."""

from .activation.module import mish, silu, swish
from .attention.module import attention
from .attention.positional import rotary_embedding
from .conv_bn_act.blocks import conv_bn_act
from .conv_bn_act.module import batch_norm_act
from .convolution.module import conv2d_act
from .focal_loss.module import linear_focal_loss, sigmoid_focal_loss, softmax_focal_loss

__all__ = [
    "attention",
    "batch_norm_act",
    "conv2d_act",
    "conv_bn_act",
    "linear_focal_loss",
    "mish",
    "rotary_embedding",
    "sigmoid_focal_loss",
    "silu",
    "softmax_focal_loss",
    "swish",
]
