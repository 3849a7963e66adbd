"""What the command prints, and its own error."""

import sys
from collections.abc import Iterable, Sequence

from unilora_core import UniLoraError

__all__ = ["CommandError", "number", "one_line", "say", "table"]


class CommandError(UniLoraError):
    """Something that the user can put right: a missing file, a wrong column, a model that cannot be built."""


def say(text: str = "") -> None:
    """Print a line (or several)."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def one_line(error: BaseException | str, limit: int = 600) -> str:
    """A message without line breaks, cut where it gets long; the type's name where there is no message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[:limit]} …"


def number(value: object) -> str:
    """Short for people: 12,345; 0.00213; 1.6e-05."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def table(rows: Iterable[Sequence[object]], indent: str = "  ") -> str:
    """Columns of equal width; the first is flush left, the others are flush right where they hold numbers."""
    rows = [tuple(row) for row in rows]
    cells = [[number(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [all(isinstance(row[i], (int, float)) for row in rows[1:]) for i in range(len(widths))]
    lines = (
        "  ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True))
        for row in cells
    )
    return "\n".join(f"{indent}{line}".rstrip() for line in lines)
