"""Tables of the page."""

from collections.abc import Iterable, Iterator
from typing import Any


def table(header: Iterable[str], lines: Iterable[Iterable[Any]]) -> Iterator[str]:
    """A table, and an empty line after it."""
    names = list(header)
    yield f"| {' | '.join(names)} |"
    yield "|---|" + "---|" * (len(names) - 1)
    for line in lines:
        yield f"| {' | '.join(map(shown, line))} |"
    yield ""


def shown(value: Any) -> str:
    """A cell: three digits of a small number, all of a large one; a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, bool | str):
        return str(value)
    return f"{value:#.3g}".rstrip(".") if isinstance(value, float) and abs(value) < 1000 else f"{value:,.0f}"
