"""Focal loss as modules and as functions: of softmax over classes, and of sigmoids as torchvision's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import linear, op


def softmax_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float | Tensor = 1,
    gamma: float = 2,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Multi-class focal loss: alpha * (1 - p)**gamma * ce, ce = cross_entropy(inputs, targets), p = exp(-ce).

    Args:
        inputs: logits (N, C), (C,) or (N, C, d1, ...); any floating-point dtype.
        targets: classes (N,), () or (N, d1, ...) in int64, int32 or uint8, or class probabilities, of inputs'
            shape and a floating-point dtype.
        alpha: a number, or a tensor (C,) with a factor for each class; the mean's denominator is without it.
        gamma: how much less a well-classified example counts, at least 0; 0 is cross entropy.
        weight: (C,), `F.cross_entropy`'s weight: a factor that enters the mean's denominator, but not p.
        ignore_index: targets of this class give no loss and no gradient, and do not count in the mean.
        label_smoothing: in [0, 1]; smooths the cross entropy as `F.cross_entropy` does, while p stays the
            probability of the true class: alpha * (1 - p)**gamma * cross_entropy(..., label_smoothing).
        reduction: "none", "mean" or "sum". The mean divides as `F.cross_entropy` does: by the number of
            targets not ignored, or the sum of their weights; with class probabilities by that of rows.

    With class probabilities y, p = exp(sum_j y_j log p_j) and a tensor alpha acts as sum_j y_j alpha_j.

    Returns:
        A scalar, or with reduction "none" a tensor of the shape that class targets have, in inputs' dtype; in
        float32 under autocast.

    Raises:
        TypeError: for a wrong type or dtype.
        ValueError: for a wrong shape, device, gamma, alpha, label_smoothing or reduction.
        IndexError: on the cpu, for a class out of range.
        BackendError: if a forced backend cannot serve.

    Source: Lin et al. 2017, arXiv:1708.02002, eq. 5, over softmax.
    """
    return op.softmax_focal_loss(
        inputs, targets, alpha, gamma, weight, ignore_index, label_smoothing, reduction
    )


def sigmoid_focal_loss(
    inputs: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2, reduction: str = "none"
) -> Tensor:
    """Binary focal loss of every logit, `torchvision.ops.sigmoid_focal_loss`:

    (alpha t + (1 - alpha)(1 - t)) * (1 - p_t)**gamma * ce, with p = sigmoid(x), p_t = p t + (1 - p)(1 - t).

    Args:
        inputs: logits x of any shape; any floating-point dtype.
        targets: t, of the same shape, in [0, 1]; any dtype.
        alpha: weight of the positive class in [0, 1]; below 0 there is no weighting.
        gamma: at least 0; 0 is binary cross entropy.
        reduction: "none", "mean" or "sum".

    Returns:
        A tensor of inputs' shape, or a scalar, in inputs' dtype; in float32 under autocast.

    Raises:
        TypeError: for a wrong type or dtype.
        ValueError: for a wrong shape, device, alpha, gamma or reduction.
        BackendError: if a forced backend cannot serve.

    Source: Lin et al. 2017, arXiv:1708.02002, eq. 5.
    """
    return op.sigmoid_focal_loss(inputs, targets, alpha, gamma, reduction)


def linear_focal_loss(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    alpha: float | Tensor = 1,
    gamma: float = 2,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """`softmax_focal_loss(F.linear(x, weight, bias), target, ...)` without ever holding all logits.

    They are made a chunk of rows at a time, a sixteenth of them or 4M if that is more. With a mean or a sum
    the gradients are made along with the loss; with reduction "none" the backward makes the logits once more.
    All logits are held under torch.func's transforms, for a double backward, where alpha or class_weight
    require grad, and under torch.compile where torch's own operations serve.

    Args:
        x: (..., D); any floating-point dtype.
        weight: (C, D), as `nn.Linear` has it, in x's dtype.
        target: (...) classes in int64, int32 or uint8.
        bias: (C,), in x's dtype.
        alpha, gamma, ignore_index, label_smoothing, reduction: as `softmax_focal_loss` takes them.
        class_weight: (C,), `softmax_focal_loss`'s weight.

    Returns:
        A scalar, or with reduction "none" a tensor of target's shape, in x's dtype; float32 under autocast.

    Raises:
        TypeError, ValueError, IndexError, BackendError: as `softmax_focal_loss` does.

    Source: Lin et al. 2017, arXiv:1708.02002, eq. 5, over softmax.
    """
    return linear.linear_focal_loss(
        x, weight, target, bias, alpha, gamma, class_weight, ignore_index, label_smoothing, reduction
    )


# what `nnfast.explain` looks up
linear_focal_loss.nnfast_op = "linear_focal_loss"  # type: ignore[attr-defined]
softmax_focal_loss.nnfast_op = "softmax_focal_loss"  # type: ignore[attr-defined]
sigmoid_focal_loss.nnfast_op = "sigmoid_focal_loss"  # type: ignore[attr-defined]


class FocalLoss(nn.Module):
    """Multi-class focal loss: the mean of alpha * (1 - p)**gamma * ce. Arguments: `softmax_focal_loss`'s.

    Inputs: logits (N, C), (C,) or (N, C, d1, ...). Targets: classes, or probabilities of inputs' shape.
    Tensors alpha and weight are buffers that move with the module and stay out of its state_dict.
    """

    nnfast_op = "softmax_focal_loss"
    alpha: float | Tensor
    weight: Tensor | None

    def __init__(
        self,
        alpha: float | Tensor = 1,
        gamma: float = 2,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        if isinstance(alpha, Tensor):
            self.register_buffer("alpha", alpha, persistent=False)
        else:
            self.alpha = alpha
        self.register_buffer("weight", weight, persistent=False)
        self.gamma = gamma
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        op.check_options("nnfast.FocalLoss", gamma, reduction)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """See `nnfast.functional.softmax_focal_loss`."""
        return op.softmax_focal_loss(
            inputs,
            targets,
            self.alpha,
            self.gamma,
            self.weight,
            self.ignore_index,
            self.label_smoothing,
            self.reduction,
        )

    def extra_repr(self) -> str:
        """Alpha, gamma and what differs from the defaults."""
        return _loss_repr(self, self.weight, "weight")


def _loss_repr(loss: FocalLoss | LinearFocalLoss, weight: Tensor | None, name: str) -> str:
    alpha = f"(C={len(loss.alpha)})" if isinstance(loss.alpha, Tensor) and loss.alpha.dim() else loss.alpha
    parts = [f"alpha={alpha}", f"gamma={loss.gamma}"]
    if weight is not None:
        parts.append(f"{name}=(C={len(weight)})")
    defaults = {"ignore_index": -100, "label_smoothing": 0.0, "reduction": "mean"}
    parts += [
        f"{key}={getattr(loss, key)!r}" for key, default in defaults.items() if getattr(loss, key) != default
    ]
    return ", ".join(parts)


class SigmoidFocalLoss(nn.Module):
    """Binary focal loss of every logit. Arguments: `sigmoid_focal_loss`'s. Inputs and targets: one shape."""

    nnfast_op = "sigmoid_focal_loss"

    def __init__(self, alpha: float = 0.25, gamma: float = 2, reduction: str = "none") -> None:
        super().__init__()
        op.check_options("nnfast.SigmoidFocalLoss", gamma, reduction)
        self.alpha = alpha
        self.gamma = gamma
        self.reduction = reduction

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """See `nnfast.functional.sigmoid_focal_loss`."""
        return op.sigmoid_focal_loss(inputs, targets, self.alpha, self.gamma, self.reduction)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"alpha={self.alpha}, gamma={self.gamma}, reduction={self.reduction!r}"


class LinearFocalLoss(nn.Linear):
    """A classifier with its focal loss: (x, target) to the loss, the logits never whole in memory.

    Called with x alone it gives the logits, as the `nn.Linear` that it is. Arguments: `nn.Linear`'s, then
    `linear_focal_loss`'s; tensors alpha and class_weight are buffers that stay out of the state_dict.

    x: (..., in_features). Target: (...) classes.
    """

    nnfast_op = "linear_focal_loss"
    alpha: float | Tensor
    class_weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        bias: bool = True,
        *,
        alpha: float | Tensor = 1,
        gamma: float = 2,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        op.check_options("nnfast.LinearFocalLoss", gamma, reduction)
        super().__init__(in_features, num_classes, bias, device, dtype)
        if isinstance(alpha, Tensor):
            self.register_buffer("alpha", alpha, persistent=False)
        else:
            self.alpha = alpha
        self.register_buffer("class_weight", class_weight, persistent=False)
        self.gamma = gamma
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.reduction = reduction

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        """The loss, see `nnfast.functional.linear_focal_loss`; without a target the logits."""
        if target is None:
            return super().forward(x)
        return linear.linear_focal_loss(
            x,
            self.weight,
            target,
            self.bias,
            self.alpha,
            self.gamma,
            self.class_weight,
            self.ignore_index,
            self.label_smoothing,
            self.reduction,
        )

    def extra_repr(self) -> str:
        """The layer's shape, and the loss's arguments that differ from the defaults."""
        return f"{super().extra_repr()}, {_loss_repr(self, self.class_weight, 'class_weight')}"


def class_balanced_alpha(counts: Tensor | Sequence[int], beta: float = 0.999) -> Tensor:
    """Alpha for each class from how often it occurs, by the effective number of samples.

    alpha_c = (1 - beta) / (1 - beta**n_c), scaled so that they sum to the number of classes. A class that
    does not occur gets 0.

    Args:
        counts: (C,) examples of every class, none negative.
        beta: in [0, 1]; 0 gives every class 1, and 1 the inverse of its count.

    Returns:
        A float32 tensor (C,), on counts' device.

    Raises:
        ValueError: for another shape, a negative or non-finite count, no examples at all, or another beta.

    Source: Cui et al. 2019, arXiv:1901.05555, eq. 4 and section 4.
    """
    n = torch.as_tensor(counts).double()
    if n.dim() != 1 or not n.numel():
        raise ValueError(f"nnfast.class_balanced_alpha: counts has shape {list(n.shape)}; it needs (C,)")
    if not (n.isfinite().all() and (n >= 0).all() and n.any()):
        raise ValueError(
            f"nnfast.class_balanced_alpha: counts is {n.tolist()}; it needs numbers of at least 0, not all 0"
        )
    if not 0 <= beta <= 1:
        raise ValueError(f"nnfast.class_balanced_alpha: beta is {beta}; it needs to be within [0, 1]")
    # (1 - beta**n) / (1 - beta), of which n is the limit at beta = 1
    effective = n if beta == 1 else (1 - beta**n) / (1 - beta)
    alpha = (1 / effective).where(n > 0, 0)
    return (alpha * (len(n) / alpha.sum())).float()
