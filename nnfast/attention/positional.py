"""Positional encodings: sinusoids added to the input, and rotations of queries and keys.

Sinusoids: PE[p, 2i] = sin(p / base^(2i / E)), PE[p, 2i + 1] = cos(p / base^(2i / E)); Vaswani et al. 2017,
arXiv:1706.03762, section 3.5. Rotations: features i and i + D/2, or 2i and 2i + 1, turn by p / base^(2i / D);
Su et al. 2021, arXiv:2104.09864, section 3.2. The gradient of a rotation is the rotation backwards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def _angles(positions: Tensor, width: int, base: float) -> Tensor:
    """Position over base^(2i / width): (..., width / 2), in float64 where there is one."""
    dtype = torch.float32 if positions.device.type == "mps" else torch.float64
    i = torch.arange(0, width, 2, device=positions.device, dtype=dtype)
    return positions.to(dtype)[..., None] * base ** (-i / width)


def _check_width(name: str, what: str, width: int) -> None:
    if width < 2 or width % 2:
        raise ValueError(f"{name}: {what} is {width}; it needs to be even and at least 2")


class SinusoidalPositionalEncoding(nn.Module):
    """x + PE, and dropout. Nothing to learn, and nothing in the state_dict: the table moves with the module.

    Args:
        embed_size: E, even.
        max_length: rows of the table at first; longer inputs make it grow.
        dropout: probability, of the sum.
        base: of the wavelengths, 2 pi to 2 pi * base.
        batch_first: x is (N, L, E), else (L, N, E).

    Raises:
        ValueError: for an odd embed_size.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.5.
    """

    table: Tensor

    def __init__(
        self,
        embed_size: int,
        max_length: int = 1024,
        dropout: float = 0.0,
        *,
        base: float = 10000.0,
        batch_first: bool = True,
    ) -> None:
        super().__init__()
        _check_width("nnfast.SinusoidalPositionalEncoding", "embed_size", embed_size)
        self.embed_size, self.base, self.batch_first = embed_size, base, batch_first
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("table", self._rows(max_length, torch.empty(0)), persistent=False)

    def _rows(self, length: int, like: Tensor) -> Tensor:
        angles = _angles(torch.arange(length, device=like.device), self.embed_size, self.base)
        return torch.stack((angles.sin(), angles.cos()), -1).flatten(-2).to(like.dtype)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Moved to another type the table is made anew, not rounded twice."""
        before = self.table.dtype
        moved = super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        if self.table.dtype != before:
            self.table = self._rows(len(self.table), self.table)
        return moved

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, L, E) or unbatched (L, E); (L, N, E) without batch_first. Returns the same shape and dtype.

        Raises:
            ValueError: for another number of features.
        """
        if x.dim() not in (2, 3) or x.shape[-1] != self.embed_size:
            raise ValueError(
                f"nnfast.SinusoidalPositionalEncoding: x has shape {list(x.shape)}; it needs "
                f"(..., length, {self.embed_size}), of 2 or 3 dimensions"
            )
        length = x.shape[-2] if self.batch_first or x.dim() == 2 else x.shape[0]
        table = self.table
        if length > table.shape[0]:
            table = self._rows(length, table)
            if not torch.compiler.is_compiling():
                self.table = table
        rows = table[:length].to(x.dtype)
        y: Tensor = self.dropout(x + (rows if self.batch_first or x.dim() == 2 else rows[:, None]))
        return y

    def extra_repr(self) -> str:
        """The sizes."""
        return f"embed_size={self.embed_size}, base={self.base:g}, batch_first={self.batch_first}"


class _Rotate(torch.autograd.Function):
    """(..., L, D) turned; saves the angles' cosines and sines alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        return _rotated(x, cos, sin, interleaved)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, cos, sin, ctx.interleaved = inputs
        ctx.save_for_backward(cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _Rotate.apply(grad, cos, -sin, ctx.interleaved), None, None, None  # type: ignore[no-untyped-call]


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Half types turn in float32."""
    width = 2 * cos.shape[-1]
    turned = x[..., :width].to(cos.dtype)
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    a, b = a * cos - b * sin, b * cos + a * sin
    turned = torch.stack((a, b), -1).flatten(-2) if interleaved else torch.cat((a, b), -1)
    turned = turned.to(x.dtype)
    return turned if width == x.shape[-1] else torch.cat((turned, x[..., width:]), -1)


def rotary_embedding(
    x: Tensor,
    positions: Tensor | None = None,
    *,
    base: float = 10000.0,
    rotary_dim: int | None = None,
    interleaved: bool = False,
) -> Tensor:
    """Turn pairs of features by angles that grow with the position: scores then depend on distances alone.

    Args:
        x: (..., L, D) in a floating-point dtype: queries or keys, as (N, H, L, D).
        positions: integers or floats, broadcastable to (..., L); 0 to L - 1 if None.
        base: of the wavelengths, 2 pi to 2 pi * base.
        rotary_dim: how many of the first features turn, even; all if None.
        interleaved: pairs are features 2i and 2i + 1; else i and i + rotary_dim / 2, as in Llama.

    Returns:
        x's shape and dtype.

    Raises:
        TypeError: if x is not floating-point.
        ValueError: for an odd or too large rotary_dim, or positions that do not fit.

    Source: Su et al. 2021, arXiv:2104.09864, section 3.2.
    """
    name = "nnfast.rotary_embedding"
    width = _check_rotary(name, x, rotary_dim)
    if positions is None:
        positions = torch.arange(x.shape[-2], device=x.device)
    else:
        _check_positions(name, x, positions)
    return _turn(x, _angles(positions, width, base), interleaved)


def _turn(x: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    y: Tensor = _Rotate.apply(x, cos, sin, interleaved)  # type: ignore[no-untyped-call]
    return y


def _check_rotary(name: str, x: Tensor, rotary_dim: int | None) -> int:
    if not x.is_floating_point():
        raise TypeError(f"{name}: x has dtype {x.dtype}; it needs a floating-point one")
    if x.dim() < 2:
        raise ValueError(f"{name}: x has shape {list(x.shape)}; it needs (..., length, head dim)")
    width = x.shape[-1] if rotary_dim is None else rotary_dim
    _check_width(name, "rotary_dim", width)
    if width > x.shape[-1]:
        raise ValueError(f"{name}: rotary_dim is {width}; x has shape {list(x.shape)}")
    return width


def _check_positions(name: str, x: Tensor, positions: Tensor) -> None:
    shape, whole = positions.shape, x.shape[:-1]
    padded = (1,) * (len(whole) - len(shape)) + tuple(shape)
    if len(padded) != len(whole) or any(s not in (1, w) for s, w in zip(padded, whole, strict=True)):
        raise ValueError(f"{name}: positions has shape {list(shape)}; it needs to broadcast to {list(whole)}")


class RotaryEmbedding(nn.Module):
    """`nnfast.functional.rotary_embedding` of queries and keys. No parameters, and nothing in the state_dict.

    Args:
        head_dim: D.
        base: of the wavelengths.
        rotary_dim: how many of the first features turn, even; all if None.
        interleaved: pairs are features 2i and 2i + 1.

    Raises:
        ValueError: for an odd or too large rotary_dim.

    Source: Su et al. 2021, arXiv:2104.09864, section 3.2.
    """

    def __init__(
        self,
        head_dim: int,
        base: float = 10000.0,
        *,
        rotary_dim: int | None = None,
        interleaved: bool = False,
    ) -> None:
        super().__init__()
        self.head_dim, self.base, self.interleaved = head_dim, base, interleaved
        self.rotary_dim = head_dim if rotary_dim is None else rotary_dim
        _check_rotary("nnfast.RotaryEmbedding", torch.empty(1, head_dim, device="meta"), rotary_dim)

    def forward(self, q: Tensor, k: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """q: (N, H, Lq, D), k: (N, Hk, Lk, D), turned; positions: of both, as `rotary_embedding` takes them.

        Raises:
            ValueError: for another head dim.
        """
        for name, x in (("q", q), ("k", k)):
            if x.shape[-1] != self.head_dim:
                raise ValueError(
                    f"nnfast.RotaryEmbedding: {name} has shape {list(x.shape)}; head_dim is {self.head_dim}"
                )
        q, k = (
            rotary_embedding(
                x, positions, base=self.base, rotary_dim=self.rotary_dim, interleaved=self.interleaved
            )
            for x in (q, k)
        )
        return q, k

    def extra_repr(self) -> str:
        """The arguments."""
        return (
            f"{self.head_dim}, base={self.base:g}, rotary_dim={self.rotary_dim}, "
            f"interleaved={self.interleaved}"
        )
