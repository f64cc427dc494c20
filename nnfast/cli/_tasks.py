"""What the demo trains. A task is its data, a network as a user would write it, and a loss.

To add one, write these three and enter them in `TASKS`; the demo does the rest.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FASHION_MNIST = Path(__file__).parent / "data" / "fashion-mnist-t10k"


@dataclass(frozen=True)
class Samples:
    """Inputs and their targets; the first dimension counts them."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        """How many."""
        return len(self.inputs)

    def __getitem__(self, which: Tensor | slice) -> Samples:
        """Some of them."""
        return Samples(self.inputs[which], self.targets[which])

    def to(self, device: torch.device) -> Samples:
        """The same on another device."""
        return Samples(self.inputs.to(device), self.targets.to(device))


@dataclass(frozen=True)
class Task:
    """Something to learn.

    Attributes:
        name: for file names.
        title: for people.
        description: of the network, for people.
        data: reads it: the samples to train on and those held out.
        network: makes the untrained network, of a user's own modules. `nnfast.swap` is applied to a copy.
        loss: of the network's outputs and the targets, a mean over the samples.
    """

    name: str
    title: str
    description: str
    data: Callable[[], tuple[Samples, Samples]]
    network: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]


class Mish(nn.Module):
    """Mish as a user would write it (Misra 2019, arXiv:1908.08681)."""

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise, any shape."""
        return x * torch.tanh(F.softplus(x))


class Swish(nn.Module):
    """Swish as a user would write it (Ramachandran et al. 2017, arXiv:1710.05941)."""

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise, any shape."""
        return x * torch.sigmoid(x)


def _conv_bn(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs)]


class Residual(nn.Module):
    """Two convolutions with batch norm, added to their input (He et al. 2015, arXiv:1512.03385)."""

    def __init__(self, channels: int) -> None:
        """Of an input (N, channels, H, W)."""
        super().__init__()
        self.branch = nn.Sequential(*_conv_bn(channels, channels), Mish(), *_conv_bn(channels, channels))
        self.activation = Mish()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same."""
        activated: Tensor = self.activation(x + self.branch(x))
        return activated


def residual_network(width: int = 16, classes: int = 10) -> nn.Module:
    """For (N, 1, 28, 28): a residual stage at 28x28, one at 14x14, and a classifier with dropout."""
    return nn.Sequential(
        *_conv_bn(1, width),
        Mish(),
        Residual(width),
        *_conv_bn(width, 2 * width, stride=2),
        Mish(),
        Residual(2 * width),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(2 * width * 7 * 7, 64),
        Swish(),
        nn.Dropout(0.2),
        nn.Linear(64, classes),
    )


class SelfAttention(nn.Module):
    """Multi-head self-attention as a user would write it (Vaswani et al. 2017, arXiv:1706.03762)."""

    def __init__(self, embed_size: int, heads: int) -> None:
        """One projection of values, keys and queries each, shared by the heads."""
        super().__init__()
        self.embed_size = embed_size
        self.heads = heads
        self.head_dim = embed_size // heads
        self.values = nn.Linear(self.head_dim, self.head_dim, bias=False)
        self.keys = nn.Linear(self.head_dim, self.head_dim, bias=False)
        self.queries = nn.Linear(self.head_dim, self.head_dim, bias=False)
        self.fc_out = nn.Linear(heads * self.head_dim, embed_size)

    def forward(self, values: Tensor, keys: Tensor, query: Tensor, mask: Tensor | None) -> Tensor:
        """Values and keys (N, key_len, embed_size), query (N, query_len, embed_size) to the query's shape."""
        n = query.shape[0]
        value_len, key_len, query_len = values.shape[1], keys.shape[1], query.shape[1]
        values = values.reshape(n, value_len, self.heads, self.head_dim)
        keys = keys.reshape(n, key_len, self.heads, self.head_dim)
        queries = query.reshape(n, query_len, self.heads, self.head_dim)
        values = self.values(values)
        keys = self.keys(keys)
        queries = self.queries(queries)
        energy = torch.einsum("nqhd,nkhd->nhqk", [queries, keys])
        if mask is not None:
            energy = energy.masked_fill(mask == 0, float("-1e20"))
        attention = torch.softmax(energy / (self.embed_size ** (1 / 2)), dim=3)
        out = torch.einsum("nhql,nlhd->nqhd", [attention, values]).reshape(
            n, query_len, self.heads * self.head_dim
        )
        projected: Tensor = self.fc_out(out)
        return projected


class Encoder(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) (Xiong et al. 2020, arXiv:2002.04745)."""

    def __init__(self, width: int, heads: int) -> None:
        """Of an input (N, length, width)."""
        super().__init__()
        self.attention = SelfAttention(width, heads)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), Swish(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(N, length, width) to the same."""
        normalised = self.norm1(x)
        x = x + self.attention(normalised, normalised, normalised, None)
        summed: Tensor = x + self.mlp(self.norm2(x))
        return summed


class Patches(nn.Module):
    """Images (N, 1, H, W) to their patches in sequence, (N, length, width), each with its position added."""

    def __init__(self, side: int, width: int, length: int) -> None:
        """Patches of side x side pixels."""
        super().__init__()
        self.project = nn.Conv2d(1, width, side, stride=side)
        self.position = nn.Buffer(positions(length, width))

    def forward(self, x: Tensor) -> Tensor:
        """The projected patches."""
        placed: Tensor = self.project(x).flatten(2).transpose(1, 2) + self.position
        return placed


class Mean(nn.Module):
    """The mean over a sequence."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, length, width) to (N, width)."""
        return x.mean(1)


def positions(length: int, width: int) -> Tensor:
    """Sines and cosines of geometric frequencies, (length, width); Vaswani et al. 2017, section 3.5."""
    angles = torch.arange(length)[:, None] / 10000 ** (torch.arange(0, width, 2) / width)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)


def attention_network(width: int = 64, heads: int = 4, classes: int = 10) -> nn.Module:
    """For (N, 1, 28, 28): 196 patches of 2x2 pixels, an encoder, and a classifier of their mean."""
    return nn.Sequential(
        Patches(2, width, 14 * 14),
        Encoder(width, heads),
        nn.LayerNorm(width),
        Mean(),
        nn.Linear(width, classes),
    )


def read_idx(path: Path) -> Tensor:
    """The uint8 tensor in a gzipped IDX file (two zero bytes, type 8, dimensions, sizes, values)."""
    content = bytearray(gzip.decompress(path.read_bytes()))
    if content[:3] != b"\0\0\x08":
        raise ValueError(
            f"{path}: begins with {bytes(content[:4])!r}; an IDX file of uint8 begins with 0, 0, 8"
        )
    dimensions = content[3]
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, 4 + 4 * dimensions, 4)]
    return torch.frombuffer(content, dtype=torch.uint8, offset=4 + 4 * dimensions).view(shape)


def fashion_mnist() -> tuple[Samples, Samples]:
    """Fashion-MNIST's test images (Xiao et al. 2017, arXiv:1708.07747), of each class 800 and 200 held out.

    Returns:
        Images (N, 1, 28, 28), float32 of mean 0 and variance 1, and labels (N,), int64; the split is fixed.
    """
    images = read_idx(FASHION_MNIST / "t10k-images-idx3-ubyte.gz")[:, None].float()
    images = (images - images.mean()) / images.std()
    labels = read_idx(FASHION_MNIST / "t10k-labels-idx1-ubyte.gz").long()
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    by_class = shuffled[labels[shuffled].argsort(stable=True)].view(10, 1000)
    samples = Samples(images, labels)
    return samples[by_class[:, 200:].flatten()], samples[by_class[:, :200].flatten()]


TASKS = (
    Task(
        "fashion-mnist",
        "Fashion-MNIST",
        "residual, batch norm, Mish; dropout and Swish in the classifier",
        fashion_mnist,
        residual_network,
        F.cross_entropy,
    ),
    Task(
        "fashion-mnist-attention",
        "Fashion-MNIST in patches",
        "196 patches with sinusoidal positions, self-attention of 4 heads, Swish",
        fashion_mnist,
        attention_network,
        F.cross_entropy,
    ),
)
"""What `nnfast demo` trains, in this order."""
