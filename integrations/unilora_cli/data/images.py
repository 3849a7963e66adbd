"""Images with classes: which are trained on, which are held out, and which are tested on once at the end."""

import argparse
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from unilora_cli.console import CommandError, path_of
from unilora_cli.data.image_sources import (
    FolderImages,
    ImageSource,
    TableImages,
    TorchImages,
    class_folders,
    class_names,
    endings,
    files_beside,
    has_images,
    reason,
    undecodable,
)
from unilora_cli.data.records import (
    HELD_OUT,
    Tables,
    class_notes,
    draw,
    is_local,
    load_tables,
    nfc,
    seen,
    some,
    split_off,
)
from unilora_cli.tasks.models import readable_errors

__all__ = ["ImageSet", "Images", "Part", "load_images"]

SPLITS = {"train", "training", "test", "testing", "eval", "evaluation", *HELD_OUT}
"""Names of folders, in small letters, that are parts of the data rather than classes."""

STREAMED = ("hfids/", "tfds/", "wds/")
"""Prefixes of timm for data that come as a stream."""


Sources = tuple[ImageSource, ImageSource | None, ImageSource | None]
"""To train on, held out, and to test on; None where nothing is set apart for it."""


@dataclass(frozen=True)
class Part:
    """Some images of a source."""

    source: ImageSource
    indices: Sequence[int]


@dataclass(frozen=True)
class Images:
    """The images of a run.

    Attributes:
        skipped: those that do not decode and are left out: (name, why).
        notes: lines about the data for the printed plan.
    """

    classes: tuple[str, ...]
    train: Part
    held_out: Part
    test: Part | None
    skipped: tuple[tuple[str, str], ...] = ()
    notes: tuple[tuple[str, Any], ...] = ()


class ImageSet(Dataset):
    """The images of a part, transformed: ``{"x": (channels, height, width), "labels": int}``."""

    def __init__(self, part: Part, transform: Callable, mode: str = "RGB"):
        self.part, self.transform, self.mode = part, transform, mode

    def __len__(self) -> int:
        return len(self.part.indices)

    def __getitem__(self, position: int) -> dict[str, Any]:
        index = self.part.indices[position]
        image = self.part.source.open(index).convert(self.mode)
        return {"x": self.transform(image), "labels": self.part.source.labels[index]}


def load_images(arguments: argparse.Namespace) -> Images:
    """The images that the arguments name, parted as they say.

    Raises:
        CommandError: no such data, data without images and classes, one class only, or options that do not go together.
    """
    train, held_out, test = _sources(arguments)
    if len(train.classes) < 2:
        raise CommandError(f"{arguments.data}: there is one class only, {train.classes[0]!r}; nothing can be learnt.")
    parts = [Part(source, range(len(source.labels))) for source in (train, held_out, test) if source is not None]
    skipped: list[tuple[str, str]] = []
    if arguments.bad_images == "skip":
        parts = [_decodable(part, arguments.workers, skipped) for part in parts]
        if lost := set(train.labels) - {train.labels[i] for i in parts[0].indices}:
            raise CommandError(f"{arguments.data}: no image of the class {train.classes[min(lost)]!r} can be decoded.")
        if empty := [part for part in parts if not part.indices]:
            raise CommandError(f"{empty[0].source.name(0)}: none of the images beside it can be decoded either.")
    elif test is not None:  # read after training only, when it would be late to stop
        _decodable(parts[-1], arguments.workers, skipped)
        if skipped:
            raise CommandError(undecodable(*skipped[0]))
    usable = {id(part.source): part.indices for part in parts}
    kept = usable[id(train)]
    if held_out is None:
        left, apart = split_off(len(kept), arguments.holdout, arguments.seed, [train.labels[i] for i in kept])
        held_out_part = Part(train, [kept[i] for i in apart])
        kept = [kept[i] for i in left]
    else:
        held_out_part = Part(held_out, usable[id(held_out)])
    kept = [kept[i] for i in draw(len(kept), arguments.limit, arguments.seed)]
    tested = None if test is None else Part(test, usable[id(test)])
    learnt = Part(train, kept)
    notes = (*_left_out((train, held_out, test), path_of(arguments.data)), *_comparison(learnt, held_out_part))
    return Images(train.classes, learnt, held_out_part, tested, tuple(skipped), notes)


def _comparison(train: Part, held_out: Part) -> list[tuple[str, Any]]:
    """Lines about what is to train on and what is held out."""
    labels = ([part.source.labels[i] for i in part.indices] for part in (train, held_out))
    learnt, apart = _digests(train, held_out)
    return [*class_notes(train.source.classes, *labels), *seen(learnt, apart, len(held_out.indices))]


def _digests(*parts: Part) -> list[list[bytes]]:
    """Hashes of the images of each part as they are stored; of those alone whose size is one of every part's, so that
    the others need not be read.
    """
    sizes = [part.source.sizes() for part in parts]
    if not all(sizes):
        return [[] for _ in parts]
    common = set.intersection(*({of[i] for i in part.indices} for part, of in zip(parts, sizes, strict=True))) - {-1}
    return [
        [hashlib.sha256(part.source.stored(i)).digest() for i in part.indices if of[i] in common]
        for part, of in zip(parts, sizes, strict=True)
    ]


def _left_out(sources: Sources, folder: Path) -> list[tuple[str, Any]]:
    """Lines about files and folders of the data that are not used."""
    used = {path for source in sources if source is not None for path in source.folders}
    strays = [path for source in sources if source is not None for path in source.strays]
    notes = []
    if folder.is_dir() and used and folder not in used:
        strays += files_beside(folder)
        if others := [
            repr(path.name) for path in sorted(class_folders(folder)) if path not in used and has_images(path)
        ]:
            notes.append(("left out", f"the folders {some(others)}"))
    if strays:
        notes.append(
            ("left out", f"{endings(strays)}: no images to Pillow, or in no class folder, such as {strays[0]}")
        )
    return notes


def _sources(arguments: argparse.Namespace) -> Sources:
    if arguments.data.startswith("torch/"):
        return _from_torchvision(arguments)
    if arguments.data.startswith(STREAMED):
        raise CommandError(f"{arguments.data}: data that come as a stream are not read; use hfds/NAME or torch/NAME.")
    for name in ("data_dir", "download"):
        if getattr(arguments, name):
            raise CommandError(f"--{name.replace('_', '-')} is for data of torchvision, --data torch/NAME.")
    if arguments.data.startswith("hfds/"):
        hub = argparse.Namespace(**vars(arguments) | {"data": arguments.data.removeprefix("hfds/")})
        return _from_tables(hub)
    folder = path_of(arguments.data)
    if is_local(arguments.data) and not folder.exists():
        raise CommandError(f"{arguments.data}: no such folder.")
    if folder.is_dir() and _is_image_folder(folder, arguments.train_split):
        return _from_folder(arguments, folder)
    return _from_tables(arguments)


def _parted(folder: Path, arguments: argparse.Namespace) -> bool:
    """Whether a folder holds the parts of the data, each with its class folders; else its own folders are the classes.

    Raises:
        CommandError: one may be meant as well as the other, or there is no part to train on.
    """
    names = [path.name for path in class_folders(folder)]
    train = arguments.train_split
    if train != "train" or arguments.eval_split or arguments.test_split:
        if train not in names:
            raise CommandError(f"{folder}: there is no folder {train!r} in it.")
        return True
    parts = [name for name in names if name.casefold() in SPLITS]
    others = [repr(name) for name in names if name not in parts and has_images(folder / name)]
    if not others and parts and "train" not in parts:
        raise CommandError(
            f"{folder}: there is no folder 'train' in it; it has {some(list(map(repr, parts)))}: name the parts by "
            "--train-split and --eval-split, if they are that."
        )
    nested = any(
        has_images(inner) for name in parts if name.casefold() == "train" for inner in class_folders(folder / name)
    )
    if others and nested:
        raise CommandError(
            f"{folder}: 'train' may be a part of the data or a class: there are folders of images in it, and beside it "
            f"{some(others)} with images too. For a part, name the others, --eval-split NAME, or give --data "
            f"{folder}/train; for a class, rename it."
        )
    return "train" in parts and not others


def _from_folder(arguments: argparse.Namespace, folder: Path) -> Sources:
    parted = _parted(folder, arguments)

    def chosen(data: str | None, split: str | None, usual: Sequence[str]) -> Path | None:
        """The folder that the options name, or the first of the usual ones that is there."""
        if data:
            path = path_of(data)
            path = path / split if split else path
        elif split:
            path = folder / split
        else:
            return next((folder / name for name in usual if (folder / name).is_dir()), None) if parted else None
        if not path.is_dir():
            raise CommandError(f"{path}: no such folder.")
        return path

    train = FolderImages(folder / arguments.train_split if parted else folder)
    others = [name for name in HELD_OUT if name != arguments.test_split]
    held_out = chosen(arguments.eval_data, arguments.eval_split, others)
    test = chosen(arguments.test_data, arguments.test_split, () if held_out == folder / "test" else ("test",))
    return (
        train,
        None if held_out is None else FolderImages(held_out, train.classes),
        None if test is None else FolderImages(test, train.classes),
    )


def _from_tables(arguments: argparse.Namespace) -> Sources:
    import datasets

    tables: Tables = load_tables(arguments, arguments.test_data, arguments.test_split)
    kinds = getattr(tables.train, "features", {})
    images = [name for name, kind in kinds.items() if isinstance(kind, datasets.Image)]
    image, label = arguments.image_column or next(iter(images), ""), arguments.label_column
    if image not in images:
        asked = f"no column {image!r} of images" if image else "no column of images"
        raise CommandError(f"{arguments.data}: there is {asked}; its columns are {', '.join(kinds) or 'plain text'}.")
    if label not in kinds:
        raise CommandError(f"{arguments.data}: there is no column {label!r}; it has {', '.join(map(repr, kinds))}.")
    classes = tuple(map(nfc, tables.names.get(label, ()))) or class_names(list(tables.train[label]), arguments.data)

    def source(rows: Any, where: str) -> TableImages:
        if missing := [name for name in (image, label) if name not in rows.features]:
            raise CommandError(f"{where}: there is no column {missing[0]!r}; it has {', '.join(rows.features)}.")
        undecoded = rows.cast_column(image, datasets.Image(decode=False))
        return TableImages(undecoded, image, label, classes, where)

    return (
        source(tables.train, arguments.data),
        None if tables.held_out is None else source(tables.held_out, arguments.eval_data or arguments.data),
        None if tables.test is None else source(tables.test, arguments.test_data or arguments.data),
    )


def _from_torchvision(arguments: argparse.Namespace) -> Sources:
    """Data in timm's notation, by timm's own reader: ``torch/cifar10``, ``torch/image_folder``."""
    from timm.data import create_dataset
    from torchvision.datasets import ImageFolder

    if arguments.data_dir is None:
        raise CommandError(f"{arguments.data} wants the folder that it is in, or goes to: --data-dir FOLDER.")
    if other := arguments.eval_data or arguments.test_data:
        raise CommandError(f"{other}: data of torchvision are parted by --eval-split and --test-split.")
    root = path_of(arguments.data_dir)

    def part(split: str | None, usual: str = "") -> ImageSource | None:
        if not (split or usual):
            return None
        with readable_errors(f"cannot load {arguments.data} from {root} (--download fetches what torchvision can)"):
            found = create_dataset(
                arguments.data, root=str(root), split=split or usual, download=arguments.download or False
            )
        if isinstance(found, ImageFolder) and Path(found.root) == root:  # what timm takes where it finds no such split
            if split:
                raise CommandError(f"{root}: there is no folder {split!r} in it.")
            if usual != "train":
                return None
        if type(found) is ImageFolder:  # which knows fewer endings of names, and leaves other files out unsaid
            return FolderImages(Path(found.root))
        return TorchImages(found, f"{arguments.data}, {split or usual}")

    train = part(None if arguments.train_split == "train" else arguments.train_split, "train")
    held_out = part(arguments.eval_split, "" if arguments.test_split else "validation")
    test = part(arguments.test_split)
    assert train is not None
    for source in (held_out, test):
        if source is not None and source.classes != train.classes:
            raise CommandError(f"{source.where}: the classes are not those of the training data.")
    return train, held_out, test


def _decodable(part: Part, workers: int, skipped: list[tuple[str, str]]) -> Part:
    """The images of a part that decode; each is decoded once to find out, and the others are added to ``skipped``."""
    probes = DataLoader(_Probe(part), batch_size=None, num_workers=workers)
    bad = {}
    for index, why in tqdm(probes, desc="decoding every image once", unit="image", disable=None, leave=False):
        if why:
            bad[index] = why
            skipped.append((part.source.name(index), why))
    return Part(part.source, [index for index in part.indices if index not in bad])


class _Probe(Dataset):
    """Why an image cannot be decoded, or nothing: ``(index, why)``."""

    def __init__(self, part: Part):
        self.part = part

    def __len__(self) -> int:
        return len(self.part.indices)

    def __getitem__(self, position: int) -> tuple[int, str]:
        index = self.part.indices[position]
        try:
            self.part.source.open(index)
        except CommandError as error:
            return index, reason(error.__cause__ or error)
        return index, ""


def _is_image_folder(folder: Path, train: str) -> bool:
    """Class folders, or train/ with class folders; a folder of data files is for `datasets`."""
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return False
    data = any(path.suffix in {".parquet", ".arrow", ".jsonl", ".json", ".csv"} for path in folder.rglob("*"))
    if (folder / train).is_dir():
        others = [path for path in class_folders(folder) if path.name.casefold() not in SPLITS]
        return not data or any(map(has_images, [*class_folders(folder / train), *others]))
    return not data or any(map(has_images, class_folders(folder)))
