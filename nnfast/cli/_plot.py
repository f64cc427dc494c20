"""The demo's picture: losses and accuracy of both models, and time and memory of a step."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from ._training import Result

COLORS = ("#b8b8c4", "#d1495b")
"""As written, nnfast."""

INK = "#2b2d42"


def plot(result: Result, title: str, machine: str, path: Path) -> None:
    """Write the picture to `path`, a PNG."""
    sides = result.written, result.swapped
    times = [side.quartiles()[1] * 1e3 for side in sides]
    layout = ConstrainedLayoutEngine(wspace=0.05, w_pad=0.12, h_pad=0.1)
    figure = Figure(figsize=(13, 5), dpi=130, layout=layout, facecolor="white")
    figure.suptitle(
        f"{title}: a step swapped by nnfast takes {times[1] / times[0]:.0%} of the time it takes as written",
        x=0.012,
        ha="left",
        fontsize=15,
        fontweight="bold",
        color=INK,
    )
    loss, accuracy, seconds, memory = figure.subplots(1, 4, width_ratios=[3.2, 2.2, 1.2, 1.2])
    steps = range(1, len(sides[0].losses) + 1)
    epochs = range(1, result.epochs + 1)
    _curves(loss, "Training loss (mean of 10 steps)", "step", steps, [_smooth(s.losses) for s in sides])
    _curves(accuracy, "Held-out accuracy, %", "epoch", epochs, [[100 * a for a in s.accuracy] for s in sides])
    loss.set_ylim(bottom=0)
    loss.legend([s.label for s in sides], frameon=False, fontsize=10)
    accuracy.set_xticks(list(epochs))
    _bars(seconds, "Time of a step, ms", times, [s.label for s in sides])
    memory_title = f"{result.memory_label.capitalize()}, MiB"
    _bars(memory, memory_title, [s.memory / 2**20 for s in sides], [s.label for s in sides])
    figure.supxlabel(machine, x=0.012, ha="left", fontsize=9, color="#6c757d")
    figure.savefig(path)


def _frame(ax: Any, title: str) -> None:
    ax.set_title(title, loc="left", fontsize=11, color=INK)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#8d99ae")
    ax.tick_params(colors=INK, labelsize=9)


def _curves(ax: Any, title: str, x_label: str, x: Sequence[int], curves: list[list[float]]) -> None:
    """The first wide and pale, the second thin upon it: where they are equal, both are seen."""
    _frame(ax, title)
    marker = "o" if len(x) <= 30 else None
    for values, color, width, size, style in zip(curves, COLORS, (6, 1.6), (11, 5), ("-", "--"), strict=True):
        ax.plot(x, values, style, color=color, lw=width, marker=marker, ms=size)
    ax.set_xlabel(x_label, fontsize=9, color=INK)
    ax.grid(axis="y", color="#edf0f4")
    ax.set_axisbelow(True)


def _smooth(values: list[float], window: int = 10) -> list[float]:
    """The mean of each value and those up to `window` - 1 before it."""
    return [statistics.fmean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]


def _bars(ax: Any, title: str, values: list[float], labels: list[str]) -> None:
    """A bar for each side, with its value; beneath, how much less the second is."""
    _frame(ax, title)
    bars = ax.bar(labels, values, color=COLORS, width=0.66)
    ax.bar_label(bars, fmt="{:.1f}", padding=3, fontsize=10, fontweight="bold", color=INK)
    ax.set_xlabel(f"ratio {values[0] / values[1]:.2f}", fontsize=9, color=INK)
    ax.margins(y=0.1)
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
