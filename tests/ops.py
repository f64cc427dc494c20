"""The table of operations that tests and benchmarks iterate: a new operation is a new row of `TABLE`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import nnfast
from nnfast.activation import reference
from nnfast.activation.reference import ACTIVATIONS
from nnfast.activation.reference import act as activated
from nnfast.attention import reference as attention_reference
from nnfast.attention.reference import Terms
from nnfast.conv_bn_act import op as batch_norm
from nnfast.conv_bn_act import reference as batch_norm_reference
from nnfast.convolution import reference as convolution_reference
from nnfast.core.operator import convolved_size
from nnfast.focal_loss import reference as focal_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Sample:
    """Named arguments of one call; the metric says what an error is measured against.

    "norm": the largest error over the largest magnitude of the truth; for values that cross zero.
    "relative": the largest error of an element over that element; for tails, where every digit counts.
    """

    name: str
    make: Callable[[], Tensor]
    metric: str = "norm"

    def __call__(self, dtype: torch.dtype, device: str) -> Tensor:
        """x in dtype on device, the same at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make().to(dtype).to(device)

    def error(self, result: Tensor, truth: Tensor) -> float:
        """Error of result against a float64 truth in this sample's metric; infinite where only one is NaN."""
        result, truth = result.detach().double().cpu(), truth.detach().double().cpu()
        if not torch.equal(result.isnan(), truth.isnan()):
            return float("inf")
        difference = (result - truth).nan_to_num(nan=0.0).abs()
        if not difference.numel():
            return 0.0
        tiny = torch.finfo(torch.float32).tiny
        if self.metric == "relative":
            return float((difference / truth.abs().clamp(min=tiny)).max())
        return float(difference.max() / truth.abs().max().clamp(min=tiny))


TRAITS = {
    "inplace": "takes inplace=True",
    "elementwise": "any shape, laid out as the input",
    "transforms": "serves under torch.func's transforms and forward-mode differentiation",
    "builtin": "torch has it as one function and one module, which it stands in for",
}


@dataclass(frozen=True)
class Case:
    """One operation: ours, torch's, the seed formulation, the truth, its samples and what it moves.

    Functions take x alone; what else they need is made from its shape. operators: name -> arguments from x.
    """

    name: str
    ours: Callable[..., Tensor]
    torchs: Callable[..., Tensor]
    module: type[torch.nn.Module]
    torch_module: type[torch.nn.Module]
    seed: Callable[[Tensor], Tensor]
    truth: Callable[[Tensor], Tensor]
    operators: dict[str, Callable[[Tensor], tuple[Any, ...]]]
    example: Sample
    """A few numbers."""
    samples: tuple[Sample, ...]
    """What errors are measured on. In "norm" they take many numbers: the largest error of two is an accident,
    and torch's own breaks the rule against ours there as readily as ours against torch's."""
    flops: dict[str, int] = field(default_factory=dict)
    """Floating-point operations of an element, exponential and division counted as one each."""
    family: str = "activation"
    variant: str = ""
    """Which way of calling the operation, where there are several rows of it."""
    shaped: Callable[[Tensor], Tensor] = lambda x: x
    """A vector in a shape that the operation takes, less some elements at its end."""
    dtypes: dict[str, tuple[torch.dtype, ...]] = field(default_factory=dict)
    """What a backend takes, where that is not every type."""
    traits: frozenset[str] = frozenset()
    """What holds of it, of `TRAITS`; a test of a trait runs for the rows that have it."""

    @property
    def label(self) -> str:
        """Name and variant."""
        return f"{self.name}-{self.variant}" if self.variant else self.name

    def takes(self, backend: str, dtype: torch.dtype) -> bool:
        """Whether a backend takes a type."""
        return dtype in self.dtypes.get(backend, DTYPES)

    def bytes_moved(self, direction: str, x: Tensor) -> int:
        """Bytes that any implementation must move through memory for x: inputs once, outputs once."""
        passes = {"forward": 2, "backward": 3, "forward+backward": 5}[direction]
        return passes * x.numel() * x.element_size()


def _seed_silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def _seed_mish(x: Tensor) -> Tensor:
    return x * torch.tanh(F.softplus(x))


_EXAMPLE = Sample("example", lambda: torch.tensor([[-2.5, -1.0, -0.3], [0.2, 1.1, 3.0]]))

_ACTIVATION_SAMPLES = (
    _EXAMPLE,
    Sample("body", lambda: torch.randn(7, 11, 13) * 4),
    Sample("tail", lambda: torch.linspace(-80, -6, 500), "relative"),
    Sample("large", lambda: torch.cat([torch.linspace(6, 100, 400), torch.logspace(2, 4, 50)]), "relative"),
    Sample(
        "near zero",
        lambda: torch.cat([torch.logspace(-30, -2, 200), -torch.logspace(-30, -2, 200)]),
        "relative",
    ),
)


def _activation(name: str, module: type, torch_module: type, seed: Any, flops: dict[str, int]) -> Case:
    return Case(
        name=name,
        ours=getattr(nnfast.functional, name),
        torchs=getattr(F, name),
        module=module,
        torch_module=torch_module,
        seed=seed,
        truth=getattr(reference, name),
        operators={
            name: lambda x: (x,),
            f"{name}_": lambda x: (x,),
            f"{name}_backward": lambda x: (torch.randn_like(x), x),
        },
        example=_EXAMPLE,
        samples=_ACTIVATION_SAMPLES,
        flops=flops,
        traits=frozenset(TRAITS),
    )


def class_targets(x: Tensor) -> Tensor:
    """A class for every row of logits x: (N, C, ...) or (C,)."""
    classes = x.shape[min(1, x.dim() - 1)]
    shape = x.shape[:1] * (x.dim() > 1) + x.shape[2:]
    return (torch.arange(math.prod(shape), device=x.device) * 7 % classes).reshape(shape)


def soft_targets(x: Tensor) -> Tensor:
    """A target in [0, 1] for every logit of x, the ends included; exact in every dtype."""
    targets = torch.tensor([0, 0.75, 0.5, 0.25, 1], dtype=x.dtype, device=x.device)
    size = math.prod(x.shape)
    return targets.repeat(size // 5 + 1)[:size].reshape(x.shape)


def seed_focal(x: Tensor, targets: Tensor, alpha: Any = 1, gamma: float = 2) -> Tensor:
    """The seed's multi-class focal loss, before its mean."""
    ce = F.cross_entropy(x, targets, reduction="none")
    return alpha * (1 - torch.exp(-ce)) ** gamma * ce


def matrix(x: Tensor) -> Tensor:
    """Weights (7, D) of a linear layer for x: (..., D); exact in every dtype."""
    return (torch.arange(7 * x.shape[-1], device=x.device) % 17 / 8 - 1).reshape(7, -1).to(x.dtype)


def row_targets(x: Tensor) -> Tensor:
    """One of `matrix`' 7 classes for every row of x: (..., D)."""
    shape = x.shape[:-1]
    return (torch.arange(math.prod(shape), device=x.device) * 3 % 7).reshape(shape)


def seed_linear_focal(x: Tensor) -> Tensor:
    """The seed's loss of a linear layer's outputs, one a row."""
    logits = F.linear(x, matrix(x)).reshape(-1, 7)
    return seed_focal(logits, row_targets(x).reshape(-1)).reshape(x.shape[:-1])


def seed_sigmoid_focal(x: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2) -> Tensor:
    """torchvision's sigmoid_focal_loss, without reduction."""
    p = torch.sigmoid(x)
    ce = F.binary_cross_entropy_with_logits(x, targets, reduction="none")
    loss = ce * ((1 - (p * targets + (1 - p) * (1 - targets))) ** gamma)
    return (alpha * targets + (1 - alpha) * (1 - targets)) * loss if alpha >= 0 else loss


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _rows(x: Tensor) -> tuple[Tensor, Tensor]:
    targets = class_targets(x)
    return x.flatten(2) if x.dim() > 2 else x.unsqueeze(-1), targets.reshape(x.shape[0], -1)


def _softmax_backward(x: Tensor) -> tuple[Any, ...]:
    rows, targets = _rows(x)
    grad = torch.randn_like(_wide(rows[:, 0]))
    slopes = focal_reference.softmax_focal_loss_slopes(rows, targets, None, 1.5, 2)
    return grad, rows, targets, slopes, 2


def _softmax_truth(x: Tensor, targets: Tensor | None = None) -> Tensor:
    rows = x.unsqueeze(0) if x.dim() == 1 else x
    rows = rows.flatten(2) if x.dim() > 2 else rows.unsqueeze(-1)
    targets = class_targets(x) if targets is None else targets
    loss = focal_reference.softmax_focal_loss(rows, targets.reshape(rows.shape[0], -1), None, 2, -100)
    return loss.reshape(targets.shape)


_FOCAL_SAMPLES = (
    Sample("rows", lambda: torch.randn(2000, 3) * 2),
    Sample("body", lambda: torch.randn(7, 11, 13) * 4),
    Sample("classes", lambda: torch.randn(20, 1000) * 4),
    Sample("hard", lambda: torch.randn(40, 9).abs() * 4 + 1, "relative"),
)

_FOCAL = (
    Case(
        name="softmax_focal_loss",
        ours=lambda x: nnfast.functional.softmax_focal_loss(x, class_targets(x), reduction="none"),
        torchs=lambda x: seed_focal(x, class_targets(x)),
        module=nnfast.FocalLoss,
        torch_module=torch.nn.CrossEntropyLoss,
        seed=lambda x: seed_focal(x, class_targets(x)),
        truth=_softmax_truth,
        operators={
            "softmax_focal_loss": lambda x: (*_rows(x), None, 1.5, 2),
            "softmax_focal_loss_backward": _softmax_backward,
        },
        example=_EXAMPLE,
        samples=(
            *_FOCAL_SAMPLES[:3],
            Sample("vocabulary", lambda: torch.randn(4, 50257) * 4),
            Sample("few", lambda: torch.randn(50, 3) / 4, "relative"),
        ),
        family="focal_loss",
        traits=frozenset({"transforms"}),
    ),
    Case(
        name="sigmoid_focal_loss",
        ours=lambda x: nnfast.functional.sigmoid_focal_loss(x, soft_targets(x)),
        torchs=lambda x: seed_sigmoid_focal(x, soft_targets(x)),
        module=nnfast.SigmoidFocalLoss,
        torch_module=torch.nn.BCEWithLogitsLoss,
        seed=lambda x: seed_sigmoid_focal(x, soft_targets(x)),
        truth=lambda x: focal_reference.sigmoid_focal_loss(x, soft_targets(x), 0.25, 2),
        operators={
            "sigmoid_focal_loss": lambda x: (x, soft_targets(x), 0.25, 1.5),
            "sigmoid_focal_loss_backward": lambda x: (torch.randn_like(x), x, soft_targets(x), 0.25, 1.5),
        },
        example=_EXAMPLE,
        samples=_FOCAL_SAMPLES,
        family="focal_loss",
        traits=frozenset({"elementwise", "transforms"}),
    ),
    Case(
        name="linear_focal_loss",
        ours=lambda x: nnfast.functional.linear_focal_loss(x, matrix(x), row_targets(x), reduction="none"),
        torchs=seed_linear_focal,
        module=nnfast.LinearFocalLoss,
        torch_module=torch.nn.Linear,
        seed=seed_linear_focal,
        truth=lambda x: _softmax_truth(
            F.linear(x, matrix(x)).reshape(-1, 7), row_targets(x).reshape(-1)
        ).reshape(x.shape[:-1]),
        operators={},
        example=_EXAMPLE,
        samples=(
            Sample("rows", lambda: torch.randn(2000, 3)),
            Sample("body", lambda: torch.randn(7, 11, 13)),
        ),
        family="focal_loss",
    ),
)


def _channel_values(x: Tensor, start: int, steps: int) -> Tensor:
    """A value for every channel, exact in every dtype: start / 4, and so on in steps of 1 / 4."""
    values = (torch.arange(x.shape[1], device=x.device) % steps + start) / 4
    return values.to(x.dtype if x.dtype == torch.float64 else torch.float32)


def batch_norm_of(x: Tensor, training: bool, first: int = 3) -> batch_norm.Norm:
    """A batch norm with weights and running statistics made for x; in training nothing is updated."""
    running = (None, None) if training else (_channel_values(x, -2, 5), _channel_values(x, 3, 3))
    weight, bias = _channel_values(x, first, 4), _channel_values(x, -1, 4)
    return batch_norm.Norm(weight, bias, *running, training, 0.1, 1e-5)


def _batch_norm(variant: str, training: bool, residual: str, act: int) -> Case:
    def arguments(x: Tensor) -> tuple[Any, ...]:
        other = x.flip(0) * 0.5 if residual else None
        other_norm = batch_norm_of(x, training, 2) if residual == "norm" else None
        return batch_norm_of(x, training), other, other_norm

    def ours(x: Tensor) -> Tensor:
        norms = arguments(x)
        batch_norm.check(x, *norms)
        return batch_norm.batch_norm_act(x, *norms, act, 0.125)

    def formula(normalised: Callable[[Tensor, batch_norm.Norm], Tensor], x: Tensor) -> Tensor:
        norm, other, other_norm = arguments(x)
        z = normalised(x, norm)
        if other is not None:
            z = z + (other if other_norm is None else normalised(other, other_norm))
        acts = (lambda z: z, F.relu, lambda z: F.leaky_relu(z, 0.125), F.silu, F.mish)
        return acts[act](z)

    def torchs_norm(x: Tensor, norm: batch_norm.Norm) -> Tensor:
        parameters = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        return F.batch_norm(x, *parameters, norm.batch, norm.momentum, norm.eps)

    def true_norm(x: Tensor, norm: batch_norm.Norm) -> Tensor:
        """In float64 F.batch_norm's own sums are some 50 eps off."""
        if not norm.batch:
            return torchs_norm(x, norm)
        over = (0, *range(2, x.dim()))
        centred = x - x.mean(over, keepdim=True)
        z = centred / (centred.square().mean(over, keepdim=True) + norm.eps).sqrt()
        weight, bias = (t.view(-1, *[1] * (x.dim() - 2)) for t in (norm.weight, norm.bias))
        return z * weight + bias

    torchs, truth = partial(formula, torchs_norm), partial(formula, true_norm)

    def operands(x: Tensor) -> tuple[Any, ...]:
        """What the operators take from x to residual_eps."""
        norm, other, other_norm = arguments(x)
        mean, var = batch_norm_reference.statistics(x)
        own = (x, mean, var, norm.weight, norm.bias, norm.eps, other)
        if other_norm is None:
            return *own, None, None, None, None, 0.0
        moments = batch_norm_reference.statistics(other)
        return *own, *moments, other_norm.weight, other_norm.bias, other_norm.eps

    with_mask = residual == "plain" and act in (1, 2)

    def gradient_operands(x: Tensor) -> tuple[Any, ...]:
        given = operands(x)
        mask = batch_norm_reference.forward(*given, act, 0.125, True)[1] if with_mask else None
        return torch.randn_like(x), *given, mask, act, 0.125

    def backward_operands(x: Tensor) -> tuple[Any, ...]:
        given = gradient_operands(x)
        if not training:
            return *given, None, None, None, 1.0
        sums = batch_norm_reference.sums(*given, False)[:3]
        of_residual = sums[2] if residual == "norm" else None
        return *given, *sums[:2], of_residual, float(x.numel() / x.shape[1])

    def running(x: Tensor) -> tuple[Any, ...]:
        moments = batch_norm_reference.statistics(x)
        return *(torch.zeros_like(m) for m in moments), *moments, _channel_values(x, 1, 3), 1.25, 0.125

    return Case(
        name="batch_norm_act",
        variant=variant,
        ours=ours,
        torchs=torchs,
        module=nnfast.BatchNormAct2d,
        torch_module=torch.nn.BatchNorm2d,
        seed=torchs,
        truth=truth,
        operators={
            "batch_norm_stats": lambda x: (x,),
            "batch_norm_update_": running,
            "batch_norm_act": lambda x: (*operands(x), act, 0.125, with_mask),
            "batch_norm_act_sums": lambda x: (*gradient_operands(x), residual == "plain"),
            "batch_norm_act_backward": backward_operands,
        },
        samples=_BATCH_NORM_SAMPLES,
        example=Sample("small", lambda: torch.randn(4, 3, 2)),
        family="conv_bn_act",
        shaped=lambda x: x[: len(x) // 21 * 21].view(7, 3, -1),
    )


_BATCH_NORM_SAMPLES = (
    Sample("body", lambda: torch.randn(7, 11, 13) * 4 + 1),
    Sample("images", lambda: torch.randn(5, 6, 9, 7)),
    Sample(
        "channels last",
        lambda: torch.randn(5, 19, 6, 7).contiguous(memory_format=torch.channels_last) - 2,
    ),
    Sample("rows", lambda: torch.randn(130, 33) * 0.1),
    Sample("far from zero", lambda: torch.randn(64, 5, 8) + 6),
)

_BATCH_NORM = (
    _batch_norm("training-relu", training=True, residual="", act=1),
    _batch_norm("training-residual-leaky_relu", training=True, residual="plain", act=2),
    _batch_norm("training-residual-norm-mish", training=True, residual="norm", act=4),
    _batch_norm("eval-residual-silu", training=False, residual="plain", act=3),
    _batch_norm("eval-residual-norm-relu", training=False, residual="norm", act=1),
)


def image_of(x: Tensor) -> Tensor:
    """x as an image in channels_last: (N, C, H, W), or one channel of what has fewer dimensions."""
    x = x if x.dim() == 4 else x.reshape(1, 1, *x.shape[-2:])
    return x.contiguous(memory_format=torch.channels_last)


def _exact(x: Tensor, *shape: int, step: float = 0.125) -> Tensor:
    """A few values in turn, exact in every dtype, as x."""
    values = torch.arange(math.prod(shape), device=x.device) * 5 % 13 - 6
    return (values.reshape(shape) * step).to(x.dtype)


def _convolution(variant: str, act: str, stride: int, kernel: int, residual: bool, prologue: str) -> Case:
    padding, out_channels = kernel // 2, 5
    code = ACTIVATIONS[act]

    def vectors(x: Tensor) -> tuple[Tensor, Tensor]:
        as_x = x if x.dtype == torch.float64 else x.float()
        return _exact(as_x, x.shape[1], step=0.25), _exact(as_x, x.shape[1]).flip(0)

    def arguments(x: Tensor) -> tuple[Any, ...]:
        """Weight, bias and residual."""
        weight = _exact(x, out_channels, x.shape[1], kernel, kernel)
        size = convolved_size(x.shape, weight.shape, (stride, stride), (padding, padding))
        other = image_of(_exact(x, *size)) if residual else None
        return weight, _exact(x, out_channels), other

    def ours(x: Tensor) -> Tensor:
        x = image_of(x)
        weight, bias, other = arguments(x)
        before = (*vectors(x), prologue) if prologue else None
        options = {"act": act, "negative_slope": 0.125, "residual": other, "prologue": before}
        return nnfast.functional.conv2d_act(x, weight, bias, stride, padding, **options)

    def torchs(x: Tensor) -> Tensor:
        x = image_of(x)
        weight, bias, other = arguments(x)
        if prologue:
            scale, shift = (v.view(-1, 1, 1).to(x.dtype) for v in vectors(x))
            x = activated(x * scale + shift, ACTIVATIONS[prologue], 0.01)
        y = F.conv2d(x, weight, bias, stride, padding)
        return activated(y if other is None else y + other.to(y.dtype), code, 0.125)

    def before(x: Tensor) -> tuple[Any, ...]:
        if not prologue:
            return None, None, None, 0, 0.01
        return (vectors(x)[1], *vectors(x), ACTIVATIONS[prologue], 0.01)

    tail = ([stride] * 2, [padding] * 2)

    def operands(x: Tensor) -> tuple[Any, ...]:
        x = image_of(x)
        weight, bias, other = arguments(x)
        wide_bias = bias if x.dtype == torch.float64 else bias.float()
        return x, weight, wide_bias, other, *before(x), *tail, code, 0.125, code == 1

    def gradient(x: Tensor) -> tuple[Tensor, Tensor | None]:
        y = convolution_reference.forward(*operands(x))[0]
        return torch.randn_like(y), y if code in (1, 2) else None

    def input_operands(x: Tensor) -> tuple[Any, ...]:
        grad, y = gradient(x)
        x = image_of(x)
        added, given = (torch.randn_like(x), None) if residual else (None, x if prologue else None)
        prologue_of_x = before(x) if given is not None else (None, None, None, 0, 0.01)
        rest = (list(x.shape), *tail, 0 if y is None else code, 0.125, True)
        return grad, y, arguments(x)[0], added, given, *prologue_of_x, *rest

    def weight_operands(x: Tensor) -> tuple[Any, ...]:
        rest = ([kernel] * 2, *tail)
        grad, y = gradient(x)
        return (
            grad,
            y,
            image_of(x),
            *before(image_of(x)),
            *rest,
            0 if y is None else code,
            0.125,
            not residual,
        )

    return Case(
        name="conv2d_act",
        variant=variant,
        dtypes={"cpu": (torch.float32,)},
        ours=ours,
        torchs=torchs,
        module=nnfast.Conv2dAct,
        torch_module=torch.nn.Conv2d,
        seed=torchs,
        truth=torchs,
        operators={
            "conv2d_act": operands,
            "conv2d_act_input_gradient": input_operands,
            "conv2d_act_weight_gradient": weight_operands,
        },
        samples=(
            Sample("images", lambda: torch.randn(3, 18, 9, 7)),
            Sample("few channels", lambda: torch.randn(2, 3, 17, 12) * 4 + 1),
        ),
        example=Sample("small", lambda: torch.randn(1, 2, 3, 3)),
        family="convolution",
        shaped=lambda x: x[: len(x) // 4000 * 4000].view(-1, 4, 40, 25),
    )


_CONVOLUTION = (
    _convolution("3x3-relu", "relu", 1, 3, False, ""),
    _convolution("3x3-stride-prologue", "leaky_relu", 2, 3, False, "relu"),
    _convolution("1x1-residual-silu-prologue", "silu", 1, 1, True, "mish"),
)


def qkv(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (N, H, L, D) from x: (L, D), (N, L, D) or (N, H, L, D)."""
    q = x.reshape(x.shape[:1] + (1,) * (4 - x.dim()) + x.shape[1:]) if x.dim() > 2 else x[None, None]
    return q, q.flip(2) * 0.125, q.flip(3) + 1


def _seed_attention(x: Tensor) -> Tensor:
    q, k, v = qkv(x)
    scores = q @ k.mT / q.shape[3] ** 0.5
    future = torch.ones(scores.shape[2:], dtype=torch.bool, device=x.device).triu(1)
    return (torch.softmax(scores.masked_fill(future, -torch.inf), -1) @ v).reshape(x.shape)


def _attention_operands(x: Tensor) -> tuple[Any, ...]:
    q, k, v = qkv(x)
    bias = torch.randn(q.shape[1], q.shape[2], k.shape[2], device=x.device)[None]
    cos, sin = torch.randn(2, 1, 1, max(q.shape[2], k.shape[2]), q.shape[3] // 2, device=x.device)
    return q, k, v, *Terms(bias=bias, cos=cos, sin=sin, is_causal=True, scale=0.25)


def _projected_attention_operands(x: Tensor) -> tuple[Any, ...]:
    q, k, v, *terms = _attention_operands(x)
    in_bias, weight = (torch.randn(n, q.shape[i], q.shape[3], device=x.device) for n, i in ((3, 1), (1, 3)))
    return q, k, v, in_bias, weight[0], *terms[:3], True, 0.25


def _attention_backward_operands(x: Tensor) -> tuple[Any, ...]:
    q, k, v, *terms = _attention_operands(x)
    out, lse = attention_reference.attention(q, k, v, Terms(*terms))
    uppers = (torch.randn_like(out), torch.randn_like(lse))
    return *uppers, q, k, v, *Terms(*terms).for_backward(out, lse, bias_grad=True)


_ATTENTION = Case(
    name="attention",
    ours=lambda x: nnfast.functional.attention(*qkv(x), is_causal=True).reshape(x.shape),
    torchs=lambda x: F.scaled_dot_product_attention(*qkv(x), is_causal=True).reshape(x.shape),
    module=nnfast.MultiheadAttention,
    torch_module=torch.nn.MultiheadAttention,
    seed=_seed_attention,
    truth=_seed_attention,
    operators={
        "attention": _attention_operands,
        "projected_attention": _projected_attention_operands,
        "attention_backward": _attention_backward_operands,
    },
    samples=(
        Sample("body", lambda: torch.randn(3, 65, 24)),
        Sample("heads", lambda: torch.randn(2, 3, 33, 16)),
        Sample("large scores", lambda: torch.randn(4, 40, 8) * 4),
    ),
    example=Sample("small", lambda: torch.randn(4, 3)),
    family="attention",
    shaped=lambda x: x[: len(x) // 8192 * 8192].view(-1, 128, 64),
)


def _rotary(variant: str, interleaved: bool) -> Case:
    def width(x: Tensor) -> int:
        """All features by halves, half of them by neighbours."""
        return x.shape[-1] // 2 if interleaved and x.shape[-1] % 4 == 0 else x.shape[-1]

    def by_hand(x: Tensor) -> Tensor:
        """As transformers' models do it: x * cos + rotate_half(x) * sin, in x's type; joined in a wide one,
        since autocast joins no float16 on the CPU."""
        wide = torch.promote_types(x.dtype, torch.float32)
        steps = torch.arange(0, width(x), 2, device=x.device, dtype=wide)
        angles = torch.arange(x.shape[-2], device=x.device, dtype=wide)[:, None] * 10000 ** (
            -steps / width(x)
        )
        angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
        turning, rest = x[..., : width(x)], x[..., width(x) :]
        if interleaved:
            half = torch.stack((-turning[..., 1::2].to(wide), turning[..., ::2].to(wide)), -1).flatten(-2)
        else:
            a, b = turning.to(wide).chunk(2, -1)
            half = torch.cat((-b, a), -1)
        turned = turning * angles.cos().to(x.dtype) + half.to(x.dtype) * angles.sin().to(x.dtype)
        return torch.cat((turned.to(wide), rest.to(wide)), -1).to(x.dtype)

    def ours(x: Tensor) -> Tensor:
        return nnfast.functional.rotary_embedding(x, rotary_dim=width(x), interleaved=interleaved)

    def operands(x: Tensor) -> tuple[Any, ...]:
        x = x.reshape((1,) * (4 - x.dim()) + x.shape) if x.dim() < 4 else x
        angles = torch.rand(x.shape[0], 1, x.shape[2], x.shape[3] // 2, device=x.device)
        return x, angles.cos(), angles.sin(), interleaved

    return Case(
        name="rotary",
        variant=variant,
        ours=ours,
        torchs=by_hand,
        module=nnfast.RotaryEmbedding,
        torch_module=torch.nn.Identity,
        seed=by_hand,
        truth=by_hand,
        operators={"rotary": operands},
        samples=(
            Sample("body", lambda: torch.randn(7, 11, 24)),
            Sample("heads", lambda: torch.randn(2, 3, 33, 16)),
            Sample("a long one", lambda: torch.randn(3000, 4)),
        ),
        example=Sample("small", lambda: torch.randn(3, 4)),
        family="attention",
        shaped=lambda x: x[: len(x) // 8192 * 8192].view(-1, 128, 64),
    )


_ROTARY = (_rotary("halves", interleaved=False), _rotary("neighbours", interleaved=True))

TABLE = (
    _activation("silu", nnfast.SiLU, torch.nn.SiLU, _seed_silu, {"forward": 4, "backward": 8}),
    _activation("mish", nnfast.Mish, torch.nn.Mish, _seed_mish, {"forward": 8, "backward": 14}),
    *_FOCAL,
    *_BATCH_NORM,
    *_CONVOLUTION,
    _ATTENTION,
    *_ROTARY,
)
