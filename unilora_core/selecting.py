"""Which layers are meant: patterns and endings for their names, and blocks of one weight that must lie apart."""

import itertools
import re
from collections.abc import Iterable
from typing import Any, TypeVar

from unilora_core.errors import TargetError

__all__ = ["check_apart", "given", "matches"]

Kind = TypeVar("Kind")


def given(targets: Iterable[Any], kind: type[Kind]) -> tuple[Kind, ...]:
    """The targets themselves, where they are made already; none where they are names.

    Raises:
        TargetError: both in one.
    """
    targets = tuple(targets)
    made = tuple(target for target in targets if isinstance(target, kind))
    if made and len(made) < len(targets):
        raise TargetError("expected a list of names or a list of Target, got both in one; make a Target of each name.")
    return made


def matches(names: Iterable[str], pattern: str | Iterable[Any], separator: str = ".") -> bool:
    """Whether a pattern means a layer, by one of its names.

    Args:
        names: of the layer; a regular expression is for the first, whole.
        pattern: a regular expression, or a list of names or endings, which begin behind a ``separator``.

    Raises:
        TargetError: it is no regular expression.
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
        blocks: name, first row, and how many rows.

    Raises:
        TargetError: with both names.
    """
    for (above, first, rows), (below, start, _) in itertools.pairwise(sorted(blocks, key=lambda block: block[1])):
        if start < first + rows:
            raise TargetError(f"{above} and {below} adapt the same outputs of {weight}.")
