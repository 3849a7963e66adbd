"""The labels of a table as classes: words, integers, or the numbers of classes that the table names itself."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from unilora_cli.console import CommandError
from unilora_cli.data.records import nfc
from unilora_core.schema import shown

__all__ = ["class_index", "class_names"]

WHOLE = re.compile(r"-?[0-9]{1,100}")
"""A whole number, of no more digits than a label has."""


def class_names(values: Iterable[Any], where: str) -> tuple[str, ...]:
    """Return the classes that the labels name, in order.

    Raises:
        CommandError: a label that is missing, or neither a word nor a number.
    """
    found = {_word(value, where, i) for i, value in enumerate(values)}
    whole = all(map(WHOLE.fullmatch, found))
    return tuple(sorted(found, key=lambda word: (int(word) if whole else 0, word)))


def class_index(classes: Sequence[str], named: bool, value: Any, where: str, index: int) -> int:
    """Return the number of the class that a label names.

    Args:
        named: whether the table names its classes, so that a label may be the number of one.

    Raises:
        CommandError: it is missing, or not among them.
    """
    word = _word(value, where, index)
    if named and WHOLE.fullmatch(word) and 0 <= int(word) < len(classes):
        return int(word)
    if word not in classes:
        raise CommandError(
            f"{where}, record {index + 1}: the label {shown(word)} is not among the training classes "
            f"({', '.join(classes[:10])})."
        )
    return classes.index(word)


def _word(value: Any, where: str, index: int) -> str:
    """A label as a word: 1, 1.0 and "1" are the same class."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    missing = value is None or value != value  # NaN, which is what a table of floats has where there is nothing
    text = "" if missing else nfc(str(value).strip())
    if not text or isinstance(value, (list, dict)):
        what = f"the label is {shown(value)}" if text else "the label is missing"
        raise CommandError(f"{where}, record {index + 1}: {what}; expected a word or an integer.")
    return text
