"""Tables and plots from the committed result lines: `python -m benchmarks.report`.

Writes benchmarks/results/README.md, a plot beside each results file, and the tables between the markers of
the project's README. A figure whose kernels have changed since it was measured is marked stale.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.runner import ROOT, Result, human, load, table

FOLDER = ROOT / "benchmarks/results"
MARKERS = r"(<!-- results:{name} -->\n).*?(<!-- /results -->)"
CONTENDERS = {"seed": "#b0b7c3", "torch": "#5b7db1", "compile": "#8d6cab"}
README_SIZES = (2**10, 2**22, 2**28)
README_DTYPES = ("float32", "bfloat16")


def heading(results: Sequence[Result]) -> str:
    """Where and when the figures of a file come from."""
    first = results[0]
    facts = first.machine
    parts = [facts["device"], f"torch {facts['torch']}", f"triton {facts['triton'] or 'none'}"]
    parts += [f"driver {facts['driver']}"] * bool(facts["driver"])
    parts += [f"{facts['threads']} threads"] * bool(facts["threads"])
    copy, product = ([r.limits[key] for r in results] for key in ("copy_bytes_per_s", "matmul_flop_per_s"))
    commits = ", ".join(dict.fromkeys(f"{r.commit} ({r.date})" for r in results))
    return (
        f"{', '.join(parts)}. Copy {_span(copy, 1e9)} GB/s, matrix product {_span(product, 1e12)} TFLOP/s, "
        f"measured in each run. Commits: {commits}."
    )


def _span(values: Sequence[float], unit: float) -> str:
    ends = dict.fromkeys(f"{end / unit:.3g}" for end in (min(values), max(values)))
    return " to ".join(ends)


def selected(results: Sequence[Result]) -> list[Result]:
    """The few rows that the project's README shows."""
    sizes = [r for r in results if r.family == "activation" and r.numel in README_SIZES]
    many = ("activation", "convolution")  # sizes and layers, and so is attention as a function
    promised = [r for r in results if r.family not in many and r.op != "attention" and r.targets]
    models = [r for r in results if r.family == "models" and not r.targets]
    return [r for r in sizes + promised + models if r.dtype in README_DTYPES]


def short_table(results: Sequence[Result]) -> str:
    """For the README: time, and how many times longer the others take."""
    lines = [
        "| | served by | time | rate (of limit) | seed formulation | torch | torch.compile |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in selected(results):
        ratios = " | ".join(f"{r.ratio(name):.2f}x" if name in r.seconds else "" for name in CONTENDERS)
        stale = " (stale)" if r.stale else ""
        time = human(r.seconds["nnfast"])
        lines.append(f"| {r.case}{stale} | {r.backend} | {time} | {r.rate} ({r.share:.0%}) | {ratios} |")
    return "\n".join(lines)


def below(results: Sequence[Result]) -> str:
    """For the README: where something is faster than ours, or a promise is missed."""
    lines = ["| | served by | faster, its time over ours | promise missed |", "|---|---|---|---|"]
    for r in results:
        ratios = {name: round(r.ratio(name), 2) for name in CONTENDERS if name in r.seconds}
        faster = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in ratios.items() if ratio < 1)
        if faster or r.missed():
            stale = " (stale)" if r.stale else ""
            lines.append(f"| {r.case}{stale} | {r.backend} | {faster} | {'; '.join(r.missed())} |")
    return "\n".join(lines)


def pictures(results: Sequence[Result], path: Path) -> dict[Path, tuple[Callable[..., Any], list[Result]]]:
    """File -> what draws it, and of which results: activations by size, everything else case by case."""
    sized = [r for r in results if r.family == "activation"]
    cases = [r for r in results if r.family != "activation" and r.dtype in README_DTYPES]
    beside = path.with_name(f"{path.stem}-cases.png")
    both = {path.with_suffix(".png"): (_by_size, sized), beside: (_by_case, cases)}
    return {where: (draw, found) for where, (draw, found) in both.items() if found}


def plot(results: Sequence[Result], path: Path) -> None:
    """How many times longer the others take."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    for where, (draw, found) in pictures(results, path).items():
        figure = draw(found, plt)
        figure.suptitle(heading(found), fontsize=7)
        figure.savefig(where, dpi=120)
        plt.close(figure)
        print(where.relative_to(ROOT))


def _ratio_axis(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axis.set_minor_formatter(FuncFormatter(lambda value, _: ""))


def _by_size(results: Sequence[Result], plt: Any) -> Any:
    """A panel for each operation, direction and dtype."""
    ops = sorted({r.op for r in results})
    columns = [(d, t) for d in ("forward", "forward+backward") for t in README_DTYPES]
    size = (3.6 * len(columns), 3 * len(ops))
    figure, panels = plt.subplots(
        len(ops), len(columns), figsize=size, squeeze=False, sharey="row", layout="constrained"
    )
    for row, op in zip(panels, ops, strict=True):
        for panel, (direction, dtype) in zip(row, columns, strict=True):
            found = sorted(
                (r for r in results if (r.op, r.direction, r.dtype) == (op, direction, dtype)),
                key=lambda r: r.numel,
            )
            sizes = [r.numel for r in found]
            for name, colour in CONTENDERS.items():
                panel.plot(sizes, [r.ratio(name) for r in found], "o-", ms=4, color=colour, label=name)
            panel.axhline(1, color="black", lw=1, label="nnfast")
            panel.set_xscale("log", base=2)
            panel.set_yscale("log", base=2)
            _ratio_axis(panel.yaxis)
            panel.set_title(f"{op} {direction}, {dtype}", fontsize=10)
            panel.grid(alpha=0.3)
        row[0].set_ylabel("time over nnfast's")
    for panel in panels[-1]:
        panel.set_xlabel("elements")
    panels[0][0].legend(fontsize=8)
    return figure


def _by_case(results: Sequence[Result], plt: Any) -> Any:
    """A line for each case, a dot on it for each contender."""
    figure, panel = plt.subplots(figsize=(11, 1.5 + 0.24 * len(results)), layout="constrained")
    for name, colour in CONTENDERS.items():
        found = [(r.ratio(name), at) for at, r in enumerate(results) if name in r.seconds]
        panel.plot(*zip(*found, strict=True), "o", ms=6, color=colour, label=name)
    panel.axvline(1, color="black", lw=1, label="nnfast")
    panel.set_yticks(range(len(results)), [r.case for r in results], fontsize=8)
    panel.set_ylim(len(results) - 0.5, -0.5)
    panel.set_xscale("log", base=2)
    _ratio_axis(panel.xaxis)
    panel.set_xlabel("time over nnfast's")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8, loc="lower right")
    return figure


def write_markers(text: str, name: str, content: str) -> str:
    """text with what stands between a table's markers replaced."""
    return re.sub(MARKERS.format(name=name), lambda m: m[1] + content + "\n" + m[2], text, flags=re.DOTALL)


def render() -> dict[Path, str]:
    """Every file that is made from the results, as text."""
    readme = (ROOT / "README.md").read_text()
    parts = ["# Results", "", "Made by `python -m benchmarks.report` from the lines in this folder."]
    for path in sorted(FOLDER.glob("*.jsonl")):
        results = load(path)
        readme = write_markers(readme, path.stem, f"\n{heading(results)}\n\n{short_table(results)}\n")
        readme = write_markers(readme, f"{path.stem} below 1x", f"\n{below(results)}\n")
        parts += [
            "",
            f"## {path.stem}",
            "",
            heading(results),
            "",
            table(results),
            *(f"\n![{picture.stem}]({picture.name})" for picture in pictures(results, path)),
        ]
    return {ROOT / "README.md": readme, FOLDER / "README.md": "\n".join(parts) + "\n"}


def main() -> int:
    """Write everything, or with --check say what is not as the results have it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if a table differs from the results"
    )
    check = parser.parse_args().check
    differs = [path for path, text in render().items() if not path.exists() or path.read_text() != text]
    if check:
        for path in differs:
            print(f"{path.relative_to(ROOT)} is not what the results say: run python -m benchmarks.report")
        return bool(differs)
    for path, text in render().items():
        path.write_text(text)
    for path in sorted(FOLDER.glob("*.jsonl")):
        plot(load(path), path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
