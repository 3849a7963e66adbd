"""The values of arguments: what a word of the command line must be."""

import argparse
import ast
import json
import re
from collections.abc import Callable, Iterable
from typing import Any

from unilora_core.errors import SpecError
from unilora_core.schema import shown
from unilora_core.spec import known

__all__ = [
    "assignment",
    "auto_or_positive",
    "flag",
    "fraction",
    "learning_rate",
    "names",
    "natural",
    "not_negative",
    "one_of",
    "part",
    "positive",
    "rate",
    "selection",
    "span",
]


def _number(text: str, kind: type, check: Any, wanted: str, bits: int = 64) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if isinstance(value, int) and value >= 2**bits:
        value, wanted = None, f"a number below 2^{bits}"
    if value is None or not check(value):
        raise argparse.ArgumentTypeError(f"expected {wanted}, got {shown(text)}")
    return value


def positive(text: str) -> int:
    """A whole number above 0."""
    return _number(text, int, lambda value: value > 0, "a whole number above 0", bits=63)  # as Python counts things


def natural(text: str) -> int:
    """A whole number from 0."""
    return _number(text, int, lambda value: value >= 0, "a whole number from 0")


def rate(text: str) -> float:
    """A number above 0."""
    return _number(text, float, lambda value: 0 < value < float("inf"), "a number above 0")


def learning_rate(text: str) -> float:
    """A number above 0, with which float32 can be multiplied."""
    return _number(text, float, lambda value: 0 < value <= 1e30, "a number above 0, and at most 1e30")


def not_negative(text: str) -> float:
    """A number from 0."""
    return _number(text, float, lambda value: 0 <= value < float("inf"), "a number from 0")


def part(text: str) -> float:
    """A number from 0 to 1."""
    return _number(text, float, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def span(text: str) -> tuple[float, float]:
    """Two parts, the lower first: 0.08,1."""
    words = text.split(",")
    values = tuple(part(word) for word in words) if len(words) == 2 else ()
    if len(values) != 2 or not 0 < values[0] <= values[1]:
        raise argparse.ArgumentTypeError(f"expected two numbers from 0 to 1, the lower first, got {shown(text)}")
    return values


def fraction(text: str) -> float:
    """A number between 0 and 1."""
    return _number(text, float, lambda value: 0 < value < 1, "a number between 0 and 1")


def auto_or_positive(text: str) -> int | str:
    """``auto``, or a whole number above 0."""
    return text if text == "auto" else positive(text)


def one_of(what: str, there: Iterable[str]) -> Callable[[str], str]:
    """One of these names; of another, the nearest are told."""

    def value(text: str) -> str:
        try:
            known(what, text, there)
        except SpecError as error:
            raise argparse.ArgumentTypeError(str(error).partition(": ")[2].rstrip(".")) from None
        return text

    return value


def names(text: str) -> tuple[str, ...]:
    """A comma list."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def selection(text: str) -> str | tuple[str, ...]:
    """Words become a tuple of names or endings; ``all-linear`` and everything else stays one string, a pattern."""
    words = re.fullmatch(r"[\w.-]+(\s*,\s*[\w.-]+)*,?", text)
    return names(text) if words and text != "all-linear" else text


def flag(group: Any, name: str, purpose: str) -> None:
    """Add a flag that ``--no-…`` takes back, as one may wish to where a recipe sets it."""
    group.add_argument(name, action=argparse.BooleanOptionalAction, default=None, help=purpose)


def assignment(text: str) -> tuple[str, Any]:
    """KEY=VALUE, the value as Python reads it, else a string; it must be one that a JSON file can hold."""
    key, equals, value = text.partition("=")
    if not (key.isidentifier() and equals):
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {shown(text)}")
    try:
        read = ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError):
        return key, {"true": True, "false": False, "none": None}.get(value.lower(), value)
    except (RecursionError, MemoryError) as error:
        raise argparse.ArgumentTypeError(f"{key}: a value nested too deeply, {shown(value)}") from error
    try:
        json.dumps(read, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(
            f"{key}: expected a text, a finite number, true, false, none, or a list or dict of such, got {shown(value)}"
        ) from error
    return key, read
