"""Tables of GLUE: train.tsv.gz and dev.tsv under UNILORA_DATA."""

import gzip
from pathlib import Path

from quality.tasks import Data, TaskError, data_folder, split
from quality.tasks._minilm import Example, encoded


def read(name: str, columns: tuple[int, ...], *, header: bool, validation: int = 1000) -> Data:
    """The dev file to judge on, a part of the training file to choose on; ``columns``: label, sentence, sentence."""
    folder = data_folder(name)
    with gzip.open(folder / "train.tsv.gz", "rt", encoding="utf-8-sig") as file:
        train = _examples(file.read(), columns, header, folder / "train.tsv.gz")
    test = _examples((folder / "dev.tsv").read_text(encoding="utf-8-sig"), columns, header, folder / "dev.tsv")
    pool, chosen, _ = split(train, validation)
    return Data(pool, chosen, test)


def _examples(text: str, columns: tuple[int, ...], header: bool, path: Path) -> list[Example]:
    rows = [line.split("\t") for line in text.rstrip("\n").split("\n")[int(header) :]]
    for number, row in enumerate(rows, 1 + int(header)):
        if len(row) <= max(columns) or row[columns[0]].strip() not in ("0", "1"):
            raise TaskError(
                f"{path.name}, line {number}: expected a label 0 or 1 in column {columns[0]} and at least "
                f"{max(columns) + 1} columns, found {row[:4]}."
            )
    labels, *sentences = zip(*([row[column].strip() for column in columns] for row in rows), strict=True)
    return encoded(sentences, [int(label) for label in labels])
