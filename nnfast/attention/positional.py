"""Positional encodings: sinusoids added to the input, and rotations of queries and keys.

Sinusoids: PE[p, 2i] = sin(p / base^(2i / E)), PE[p, 2i + 1] = cos(p / base^(2i / E)); Vaswani et al. 2017,
arXiv:1706.03762, section 3.5. Rotations: features i and i + D/2, or 2i and 2i + 1, turn by p / base^(2i / D);
Su et al. 2021, arXiv:2104.09864, section 3.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.op import Explanation
from .rotary import ROTARY


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
        """Moved, the table is made anew: not rounded twice, and not left empty by what moves no values."""
        before = self.table
        moved = super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        if self.table is not before:
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


def rotary_embedding(
    x: Tensor,
    positions: Tensor | None = None,
    *,
    base: float = 10000.0,
    rotary_dim: int | None = None,
    interleaved: bool = False,
) -> Tensor:
    """Turn pairs of features by angles that grow with the position: scores then depend on distances alone.

    On the CPU this is one pass of our own kernel, a read and a write; under torch.compile torch's operations.
    `attention` with `rotary` does without that pass where it can.

    Args:
        x: (..., L, D) in a floating-point dtype: queries or keys, as (N, H, L, D).
        positions: integers or floats, broadcastable to (..., L); 0 to L - 1 if None.
        base: of the wavelengths, 2 pi to 2 pi * base.
        rotary_dim: how many of the first features turn, even; all if None.
        interleaved: pairs are features 2i and 2i + 1; else i and i + rotary_dim / 2, as in Llama.

    Returns:
        x's shape and dtype. Differentiable in x, and in positions that are floats.

    Raises:
        TypeError: if x is not floating-point.
        ValueError: for an odd or too large rotary_dim, or positions that do not fit.
        BackendError: if a forced backend cannot serve.

    Source: Su et al. 2021, arXiv:2104.09864, section 3.2.
    """
    y: Tensor = ROTARY(*_arguments(x, positions, base=base, rotary_dim=rotary_dim, interleaved=interleaved))
    return y


rotary_embedding.nnfast_op = "rotary"  # type: ignore[attr-defined]  # what `nnfast.explain` looks up


def _arguments(
    x: Tensor,
    positions: Tensor | None = None,
    *,
    base: float = 10000.0,
    rotary_dim: int | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """The operation's arguments from the function's, checked."""
    name = "nnfast.rotary_embedding"
    width = _check_rotary(name, x, rotary_dim)
    if positions is None:
        positions = torch.arange(x.shape[-2], device=x.device)
    else:
        _check_positions(name, x, positions)
    cos, sin = _turns(positions, width, base, _wide(x.dtype))
    return x, cos, sin, interleaved


ROTARY.arguments = _arguments


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What a tensor of this dtype turns in."""
    return torch.promote_types(dtype, torch.float32)


def _turns(positions: Tensor, width: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines: (..., width / 2)."""
    angles = _angles(positions, width, base)
    return angles.cos().to(dtype), angles.sin().to(dtype)


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
    """`nnfast.functional.rotary_embedding` of queries and keys.

    No parameters, and nothing in the state_dict: cosines and sines of the first places are kept in a table
    that moves with the module, in float32 or float64.

    Args:
        head_dim: D.
        base: of the wavelengths.
        rotary_dim: how many of the first features turn, even; all if None.
        interleaved: pairs are features 2i and 2i + 1.
        max_length: places of the table at first; longer inputs make it grow.

    Raises:
        ValueError: for an odd or too large rotary_dim.

    Source: Su et al. 2021, arXiv:2104.09864, section 3.2.
    """

    nnfast_op = "rotary"
    table: Tensor

    def __init__(
        self,
        head_dim: int,
        base: float = 10000.0,
        *,
        rotary_dim: int | None = None,
        interleaved: bool = False,
        max_length: int = 1024,
    ) -> None:
        super().__init__()
        self.head_dim, self.base, self.interleaved = head_dim, base, interleaved
        self.rotary_dim = head_dim if rotary_dim is None else rotary_dim
        _check_rotary(_NAME, torch.empty(1, head_dim, device="meta"), rotary_dim)
        self.register_buffer("table", self._turns(max_length, torch.empty(0)), persistent=False)

    def _turns(self, length: int, like: Tensor) -> Tensor:
        """Cosines and sines: (2, length, rotary_dim / 2)."""
        with torch.inference_mode(False):  # autograd saves them
            positions = torch.arange(length, device=like.device)
            return torch.stack(_turns(positions, self.rotary_dim, self.base, _wide(like.dtype)))

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Moved, the table is made anew, as above, and never in half types."""
        before = self.table
        moved = super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        if self.table is not before:
            self.table = self._turns(self.table.shape[1], self.table)
        return moved

    def forward(self, q: Tensor, k: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """q: (N, H, Lq, D), k: (N, Hk, Lk, D), turned; positions: of both, as `rotary_embedding` takes them.

        Raises:
            TypeError: if q or k is not floating-point.
            ValueError: for another head dim, or positions that do not fit.
            BackendError: if a forced backend cannot serve.
        """
        of_q, of_k = self.angles(q, k, positions)
        return ROTARY(q, *of_q, self.interleaved), ROTARY(k, *of_k, self.interleaved)

    def angles(
        self, q: Tensor, k: Tensor, positions: Tensor | None = None
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Cosines and sines by which `forward` turns q, and those for k; it raises as that does."""
        for name, x in (("q", q), ("k", k)):
            if x.shape[-1] != self.head_dim:
                raise ValueError(f"{_NAME}: {name} has shape {list(x.shape)}; head_dim is {self.head_dim}")
            _check_rotary(_NAME, x, self.rotary_dim)
            if positions is not None:
                _check_positions(_NAME, x, positions)
        of_q = self._cos_sin(q, positions)
        alike = (q.dtype, q.device, q.shape[-2]) == (k.dtype, k.device, k.shape[-2])
        of_k = of_q if alike else self._cos_sin(k, positions)
        return of_q, of_k

    def _cos_sin(self, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        if positions is not None:
            return _turns(positions, self.rotary_dim, self.base, _wide(x.dtype))
        table, length = self.table, x.shape[-2]
        if length > table.shape[1] or (table.dtype, table.device) != (_wide(x.dtype), x.device):
            table = self._turns(max(length, table.shape[1]), x)
            if type(table) is Tensor and not torch.compiler.is_compiling():
                self.table = table
        cos, sin = table[:, :length]
        return cos, sin

    def explain(self, q: Tensor, k: Tensor, positions: Tensor | None = None) -> Explanation:
        """What `nnfast.explain` says of a call: of its queries."""
        return ROTARY.explain(q, *self._cos_sin(q, positions), self.interleaved)

    def extra_repr(self) -> str:
        """The arguments."""
        return (
            f"{self.head_dim}, base={self.base:g}, rotary_dim={self.rotary_dim}, "
            f"interleaved={self.interleaved}"
        )


_NAME = "nnfast.RotaryEmbedding"
