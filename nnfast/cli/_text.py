"""Text for people: aligned tables and numbers with units."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns under their header, indented; the first `left` of them aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        aligned = [
            f"{cell:<{width}}" if i < left else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  " + "   ".join(aligned).rstrip()

    return "\n".join(map(line, [header, ["-" * width for width in widths], *rows]))


def facts(pairs: Sequence[tuple[str, str]], width: int = 100) -> str:
    """One `label   text` a line, indented; long texts wrapped under themselves."""
    column = max(len(label) for label, _ in pairs) + 3
    wrapped = [
        textwrap.fill(
            text,
            width,
            initial_indent=f"  {label:<{column}}",
            subsequent_indent=" " * (column + 2),
            break_long_words=False,
            break_on_hyphens=False,
        )
        for label, text in pairs
    ]
    return "\n".join(wrapped)
