"""The demo's second part: images of which some classes are rare, with cross entropy and with focal loss."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nnfast

from ._tasks import Samples, fashion_mnist
from ._text import facts, table

CLASSES = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
RARE = (4, 6, 7)
KEPT = 40
"""Images of a rare class to train on; of the others there are 800."""

LOGITS = ((65536, 10), (16384, 1000))
"""Rows and classes for which the loss alone is timed."""

Loss = Callable[[Tensor, Tensor], Tensor]


class FocalLoss(nn.Module):
    """Focal loss as a user would write it (Lin et al. 2017, arXiv:1708.02002)."""

    def __init__(self, alpha: float = 1, gamma: float = 2) -> None:
        """The mean of alpha * (1 - p)**gamma * cross entropy."""
        super().__init__()
        self.alpha = alpha
        self.gamma = gamma

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Inputs (N, C), targets (N,)."""
        ce = F.cross_entropy(inputs, targets, reduction="none")
        focal: Tensor = self.alpha * (1 - torch.exp(-ce)) ** self.gamma * ce
        return focal.mean()


def imbalanced(samples: Samples) -> Samples:
    """All images of most classes, and the first few of the rare ones."""
    rare = torch.zeros(len(samples), dtype=torch.bool)
    for label in RARE:
        rare[(samples.targets == label).nonzero().flatten()[KEPT:]] = True
    return samples[~rare]


def network() -> nn.Module:
    """A small convolutional network for (N, 1, 28, 28)."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 64),
        nn.ReLU(),
        nn.Linear(64, len(CLASSES)),
    )


def train(loss_of: Loss, samples: Samples, epochs: int, steps: int, batch_size: int, seed: int) -> nn.Module:
    """A network from the seed's weights, after `epochs` times `steps` batches in the seed's order."""
    torch.manual_seed(seed)
    model = network().to(samples.inputs.device)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.05, epochs * steps)
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        shuffled = torch.randperm(len(samples), generator=order)
        for step in range(steps):
            batch = samples[shuffled[step * batch_size : (step + 1) * batch_size]]
            optimizer.zero_grad()
            loss_of(model(batch.inputs), batch.targets).backward()
            optimizer.step()
            schedule.step()
    return model


@torch.no_grad()
def recall(model: nn.Module, samples: Samples) -> list[float]:
    """Of each class, the share of its samples that are found."""
    found = torch.cat([model(part).argmax(1) for part in samples.inputs.split(500)])
    right = found == samples.targets
    return [right[samples.targets == label].float().mean().item() for label in range(len(CLASSES))]


def show(device: torch.device, epochs: int, steps: int | None, batch_size: int, seed: int) -> None:
    """Train with both losses and print what each finds, and what the loss itself costs."""
    samples, held_out = fashion_mnist()
    samples, held_out = imbalanced(samples).to(device), held_out.to(device)
    steps = max(1, min(len(samples) // batch_size, steps or len(samples)))
    counts = samples.targets.bincount(minlength=len(CLASSES))
    alpha = nnfast.class_balanced_alpha(counts)
    losses: dict[str, Loss] = {
        "cross entropy": F.cross_entropy,
        "focal loss": nnfast.FocalLoss(alpha, gamma=2).to(device),
    }
    rare = " and ".join([", ".join(CLASSES[label] for label in RARE[:-1]), CLASSES[RARE[-1]]])
    heading = [
        ("data", f"Fashion-MNIST with only {KEPT} images each of {rare}: {len(samples):,} to train on"),
        ("losses", f"cross entropy; {losses['focal loss']} with nnfast.class_balanced_alpha"),
        ("training", f"{epochs} epochs of {steps} steps with {batch_size} images, seed {seed}"),
    ]
    print(f"\nRare classes\n{facts(heading)}\n", flush=True)
    recalls = [
        recall(train(loss, samples, epochs, steps, batch_size, seed), held_out) for loss in losses.values()
    ]
    print(_recalls(list(losses), counts.tolist(), recalls), end="\n\n", flush=True)
    print(_speed(device))


def _recalls(names: list[str], counts: list[int], recalls: list[list[float]]) -> str:
    """A row for each class, the rare ones first, and their means."""
    order = sorted(range(len(CLASSES)), key=lambda label: (label not in RARE, label))
    rows = [[CLASSES[label], str(counts[label]), *(f"{r[label]:.1%}" for r in recalls)] for label in order]
    for name, labels in (("mean of the rare", RARE), ("mean of all", range(len(CLASSES)))):
        rows.append([name, "", *(f"{statistics.fmean(r[label] for label in labels):.1%}" for r in recalls)])
    title = "Recall: of the 200 held-out images of a class, how many are found"
    return f"{title}\n{table(['class', 'trained on', *names], rows)}"


def _speed(device: torch.device) -> str:
    """The loss alone, forward and backward, as written and swapped."""
    rows = []
    for shape in LOGITS:
        x = torch.randn(shape, device=device, requires_grad=True)
        targets = torch.randint(shape[1], shape[:1], device=device)
        written, swapped = FocalLoss(), FocalLoss()
        nnfast.swap(swapped)
        times: tuple[list[float], list[float]] = ([], [])
        values = [0.0, 0.0]
        for _ in range(7):
            for i, loss in enumerate((written, swapped)):
                _synchronize(device)
                begin = time.perf_counter()
                value = loss(x, targets)
                torch.autograd.grad(value, x)
                _synchronize(device)
                times[i].append(time.perf_counter() - begin)
                values[i] = value.item()
        medians = [statistics.median(found[2:]) for found in times]
        backend = nnfast.explain("softmax_focal_loss", x, targets).backend or "none"
        rows.append(
            [
                f"{shape[0]} x {shape[1]}",
                *(f"{seconds * 1e3:.2f} ms" for seconds in medians),
                f"{medians[0] / medians[1]:.2f}x",
                f"{abs(values[0] - values[1]):.1e}",
                backend,
            ]
        )
    header = ["rows x classes", "as written", "nnfast", "ratio", "difference", "served by"]
    return "Focal loss alone, forward and backward\n" + table(header, rows)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
