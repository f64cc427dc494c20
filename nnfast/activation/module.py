"""Swish, SiLU and Mish as modules and as functions: drop-ins for torch.nn's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .op import MISH, SILU, activate, small_first


@small_first(SILU)
def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """SiLU, also called Swish: input * sigmoid(input), elementwise.

    Args:
        input: any shape and strides; float64, float32, float16, bfloat16, or complex.
        inplace: write the result into `input` and return it.

    Returns:
        A tensor of input's shape and dtype, laid out in memory as `torch.nn.functional.silu` lays it out.

    Raises:
        TypeError: if input is not a tensor.
        NotImplementedError: for an integer or boolean dtype.
        RuntimeError: in place on a leaf that requires grad.
        BackendError: if a forced backend cannot serve.

    Source: Ramachandran et al. 2017, arXiv:1710.05941; Elfwing et al. 2017, arXiv:1702.03118.
    """
    return activate(SILU, input, inplace)


@small_first(SILU)
def swish(input: Tensor, inplace: bool = False) -> Tensor:
    """Swish with beta = 1: `silu`, that takes integers and booleans too where it is not in place.

    They give the default dtype, as they do in input * sigmoid(input).
    """
    if not inplace and isinstance(input, Tensor) and not (input.is_floating_point() or input.is_complex()):
        input = input.to(torch.get_default_dtype())
    return activate(SILU, input, inplace)


@small_first(MISH)
def mish(input: Tensor, inplace: bool = False) -> Tensor:
    """Mish: input * tanh(softplus(input)), elementwise.

    Args:
        input: any shape and strides; float64, float32, float16 or bfloat16.
        inplace: write the result into `input` and return it.

    Returns:
        A tensor of input's shape and dtype, laid out in memory as `torch.nn.functional.mish` lays it out.

    Raises:
        TypeError: if input is not a tensor.
        NotImplementedError: for a complex, integer or boolean dtype.
        RuntimeError: in place on a leaf that requires grad.
        BackendError: if a forced backend cannot serve.

    Source: Misra 2019, arXiv:1908.08681.
    """
    return activate(MISH, input, inplace)


# what `nnfast.explain` looks up
silu.nnfast_op = swish.nnfast_op = "silu"  # type: ignore[attr-defined]
mish.nnfast_op = "mish"  # type: ignore[attr-defined]


class SiLU(nn.SiLU):
    """Drop-in for `torch.nn.SiLU`: input * sigmoid(input). Input and output: any shape.

    Args:
        inplace: overwrite the input.
    """

    nnfast_op = "silu"

    def forward(self, input: Tensor) -> Tensor:
        """See `nnfast.functional.silu`."""
        return silu(input, self.inplace)


class Swish(SiLU):
    """Swish with beta = 1, input * sigmoid(input): `SiLU`, of integers too. Input and output: any shape.

    Args:
        inplace: overwrite the input.
    """

    def forward(self, input: Tensor) -> Tensor:
        """See `nnfast.functional.swish`."""
        return swish(input, self.inplace)


class Mish(nn.Mish):
    """Drop-in for `torch.nn.Mish`: input * tanh(softplus(input)). Input and output: any shape.

    Args:
        inplace: overwrite the input.
    """

    nnfast_op = "mish"

    def forward(self, input: Tensor) -> Tensor:
        """See `nnfast.functional.mish`."""
        return mish(input, self.inplace)
