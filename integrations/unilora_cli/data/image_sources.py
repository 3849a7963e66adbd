"""Labelled images that are opened one by one: of class folders, of a column of a data set, or of torchvision."""

import difflib
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from unilora_cli.console import CommandError, one_line
from unilora_cli.data.records import nfc, some

__all__ = ["ImageSource", "class_folders", "endings", "files_beside", "has_images", "images_of_folder"]

NO_PICTURES = {"BUFR", "GRIB", "HDF5", "MPEG"}
"""Formats that Pillow knows by name and cannot decode."""

OF_16_BITS = {"PNG", "PPM"}
"""Formats whose 16 bits may come as Pillow's integers of 32; white is 65535."""

JUNK = {"__MACOSX", "Thumbs.db", "desktop.ini"}
"""What systems leave in folders, beside the files whose names begin with a dot."""


@dataclass(frozen=True)
class ImageSource:
    """Labelled images that are opened one by one.

    Attributes:
        where: what the source is called.
        classes: the names of the classes.
        labels: the class of each image, an index into ``classes``.
        images: of each its path, the record of a table whose one column is undecoded, or of a data set of torchvision
            ``(image, label)``.
        folder: where the class folders are, if it is one of such.
        strays: files beside the images that are none, or that are in no class folder.
    """

    where: str
    classes: tuple[str, ...]
    labels: Sequence[int]
    images: Any
    folder: Path | None = None
    strays: Sequence[Path] = ()

    def name(self, index: int) -> str:
        """What an image is called: its path, if it has one."""
        image = self._stored(index)
        path = f" ({image['path']})" if isinstance(image, dict) and image["path"] else ""
        return str(image) if isinstance(image, Path) else f"{self.where}: image {index}{path}"

    def open(self, index: int) -> Image.Image:
        """Decode one image; `CommandError` names the one that cannot be."""
        image = self._stored(index)
        if image is None:
            raise CommandError(f"{self.where}: image {index}: there is none in this record; remove it.")
        if isinstance(image, dict):
            image = image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"])
        return image if isinstance(image, Image.Image) else _decode(image, self.name(index))

    def _stored(self, index: int) -> Any:
        found = self.images[index]
        return found if isinstance(found, Path) else next(iter(found.values() if isinstance(found, dict) else found))


def images_of_folder(folder: Path, classes: tuple[str, ...] | None = None) -> ImageSource:
    """Find the images of a folder with a folder of images per class, each with folders in it or not.

    Two folders whose names are two spellings of one word ("é" as one character or two) are one class.

    Raises:
        CommandError: no class folder, a class folder without an image, or one that is not among ``classes``; a folder
            that cannot be read, or a link to one that it stands in.
    """
    found: dict[str, list[Path]] = {}
    for path in class_folders(folder):
        found.setdefault(nfc(path.name), []).append(path)
    if not found:
        raise CommandError(f"{folder}: expected a folder of images for each class, there is no folder in it.")
    classes = classes or tuple(sorted(found))
    if stray := sorted(set(found) - set(classes)):
        raise CommandError(
            f"{folder}: the class {stray[0]!r} is not among the training classes{_meant(stray[0], classes)}."
        )
    images: list[Path] = []
    labels: list[int] = []
    strays = files_beside(folder)
    for name, paths in sorted(found.items()):
        files = sorted(file for path in paths for file in _files(path))
        mine = [file for file in files if _is_image(file)]
        others = sorted(set(files) - set(mine))
        if not mine:
            what = f" that Pillow reads, but {endings(others)}" if others else ""
            raise CommandError(f"{paths[0]}: no image in this class folder{what}; put images into it, or remove it.")
        images += mine
        labels += [classes.index(name)] * len(mine)
        strays += others
    return ImageSource(str(folder), classes, labels, images, folder, strays)


def class_folders(folder: Path) -> list[Path]:
    """The folders in a folder, but for hidden ones."""
    return [path for path in folder.iterdir() if path.is_dir() and not _hidden(path.name)]


def files_beside(folder: Path) -> list[Path]:
    """What is beside the folders in a folder, but for hidden files."""
    return sorted(path for path in folder.iterdir() if not path.is_dir() and not _hidden(path.name))


def has_images(folder: Path) -> bool:
    """Whether there is an image in a folder, or in the folders in it."""
    return any(map(_is_image, _files(folder)))


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
        why = "no image format fits its contents" if "cannot identify" in str(error) else one_line(error, 200)
        raise CommandError(f"{name}: cannot be decoded as an image ({why}); repair or remove it.") from error


def _in_8_bits(image: Image.Image) -> Image.Image:
    """What Pillow's own conversion to RGB would clip or warn of; transparency is dropped later, as timm drops it."""
    if image.mode == "F" or (image.mode == "I" and image.format not in OF_16_BITS):
        what = "floating-point numbers" if image.mode == "F" else "signed or 32-bit integers"
        raise ValueError(f"its pixels are {what}, of which none is known to be white")
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    return image.convert("RGBA") if image.mode == "P" and "transparency" in image.info else image
