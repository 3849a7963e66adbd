"""Tables of records from a file (.tsv, .csv, .jsonl, .json, .txt, .parquet), a folder or the hub; and parting them."""

import codecs
import csv
import functools
import gzip
import io
import json
import random
import re
import unicodedata
import zlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unilora_cli.console import CommandError, path_of
from unilora_cli.options.finetune import Source
from unilora_cli.tasks.models import readable_errors
from unilora_core.schema import shown

__all__ = [
    "Tables",
    "class_notes",
    "column",
    "draw",
    "is_local",
    "load_tables",
    "nfc",
    "seen",
    "some",
    "split_off",
]

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


def load_tables(options: Source, test_data: str | None = None, test_split: str | None = None) -> Tables:
    """The records that ``--data`` and ``--eval-data`` name, and those to test on.

    Raises:
        CommandError: no such data, or data that cannot be read; the message names the file and the line.
    """
    splits = _load(options.data, options.subset)
    train = _split(options.data, splits, options.train_split)
    if options.eval_data:
        others = _load(options.eval_data, options.eval_subset)
        name = options.eval_split or _held_out(others) or options.train_split
        held_out = _split(options.eval_data, others, name)
    else:
        other = None if LONE in splits else options.eval_split or _held_out(splits, test_split)
        held_out = _split(options.data, splits, other) if other and other != options.train_split else None
    test = None
    if test_data:
        others = _load(test_data, None)
        test = _split(test_data, others, test_split or ("test" if len(others) > 1 else next(iter(others))))
    elif test_split:
        if LONE in splits:
            raise CommandError(f"{options.data}: there are no splits in it, so none is {test_split!r}.")
        test = _split(options.data, splits, test_split)
    tables = Tables(train, held_out, test, _named_classes(train))
    for source, rows in (
        (options.data, train),
        (options.eval_data or options.data, held_out),
        (test_data or options.data, test),
    ):
        if rows is not None and len(rows) == 0:
            raise CommandError(f"{source}: there are no records in it.")
        classes = _named_classes(rows)
        for name in tables.names:
            if classes.get(name, tables.names[name]) != tables.names[name]:
                raise CommandError(f"{source}: the classes of {name!r} are not those of {options.data}.")
    return tables


def column(rows: Sequence[Mapping[str, Any]], wanted: str | None, usual: Sequence[str], where: str) -> str:
    """The name of a column: the one asked for, or the first of the usual ones.

    Raises:
        CommandError: there is none; the message lists the columns.
    """
    present = getattr(rows, "column_names", None) or list(rows[0])
    for name in [nfc(wanted)] if wanted else usual:
        if name in present:
            return name
    asked = repr(wanted) if wanted else " or ".join(map(repr, usual))
    raise CommandError(f"{where}: there is no column {asked}; it has {', '.join(map(repr, present))}.")


def is_local(source: str) -> bool:
    """Whether a data source is meant to be a path: it exists, or it looks like one."""
    return (
        Path(source).exists()
        or source.startswith((".", "/", "~"))
        or _suffix(Path(source)) in READERS.keys() | BUILDERS.keys()
    )


def split_off(n: int, part: float, seed: int, classes: Sequence[Hashable] = ()) -> tuple[list[int], list[int]]:
    """Indices to train on, and at least one index held out, drawn at random and in order.

    Args:
        classes: the class of each example; of each class one example stays to train on.

    Raises:
        CommandError: fewer than two examples, or no class has two.
    """
    if n < 2:
        raise CommandError("there is one example only; nothing is left to hold out (give --eval-data).")
    held_out = set(draw(n, min(n - 1, max(1, round(n * part))), seed))
    learnt = {name for i, name in enumerate(classes) if i not in held_out}
    for i in sorted(held_out) if classes else ():
        if classes[i] not in learnt:
            learnt.add(classes[i])
            held_out.remove(i)
    if not held_out:
        raise CommandError("what would be held out are the only examples of their classes; give --eval-data.")
    return [i for i in range(n) if i not in held_out], sorted(held_out)


def seen(train: Iterable[Hashable], held_out: Iterable[Hashable], total: int) -> list[tuple[str, Any]]:
    """A line about held-out examples that are in the training data too; none where none is.

    Args:
        total: how many are held out.
    """
    known = set(train)
    count = sum(example in known for example in held_out)
    return [("seen in training", f"{count:,} of the {total:,} held out")] if count else []


def class_notes(classes: Sequence[str], train: Iterable[Any], held_out: Iterable[Any]) -> list[tuple[str, Any]]:
    """Lines about classes of which there is nothing to train on, or nothing held out, or of nearly the same name.

    Args:
        train, held_out: the class of each example, an index into ``classes``.
    """
    notes: list[tuple[str, Any]] = []
    for what, labels in (("to train on", set(train)), ("held out", set(held_out))):
        if lacking := [repr(name) for i, name in enumerate(classes) if i not in labels]:
            notes.append(("classes without", f"{len(lacking):,}, nothing {what}: {some(lacking)}"))
    folded: dict[str, list[str]] = {}
    for name in classes:
        folded.setdefault(name.casefold(), []).append(repr(name))
    notes += [("classes apart", f"by capitals alone: {some(names)}") for names in folded.values() if len(names) > 1]
    return notes


def some(names: Sequence[str]) -> str:
    """The first few of a list."""
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


def draw(n: int, size: int | None, seed: int) -> list[int]:
    """``size`` of the indices below n at random, in order; all of them for None."""
    return list(range(n)) if size is None or size >= n else sorted(random.Random(seed).sample(range(n), size))


# ---- sources ----------------------------------------------------------------------------------------------------


def _load(source: str, subset: str | None) -> dict[str, Any]:
    """Split → records; a file has one lone table."""
    source = source.removeprefix("hfds/")  # as timm says it
    path = path_of(source)
    if is_local(source) and not path.exists():
        raise CommandError(f"{source}: no such file or folder.")
    if reader := READERS.get(_suffix(path)) if path.is_file() else None:
        return {LONE: reader(path)}
    if path.is_file() and _suffix(path) not in BUILDERS:
        known = ", ".join([*READERS, *BUILDERS])
        raise CommandError(f"{source}: files of this kind are not read; known: {known}, also with .gz.")
    return _load_with_datasets(source, path, subset)


def _load_with_datasets(source: str, path: Path, subset: str | None) -> dict[str, Any]:
    import datasets

    with readable_errors(f"cannot load the data set {source!r}"):
        if path.is_file():
            found: Any = datasets.load_dataset(BUILDERS[_suffix(path)], data_files=str(path), split="train")
        elif (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            found = datasets.load_from_disk(str(path))
        else:
            _check_headers(path)
            found = datasets.load_dataset(str(path) if path.is_dir() else source, subset)
        splits = dict(found) if isinstance(found, datasets.DatasetDict) else {LONE: found}
        return {name: _composed(rows) for name, rows in splits.items()}


def nfc(text: str) -> str:
    """A name in one spelling: "é" is one character or two, and both look the same."""
    return unicodedata.normalize("NFC", text)


def _composed(rows: Any) -> Any:
    names = {name: nfc(name) for name in rows.column_names if name != nfc(name)}
    return rows.rename_columns(names) if names else rows


def _split(source: str, splits: Mapping[str, Any], name: str) -> Any:
    """The records of a split; ``train[:1000]`` are the first thousand of it."""
    if LONE in splits:
        return splits[LONE]
    whole, _, end = name.partition("[:")
    if whole not in splits or (end and not re.fullmatch(r"[0-9]+\]", end)):
        raise CommandError(f"{source}: there is no split {name!r}; it has {', '.join(map(repr, splits))}.")
    rows = splits[whole]
    return rows.select(range(min(int(end.rstrip("]")), len(rows)))) if end else rows


def _held_out(splits: Mapping[str, Any], test: str | None = None) -> str | None:
    return next((name for name in HELD_OUT if name in splits and name != test), None)


def _named_classes(rows: Any) -> dict[str, tuple[str, ...]]:
    if not (kinds := getattr(rows, "features", {})):
        return {}
    import datasets

    return {key: tuple(map(nfc, kind.names)) for key, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)}


def _read_separated(path: Path, delimiter: str = ",", **dialect: Any) -> list[dict[str, Any]]:
    csv.field_size_limit(2**31 - 1)
    rows: list[dict[str, Any]] = []
    reader = csv.reader(io.StringIO(_text(path)), delimiter=delimiter, strict=True, **dialect)
    try:
        filled = (fields for fields in reader if fields)
        names = _header(next(filled, []), path, delimiter)
        for fields in filled:
            where = f"{path}, line {reader.line_num}"
            if len(fields) != len(names):
                raise CommandError(f"{where}: expected {len(names)} fields, as in the header, got {len(fields)}.")
            if stray := [i for i, name in enumerate(names) if not name and fields[i].strip() and i]:
                raise CommandError(f"{where}: column {stray[0] + 1} has no name in the header, but a value here.")
            rows.append({name: field for name, field in zip(names, fields, strict=True) if name})
    except csv.Error as error:
        hint = "; is there a quote that is not closed?" if "end of data" in str(error) else "."
        raise CommandError(f"{path}, line {reader.line_num}: {error}{hint}") from error
    return rows


def _check_headers(folder: Path) -> None:
    """What pandas, which `datasets` reads a folder with, would take for granted: columns of different names."""
    for path in sorted(folder.rglob("*.[ct]sv")) if folder.is_dir() else ():
        delimiter = "," if path.suffix == ".csv" else "\t"
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            _header(next(filter(None, csv.reader(file, delimiter=delimiter)), []), path, delimiter)


def _header(fields: list[str], path: Path, delimiter: str) -> list[str]:
    """The names of the columns; "" where there is none, as above the row numbers that pandas writes."""
    names = [nfc(name) if name.strip() else "" for name in fields]
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        places = " and ".join(str(i + 1) for i, name in enumerate(names) if name == twice[0])
        raise CommandError(f"{path}: the columns {places} are both called {twice[0]!r}; rename or remove one.")
    other = next((mark for mark in SEPARATORS if len(names) == 1 and mark in names[0] and mark != delimiter), None)
    if other:
        raise CommandError(
            f"{path}: one column only, {names[0]!r}: the fields are separated by {other!r}, and expected by "
            f"{delimiter!r}; save it with commas as .csv, or with tabs as .tsv."
        )
    return names


def _read_json(path: Path) -> list[dict[str, Any]]:
    """A record per line, or one list of records; each with every column, None where it lacks one, as in `datasets`."""
    text = _text(path)
    if text.lstrip().startswith("["):
        found = [(row, f"{path}, record {i}") for i, row in enumerate(_parsed(text, str(path)), 1)]
    else:
        lines = ((line, f"{path}, line {i}") for i, line in enumerate(text.split("\n"), 1) if line.strip())
        found = [(_parsed(line, where), where) for line, where in lines]
    for row, where in found:
        if not isinstance(row, dict):
            raise CommandError(f"{where}: expected an object {{...}}, got {shown(row)}.")
    names = dict.fromkeys(name for row, _ in found for name in row)
    return [{name: row.get(name) for name in names} for row, _ in found]


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CommandError(f"{where}: not JSON ({error}).") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; of two equal keys Python would take the last without a word."""
    found = {name if name.isascii() else nfc(name): value for name, value in pairs}
    if len(found) < len(pairs):
        names = [nfc(name) for name, _ in pairs]
        raise ValueError(f"the key {shown(max(names, key=names.count))} stands twice in an object")
    return found


def _suffix(path: Path) -> str:
    """The kind of a file by its name, in small letters; .tsv for a .tsv.gz."""
    return (Path(path.stem).suffix if path.suffix.lower() == ".gz" else path.suffix).lower()


def _text(path: Path) -> str:
    """Return the text of a file, compressed or not; its lines end in a line feed, however the file ends them.

    Raises:
        CommandError: not UTF-8, a null character, or a damaged compressed file.
    """
    data = path.read_bytes()
    try:
        data = gzip.decompress(data) if path.suffix.lower() == ".gz" else data
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data[:4096]:
            raise CommandError(f"{path}: not UTF-8 text, but UTF-16 or no text at all; save it as UTF-8.")
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise CommandError(f"{path}, line {line}: not UTF-8 text ({error.reason}); save it as UTF-8.") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise CommandError(f"{path}: a damaged .gz file ({error}).") from error
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise CommandError(f"{path}, line {line}: it holds a null character, which no text has.")
    return text


SEPARATORS = (";", "\t", "|", ",")

READERS: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
    ".tsv": functools.partial(_read_separated, delimiter="\t", quoting=csv.QUOTE_NONE),  # as in GLUE
    ".csv": _read_separated,
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), _read_json),
    ".txt": lambda path: [{"text": _text(path)}],
}
BUILDERS = {".parquet": "parquet", ".arrow": "arrow"}
