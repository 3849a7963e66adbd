"""The choice of layers: patterns and endings for their names, and blocks of one weight that must not overlap."""

import itertools
import re
from collections.abc import Iterable
from typing import Any, TypeVar

from unilora_core.errors import TargetError

__all__ = ["check_apart", "given", "matches"]

Kind = TypeVar("Kind")


def given(targets: Iterable[Any], kind: type[Kind]) -> tuple[Kind, ...]:
    """Return the targets that are made already; none where the targets are names.

    Raises:
        TargetError: the list has both.
    """
    targets = tuple(targets)
    made = tuple(target for target in targets if isinstance(target, kind))
    if made and len(made) < len(targets):
        raise TargetError("expected a list of names or a list of Target, got both in one; make a Target of each name.")
    return made


def matches(names: Iterable[str], pattern: str | Iterable[Any], separator: str = ".") -> bool:
    """Say whether a pattern means a layer, by one of its names.

    Args:
        names: the names of the layer; a regular expression must match the whole first one.
        pattern: a regular expression, or a list of names or endings; an ending starts after a ``separator``.

    Raises:
        TargetError: the pattern is no regular expression.
    """
    names = tuple(names)
    if isinstance(pattern, str):
        try:
            return re.fullmatch(pattern, names[0]) is not None
        except re.error as error:
            raise TargetError(
                f"{pattern!r} is not a regular expression ({error}); give a list for plain names."
            ) from None
    ends = tuple(str(end).replace(".", separator) for end in pattern)
    return any(name == end or name.endswith(separator + end) for name in names for end in ends)


def check_apart(weight: str, blocks: Iterable[tuple[str, int, int]]) -> None:
    """Refuse blocks of one weight that overlap.

    Args:
        blocks: (name, first row, number of rows) of each.

    Raises:
        TargetError: two blocks overlap; the error has both names.
    """
    for (above, first, rows), (below, start, _) in itertools.pairwise(sorted(blocks, key=lambda block: block[1])):
        if start < first + rows:
            raise TargetError(f"{above} and {below} adapt the same outputs of {weight}.")
