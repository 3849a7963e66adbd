"""Tables of records from a file (.tsv, .csv, .jsonl, .parquet), a folder, or the hub; and splitting them."""

import argparse
import contextlib
import csv
import gzip
import json
import random
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from unilora_cli.console import CommandError, path_of
from unilora_cli.models import readable_errors

__all__ = ["Tables", "column", "draw", "is_local", "load_tables", "opened", "split_off", "suffix"]

HELD_OUT = ("validation", "valid", "val", "dev", "validation_matched", "test")
"""The held-out split of a data set that has several: the first of these."""

LONE = ""
"""The name of the only table of a source without splits."""


@dataclass
class Tables:
    """Records to train on and, where the source has them apart, records held out.

    Attributes:
        train, held_out, test: sequences of ``{column: value}``.
        names: column → the class names of its integers, where the source knows them.
    """

    train: Sequence[Mapping[str, Any]]
    held_out: Sequence[Mapping[str, Any]] | None = None
    test: Sequence[Mapping[str, Any]] | None = None
    names: dict[str, tuple[str, ...]] = field(default_factory=dict)


def load_tables(arguments: argparse.Namespace, test_data: str | None = None, test_split: str | None = None) -> Tables:
    """The records that ``--data`` and ``--eval-data`` name, and those to test on.

    Raises:
        CommandError: no such data, or data that cannot be read; the message names the file and the line.
    """
    splits = _load(arguments.data, arguments.subset)
    train = _split(arguments.data, splits, arguments.train_split)
    if arguments.eval_data:
        others = _load(arguments.eval_data, arguments.eval_subset)
        name = arguments.eval_split or _held_out(others) or arguments.train_split
        held_out = _split(arguments.eval_data, others, name)
    else:
        name = None if LONE in splits else arguments.eval_split or _held_out(splits, test_split)
        held_out = None if name in (None, arguments.train_split) else _split(arguments.data, splits, name)
    test = None
    if test_data:
        others = _load(test_data, None)
        test = _split(test_data, others, test_split or ("test" if len(others) > 1 else next(iter(others))))
    elif test_split:
        if LONE in splits:
            raise CommandError(f"{arguments.data}: there are no splits in it, so none is {test_split!r}.")
        test = _split(arguments.data, splits, test_split)
    tables = Tables(train, held_out, test, _named_classes(train))
    for source, rows in (
        (arguments.data, train),
        (arguments.eval_data or arguments.data, held_out),
        (test_data or arguments.data, test),
    ):
        if rows is not None and len(rows) == 0:
            raise CommandError(f"{source}: there are no records in it.")
        classes = _named_classes(rows)
        for name in tables.names:
            if classes.get(name, tables.names[name]) != tables.names[name]:
                raise CommandError(f"{source}: the classes of {name!r} are not those of {arguments.data}.")
    return tables


def column(rows: Sequence[Mapping[str, Any]], wanted: str | None, usual: Sequence[str], where: str) -> str:
    """The name of a column: the one asked for, or the first of the usual ones.

    Raises:
        CommandError: there is none; the message lists the columns.
    """
    present = list(rows[0])
    for name in [wanted] if wanted else usual:
        if name in present:
            return name
    asked = repr(wanted) if wanted else " or ".join(map(repr, usual))
    raise CommandError(f"{where}: there is no column {asked}; it has {', '.join(map(repr, present))}.")


def is_local(source: str) -> bool:
    """Whether a data source is meant to be a path: it exists, or it looks like one."""
    return (
        Path(source).exists()
        or source.startswith((".", "/", "~"))
        or suffix(Path(source)) in {*READERS, *BUILDERS, ".txt"}
    )


def split_off(n: int, part: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices to train on, and at least one index held out, drawn at random and in order.

    Raises:
        CommandError: fewer than two examples.
    """
    if n < 2:
        raise CommandError("there is one example only; nothing is left to hold out (give --eval-data).")
    held_out = set(draw(n, min(n - 1, max(1, round(n * part))), seed))
    return [i for i in range(n) if i not in held_out], sorted(held_out)


def draw(n: int, size: int | None, seed: int) -> list[int]:
    """``size`` of the indices below n at random, in order; all of them for None."""
    return list(range(n)) if size is None or size >= n else sorted(random.Random(seed).sample(range(n), size))


# ---- sources ----------------------------------------------------------------------------------------------------


def _load(source: str, subset: str | None) -> dict[str, Any]:
    """Split → records; a file has one lone table."""
    path = path_of(source)
    if is_local(source) and not path.exists():
        raise CommandError(f"{source}: no such file or folder.")
    if reader := READERS.get(suffix(path)) if path.is_file() else None:
        return {LONE: reader(path)}
    if path.is_file() and suffix(path) not in BUILDERS:
        known = ", ".join([*READERS, *BUILDERS])
        raise CommandError(f"{source}: files of this kind are not read; known: {known}, also with .gz.")
    return _load_with_datasets(source, path, subset)


def _load_with_datasets(source: str, path: Path, subset: str | None) -> dict[str, Any]:
    import datasets

    with readable_errors(f"cannot load the data set {source!r}"):
        if path.is_file():
            found: Any = datasets.load_dataset(BUILDERS[suffix(path)], data_files=str(path), split="train")
        elif (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            found = datasets.load_from_disk(str(path))
        else:
            found = datasets.load_dataset(str(path) if path.is_dir() else source, subset)
    return dict(found) if isinstance(found, datasets.DatasetDict) else {LONE: found}


def _split(source: str, splits: Mapping[str, Any], name: str) -> Any:
    """The records of a split; ``train[:1000]`` are the first thousand of it."""
    if LONE in splits:
        return splits[LONE]
    whole, _, end = name.partition("[:")
    if whole not in splits or (end and not end.rstrip("]").isdigit()):
        raise CommandError(f"{source}: there is no split {name!r}; it has {', '.join(map(repr, splits))}.")
    rows = splits[whole]
    return rows.select(range(min(int(end.rstrip("]")), len(rows)))) if end else rows


def _held_out(splits: Mapping[str, Any], test: str | None = None) -> str | None:
    return next((name for name in HELD_OUT if name in splits and name != test), None)


def _named_classes(rows: Any) -> dict[str, tuple[str, ...]]:
    if not (kinds := getattr(rows, "features", {})):
        return {}
    import datasets

    return {key: tuple(kind.names) for key, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)}


def _read_tsv(path: Path) -> list[dict[str, Any]]:
    """Tab-separated, with a header; quotes are plain characters, as in GLUE."""
    return _read_separated(path, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_csv(path: Path) -> list[dict[str, Any]]:
    return _read_separated(path)


def _read_separated(path: Path, **dialect: Any) -> list[dict[str, Any]]:
    csv.field_size_limit(2**31 - 1)
    with opened(path) as file:
        reader = csv.DictReader(file, strict=True, **dialect)
        rows: list[dict[str, Any]] = []
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise CommandError(
                        f"{path}, line {reader.line_num}: expected {len(reader.fieldnames or ())} fields, as in the "
                        "header, got more or fewer."
                    )
                rows.append(row)
        except csv.Error as error:
            raise CommandError(f"{path}, line {reader.line_num}: {error}.") from error
    return rows


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with opened(path) as file:
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise CommandError(f"{path}, line {line}: not JSON ({error}).") from error
            if not isinstance(row, dict):
                raise CommandError(f"{path}, line {line}: expected an object {{...}}, got {text.strip():.40}.")
            rows.append(row)
    return _even(rows)


def _even(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every record with every column, None where it lacks one (`datasets` does the same)."""
    names: Iterable[str] = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in names} for row in rows]


def suffix(path: Path) -> str:
    """The kind of a file by its name; .tsv for a .tsv.gz."""
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


@contextlib.contextmanager
def opened(path: Path) -> Iterator[TextIO]:
    """A text file, compressed or not.

    Raises:
        CommandError: not UTF-8, or a damaged compressed file.
    """
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rt", encoding="utf-8-sig", newline="") as file:
                yield file
        else:
            with path.open(encoding="utf-8-sig", newline="") as file:
                yield file
    except UnicodeDecodeError as error:
        raise CommandError(f"{path}: not UTF-8 text ({error}).") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise CommandError(f"{path}: a damaged .gz file ({error}).") from error


READERS = {".tsv": _read_tsv, ".csv": _read_csv, ".jsonl": _read_jsonl, ".ndjson": _read_jsonl}
BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".json": "json"}
