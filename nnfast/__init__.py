"""Drop-in PyTorch modules on Triton, CUDA and vectorised CPU kernels: same, never slower, never silent."""

from . import functional
from .activation.module import Mish, SiLU, Swish
from .attention.encoder import TransformerEncoderLayer
from .attention.multihead import MultiheadAttention
from .attention.positional import RotaryEmbedding, SinusoidalPositionalEncoding
from .attention.self_attention import SelfAttention
from .conv_bn_act.blocks import BasicBlock, Bottleneck, ConvBNAct, ResidualBlock
from .conv_bn_act.module import BatchNormAct2d, convert_sync_batchnorm
from .convolution.module import Conv2dAct
from .core.op import BackendError, Explanation, backend, explain
from .focal_loss.module import FocalLoss, LinearFocalLoss, SigmoidFocalLoss, class_balanced_alpha
from .swap import restore, swap
from .swap.attention import register_transformers

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "BasicBlock",
    "BatchNormAct2d",
    "Bottleneck",
    "Conv2dAct",
    "ConvBNAct",
    "Explanation",
    "FocalLoss",
    "LinearFocalLoss",
    "Mish",
    "MultiheadAttention",
    "ResidualBlock",
    "RotaryEmbedding",
    "SelfAttention",
    "SiLU",
    "SigmoidFocalLoss",
    "SinusoidalPositionalEncoding",
    "Swish",
    "TransformerEncoderLayer",
    "backend",
    "class_balanced_alpha",
    "convert_sync_batchnorm",
    "explain",
    "functional",
    "register_transformers",
    "restore",
    "swap",
]
