"""Measured numbers that decide who serves, and how kernels are launched. All of them are here.

`python -m benchmarks.thresholds` measures them again.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields, replace

import torch

NEVER = sys.maxsize


@dataclass(frozen=True)
class Threshold:
    """Fewest elements from which a backend beats torch's own kernel, without and with autograd."""

    no_grad: int
    grad: int


# (op, backend) -> Threshold. A pair that is not listed has not been measured and serves only when forced:
# as yet everything on GPUs.
THRESHOLDS: dict[tuple[str, str], Threshold] = {
    ("silu", "cpu"): Threshold(no_grad=1 << 17, grad=1 << 19),
    ("mish", "cpu"): Threshold(no_grad=1 << 11, grad=1 << 12),
    # logits, at 2 to 32000 classes; no fewer were measured
    ("softmax_focal_loss", "cpu"): Threshold(no_grad=1 << 6, grad=1 << 6),
    ("sigmoid_focal_loss", "cpu"): Threshold(no_grad=1 << 6, grad=1 << 6),
    ("rotary", "cpu"): Threshold(no_grad=1, grad=1),
}


GRADIENT_IN_FORWARD = 1 << 18
"""Bytes of a row up to which a focal loss on the CPU makes its gradient along with itself, in a cache."""


@dataclass(frozen=True)
class NormThreshold:
    """From where on a backend's batch norm beats torch's own.

    Attributes:
        wide: fewest elements in float32 and float64.
        half: fewest elements in half types.
        stretch: fewest values of a channel where channels are innermost, else of a plane.
        short: fewest elements where a stretch has less than `SHORT` values, each of which costs a start.
        plain: whether that holds of a batch norm alone, without an activation or a residual, too.
    """

    wide: int
    half: int
    stretch: int
    short: int = 0
    plain: bool = True

    def elements(self, half: bool, stretch: int) -> int:
        """Fewest elements in half types or others, in stretches of so many values."""
        least = self.half if half else self.wide
        return max(least, self.short) if stretch < SHORT else least


SHORT = 14 * 14

_WITH_AVX512 = {
    ("cpu", "autograd", True): NormThreshold(wide=1 << 19, half=1 << 18, stretch=1536),
    ("cpu", "autograd", False): NormThreshold(wide=3 << 17, half=1 << 21, stretch=14 * 14),
    ("cpu", "statistics", True): NormThreshold(wide=1 << 19, half=1 << 18, stretch=1536),
    ("cpu", "statistics", False): NormThreshold(wide=3 << 16, half=1 << 21, stretch=7 * 7, short=3 << 17),
    ("cpu", "inference", True): NormThreshold(wide=1 << 20, half=1 << 18, stretch=1, plain=False),
    ("cpu", "inference", False): NormThreshold(wide=1 << 20, half=1 << 19, stretch=14 * 14, plain=False),
}
_WITHOUT = {
    # at parity from there on, and the block keeps a quarter less memory
    ("cpu", "autograd", True): NormThreshold(wide=3 << 18, half=NEVER, stretch=1536, plain=False),
    ("cpu", "autograd", False): NormThreshold(wide=3 << 17, half=NEVER, stretch=14 * 14),
    ("cpu", "statistics", True): NormThreshold(wide=1 << 20, half=1 << 20, stretch=1536, plain=False),
    ("cpu", "statistics", False): NormThreshold(wide=3 << 16, half=NEVER, stretch=7 * 7),
    ("cpu", "inference", True): NormThreshold(wide=1 << 19, half=1 << 19, stretch=1, plain=False),
    ("cpu", "inference", False): NormThreshold(wide=1 << 20, half=1 << 20, stretch=14 * 14, plain=False),
}

# (backend, mode, channels innermost) -> NormThreshold; the mode is "inference", "statistics" of the batch, or
# "autograd" with either. What is not listed has not been measured, as above.
NORM_THRESHOLDS: dict[tuple[str, str, bool], NormThreshold] = (
    _WITH_AVX512 if torch.backends.cpu.get_cpu_capability() == "AVX512" else _WITHOUT
)


def smallest_norm(innermost: bool, *modes: str) -> NormThreshold:
    """From where on any backend but torch's own can be worth choosing."""
    found = [t for (_, mode, last), t in NORM_THRESHOLDS.items() if mode in modes and last is innermost]
    return NormThreshold(*(min(getattr(t, f.name) for t in found) for f in fields(NormThreshold)))


def threshold(op: str, backend: str, grad: bool) -> int:
    """Fewest elements from which `backend` is worth choosing for `op`."""
    found = THRESHOLDS.get((op, backend))
    return NEVER if found is None else found.grad if grad else found.no_grad


def smallest(op: str, grad: bool = False) -> int:
    """Fewest elements for which any backend but torch's own is worth choosing, at all or with a gradient."""
    found = [t for (name, _), t in THRESHOLDS.items() if name == op]
    return min((t.grad if grad else min(t.no_grad, t.grad) for t in found), default=NEVER)


@dataclass(frozen=True)
class Config:
    """How a Triton kernel is launched: elements a program handles, and its warps."""

    block: int
    num_warps: int


# Bytes of an element -> Config: two 16-byte accesses a thread (one in float64, short of registers) keep
# 32 KB in flight on a multiprocessor at half occupancy.
_POINTWISE = {2: Config(2048, 4), 4: Config(1024, 4), 8: Config(512, 8)}


# The same for kernels that need many registers for an element: 4 elements a thread, 2 in float64.
_HEAVY = {2: Config(512, 4), 4: Config(512, 4), 8: Config(256, 4)}


def pointwise_config(element_size: int, heavy: bool = False) -> Config:
    """Launch configuration of elementwise kernels; heavy: of those with much to compute."""
    return (_HEAVY if heavy else _POINTWISE)[element_size]


@dataclass(frozen=True)
class RowsConfig:
    """How a Triton kernel over rows is launched: rows a program, elements of a row at a time, and warps."""

    rows: int
    block: int
    num_warps: int


_WHOLE_ROW = {2: 1 << 15, 4: 1 << 14, 8: 1 << 13}
"""Bytes of an element -> longest row held on chip at once; longer ones are looped over."""

_TILE = {2: 1 << 10, 4: 1 << 10, 8: 1 << 9}
"""Bytes of an element -> elements of a row that 4 warps hold: 8 a thread, 4 in float64."""


def rows_config(length: int, element_size: int, whole: bool = True) -> RowsConfig:
    """Launch configuration for contiguous rows; whole: a program sees all of a row, in a loop if long.

    Short rows share a program, 2 elements a thread: what is computed once a row costs registers for each.
    """
    tile = _TILE[element_size]
    longest = _WHOLE_ROW[element_size] if whole else tile
    power_of_2 = _power_of_2(length)
    block = power_of_2 if power_of_2 <= longest else 4 * tile if whole else tile
    return RowsConfig(max(256 // block, 1), block, min(max(block * 4 // tile, 4), 32))


def norm_rows_config(length: int, element_size: int, heavy: bool = False) -> RowsConfig:
    """For batch norms over memory rows, none whole: 16 bytes a thread; heavy: for sums of gradients."""
    config = rows_config(length, element_size, whole=False)
    if not heavy:
        config = replace(config, rows=max(_TILE[element_size] // config.block, 1))
    if element_size < 8:
        return config
    return replace(config, block=min(config.block, 256) if heavy else config.block, num_warps=8)


def rotary_config(pairs: int, element_size: int) -> RowsConfig:
    """For rotary embedding, of rows with so many pairs: two tiles of them, 16 bytes a thread of each."""
    block = _power_of_2(pairs)
    return RowsConfig(max(4 * 32 * 16 // element_size // block, 1), block, 4)


def strided_rows_config(length: int, element_size: int) -> RowsConfig:
    """The same for rows that lie side by side: 32 of them, a warp's accesses, in a loop over the elements."""
    return RowsConfig(32, min(_power_of_2(length), _TILE[element_size] // 32), 4)


def _power_of_2(length: int) -> int:
    return max(1 << (length - 1).bit_length(), 8)


@dataclass(frozen=True)
class ConvConfig:
    """How a Triton convolution is launched: rows and columns of a program's tile, depth of a step's sums."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int

    def flat(self, channels: int) -> bool:
        """Taps and channels are gone along as one: few channels would leave a block of one tap empty."""
        return channels < 16

    def steps(self, channels: int, taps: int) -> int:
        """Steps of a program that sums over all taps and channels."""
        whole = -(-taps * channels // self.depth)
        return whole if self.flat(channels) else taps * -(-channels // self.depth)


CONV_PROGRAMS = 132
"""Tiles below which a convolution's sums are split: the multiprocessors of an H100. Not measured."""

# Bytes of an element -> from the largest tile to the smallest, chosen by what fits registers and shared
# memory of every architecture; not measured. float32 uses no tensor cores, unless tf32 is allowed.
CONV_CONFIGS: dict[int, tuple[ConvConfig, ...]] = {
    2: (
        ConvConfig(128, 128, 64, 8, 3),
        ConvConfig(128, 64, 64, 8, 3),
        ConvConfig(64, 64, 64, 4, 3),
        ConvConfig(64, 64, 32, 4, 3),
    ),
    4: (ConvConfig(64, 64, 16, 8, 3), ConvConfig(32, 32, 16, 4, 3)),
    8: (ConvConfig(32, 32, 16, 4, 2),),
}


def conv_config(rows: int, columns: int, channels: int, element_size: int, widest: int = 128) -> ConvConfig:
    """For a product of rows (pixels) x columns (channels made) over channels.

    The largest tiles that fill the device twice, no wider than the columns; short steps for few channels.
    """
    configs = [c for c in CONV_CONFIGS[element_size] if c.columns <= widest]
    if element_size == 2:
        configs = configs[-1:] if channels <= 32 else configs[:-1]
    for config in configs[:-1]:
        tiles = -(-rows // config.rows) * -(-columns // config.columns)
        if tiles >= 2 * CONV_PROGRAMS and config.columns <= max(columns, 64):
            return config
    return configs[-1]


CONV_INPUT_WIDEST = 64
"""Widest tile of an input gradient: with a prologue's derivative a wider one does not fit the registers."""

CONV_WEIGHT_CONFIGS: dict[int, tuple[ConvConfig, ...]] = {
    2: (ConvConfig(64, 64, 64, 4, 3),),
    4: (ConvConfig(64, 64, 16, 8, 2),),
    8: (ConvConfig(32, 32, 16, 8, 2),),
}


def weight_gradient_config(channels: int, element_size: int) -> ConvConfig:
    """For a convolution's weight gradient: rows are channels made, columns channels, sums over pixels."""
    return CONV_WEIGHT_CONFIGS[element_size][0]


def conv_box(pixels: int, images: int, height: int, width: int) -> tuple[tuple[int, int], int]:
    """Height and width of boxes of as many pixels, over some images, and how many cover all: the fewest.

    Of equal ones the most compact, whose taps overlap most.
    """
    found = []
    for high, wide in ((8, 8), (4, 4), (2, 2), (1, 1), (1, pixels)):
        if high * wide <= pixels:
            along = -(-images * high * wide // pixels)
            found.append(((high, wide), along * -(-height // high) * -(-width // wide)))
    return min(found, key=lambda one: one[1])


def conv_splits(tiles: int, steps: int) -> tuple[int, int]:
    """Into how many parts the steps of a sum are split, and steps of a part: 4 at least."""
    splits = max(min(2 * CONV_PROGRAMS // tiles, steps // 4), 1) if tiles < CONV_PROGRAMS else 1
    steps_a_split = -(-steps // splits)
    return -(-steps // steps_a_split), steps_a_split


@dataclass(frozen=True)
class WinogradThreshold:
    """From where on Winograd's convolution beats oneDNN's on the CPU, with its weights' transform.

    Attributes:
        channels: fewest of the input and of the result.
        pairs: fewest pairs of them.
        tiles: fewest tiles of 2x2 results.
        products: fewest pairs times tiles.
    """

    channels: int
    pairs: int
    tiles: int
    products: int


WINOGRAD = WinogradThreshold(channels=32, pairs=64 * 64, tiles=192, products=64 * 64 * 384)


def linear_chunk(rows: int, classes: int) -> int:
    """Rows of logits that a linear layer with its loss makes at once: a sixteenth, or 4M logits if more."""
    return max(-(-rows // 16), (1 << 22) // classes, 1)


CHANNELS_LAST_PIXELS = 28 * 28
"""Smallest image, of a residual block's result, for which training on contiguous tensors on the CPU pays to
run inside in channels_last: with smaller ones weights are large, and to reorder them costs what is gained."""

WINOGRAD_PIXELS = 14 * 14
"""The same where all convolutions are Winograd's, which take no other order."""

CHANNELS_LAST_ELEMENTS, WINOGRAD_ELEMENTS = 3 << 17, 3 << 16
"""Fewest elements of a contiguous residual block's input for which to run inside in channels_last pays on the
CPU, in training and, whatever the image's size, in inference; the second where all its convolutions are
Winograd's."""

LEAST_LAYOUT = 1 << 16
"""Fewest elements of an image that we bring into another memory format on the CPU."""

RECOMPUTE_PRODUCTS = 512
"""Fewest products of an element with weights for which to compute it again costs little beside them: 3%."""

QUICK_WEIGHTS, QUICK_POINTWISE, QUICK_RESULT = 5 << 15, 1 << 19, 1 << 17
"""Most weights, those of 1x1 on contiguous images, and elements of a result, for which a folded convolution
that torch.conv2d does without oneDNN, of a small image or in one thread, is faster so: quick to call."""

FOLDED_SHAPES = 4
"""Shapes of input for which the reordered weights of a folded convolution are kept."""

FOLDED_CALLS = 64
"""Kinds of calls of which it is remembered that a folded convolution serves them."""

PRODUCT, PRODUCT_ROWS = 1 << 24, 64
"""Fewest multiplications a thread, and rows, of a linear layer for which our products on the CPU pay."""

ATTENTION_QUERIES = 32
"""Fewest queries for which our attention on the CPU, which takes 32 at once, is faster than torch's."""

ATTENTION_SCORES = 1 << 14
"""Fewest scores, of all heads, for which it is without masks."""

ATTENTION_BIAS_KEYS = 32
"""Fewest keys for which its gradient of a bias is as exact as torch's."""

ROTARY_QUERIES = 128
"""Most queries, of all heads that read the same keys, for which Triton's attention turns keys as it reads
them, each program again. Not yet measured."""

ROTARY_HEAD = 128
"""Largest head that it turns itself: as compiled ahead of time, larger ones spill."""

MULTIHEAD_ELEMENTS = 1 << 18
"""Fewest elements of queries for which multi-head attention without autograd pays on the CPU."""

MULTIHEAD_FASTPATH_LENGTH = 192
"""Greatest length for which torch's fused inference of nn.MultiheadAttention is faster on the CPU, where our
kernels do not serve."""

MULTIHEAD_SLICE = 32 << 20
"""Most bytes of projections that multi-head attention's inference on the CPU holds, if the batch can go in
slices: malloc maps larger memory anew each time, to be touched for the first time."""

ENCODER_LENGTH = 384
"""Least length for which an encoder layer's inference in parts, on our CPU kernels, beats torch's fused."""

ENCODER_LENGTH_MASKED = 192
"""The same with a mask or padding."""

ENCODER_LENGTH_PRODUCTS = 32
"""The same where products are ours."""

MULTIHEAD_DROPOUT_WEIGHTS = 1 << 28
"""Most attention weights, 1 GiB, for which torch's multi-head attention with dropout is faster on the CPU,
where our kernels do not serve."""


@dataclass(frozen=True)
class AttentionConfig:
    """How a Triton kernel of attention is launched: queries and keys of a tile, warps, stages of its loop."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# (kernel, architecture) -> of half types' plain scores, and of others: for heads up to 64, 128, 256.
# Large tiles that still stay in registers, as compiled ahead of time, and whose stages fit into shared
# memory: 99 KB on sm_80, for the smaller devices of its kind, 227 on sm_90 and sm_100, 64 on gfx942. Not yet
# measured.
_ATTENTION: dict[tuple[str, str], tuple[tuple[tuple[int, int, int, int], ...], ...]] = {
    ("forward", "sm_80"): (
        ((128, 64, 8, 3), (128, 32, 8, 3), (64, 32, 8, 2)),
        ((128, 32, 8, 3), (128, 32, 8, 3), (64, 16, 4, 1)),
    ),
    ("forward", "sm_90"): (
        ((128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 2)),
        ((128, 32, 8, 3), (128, 32, 8, 3), (64, 32, 8, 1)),
    ),
    ("forward", "sm_100"): (
        ((128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 2)),
        ((128, 32, 8, 3), (128, 32, 8, 3), (64, 32, 8, 2)),
    ),
    ("forward", "gfx942"): (
        ((128, 64, 4, 3), (128, 64, 8, 2), (64, 32, 8, 2)),
        ((128, 64, 4, 3), (128, 32, 8, 3), (64, 32, 4, 2)),
    ),
    ("grad_q", "sm_80"): (
        ((64, 32, 4, 2), (64, 64, 8, 2), (64, 32, 8, 1)),
        ((64, 16, 4, 2), (64, 32, 8, 2), (32, 32, 8, 1)),
    ),
    ("grad_q", "sm_90"): (
        ((128, 64, 8, 3), (128, 64, 8, 2), (32, 32, 8, 1)),
        ((64, 32, 4, 2), (64, 32, 8, 2), (32, 32, 8, 1)),
    ),
    ("grad_q", "sm_100"): (
        ((128, 64, 8, 3), (128, 64, 8, 2), (64, 32, 8, 1)),
        ((64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 8, 1)),
    ),
    ("grad_q", "gfx942"): (
        ((64, 64, 4, 2), (64, 32, 8, 2), (32, 32, 4, 1)),
        ((64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 1)),
    ),
    ("grad_kv", "sm_80"): (
        ((32, 64, 8, 2), (32, 32, 8, 2), (16, 32, 8, 1)),
        ((16, 64, 4, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
    ),
    ("grad_kv", "sm_90"): (
        ((64, 64, 8, 2), (32, 64, 8, 2), (32, 32, 8, 1)),
        ((32, 64, 4, 1), (16, 64, 8, 1), (16, 32, 8, 1)),
    ),
    ("grad_kv", "sm_100"): (
        ((64, 64, 8, 2), (32, 64, 8, 1), (32, 32, 8, 1)),
        ((32, 64, 8, 1), (32, 64, 8, 1), (16, 32, 8, 1)),
    ),
    ("grad_kv", "gfx942"): (
        ((32, 64, 4, 2), (16, 64, 8, 1), (16, 32, 4, 1)),
        ((16, 64, 4, 1), (16, 64, 8, 1), (16, 32, 4, 1)),
    ),
}

# The same on every architecture for grad_bias, and for forward of few queries that turns keys; and for wider
# types everywhere.
_ATTENTION_ANY = {
    "grad_bias": ((64, 64, 8, 2), (64, 64, 8, 1), (16, 16, 8, 1)),
    "turning_forward": ((64, 32, 8, 2), (64, 16, 8, 2)),
}
_ATTENTION_WIDE = {
    "forward": ((32, 32, 8, 1), (32, 32, 8, 1), (16, 16, 8, 1)),
    "turning_forward": ((32, 32, 8, 1), (32, 32, 8, 1)),
    "grad_q": ((16, 32, 8, 1), (16, 32, 8, 1), (16, 16, 4, 1)),
    "grad_kv": ((32, 16, 4, 1), (32, 16, 8, 1), (16, 16, 8, 1)),
    "grad_bias": ((32, 32, 8, 1), (16, 32, 4, 1), (16, 16, 4, 1)),
}


def attention_config(kernel: str, arch: str, element_size: int, head: int, plain: bool) -> AttentionConfig:
    """Launch configuration of (turning_)forward, grad_q, grad_kv or grad_bias for heads padded to `head`.

    plain: neither a mask, nor anything added to the scores or done to them, nor dropout; padding and windows
    may be.
    """
    size = 0 if head <= 64 else 1 if head <= 128 else 2
    if element_size > 2:
        return AttentionConfig(*_ATTENTION_WIDE[kernel][size])
    if kernel in _ATTENTION_ANY:
        return AttentionConfig(*_ATTENTION_ANY[kernel][size])
    return AttentionConfig(*_ATTENTION[kernel, arch][0 if plain else 1][size])
