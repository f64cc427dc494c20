"""nn.TransformerEncoderLayer's drop-in: torch's fused inference where that is faster, else our attention."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from ..core import product, tuning
from ..core.op import Explanation, describe, forced
from . import op
from .multihead import MultiheadAttention, is_small, recorded


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """nn.TransformerEncoderLayer: constructor, parameters, state_dict and results are its own.

    In eval mode without gradients torch's layer is one fused operation, which holds all scores and does not
    call self_attn. Where nnfast's attention is faster by more than the fusion gains, and where a backend is
    forced, its parts are called one after another, as in training, if self_attn is an
    `nnfast.MultiheadAttention`. A floating src_mask is added then, as in training; torch's fused operation
    takes it for a boolean one.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.1; Xiong et al. 2020, arXiv:2002.04745
    (norm_first).
    """

    nnfast_op = "attention"

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """As nn.TransformerEncoderLayer takes and gives them.

        Args:
            src: (N, L, E) if batch_first, else (L, N, E), or unbatched (L, E).
            src_mask: (L, L) or (N * heads, L, L); bool, True = not attended, or floating, added.
            src_key_padding_mask: (N, L); bool, True = not attended, or floating, added.
            is_causal: a promise that src_mask is causal.

        Returns:
            src's shape.

        Raises:
            What nn.TransformerEncoderLayer does.
            BackendError: if a forced backend cannot serve.
        """
        if isinstance(src, Proxy):
            return recorded(self, src, src_mask, src_key_padding_mask, is_causal)
        quick = forced() is None and is_small(src)
        if quick or _torchs_reasons(self, src, src_mask, src_key_padding_mask, is_causal):
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        masks = (src_mask, src_key_padding_mask)
        if self.norm_first:
            src = src + self._sa_block(self.norm1(src), *masks, is_causal=is_causal)
            y: Tensor = src + self._ff_block(self.norm2(src))
        else:
            src = self.norm1(src + self._sa_block(src, *masks, is_causal=is_causal))
            y = self.norm2(src + self._ff_block(src))
        return y

    def _ff_block(self, x: Tensor) -> Tensor:
        x = self.dropout(self.activation(product.applied(self.linear1, x)))
        return cast(Tensor, self.dropout2(product.applied(self.linear2, x)))

    def explain(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Explanation:
        """What `nnfast.explain` says of a call."""
        reasons = _torchs_reasons(self, src, src_mask, src_key_padding_mask, is_causal)
        if isinstance(self.self_attn, MultiheadAttention) and (not reasons or reasons == [_IN_PARTS]):
            return self.self_attn.explain(
                src, src, src, src_key_padding_mask, False, src_mask, is_causal=is_causal
            )
        return op.explain_torchs(describe((src,), {}), reasons)


_IN_PARTS = "torch's layer calls its parts one after another in training and for gradients"


def _torchs_reasons(
    m: nn.TransformerEncoderLayer,
    src: Tensor,
    src_mask: Tensor | None,
    src_key_padding_mask: Tensor | None,
    is_causal: bool,
) -> list[str]:
    """Why a call is for torch's forward, which then fuses if it can."""
    masks = [x for x in (src_mask, src_key_padding_mask) if x is not None]
    if type(m.self_attn) is not MultiheadAttention:
        return ["self_attn is torch's"]
    if m.training or (torch.is_grad_enabled() and _requires_grad(m, src, *masks)):
        return [_IN_PARTS]
    if type(src) is not Tensor or src.is_nested or src.dim() != 3:
        return ["src is no plain tensor of three dimensions"]
    if not all(x.dtype == torch.bool or x.is_floating_point() for x in masks):
        return ["masks need to be bool or floating"]
    if is_causal and src_mask is None:
        return ["is_causal without src_mask, which torch's fused layer passes over"]
    name = forced()
    if name is not None:
        return ["'aten' is forced"] if name == "aten" else []
    length = src.shape[1]
    if not (m.self_attn.batch_first and op.is_for_cpu(src, length)):
        return ["its attention is not for our CPU kernels"]
    if src.numel() < tuning.MULTIHEAD_ELEMENTS:  # below which self_attn would leave it to torch's as well
        return [f"{src.numel()} elements; measured to pay from {tuning.MULTIHEAD_ELEMENTS} on"]
    least = tuning.ENCODER_LENGTH_MASKED if masks else tuning.ENCODER_LENGTH
    if type(m.linear1) is nn.Linear and not product.why_not(src, m.linear1.weight):
        least = tuning.ENCODER_LENGTH_PRODUCTS
    if m.activation_relu_or_gelu and length < least:  # it fuses no other
        return [f"length {length}; measured to be faster than torch's fused layer from {least} on"]
    return []


def _requires_grad(m: nn.Module, *tensors: Tensor) -> bool:
    return any(x.requires_grad for x in tensors) or any(w.requires_grad for w in m.parameters())
