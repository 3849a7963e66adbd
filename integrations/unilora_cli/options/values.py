"""The types of options: each says what makes a value of a word of the command line, and the help's word for it."""

import argparse
import ast
import json
import re
from collections.abc import Callable, Iterable
from typing import Annotated, Any

from unilora_core.errors import SpecError
from unilora_core.maps import MAPS
from unilora_core.methods import METHODS
from unilora_core.schema import shown
from unilora_core.spec import STARTS, known


def _number(kind: type, wanted: str, fits: Callable[[Any], bool], bits: int = 64) -> Callable[[str], Any]:
    def value(text: str) -> Any:
        try:
            number = kind(text)
        except ValueError:
            number = None
        if isinstance(number, int) and number >= 2**bits:
            raise argparse.ArgumentTypeError(f"expected a number below 2^{bits}, got {shown(text)}")
        if number is None or not fits(number):
            raise argparse.ArgumentTypeError(f"expected {wanted}, got {shown(text)}")
        return number

    return value


def _auto_or_positive(text: str) -> int | str:
    return text if text == "auto" else _positive(text)


def _ranks(text: str) -> int | dict[str, int]:
    if "=" not in text:
        return _positive(text)
    pairs = [part.rpartition("=") for part in _names(text)]
    ranks = {name.strip(): _positive(rank) for name, equals, rank in pairs if equals and name.strip()}
    if len(ranks) < len(pairs):
        raise argparse.ArgumentTypeError(f"expected a rank, or NAME=RANK of each target once, got {shown(text)}")
    return ranks


def _span(text: str) -> tuple[float, float]:
    words = text.split(",")
    values = tuple(_part(word) for word in words) if len(words) == 2 else ()
    if len(values) != 2 or not 0 < values[0] <= values[1]:
        raise argparse.ArgumentTypeError(f"expected two numbers from 0 to 1, the lower first, got {shown(text)}")
    return values


def _one_of(what: str, there: Iterable[str]) -> Callable[[str], str]:
    """One of these names; of another, the nearest are told."""

    def value(text: str) -> str:
        try:
            known(what, text, there)
        except SpecError as error:
            raise argparse.ArgumentTypeError(str(error).partition(": ")[2].rstrip(".")) from None
        return text

    return value


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _selection(text: str) -> str | tuple[str, ...]:
    words = re.fullmatch(r"[\w.-]+(\s*,\s*[\w.-]+)*,?", text)
    return _names(text) if words and text != "all-linear" else text


def _assignment(text: str) -> tuple[str, Any]:
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


_positive = _number(int, "a whole number above 0", lambda n: n > 0, bits=63)  # as Python counts things
_part = _number(float, "a number from 0 to 1", lambda x: 0 <= x <= 1)

Positive = Annotated[int, _positive, "N"]
Ranks = Annotated[int | dict[str, int], _ranks, "R"]
"""One rank, or one for each target: q_proj=8,v_proj=16."""

Natural = Annotated[int, _number(int, "a whole number from 0", lambda n: n >= 0), "N"]
AutoOrPositive = Annotated[int | str, _auto_or_positive, "N"]
Part = Annotated[float, _part, "P"]
Fraction = Annotated[float, _number(float, "a number between 0 and 1", lambda x: 0 < x < 1), "PART"]
Span = Annotated[tuple[float, float], _span, "MIN,MAX"]
"""Two parts, the lower first: 0.08,1."""

Above0 = Annotated[float, _number(float, "a number above 0", lambda x: 0 < x < float("inf")), "X"]
From0 = Annotated[float, _number(float, "a number from 0", lambda x: 0 <= x < float("inf")), "X"]
Rate = Annotated[float, _number(float, "a number above 0, and at most 1e30", lambda x: 0 < x <= 1e30), "X"]
"""A learning rate, with which float32 can be multiplied."""

Names = Annotated[tuple[str, ...], _names, "NAMES"]
"""A comma list."""

Selection = Annotated[str | tuple[str, ...], _selection, "NAMES"]
"""Words are a tuple of names or endings; ``all-linear`` and everything else stays one string, a pattern."""

Assignment = Annotated[tuple[str, Any], _assignment, "KEY=VALUE"]
"""The value as Python reads it, else a string; it must be one that a JSON file can hold."""

Method = Annotated[str, _one_of("method", METHODS), "NAME"]
Start = Annotated[str, _one_of("start", STARTS), "NAME"]
Grouping = Annotated[str, _one_of("grouping", MAPS), "NAME"]
File = Annotated[str, str, "FILE"]
Folder = Annotated[str, str, "FOLDER"]
