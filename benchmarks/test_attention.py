"""Attention as a function against torch's own with the same mask, the plain formula, and torch.compile of it.

On CUDA also our Triton kernels where they are not what serves. Key padding leaves a quarter of the keys out.
Rotary embedding against transformers' formula, alone and before attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

import nnfast
from benchmarks.runner import Result, compare, forced, rotation
from nnfast.core.op import OPS

CUDA = torch.cuda.is_available()
DTYPE = torch.bfloat16 if CUDA else torch.float32
KINDS = ("plain", "causal", "padding", "bias", "window", "softcap")
TOKENS, WIDTH = (16384, 2048) if CUDA else (2048, 512)
LENGTHS = (128, 512, 1024, 2048, 4096, 8192, 16384) if CUDA else (128, 512, 2048)
HEAD_DIMS = (32, 64, 80, 96, 128, 256) if CUDA else (64,)
QUICK = {(1024, 64), (1024, 128), (4096, 128)} if CUDA else {(128, 64)}
WINDOW = 128
SOFTCAP = 50.0
LARGEST_FORMULA = 2048 if CUDA else 512
"""Longest sequence for which the scores are held whole."""


def targets(kind: str, length: int) -> dict[str, float]:
    """What is promised: never slower than torch's best, and half as long again where that needs a mask."""
    if kind == "softcap":  # of which torch has its formula
        return {"compile": 1.5}
    if not CUDA:
        return {"torch": 1 / 1.05} if kind != "window" else {}
    return {"torch": 1.5 if kind in ("padding", "bias") and length >= 1024 else 1 / 1.03}


def terms(kind: str, q: Tensor) -> dict[str, Any]:
    """The arguments of `nnfast.functional.attention` beyond q, k and v."""
    n, h, length, _ = q.shape
    if kind == "padding":
        places = torch.arange(length, device=q.device).expand(n, length)
        return {"key_padding_mask": places >= length * 3 // 4}
    if kind == "bias":
        return {"bias": torch.randn(1, h, length, length, device=q.device).to(q.dtype)}
    return {
        "causal": {"is_causal": True},
        "window": {"window": WINDOW},
        "softcap": {"softcap": SOFTCAP},
    }.get(kind, {})


def torch_arguments(given: dict[str, Any], length: int, device: str) -> dict[str, Any]:
    """The same for `F.scaled_dot_product_attention`, and softcap for `formula`."""
    if "key_padding_mask" in given:
        return {"attn_mask": ~given["key_padding_mask"][:, None, None]}
    if "bias" in given:
        return {"attn_mask": given["bias"]}
    if "window" in given:
        i = torch.arange(length, device=device)
        return {"attn_mask": (i[:, None] - i).abs() <= WINDOW}
    return given


def formula(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    softcap: float | None = None,
) -> Tensor:
    """As it is written down."""
    scores = q @ k.mT / q.shape[3] ** 0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if is_causal:
        attn_mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1) @ v


def flops(q: Tensor, kind: str, training: bool) -> int:
    """Of the two products of forward and the five of backward, of what a query sees."""
    n, h, length, d = q.shape
    seen = {"causal": 0.5, "padding": 0.75, "window": min(1.0, (2 * WINDOW + 1) / length)}.get(kind, 1.0)
    return int(4 * n * h * length * length * d * seen * (3.5 if training else 1))


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("length", LENGTHS)
def test_attention(length, head_dim, kind, direction, device, quick, benchmark, record):
    if quick and (length, head_dim) not in QUICK:
        pytest.skip("not in --quick")
    if kind == "bias" and length > 8192:
        pytest.skip("the bias itself would take gigabytes")
    whole = length <= (2048 if kind == "softcap" else LARGEST_FORMULA)
    if kind == "softcap" and not whole:
        pytest.skip("torch has only the formula, whose scores would take gigabytes")
    torch._dynamo.reset()
    torch.manual_seed(0)
    training = direction != "forward"
    shape = (TOKENS // length, WIDTH // head_dim, length, head_dim)

    def make() -> list[Tensor]:
        return [torch.randn(shape, device=device).to(DTYPE).requires_grad_(training) for _ in range(3)]

    q, k, v = make()
    upstream = torch.randn_like(q)
    given = terms(kind, q)
    theirs = torch_arguments(given, length, device)

    def both(function: Callable[..., Tensor]) -> Callable[[list[Tensor]], Any]:
        def run(inputs: list[Tensor]) -> Any:
            y = function(*inputs)
            return torch.autograd.grad(y, inputs, upstream) if training else (y,)

        return run

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nnfast.functional.attention(q, k, v, **given)

    functions = {"nnfast": ours}
    if kind != "softcap":
        functions["torch"] = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **theirs)
    if whole:
        functions["seed"] = lambda q, k, v: formula(q, k, v, **theirs)
        if CUDA or kind == "softcap":
            functions["compile"] = torch.compile(functions["seed"])
    with torch.set_grad_enabled(training):
        backend = nnfast.explain("attention", q, k, v, **given).backend or ""
    triton = next(b for b in OPS["attention"].backends if b.name == "triton")
    if CUDA and backend != "triton" and not triton.why_not(*OPS["attention"].arguments(q, k, v, **given)):
        functions["triton"] = forced(ours, "triton")
    functions = {name: both(function) for name, function in functions.items()}
    expected = functions["torch" if "torch" in functions else "seed"]([q, k, v])
    for run in functions.values():
        for a, b in zip(run([q, k, v]), expected, strict=True):
            scale = float(b.abs().max())
            assert_close(a / scale, b / scale, rtol=0, atol=3e-2 if DTYPE.itemsize == 2 else 1e-4)
    moved = (11 if training else 4) * q.numel() * q.element_size()
    inputs = rotation(make, moved, device)
    record(
        Result(
            family="attention",
            op="attention",
            case=f"attention {kind} {direction} {' x '.join(map(str, shape))}",
            direction=direction,
            dtype=str(DTYPE).removeprefix("torch."),
            numel=q.numel(),
            backend=backend,
            seconds=compare(functions, inputs, device, 0.5 if quick else 1.0),
            bytes=moved,
            flops=flops(q, kind, training),
            targets=targets(kind, length),
        ),
        benchmark,
    )
    benchmark.pedantic(functions["nnfast"], args=([q, k, v],), rounds=3, warmup_rounds=1)


ROTARY_SHAPES = [(4, 8, 512, 64), (2, 8, 2048, 64), (1, 32, 128, 128)]
"""Of queries and keys."""


def rotary_targets() -> dict[str, float]:
    """What is promised of queries and keys turned, against the formula as it is and compiled."""
    return {} if CUDA else {"seed": 2.0, "compile": 1.5}


def by_hand(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As transformers' models turn: cosines and sines are made once, (L, D)."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("shape", ROTARY_SHAPES, ids=str)
def test_rotary(shape, direction, device, quick, benchmark, record):
    if quick and shape != ROTARY_SHAPES[0]:
        pytest.skip("not in --quick")
    torch._dynamo.reset()
    torch.manual_seed(0)
    training = direction != "forward"
    length, head_dim = shape[2:]
    rope = nnfast.RotaryEmbedding(head_dim, max_length=length).to(device)
    tables = [torch.cat((t, t), -1).to(DTYPE) for t in rope.table]

    def make() -> list[Tensor]:
        rows = (torch.randn(shape, device=device).to(DTYPE) for _ in range(2))
        return [x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(training) for x in rows]

    upstream = [torch.randn(shape, device=device).to(DTYPE) for _ in range(2)]

    def seed(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return by_hand(q, *tables), by_hand(k, *tables)

    def both(function: Callable[..., tuple[Tensor, ...]]) -> Callable[[list[Tensor]], Any]:
        def run(inputs: list[Tensor]) -> Any:
            y = function(*inputs)
            return torch.autograd.grad(y, inputs, upstream) if training else y

        return run

    functions = {
        name: both(function)
        for name, function in {"nnfast": rope, "seed": seed, "compile": torch.compile(seed)}.items()
    }
    inputs = make()
    expected = functions["seed"](inputs)
    for run in functions.values():
        for a, b in zip(run(inputs), expected, strict=True):
            assert_close(a, b, rtol=0, atol=1e-1 if DTYPE.itemsize == 2 else 1e-5)
    moved = (4 if not training else 8) * inputs[0].numel() * DTYPE.itemsize
    record(
        Result(
            family="attention",
            op="rotary",
            case=f"rotary {direction} {' x '.join(map(str, shape))}",
            direction=direction,
            dtype=str(DTYPE).removeprefix("torch."),
            numel=inputs[0].numel(),
            backend=nnfast.explain(rope, *inputs).backend or "",
            seconds=compare(functions, rotation(make, moved, device), device, 1.0 if quick else 3.0),
            bytes=moved,
            flops=6 * inputs[0].numel() * (2 if training else 1),
            targets=rotary_targets(),
        ),
        benchmark,
    )
    benchmark.pedantic(functions["nnfast"], args=(inputs,), rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("shape", ROTARY_SHAPES, ids=str)
def test_rotary_and_attention(shape, direction, device, quick, benchmark, record):
    """Queries and keys turned as attention reads them; "apart", before it; "attention" turns nothing."""
    if quick and shape != ROTARY_SHAPES[0]:
        pytest.skip("not in --quick")
    torch.manual_seed(0)
    training = direction != "forward"
    rope = nnfast.RotaryEmbedding(shape[3], max_length=shape[2]).to(device)
    tables = [torch.cat((t, t), -1).to(DTYPE) for t in rope.table]

    def make() -> list[Tensor]:
        rows = (torch.randn(shape, device=device).to(DTYPE) for _ in range(3))
        return [x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(training) for x in rows]

    upstream = torch.randn(shape, device=device).to(DTYPE)
    attention = nnfast.functional.attention

    def both(function: Callable[..., Tensor]) -> Callable[[list[Tensor]], Any]:
        def run(inputs: list[Tensor]) -> Any:
            y = function(*inputs)
            return torch.autograd.grad(y, inputs, upstream) if training else [y]

        return run

    functions = {
        "nnfast": both(lambda q, k, v: attention(q, k, v, rotary=rope)),
        "apart": both(lambda q, k, v: attention(*rope(q, k), v)),
        "attention": both(attention),
        "torch": both(
            lambda q, k, v: F.scaled_dot_product_attention(by_hand(q, *tables), by_hand(k, *tables), v)
        ),
    }
    inputs = make()
    for a, b in zip(functions["nnfast"](inputs), functions["torch"](inputs), strict=True):
        assert_close(a, b, rtol=0, atol=1e-1 if DTYPE.itemsize == 2 else 1e-4)
    moved = (8 if training else 4) * inputs[0].numel() * DTYPE.itemsize
    record(
        Result(
            family="attention",
            op="rotary",
            case=f"rotary + attention {direction} {' x '.join(map(str, shape))}",
            direction=direction,
            dtype=str(DTYPE).removeprefix("torch."),
            numel=inputs[0].numel(),
            backend=nnfast.explain("attention", *inputs).backend or "",
            seconds=compare(functions, rotation(make, moved, device), device, 1.0 if quick else 3.0),
            bytes=moved,
            flops=flops(inputs[0], "plain", training),
            targets={} if CUDA else {"torch": 1.0, "apart": 1.0},
        ),
        benchmark,
    )
    benchmark.pedantic(functions["nnfast"], args=(inputs,), rounds=3, warmup_rounds=1)
