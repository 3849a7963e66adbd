"""Labelled texts as lists of token numbers, and their batches."""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from unilora_cli.console import CommandError
from unilora_cli.data.labels import class_index, class_names
from unilora_cli.data.records import class_notes, column, draw, load_tables, seen, split_off
from unilora_cli.options.finetune import Text
from unilora_core.schema import shown

__all__ = ["LabelledTexts", "encode", "load_texts", "pad"]

TEXT = ("sentence", "text")

NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)
"""A number as tables have it; Python takes more, such as 1_000, and ١ of other scripts."""

Example = dict[str, Any]
Labelled = tuple[tuple[str, ...], int | float]


@dataclass(frozen=True)
class LabelledTexts:
    """What ``--data`` and ``--eval-data`` hold, before a tokenizer has seen it.

    Attributes:
        classes: the names of the classes; empty for ``--regression``.
        train, held_out: pairs of the texts (one, or two for a task on pairs) and the class, or the number.
        notes: lines about the data for the printed plan.
    """

    classes: tuple[str, ...]
    train: list[Labelled]
    held_out: list[Labelled]
    notes: list[tuple[str, Any]]


def load_texts(options: Text) -> LabelledTexts:
    """Read labelled texts.

    Raises:
        CommandError: no such data, no such column, a record without text or label, fewer than two classes, a label
            that is no number where numbers are wanted.
    """
    tables, where = load_tables(options), options.data
    asked = [(options.text_column, TEXT), (options.pair_column, ()), (options.label_column, ())]
    *columns, label = (column(tables.train, name, usual, where) for name, usual in asked if name or usual)
    classes: tuple[str, ...] = ()
    target: Any = _number
    if not options.regression:
        named = tables.names.get(label, ())
        classes = named or _checked(class_names((row[label] for row in tables.train), where), where, label)
        target = functools.partial(class_index, classes, bool(named))

    def pairs(rows: Sequence[Mapping[str, Any]], where: str) -> list[Labelled]:
        for name in (*columns, label):
            column(rows, name, (), where)
        return [
            (tuple(_words(row[name], name, where, i) for name in columns), target(row[label], where, i))
            for i, row in enumerate(rows)
        ]

    train = pairs(tables.train, where)
    if tables.held_out is None:
        kept, apart = split_off(len(train), options.holdout, options.seed, [of for _, of in train] if classes else ())
        train, held_out = [train[i] for i in kept], [train[i] for i in apart]
    else:
        held_out = pairs(tables.held_out, options.eval_data or where)
    train = [train[i] for i in draw(len(train), options.limit, options.seed)]
    (learnt, labels), (tested, others) = (zip(*part, strict=True) for part in (train, held_out))
    notes = [*class_notes(classes, labels, others), *seen(learnt, tested, len(tested))]
    return LabelledTexts(classes, train, held_out, notes)


def encode(pairs: Sequence[Labelled], tokenizer: Any, length: int) -> list[Example]:
    """Token numbers of each text, cut to ``length``, with its class or number."""
    texts = [list(column) for column in zip(*(texts for texts, _ in pairs), strict=True)]
    tokens = tokenizer(*texts, truncation=True, max_length=length)
    return [
        {name: values[i] for name, values in tokens.items()} | {"labels": label} for i, (_, label) in enumerate(pairs)
    ]


def pad(filling: Mapping[str, int]) -> Callable[[list[Example]], dict[str, torch.Tensor]]:
    """Return a collate function: lists of numbers are filled up at the end to the longest of the batch.

    Args:
        filling: name → the number to fill up with; 0 for others.
    """
    return functools.partial(_padded, dict(filling))  # which processes that read data can receive


def _padded(filling: Mapping[str, int], examples: list[Example]) -> dict[str, torch.Tensor]:
    columns = {name: [torch.tensor(example[name]) for example in examples] for name in examples[0]}
    return {
        name: pad_sequence(values, True, filling.get(name, 0)) if values[0].ndim else torch.stack(values)
        for name, values in columns.items()
    }


def _checked(classes: tuple[str, ...], where: str, label: str) -> tuple[str, ...]:
    if len(classes) < 2:
        raise CommandError(f"{where}: the column {label!r} has one class only, {classes[0]!r}.")
    if len(classes) > 1000:
        raise CommandError(
            f"{where}: the column {label!r} has {len(classes)} different values; is it a class? (--label-column, or "
            "--regression)"
        )
    return classes


def _number(value: Any, where: str, index: int) -> float:
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
