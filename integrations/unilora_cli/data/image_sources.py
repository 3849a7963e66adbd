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
from unilora_cli.data.records import nfc, some
from unilora_core.schema import shown

__all__ = [
    "FolderImages",
    "ImageSource",
    "TableImages",
    "TorchImages",
    "class_folders",
    "class_names",
    "endings",
    "files_beside",
    "has_images",
    "reason",
    "undecodable",
]

NO_PICTURES = {"BUFR", "GRIB", "HDF5", "MPEG"}
"""Formats that Pillow knows by name and cannot decode."""

JUNK = {"__MACOSX", "Thumbs.db", "desktop.ini"}
"""What systems leave in folders, beside the files whose names begin with a dot."""


class ImageSource(Protocol):
    """Labelled images that are opened one by one.

    Attributes:
        where: what the source is called.
        classes: the names of the classes.
        labels: the class of each image, an index into ``classes``.
        folders: where the images are; nothing where they are in no folder.
        strays: files beside the images that are none, or that are in no class folder.
    """

    where: str
    classes: tuple[str, ...]
    labels: Sequence[int]
    folders: Sequence[Path]
    strays: Sequence[Path]

    def name(self, index: int) -> str:
        """What an image is called: its path, if it has one."""
        ...

    def open(self, index: int) -> Image.Image:
        """Decode one image; `CommandError` names the one that cannot be."""
        ...

    def sizes(self) -> Sequence[int]:
        """How many bytes each image has as it is stored; nothing where they are not stored one by one."""
        ...

    def stored(self, index: int) -> bytes:
        """An image as it is stored."""
        ...


class FolderImages:
    """A folder with a folder of images per class, each with folders in it or not.

    Two folders whose names are two spellings of one word ("é" as one character or two) are one class.

    Raises:
        CommandError: no class folder, a class folder without an image, or one that is not among ``classes``; a folder
            that cannot be read, or a link to one that it stands in.
    """

    def __init__(self, folder: Path, classes: tuple[str, ...] | None = None):
        found: dict[str, list[Path]] = {}
        for path in class_folders(folder):
            found.setdefault(nfc(path.name), []).append(path)
        if not found:
            raise CommandError(f"{folder}: expected a folder of images for each class, there is no folder in it.")
        self.classes = classes or tuple(sorted(found))
        if stray := sorted(set(found) - set(self.classes)):
            raise CommandError(
                f"{folder}: the class {stray[0]!r} is not among the training classes{_meant(stray[0], self.classes)}."
            )
        self.paths: list[Path] = []
        self.where = str(folder)
        self.folders: Sequence[Path] = [folder]
        strays = files_beside(folder)
        labels: list[int] = []
        for name, paths in sorted(found.items()):
            images, others = _sorted_out(paths)
            strays += others
            if not images:
                what = f" that Pillow reads, but {endings(others)}" if others else ""
                raise CommandError(
                    f"{paths[0]}: no image in this class folder{what}; put images into it, or remove it."
                )
            self.paths += images
            labels += [self.classes.index(name)] * len(images)
        self.labels: Sequence[int] = labels
        self.strays: Sequence[Path] = strays

    def name(self, index: int) -> str:
        """See `ImageSource`."""
        return str(self.paths[index])

    def open(self, index: int) -> Image.Image:
        """See `ImageSource`."""
        return _decode(self.paths[index], self.name(index))

    def sizes(self) -> Sequence[int]:
        """See `ImageSource`."""
        return [_size(path) for path in self.paths]

    def stored(self, index: int) -> bytes:
        """See `ImageSource`."""
        return self.paths[index].read_bytes()


class TableImages:
    """The images of one column of a data set, the classes of another."""

    def __init__(self, rows: Any, image: str, label: str, classes: tuple[str, ...], where: str):
        self.rows, self.image, self.where, self.classes = rows, image, where, classes
        self.folders: Sequence[Path] = ()
        self.strays: Sequence[Path] = ()
        self.labels: Sequence[int] = [_class_index(value, classes, where) for value in rows[label]]

    def name(self, index: int) -> str:
        """See `ImageSource`."""
        path = (self.rows[index][self.image] or {}).get("path")
        return f"{self.where}: image {index}" + (f" ({path})" if path else "")

    def open(self, index: int) -> Image.Image:
        """See `ImageSource`."""
        value = self.rows[index][self.image]
        if value is None:
            raise CommandError(f"{self.where}: image {index}: there is none in this record; remove it.")
        return _decode(value["path"] if value["bytes"] is None else io.BytesIO(value["bytes"]), self.name(index))

    def sizes(self) -> Sequence[int]:
        """See `ImageSource`."""
        import pyarrow.compute as pc

        column = self.rows.with_format("arrow")[:][self.image]
        lengths = pc.binary_length(pc.struct_field(column, "bytes")).to_pylist()
        paths = pc.struct_field(column, "path").to_pylist() if None in lengths else lengths
        return [_size(path) if length is None else length for path, length in zip(paths, lengths, strict=True)]

    def stored(self, index: int) -> bytes:
        """See `ImageSource`."""
        value = self.rows[index][self.image]
        return Path(value["path"]).read_bytes() if value["bytes"] is None else value["bytes"]


class TorchImages:
    """A data set of torchvision that knows its ``targets`` and its ``classes``.

    Raises:
        CommandError: it does not.
    """

    def __init__(self, found: Any, where: str):
        if not (hasattr(found, "targets") and hasattr(found, "classes")):
            raise CommandError(f"{where}: this data set of torchvision does not list its classes and labels.")
        self.found, self.where = found, where
        self.folders: Sequence[Path] = ()
        self.strays: Sequence[Path] = ()
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

    def sizes(self) -> Sequence[int]:
        """See `ImageSource`."""
        return [_size(path) for path, _ in getattr(self.found, "samples", ())]

    def stored(self, index: int) -> bytes:
        """See `ImageSource`."""
        return Path(self.found.samples[index][0]).read_bytes()


def class_folders(folder: Path) -> list[Path]:
    """The folders in a folder, but for hidden ones."""
    return [path for path in folder.iterdir() if path.is_dir() and not _hidden(path.name)]


def files_beside(folder: Path) -> list[Path]:
    """What is beside the folders in a folder, but for hidden files."""
    return sorted(path for path in folder.iterdir() if not path.is_dir() and not _hidden(path.name))


def has_images(folder: Path) -> bool:
    """Whether there is an image in a folder, or in the folders in it."""
    return any(_is_image(path) for path in _files(folder))


def _sorted_out(folders: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """The images in folders and in the folders in them, and the other files."""
    parts: tuple[list[Path], list[Path]] = ([], [])
    for folder in folders:
        for path in _files(folder):
            parts[not _is_image(path)].append(path)
    return sorted(parts[0]), sorted(parts[1])


def _files(folder: Path) -> Iterator[Path]:
    """The files in a folder and in the folders in it; links are followed, each folder once."""
    seen, stands = set(), Path(os.path.realpath(folder.parent))
    above = {stands, *stands.parents, *Path(os.path.realpath(folder)).parents}
    for root, folders, files in os.walk(folder, followlinks=True, onerror=_unreadable):
        real = os.path.realpath(root)
        if Path(real) in above:
            raise CommandError(f"{root}: this link leads to a folder that it stands in, {real}; remove it.")
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not _hidden(name))
        yield from (Path(root, name) for name in files if not _hidden(name))


def _unreadable(error: OSError) -> None:
    raise CommandError(f"{error.filename}: this folder cannot be read ({error.strerror}).") from error


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in JUNK


def _is_image(path: Path) -> bool:
    """Whether Pillow reads a file: by the ending of its name, or, where that says nothing, by how it begins."""
    ending = Image.registered_extensions().get(path.suffix.lower())
    if ending in Image.OPEN:
        return ending not in NO_PICTURES
    known = [name for name, (_, accepts) in Image.OPEN.items() if accepts and name not in NO_PICTURES]
    try:
        with Image.open(path, formats=known):
            return True
    except Image.DecompressionBombError:
        return True
    except Exception:  # the readers of Pillow raise errors of all kinds
        return False


def endings(paths: Sequence[Path]) -> str:
    """How many files there are, and how their names end."""
    kinds = sorted({path.suffix.lower() or "no ending" for path in paths})
    return f"{len(paths):,} file{'s' * (len(paths) > 1)} ({some(kinds)})"


def _size(path: Any) -> int:
    """Of a file; -1 where it cannot be read."""
    try:
        return os.path.getsize(path)
    except (OSError, TypeError):
        return -1


def class_names(values: Sequence[Any], where: str) -> tuple[str, ...]:
    """The classes that the labels of a table name, in order.

    Raises:
        CommandError: a label that is missing, or neither a word nor a number.
    """
    for i, value in enumerate(values):
        if not isinstance(value, (str, int, float)) or value != value:
            what = "the label is missing" if value is None or value != value else f"the label is {shown(value)}"
            raise CommandError(f"{where}, record {i + 1}: {what}; expected a word or an integer.")
    whole = all(isinstance(value, int) for value in values)
    return tuple(
        dict.fromkeys(nfc(str(value)) for value in (sorted(set(values)) if whole else sorted(map(str, values))))
    )


def _class_index(value: Any, classes: tuple[str, ...], where: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and str(value) not in classes:
        if 0 <= value < len(classes):
            return value
    elif nfc(str(value)) in classes:
        return classes.index(nfc(str(value)))
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
