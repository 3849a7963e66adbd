"""Images with classes: from a folder of class folders, or from a column of a data set."""

import argparse
import io
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from torch.utils.data import Dataset

from unilora_cli.console import CommandError
from unilora_cli.data_records import HELD_OUT, Tables, is_local, load_tables

__all__ = ["FolderImages", "ImageSet", "ImageSource", "TableImages", "load_images"]

EXTENSIONS = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


class ImageSource(Protocol):
    """Labelled images that are opened one by one.

    Attributes:
        classes: the names of the classes.
        labels: the class of each image, an index into ``classes``.
    """

    classes: tuple[str, ...]
    labels: Sequence[int]

    def open(self, index: int) -> Image.Image:
        """Decode one image; `CommandError` names the one that cannot be."""
        ...


class FolderImages:
    """A folder with a folder of images per class.

    Raises:
        CommandError: no class folder, a class folder without an image, or one that is not among ``classes``.
    """

    def __init__(self, folder: Path, classes: tuple[str, ...] | None = None):
        found = {path.name: path for path in _folders(folder)}
        if not found:
            raise CommandError(f"{folder}: expected a folder of images for each class, there is no folder in it.")
        self.classes = classes or tuple(sorted(found))
        if stray := sorted(set(found) - set(self.classes)):
            raise CommandError(f"{folder}: the class {stray[0]!r} is not among the training classes.")
        self.paths: list[Path] = []
        labels: list[int] = []
        for name, path in sorted(found.items()):
            images = sorted(_images(path))
            if not images:
                raise CommandError(f"{path}: no image in this class folder; put images into it, or remove it.")
            self.paths += images
            labels += [self.classes.index(name)] * len(images)
        self.labels: Sequence[int] = labels

    def open(self, index: int) -> Image.Image:
        """See `ImageSource`."""
        return _decode(self.paths[index], str(self.paths[index]))


class TableImages:
    """The images of one column of a data set, the classes of another."""

    def __init__(self, rows: Any, image: str, label: str, classes: tuple[str, ...], where: str):
        self.rows, self.image, self.where, self.classes = rows, image, where, classes
        self.labels: Sequence[int] = [_class_index(value, classes, where) for value in rows[label]]

    def open(self, index: int) -> Image.Image:
        """See `ImageSource`."""
        value = self.rows[index][self.image]
        name = f"{self.where}: image {index}" + (f" ({value['path']})" if value.get("path") else "")
        return _decode(value["path"] if value["bytes"] is None else io.BytesIO(value["bytes"]), name)


class ImageSet(Dataset):
    """Some images of a source, transformed: ``{"x": (channels, height, width), "labels": int}``."""

    def __init__(self, source: ImageSource, indices: Sequence[int], transform: Callable, mode: str = "RGB"):
        self.source, self.indices, self.transform, self.mode = source, indices, transform, mode

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> dict[str, Any]:
        index = self.indices[position]
        image = self.source.open(index).convert(self.mode)
        return {"x": self.transform(image), "labels": self.source.labels[index]}


def load_images(arguments: argparse.Namespace) -> tuple[ImageSource, ImageSource | None]:
    """The images that ``--data`` and ``--eval-data`` name; None where nothing is held out yet.

    Raises:
        CommandError: no such data, or data without images and classes.
    """
    folder = Path(arguments.data).expanduser()
    if is_local(arguments.data) and not folder.exists():
        raise CommandError(f"{arguments.data}: no such folder.")
    if folder.is_file() or not folder.is_dir() or not _is_image_folder(folder):
        return _from_tables(arguments, load_tables(arguments))
    train = FolderImages(folder / "train" if (folder / "train").is_dir() else folder)
    inside = (folder / name for name in HELD_OUT) if (folder / "train").is_dir() else ()
    held_out = next((path for path in inside if path.is_dir()), None)
    if arguments.eval_data:
        held_out = Path(arguments.eval_data).expanduser()
        if not held_out.is_dir():
            raise CommandError(f"{arguments.eval_data}: no such folder.")
    return train, None if held_out is None else FolderImages(held_out, train.classes)


def _from_tables(arguments: argparse.Namespace, tables: Tables) -> tuple[ImageSource, ImageSource | None]:
    import datasets

    kinds = getattr(tables.train, "features", {})
    images = [name for name, kind in kinds.items() if isinstance(kind, datasets.Image)]
    image, label = arguments.image_column or next(iter(images), ""), arguments.label_column
    if image not in images:
        asked = f"no column {image!r} of images" if image else "no column of images"
        raise CommandError(f"{arguments.data}: there is {asked}; its columns are {', '.join(kinds) or 'plain text'}.")
    if label not in kinds:
        raise CommandError(f"{arguments.data}: there is no column {label!r}; it has {', '.join(map(repr, kinds))}.")
    classes = tables.names.get(label) or tuple(map(str, sorted(set(tables.train[label]))))

    def source(rows: Any, where: str) -> TableImages:
        undecoded = rows.cast_column(image, datasets.Image(decode=False))
        return TableImages(undecoded, image, label, classes, where)

    held_out = tables.held_out
    return source(tables.train, arguments.data), (
        None if held_out is None else source(held_out, arguments.eval_data or arguments.data)
    )


def _class_index(value: Any, classes: tuple[str, ...], where: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and str(value) not in classes:
        if 0 <= value < len(classes):
            return value
    elif str(value) in classes:
        return classes.index(str(value))
    raise CommandError(f"{where}: the label {value!r} is not among the {len(classes)} training classes.")


def _is_image_folder(folder: Path) -> bool:
    """Class folders, or train/ with class folders; a folder of data files is for `datasets`."""
    root = folder / "train" if (folder / "train").is_dir() else folder
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return False
    data = any(path.suffix in {".parquet", ".arrow", ".jsonl", ".json", ".csv"} for path in root.rglob("*"))
    return not data or any(True for inner in _folders(root) for _ in _images(inner))


def _folders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]


def _images(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (
            Path(root, name) for name in files if Path(name).suffix.lower() in EXTENSIONS and not name.startswith(".")
        )


def _decode(source: Any, name: str) -> Image.Image:
    try:
        with Image.open(source) as image:
            image.load()
            return image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        why = str(error) if "cannot identify" not in str(error) else "no image format fits its contents"
        raise CommandError(f"{name}: cannot be decoded as an image ({why}); repair or remove it.") from error
