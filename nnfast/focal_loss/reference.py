"""Focal loss in plain PyTorch: the truth of the tests, the `reference` backend, and double backward.

Lin et al. 2017 (arXiv:1708.02002): alpha_t * (1 - p_t)**gamma * -log(p_t), with p_t the probability that
softmax, or sigmoid, gives to the true class.

Half types are computed in float32, their compute dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)


def wide(x: Tensor) -> Tensor:
    """x in its compute dtype."""
    return x.float() if x.dtype in _HALF else x


def power(q: Tensor, gamma: float) -> Tensor:
    """q**gamma for q in [0, 1]; 0**0 is 1. Its derivative at q = 0 is finite for gamma < 1 too."""
    if not float(gamma).is_integer():
        q = q.clamp(min=torch.finfo(q.dtype).tiny)
    return q**gamma


def _true_class(x: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of every row: whether it counts, its class (N, 1, S), and where that is in x (N, C, S)."""
    valid = target != ignore_index
    index = target.where(valid, 0).unsqueeze(1)
    classes = torch.arange(x.shape[1], device=x.device).unsqueeze(-1)
    return valid, index, classes == index


def _log_odds(x: Tensor, index: Tensor, true: Tensor) -> Tensor:
    """z = log((1 - p_t) / p_t), to full precision however small p_t or 1 - p_t is."""
    others = x.masked_fill(true, -torch.inf)
    alone = (others == -torch.inf).all(1, keepdim=True)  # where logsumexp has no derivative
    log_others = others.masked_fill(alone, 0).logsumexp(1).masked_fill(alone.squeeze(1), -torch.inf)
    return log_others - x.gather(1, index).squeeze(1)


def softmax_focal_loss(
    x: Tensor, target: Tensor, alpha: Tensor | None, gamma: float, ignore_index: int
) -> Tensor:
    """x: (N, C, S); target: (N, S) classes; alpha: (C,). Losses (N, S) in the compute dtype.

    With z as above -log p_t = log(1 + e**z) and log(1 - p_t) = -log(1 + e**-z), which any number of
    derivatives leaves finite.
    """
    x = wide(x)
    valid, index, true = _true_class(x, target, ignore_index)
    z = _log_odds(x, index, true)
    loss: Tensor = -F.logsigmoid(-z)
    if gamma:
        loss = (gamma * F.logsigmoid(z)).exp() * loss
    if alpha is not None:
        loss = loss * alpha[index.squeeze(1)]
    return loss.where(valid, 0)


def _slope(z: Tensor, alpha: Tensor | None, gamma: float) -> tuple[Tensor, Tensor]:
    """k and q = 1 - p_t, for dloss/dx_j = k * (p_j - delta_jt).

    k = alpha_t * q**gamma * (1 + gamma * p_t * ce / q), with ce = -log p_t, and the limit 1 of ce / q at
    q = 0. alpha: that of each row.
    """
    q, ce = torch.sigmoid(z), -F.logsigmoid(-z)
    k = torch.ones_like(ce)
    if gamma:
        none = q == 0
        ratio = (ce / q.masked_fill(none, 1)).masked_fill(none, 1)
        k = (gamma * F.logsigmoid(z)).exp() * (1 + gamma * torch.sigmoid(-z) * ratio)
    return k if alpha is None else k * alpha, q


def softmax_focal_loss_slopes(
    x: Tensor, target: Tensor, alpha: Tensor | None, gamma: float, ignore_index: int
) -> Tensor:
    """(3, N, S): shift, scale and that at the target, of which `gradient_from_slopes` makes gradients."""
    x = wide(x)
    valid, index, true = _true_class(x, target, ignore_index)
    k, q = _slope(_log_odds(x, index, true), None if alpha is None else alpha[index.squeeze(1)], gamma)
    shift = x.amax(1).clamp(min=torch.finfo(x.dtype).min)  # of -inf alone
    scale = k / (x - shift.unsqueeze(1)).exp().sum(1)
    return torch.stack([shift, scale.where(valid, 0), (-k * q).where(valid, 0)])


def gradient_from_slopes(
    grad: Tensor, x: Tensor, target: Tensor, slopes: Tensor, ignore_index: int
) -> Tensor:
    """Gradient with respect to x, laid out as x.contiguous(): grad * exp(x_j - shift) * scale, and grad *
    at_target at the target."""
    dtype, x = x.dtype, wide(x)
    valid, _, true = _true_class(x, target, ignore_index)
    shift, scale, at_target = slopes.unsqueeze(2)
    slope = ((x - shift).exp() * scale).where(~true, at_target)
    result: Tensor = (wide(grad).unsqueeze(1) * slope).where(valid.unsqueeze(1), 0).to(dtype)
    return result.contiguous()


def softmax_focal_loss_backward(
    grad: Tensor, x: Tensor, target: Tensor, alpha: Tensor | None, gamma: float, ignore_index: int
) -> Tensor:
    """Gradient with respect to x: k * (p_j - delta_jt), laid out as x.contiguous(); differentiable."""
    dtype, x = x.dtype, wide(x)
    valid, index, true = _true_class(x, target, ignore_index)
    k, q = _slope(_log_odds(x, index, true), None if alpha is None else alpha[index.squeeze(1)], gamma)
    k = (wide(grad) * k).where(valid, 0)
    slope = x.softmax(1).where(~true, -q.unsqueeze(1))
    return (k.unsqueeze(1) * slope).where(valid.unsqueeze(1), 0).to(dtype).contiguous()


def smoothed_focal_loss(
    x: Tensor,
    target: Tensor,
    alpha: Tensor | None,
    weight: Tensor | None,
    gamma: float,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """The loss (N, S) with smoothed labels or class probabilities, from x: (N, C, S).

    target: (N, S) classes or (N, C, S) probabilities y. With e = label_smoothing and w = weight

        alpha * (1 - p_t)**gamma * sum_j w_j (-log p_j) ((1 - e) y_j + e / C)

    where p_t = exp(sum_j y_j log p_j) and alpha = sum_j y_j alpha_j, so of classes the true one's. The sum is
    torch's cross entropy; the factor before it knows no smoothing and no weight.
    """
    x = wide(x)
    # torch is faster and more exact over the last dimension
    log_p = x.squeeze(2).log_softmax(1).unsqueeze(2) if x.shape[2] == 1 else x.log_softmax(1)
    if target.is_floating_point():
        y, valid = target.to(x.dtype), None
        log_p_t = (y * log_p.masked_fill(y == 0, 0)).sum(1)  # 0 * log 0 is 0
        factor = power(1 - torch.exp(log_p_t), gamma)
        of_row = None if alpha is None else (y * alpha.unsqueeze(-1)).sum(1)
    else:
        valid, index, true = _true_class(x, target, ignore_index)
        y = true.to(x.dtype)
        if 0 < gamma < 1:  # 1 - p_t needs all digits where it is almost 0
            factor = (gamma * F.logsigmoid(_log_odds(x, index, true))).exp()
        else:
            factor = power(1 - torch.exp(log_p.gather(1, index).squeeze(1)), gamma)
        of_row = None if alpha is None else alpha[index.squeeze(1)]
    labels = (1 - label_smoothing) * y + label_smoothing / x.shape[1]
    terms = labels * log_p.masked_fill(labels == 0, 0)
    if weight is not None:
        terms = terms * weight.unsqueeze(-1)
    loss = factor * -terms.sum(1)
    if of_row is not None:
        loss = loss * of_row
    return loss if valid is None else loss.where(valid, 0)


def sigmoid_focal_loss(x: Tensor, target: Tensor, alpha: float, gamma: float) -> Tensor:
    """Elementwise alpha_t * (1 - p_t)**gamma * ce, with ce the binary cross entropy of logits; x's dtype."""
    return sigmoid_formula(wide(x), wide(target), alpha, gamma, _sigmoid).to(x.dtype)


def _sigmoid(x: Tensor) -> Tensor:
    """sigmoid(x) whose derivative p (1 - p) keeps its digits where p is almost 1."""
    return F.logsigmoid(x).exp()


def sigmoid_formula(
    x: Tensor,
    target: Tensor,
    alpha: float,
    gamma: float,
    sigmoid: Callable[[Tensor], Tensor] = torch.sigmoid,
) -> Tensor:
    """The same in the dtype given. 1 - p_t = p (1 - t) + (1 - p) t, without cancellation."""
    ce = F.binary_cross_entropy_with_logits(x, target, reduction="none")
    if gamma:
        ce = ce * power(sigmoid(x) * (1 - target) + sigmoid(-x) * target, gamma)
    return ce * (alpha * target + (1 - alpha) * (1 - target)) if alpha >= 0 else ce


def sigmoid_focal_loss_backward(
    grad: Tensor, x: Tensor, target: Tensor, alpha: float, gamma: float
) -> Tensor:
    """Gradient with respect to x: grad * alpha_t * q**gamma * (p - t + gamma * ce * q' / q); differentiable.

    q = 1 - p_t = p (1 - t) + (1 - p) t, q' = p (1 - p) (1 - 2 t), and the limit 1 - 2 t of q' / q at q = 0.
    """
    dtype, x, target = x.dtype, wide(x), wide(target)
    p, not_p = torch.sigmoid(x), torch.sigmoid(-x)
    slope = p * (1 - target) - not_p * target
    if gamma:
        q = p * (1 - target) + not_p * target
        none = q == 0
        ratio = (p * not_p / q.masked_fill(none, 1)).masked_fill(none, 1) * (1 - 2 * target)
        ce = F.binary_cross_entropy_with_logits(x, target, reduction="none")
        slope = power(q, gamma) * (slope + gamma * ce * ratio)
    if alpha >= 0:
        slope = slope * (alpha * target + (1 - alpha) * (1 - target))
    return (wide(grad) * slope).to(dtype)
