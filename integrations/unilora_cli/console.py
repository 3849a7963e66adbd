"""What the command prints, and its own error. Whatever a file says is printed escaped: see `printable`."""

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from unilora_core import UniLoraError
from unilora_core.errors import printable

__all__ = ["CommandError", "number", "one_line", "path_of", "say", "table"]


class CommandError(UniLoraError):
    """Something that the user can put right: a missing file, a wrong column, a model that cannot be built."""


def say(text: str = "") -> None:
    """Print a line (or several); tabs are kept, as line breaks are."""
    sys.stdout.write("\t".join(map(printable, text.split("\t"))) + "\n")
    sys.stdout.flush()


def one_line(error: BaseException | str, limit: int = 600) -> str:
    """A message without line breaks, cut where it gets long; the type's name where there is no message."""
    return _cut(printable(" ".join(str(error).split())) or type(error).__name__, limit)


def path_of(text: str) -> Path:
    """A path that the user gave, ``~`` at its start replaced."""
    return Path(os.path.expanduser(text))


def number(value: object) -> str:
    """Short for people: 12,345; 0.00213; 1.6e-05."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def table(rows: Iterable[Sequence[object]], indent: str = "  ") -> str:
    """Columns of equal width; the first is flush left, the others are flush right where they hold numbers."""
    rows = [tuple(row) for row in rows]
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [all(isinstance(row[i], (int, float)) for row in rows[1:]) for i in range(len(widths))]
    lines = (
        "  ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True))
        for row in cells
    )
    return "\n".join(f"{indent}{line}".rstrip() for line in lines)


def _cell(value: object) -> str:
    """A value on one line; a long one is cut, or all others in its column would be filled up to it."""
    return _cut(printable(number(value)).replace("\n", "\\n"), 600)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]} …"
