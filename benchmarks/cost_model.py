"""What a GPU allows a training forward of ResNet-50's convolutions: `python -m benchmarks.cost_model`.

For each layer FLOPs, bytes, tiles of our convolution and waves of them over the multiprocessors; and the
least time of the layer with its batch norm, addition and activation: by torch's operations one after another,
by our passes, with the statistics in the convolution's epilogue, and with the norm before it in its prologue.

Bounds, not measurements: a convolution takes its FLOPs or its bytes, whichever is longer, ours whole waves of
tiles; every pass over its result takes the bytes of it.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

from nnfast.core.tuning import conv_config

PASSES = {  # over the result, beside the convolution: torch, ours, + epilogue, + prologue
    "inner": (5.0, 3.0, 2.0, 0.0),  # statistics 1, norm 2, relu 2; ours norm and relu 2
    "last": (8.0, 4 + 1 / 16, 3 + 1 / 16, 3 + 1 / 16),  # and addition 3; ours a bit for each element
    "projection": (3.0, 1.0, 0.0, 0.0),  # ours is normalised as it is added
    "stem": (5.0, 3.0, 2.0, 2.0),  # pooling is no convolution
}
COLUMNS = ("torch", "our passes", "+ epilogue", "+ prologue")


@dataclass(frozen=True)
class Device:
    """Rates that a device reaches, not those of its data sheet."""

    flop_per_s: float = 790e12
    bytes_per_s: float = 4.3e12
    multiprocessors: int = 132


@dataclass(frozen=True)
class Layer:
    """Convolutions of one shape: channels, channels made, kernel, stride, pixels of a side of the result."""

    name: str
    count: int
    channels: int
    out_channels: int
    kernel: int
    stride: int
    size: int
    place: str

    def flops(self, batch: int) -> int:
        """Of one convolution, a multiplication and an addition each."""
        return 2 * batch * self.size**2 * self.out_channels * self.channels * self.kernel**2

    def result_bytes(self, batch: int, element: int = 2) -> int:
        """What one pass over its result moves."""
        return batch * self.size**2 * self.out_channels * element

    def bytes(self, batch: int, element: int = 2) -> int:
        """What the convolution moves: input and weights once, result once."""
        side = (
            self.size if self.kernel == 1 else self.size * self.stride
        )  # of 1x1, pixels between are left out
        given = batch * side**2 * self.channels
        weights = self.out_channels * self.channels * self.kernel**2
        return (given + weights) * element + self.result_bytes(batch, element)

    def tiles(self, batch: int, element: int = 2) -> int:
        """Programs of our convolution."""
        rows = batch * self.size**2
        config = conv_config(rows, self.out_channels, self.channels, element)
        return math.ceil(rows / config.rows) * math.ceil(self.out_channels / config.columns)

    def waves(self, batch: int, device: Device) -> float:
        """Tiles over multiprocessors; the last wave takes as long as a full one."""
        return self.tiles(batch) / device.multiprocessors

    def bounds(self, batch: int, device: Device) -> tuple[float, ...]:
        """Least seconds of one layer in training forward, by `COLUMNS`."""
        compute, moved = self.flops(batch) / device.flop_per_s, self.bytes(batch) / device.bytes_per_s
        waves = self.waves(batch, device)
        theirs = max(compute, moved)
        ours = max(compute * math.ceil(waves) / waves, moved)
        a_pass = self.result_bytes(batch) / device.bytes_per_s
        convolutions = (theirs, theirs, ours, ours)
        return tuple(c + p * a_pass for c, p in zip(convolutions, PASSES[self.place], strict=True))


def _stage(number: int, inputs: int, width: int, blocks: int, size: int, stride: int) -> list[Layer]:
    """Bottlenecks; the 3x3 convolution of the first has the stride."""
    wide, name = 4 * width, f"conv{number}"
    return [
        Layer(f"{name} 1x1 {inputs}->{width}", 1, inputs, width, 1, 1, size * stride, "inner"),
        Layer(f"{name} 1x1 {wide}->{width}", blocks - 1, wide, width, 1, 1, size, "inner"),
        *([Layer(f"{name} 3x3 {width} /2", 1, width, width, 3, 2, size, "inner")] if stride > 1 else []),
        Layer(f"{name} 3x3 {width}", blocks - (stride > 1), width, width, 3, 1, size, "inner"),
        Layer(f"{name} 1x1 {width}->{wide}", blocks, width, wide, 1, 1, size, "last"),
        Layer(f"{name} 1x1 {inputs}->{wide} /{stride}", 1, inputs, wide, 1, stride, size, "projection"),
    ]


RESNET50 = [
    Layer("conv1 7x7 3->64 /2", 1, 3, 64, 7, 2, 112, "stem"),
    *_stage(2, 64, 64, 3, 56, 1),
    *_stage(3, 256, 128, 4, 28, 2),
    *_stage(4, 512, 256, 6, 14, 2),
    *_stage(5, 1024, 512, 3, 7, 2),
]


def table(batch: int, device: Device) -> str:
    """Microseconds of each layer, and of all."""
    heads = ("layer", "n", "GFLOP", "MB", "tiles", "waves", *(f"{c} us" for c in COLUMNS))
    rows, sums = [heads], [0.0] * len(COLUMNS)
    for layer in RESNET50:
        bounds = layer.bounds(batch, device)
        sums = [s + layer.count * b for s, b in zip(sums, bounds, strict=True)]
        rows.append(
            (
                layer.name,
                str(layer.count),
                f"{layer.flops(batch) / 1e9:.1f}",
                f"{layer.bytes(batch) / 1e6:.0f}",
                str(layer.tiles(batch)),
                f"{layer.waves(batch, device):.1f}",
                *(f"{b * 1e6:.1f}" for b in bounds),
            )
        )
    rows.append(("all", str(sum(x.count for x in RESNET50)), *[""] * 4, *(f"{s * 1e6:.0f}" for s in sums)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--batch", type=int, default=256, help="images")
    parser.add_argument("--flops", type=float, default=Device.flop_per_s, help="FLOP/s of matrix products")
    parser.add_argument("--bandwidth", type=float, default=Device.bytes_per_s, help="bytes/s of memory")
    parser.add_argument("--multiprocessors", type=int, default=Device.multiprocessors)
    given = parser.parse_args()
    print(table(given.batch, Device(given.flops, given.bandwidth, given.multiprocessors)))


if __name__ == "__main__":
    main()
