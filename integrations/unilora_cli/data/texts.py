"""Labelled texts as lists of token numbers, and their batches."""

import argparse
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from unilora_cli.console import CommandError
from unilora_cli.data.records import Tables, class_notes, column, draw, load_tables, nfc, seen, split_off
from unilora_core.schema import shown

__all__ = ["LabelledTexts", "encode", "load_texts", "pad"]

TEXT = ("sentence", "text")
WHOLE = re.compile(r"-?[0-9]{1,100}")
"""A whole number, of no more digits than a label has."""

NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)
"""A number as tables have it; Python takes more, such as 1_000, and ١ of other scripts."""

Example = dict[str, Any]
Labelled = tuple[tuple[str, ...], int | float]


class LabelledTexts:
    """What ``--data`` and ``--eval-data`` hold, before a tokenizer has seen it.

    Attributes:
        classes: the names of the classes; empty for ``--regression``.
        train, held_out: pairs of the texts (one, or two for a task on pairs) and the class, or the number.
        notes: lines about the data for the printed plan.
    """

    def __init__(self, arguments: argparse.Namespace, tables: Tables):
        where = arguments.data
        text = column(tables.train, arguments.text_column, TEXT, where)
        second = [column(tables.train, arguments.pair_column, (), where)] if arguments.pair_column else []
        self.columns = [text, *second]
        self.label = column(tables.train, arguments.label_column, (), where)
        self.classes: tuple[str, ...] = ()
        self._target: Callable[[Any, str, int], int | float] = _label_number
        if not arguments.regression:
            values = [_plain(row[self.label], where, i) for i, row in enumerate(tables.train)]
            self.classes = tuple(map(nfc, tables.names.get(self.label, ()))) or _classes(values, where, self.label)
            self._named = self.label in tables.names
            self._target = self._class
        train = self._pairs(tables.train, where)
        if tables.held_out is None:
            classes = [label for _, label in train] if self.classes else []
            kept, apart = split_off(len(train), arguments.holdout, arguments.seed, classes)
            self.train, self.held_out = [train[i] for i in kept], [train[i] for i in apart]
        else:
            self.train = train
            self.held_out = self._pairs(tables.held_out, arguments.eval_data or where)
        self.train = [self.train[i] for i in draw(len(self.train), arguments.limit, arguments.seed)]
        self.notes = class_notes(
            self.classes, (label for _, label in self.train), (label for _, label in self.held_out)
        )
        learnt, tested = ([texts for texts, _ in pairs] for pairs in (self.train, self.held_out))
        self.notes += seen(learnt, tested, len(self.held_out))

    def _pairs(self, rows: Sequence[Mapping[str, Any]], where: str) -> list[Labelled]:
        for name in (*self.columns, self.label):
            column(rows, name, (), where)
        return [
            (tuple(_words(row[name], name, where, i) for name in self.columns), self._target(row[self.label], where, i))
            for i, row in enumerate(rows)
        ]

    def _class(self, given: Any, where: str, index: int) -> int:
        value = _plain(given, where, index)
        if self._named and WHOLE.fullmatch(value) and 0 <= int(value) < len(self.classes):
            return int(value)
        if value not in self.classes:
            raise CommandError(
                f"{where}, record {index + 1}: the label {shown(value)} is not among the training classes "
                f"({', '.join(self.classes[:10])})."
            )
        return self.classes.index(value)


def load_texts(arguments: argparse.Namespace) -> LabelledTexts:
    """Read labelled texts.

    Raises:
        CommandError: no such data, no such column, a record without text or label, fewer than two classes, a label
            that is no number where numbers are wanted.
    """
    return LabelledTexts(arguments, load_tables(arguments))


def encode(pairs: Sequence[Labelled], tokenizer: Any, length: int) -> list[Example]:
    """Token numbers of each text, cut to ``length``, with its class or number."""
    texts = [list(column) for column in zip(*(texts for texts, _ in pairs), strict=True)]
    tokens = tokenizer(*texts, truncation=True, max_length=length)
    return [
        {name: values[i] for name, values in tokens.items()} | {"labels": label} for i, (_, label) in enumerate(pairs)
    ]


def pad(filling: Mapping[str, int]) -> Callable[[list[Example]], dict[str, torch.Tensor]]:
    """A collate function: lists of numbers are filled up at the end to the longest of the batch.

    Args:
        filling: name → the number to fill up with; 0 for others.
    """
    return _Pad(dict(filling))


class _Pad:
    """A class, so that processes that read data can receive it."""

    def __init__(self, filling: dict[str, int]):
        self.filling = filling

    def __call__(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        return {name: self._stack(name, [example[name] for example in examples]) for name in examples[0]}

    def _stack(self, name: str, values: list[Any]) -> torch.Tensor:
        if isinstance(values[0], (int, float)):
            return torch.tensor(values)
        width, fill = max(map(len, values)), self.filling.get(name, 0)
        return torch.tensor([[*value, *[fill] * (width - len(value))] for value in values])


def _classes(values: Sequence[str], where: str, label: str) -> tuple[str, ...]:
    found = set(values)
    if len(found) < 2:
        raise CommandError(f"{where}: the column {label!r} has one class only, {next(iter(found))!r}.")
    if len(found) > 1000:
        raise CommandError(
            f"{where}: the column {label!r} has {len(found)} different values; is it a class? (--label-column, or "
            "--regression)"
        )
    whole = all(WHOLE.fullmatch(value) for value in found)
    return tuple(sorted(found, key=int if whole else str))


def _plain(value: Any, where: str, index: int) -> str:
    """A label as a word: 1, 1.0 and "1" are the same class."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, (list, dict)):
        raise CommandError(
            f"{where}, record {index + 1}: expected a word or an integer as the label, got {shown(value)}."
        )
    missing = value is None or value != value  # NaN, which is what a table of floats has where there is nothing
    text = "" if missing else nfc(str(value).strip())
    if not text:
        raise CommandError(f"{where}, record {index + 1}: the label is missing.")
    return text


def _label_number(value: Any, where: str, index: int) -> float:
    written = not isinstance(value, (str, bool)) or NUMBER.fullmatch(str(value).strip())  # and no True or 1_000
    try:
        number = float(value) if written else math.nan
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise CommandError(f"{where}, record {index + 1}: expected a number as the label, got {shown(value)}.")
    return number


def _words(value: Any, name: str, where: str, index: int) -> str:
    if not isinstance(value, str):
        raise CommandError(f"{where}, record {index + 1}: expected a text in column {name!r}, got {shown(value)}.")
    return value
