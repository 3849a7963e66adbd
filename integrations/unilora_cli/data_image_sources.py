"""Labelled images that are opened one by one: of class folders, of a column of a data set, or of torchvision."""

import difflib
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageOps

from unilora_cli.console import CommandError, one_line

__all__ = [
    "FolderImages",
    "ImageSource",
    "TableImages",
    "TorchImages",
    "class_folders",
    "image_files",
    "reason",
    "undecodable",
]

EXTENSIONS = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


class ImageSource(Protocol):
    """Labelled images that are opened one by one.

    Attributes:
        classes: the names of the classes.
        labels: the class of each image, an index into ``classes``.
    """

    classes: tuple[str, ...]
    labels: Sequence[int]

    def name(self, index: int) -> str:
        """What an image is called: its path, if it has one."""
        ...

    def open(self, index: int) -> Image.Image:
        """Decode one image; `CommandError` names the one that cannot be."""
        ...


class FolderImages:
    """A folder with a folder of images per class, each with folders in it or not.

    Raises:
        CommandError: no class folder, a class folder without an image, or one that is not among ``classes``.
    """

    def __init__(self, folder: Path, classes: tuple[str, ...] | None = None):
        found = {path.name: path for path in class_folders(folder)}
        if not found:
            raise CommandError(f"{folder}: expected a folder of images for each class, there is no folder in it.")
        self.classes = classes or tuple(sorted(found))
        if stray := sorted(set(found) - set(self.classes)):
            raise CommandError(
                f"{folder}: the class {stray[0]!r} is not among the training classes{_meant(stray[0], self.classes)}."
            )
        self.paths: list[Path] = []
        labels: list[int] = []
        for name, path in sorted(found.items()):
            images = sorted(image_files(path))
            if not images:
                raise CommandError(f"{path}: no image in this class folder; put images into it, or remove it.")
            self.paths += images
            labels += [self.classes.index(name)] * len(images)
        self.labels: Sequence[int] = labels

    def name(self, index: int) -> str:
        """See `ImageSource`."""
        return str(self.paths[index])

    def open(self, index: int) -> Image.Image:
        """See `ImageSource`."""
        return _decode(self.paths[index], self.name(index))


class TableImages:
    """The images of one column of a data set, the classes of another."""

    def __init__(self, rows: Any, image: str, label: str, classes: tuple[str, ...], where: str):
        self.rows, self.image, self.where, self.classes = rows, image, where, classes
        self.labels: Sequence[int] = [_class_index(value, classes, where) for value in rows[label]]

    def name(self, index: int) -> str:
        """See `ImageSource`."""
        path = self.rows[index][self.image].get("path")
        return f"{self.where}: image {index}" + (f" ({path})" if path else "")

    def open(self, index: int) -> Image.Image:
        """See `ImageSource`."""
        value = self.rows[index][self.image]
        return _decode(value["path"] if value["bytes"] is None else io.BytesIO(value["bytes"]), self.name(index))


class TorchImages:
    """A data set of torchvision that knows its ``targets`` and its ``classes``.

    Raises:
        CommandError: it does not.
    """

    def __init__(self, found: Any, where: str):
        if not (hasattr(found, "targets") and hasattr(found, "classes")):
            raise CommandError(f"{where}: this data set of torchvision does not list its classes and labels.")
        self.found, self.where = found, where
        self.classes = tuple(name if isinstance(name, str) else str(name[0]) for name in found.classes)
        self.labels: Sequence[int] = [int(label) for label in found.targets]

    def name(self, index: int) -> str:
        """See `ImageSource`."""
        files = getattr(self.found, "samples", None)
        return str(files[index][0]) if files else f"{self.where}: image {index}"

    def open(self, index: int) -> Image.Image:
        """See `ImageSource`."""
        if hasattr(self.found, "samples"):
            return _decode(self.name(index), self.name(index))
        return self.found[index][0]


def class_folders(folder: Path) -> list[Path]:
    """The folders in a folder, but for hidden ones."""
    return [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]


def image_files(folder: Path) -> Iterator[Path]:
    """The image files in a folder and in the folders in it, by their names; links are followed, each folder once."""
    seen = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(root)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (
            Path(root, name) for name in files if Path(name).suffix.lower() in EXTENSIONS and not name.startswith(".")
        )


def _class_index(value: Any, classes: tuple[str, ...], where: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and str(value) not in classes:
        if 0 <= value < len(classes):
            return value
    elif str(value) in classes:
        return classes.index(str(value))
    raise CommandError(
        f"{where}: the label {value!r} is not among the {len(classes)} training classes{_meant(str(value), classes)}."
    )


def _meant(name: str, classes: Sequence[str]) -> str:
    """The class that was probably meant, in words."""
    folded = {known.casefold(): known for known in classes}
    close = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.8)
    return f" (is it {folded[close[0]]!r}?)" if close else ""


def _decode(source: Any, name: str) -> Image.Image:
    """The first frame, upright (as its EXIF orientation says), in 8 bits per channel."""
    try:
        with Image.open(source) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _in_8_bits(image)
    except Exception as error:  # the readers of Pillow raise errors of all kinds
        raise CommandError(undecodable(name, reason(error))) from error


def undecodable(name: str, why: str) -> str:
    """What is said of an image that cannot be decoded."""
    return f"{name}: cannot be decoded as an image ({why}); repair or remove it."


def reason(error: BaseException) -> str:
    """Why an image cannot be decoded, in the words of Pillow, but for those that show an object of Python."""
    return one_line(error, 200) if "cannot identify" not in str(error) else "no image format fits its contents"


def _in_8_bits(image: Image.Image) -> Image.Image:
    """What Pillow's own conversion to RGB would clip or warn of; transparency is dropped later, as timm drops it."""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, of which none is known to be white")
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    return image.convert("RGBA") if image.mode == "P" and "transparency" in image.info else image
