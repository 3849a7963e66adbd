"""Checked reading of what a file or a folder says: JSON, and dataclasses whose fields have the types they declare."""

import dataclasses
import json
import os
import reprlib
import sys
import types
import typing
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union

from unilora_core.errors import CorruptFileError

__all__ = ["parse_json", "read_json", "shown", "typed"]

T = TypeVar("T")

SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 80
SHORT.maxlist, SHORT.maxlevel = 16, 2


def parse_json(text: str, where: str) -> Any:
    """Return the value of a JSON text. NaN and infinity pass, as some ``config.json`` hold them; `typed` refuses them.

    Raises:
        CorruptFileError: the text is no JSON, is nested too deeply, says a name twice, or holds half a surrogate pair
            or a number of too many digits.
    """
    try:
        found = json.loads(text, object_pairs_hook=_unique)
        if "\\u" in text:
            json.dumps(found, ensure_ascii=False).encode()  # fails on half a pair, as whatever prints it would
        return found
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{where}: not JSON that can be read ({error}).") from error


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """Read the object in a JSON file.

    Raises:
        FileNotFoundError: the file does not exist.
        CorruptFileError: it holds no JSON object in UTF-8.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise CorruptFileError(f"{path}: not a JSON file in UTF-8 ({error}).") from error
    found = parse_json(text, str(path))
    if not isinstance(found, dict):
        raise CorruptFileError(f"{path}: expected a JSON object, got {shown(found)}.")
    return found


def typed(kind: Any, value: Any, where: str) -> Any:
    """Return a value from JSON as the type that is declared for it.

    Args:
        kind: ``str``, ``int`` (no bool, no 1.0, below 2^64), ``float`` (finite; 1 becomes 1.0), ``bool``, ``None``,
            a `Literal`, a union, ``tuple[T, ...]`` or ``tuple[A, B]`` (from a list), ``dict[str, T]``, ``Any``, or
            a dataclass of such fields (from an object that has those without a default and no others).
        where: the file and the field in it, for the message.

    Raises:
        CorruptFileError: the value has another type; the error says where, what was expected and what was found.
    """
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any or (value is None and kind in (None, type(None))):
        return value
    if dataclasses.is_dataclass(kind):
        return _object(kind, value, where)  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):
        for each in inside:
            try:
                return typed(each, value, where)
            except CorruptFileError:
                continue
    elif origin is Literal and any(value == each and type(value) is type(each) for each in inside):
        return value
    elif origin is tuple and isinstance(value, list):
        each = [inside[0]] * len(value) if inside[1:] == (...,) else list(inside)
        if len(each) == len(value):
            return tuple(typed(t, v, f"{where}[{i}]") for i, (t, v) in enumerate(zip(each, value, strict=True)))
    elif origin is dict and isinstance(value, dict):
        return {key: typed(inside[1], each, f"{where}.{key}") for key, each in value.items()}
    elif kind is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:
        return float(value)
    elif kind is int and type(value) is int and abs(value) >= 2**64:
        raise CorruptFileError(f"{where}: expected an integer below 2^64, got {shown(value)}.")
    elif kind is not float and type(value) is kind:
        return value
    raise CorruptFileError(f"{where}: expected {_wanted(kind)}, got {shown(value)}.")


def shown(value: object) -> str:
    """Return a value as text for a message: short however large or deep it is, and without control characters."""
    try:
        return SHORT.repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return f"a {type(value).__name__} too long to print"


def _object(kind: type[T], value: object, where: str) -> T:
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    nothing = dataclasses.MISSING
    needed = {f.name for f in fields if f.default is nothing and f.default_factory is nothing}
    if not isinstance(value, Mapping) or not needed <= value.keys() <= {field.name for field in fields}:
        found = shown(sorted(value)) if isinstance(value, Mapping) else shown(value)
        raise CorruptFileError(f"{where}: expected the fields {sorted(needed)}, got {found}.")
    hints = typing.get_type_hints(kind)
    return kind(**{name: typed(hints[name], each, f"{where}.{name}") for name, each in value.items()})


def _wanted(kind: Any) -> str:
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_wanted, inside))
    if origin is Literal:
        return " or ".join(map(repr, inside))
    if origin is tuple:
        return f"a list of {_wanted(inside[0])}" if inside[1:] == (...,) else f"[{', '.join(map(_wanted, inside))}]"
    if origin is dict:
        return f"an object of {_wanted(inside[1])}"
    names = {str: "a string", int: "an integer", float: "a finite number", bool: "true or false", type(None): "null"}
    return names.get(kind, str(kind))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the name {shown(twice)} occurs twice in one object")
    return found
