"""Images with classes: which are trained on, which are held out, and which are tested on once at the end."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from unilora_cli.console import CommandError, path_of
from unilora_cli.data import image_sources as sources
from unilora_cli.data.image_sources import ImageSource, images_of_folder
from unilora_cli.data.labels import class_index, class_names
from unilora_cli.data.records import HELD_OUT, class_notes, column, draw, is_local, load_tables, seen, some, split_off
from unilora_cli.options.finetune import Vit
from unilora_cli.tasks.models import readable_errors

__all__ = ["ImageSet", "Images", "Part", "load_images"]

SPLITS = {"train", "training", "test", "testing", "eval", "evaluation", *HELD_OUT}
"""Names of folders, in small letters, that are parts of the data rather than classes."""

STREAMED = ("hfids/", "tfds/", "wds/")
"""Prefixes of timm for data that come as a stream."""

FOLDERS = ("torch/image_folder", "torch/folder")
"""timm's names for what a folder is by itself."""

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
        skipped: those that do not decode and are left out: (name, what was said of it).
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


def load_images(options: Vit) -> Images:
    """The images that the options name, parted as they say.

    Raises:
        CommandError: no such data, data without images and classes, one class only, or options that do not go together.
    """
    train, held_out, test = _sources(options)
    if len(train.classes) < 2:
        raise CommandError(f"{options.data}: there is one class only, {train.classes[0]!r}; nothing can be learnt.")
    skipped: list[tuple[str, str]] = []

    def usable(source: ImageSource, read: bool) -> Part:
        part = Part(source, range(len(source.labels)))
        return _decodable(part, options.workers, skipped) if read else part

    skip = options.bad_images == "skip"
    learnt = usable(train, skip)
    if lost := set(train.labels) - {train.labels[i] for i in learnt.indices}:
        raise CommandError(f"{options.data}: no image of the class {train.classes[min(lost)]!r} can be decoded.")
    apart = None if held_out is None else usable(held_out, skip)
    tested = None if test is None else usable(test, True)  # read after training only, when it would be late to stop
    if skipped and not skip:
        raise CommandError(skipped[0][1])
    for part in (apart, tested):
        if part is not None and not part.indices:
            raise CommandError(f"{part.source.name(0)}: none of the images beside it can be decoded either.")
    kept = learnt.indices
    if apart is None:
        left, others = split_off(len(kept), options.holdout, options.seed, [train.labels[i] for i in kept])
        apart, kept = Part(train, [kept[i] for i in others]), [kept[i] for i in left]
    learnt = Part(train, [kept[i] for i in draw(len(kept), options.limit, options.seed)])
    labels = ([part.source.labels[i] for i in part.indices] for part in (learnt, apart))
    notes = _left_out((train, held_out, test), path_of(options.data))
    notes += [*class_notes(train.classes, *labels), *_seen(learnt, apart)]
    return Images(train.classes, learnt, apart, tested, tuple(skipped), tuple(notes))


def _seen(train: Part, held_out: Part) -> list[tuple[str, Any]]:
    """A line about files that are held out and trained on, byte by byte; those of a size of their own are not read."""
    if train.source.folder is None or held_out.source.folder is None:
        return []
    parts = [[part.source.images[i] for i in part.indices] for part in (train, held_out)]
    sizes = [[path.stat().st_size if path.is_file() else -1 for path in paths] for paths in parts]
    common = set.intersection(*map(set, sizes)) - {-1}
    learnt, apart = (
        [hashlib.sha256(path.read_bytes()).digest() for path, n in zip(paths, of, strict=True) if n in common]
        for paths, of in zip(parts, sizes, strict=True)
    )
    return seen(learnt, apart, len(held_out.indices))


def _left_out(found: Sources, folder: Path) -> list[tuple[str, Any]]:
    """Lines about files and folders of the data that are not used."""
    used = {source.folder for source in found if source is not None and source.folder}
    strays = [path for source in found if source is not None for path in source.strays]
    notes = []
    if folder.is_dir() and used and folder not in used:
        strays += sources.files_beside(folder)
        beside = sorted(path for path in sources.class_folders(folder) if path not in used)
        if others := [repr(path.name) for path in beside if sources.has_images(path)]:
            notes.append(("left out", f"the folders {some(others)}"))
    if strays:
        what = f"{sources.endings(strays)}: no images to Pillow, or in no class folder, such as {strays[0]}"
        notes.append(("left out", what))
    return notes


def _sources(options: Vit) -> Sources:
    data = options.data
    if data.startswith("torch/"):
        if options.data_dir is None:
            raise CommandError(f"{data} wants the folder that it is in, or goes to: --data-dir FOLDER.")
        if data not in FOLDERS:
            return _from_torchvision(options, path_of(options.data_dir))
        return _from_folder(options, path_of(options.data_dir))
    if data.startswith(STREAMED):
        raise CommandError(f"{data}: data that come as a stream are not read; use hfds/NAME or torch/NAME.")
    for name in ("data_dir", "download"):
        if getattr(options, name):
            raise CommandError(f"--{name.replace('_', '-')} is for data of torchvision, --data torch/NAME.")
    if data.startswith("hfds/"):
        return _from_tables(options)
    folder = path_of(data)
    if is_local(data) and not folder.exists():
        raise CommandError(f"{data}: no such folder.")
    images = folder.is_dir() and _is_image_folder(folder, options.train_split)
    return _from_folder(options, folder) if images else _from_tables(options)


def _parted(folder: Path, options: Vit) -> bool:
    """Whether a folder holds the parts of the data, each with its class folders; else its own folders are the classes.

    Raises:
        CommandError: one may be meant as well as the other, or there is no part to train on.
    """
    names = [path.name for path in sources.class_folders(folder)]
    train = options.train_split
    if train != "train" or options.eval_split or options.test_split:
        if train not in names:
            raise CommandError(f"{folder}: there is no folder {train!r} in it.")
        return True
    parts = [name for name in names if name.casefold() in SPLITS]
    others = [repr(name) for name in names if name not in parts and sources.has_images(folder / name)]
    if not others and parts and "train" not in parts:
        raise CommandError(
            f"{folder}: there is no folder 'train' in it; it has {some(list(map(repr, parts)))}: name the parts by "
            "--train-split and --eval-split, if they are that."
        )
    nested = [inner for name in parts if name.casefold() == "train" for inner in sources.class_folders(folder / name)]
    if others and any(map(sources.has_images, nested)):
        raise CommandError(
            f"{folder}: 'train' may be a part of the data or a class: there are folders of images in it, and beside it "
            f"{some(others)} with images too. For a part, name the others, --eval-split NAME, or give --data "
            f"{folder}/train; for a class, rename it."
        )
    return "train" in parts and not others


def _from_folder(options: Vit, folder: Path) -> Sources:
    parted = _parted(folder, options)
    train = images_of_folder(folder / options.train_split if parted else folder)

    def chosen(data: str | None, split: str | None, usual: Sequence[str]) -> ImageSource | None:
        """The folder that the options name, or the first of the usual ones that is there."""
        path = (path_of(data) if data else folder) / (split or "")
        if not (data or split):
            there = [folder / name for name in usual if parted and (folder / name).is_dir()]
            return images_of_folder(there[0], train.classes) if there else None
        if not path.is_dir():
            raise CommandError(f"{path}: no such folder.")
        return images_of_folder(path, train.classes)

    others = [name for name in HELD_OUT if name != options.test_split]
    held_out = chosen(options.eval_data, options.eval_split, others)
    usual = () if held_out is not None and held_out.folder == folder / "test" else ("test",)
    return train, held_out, chosen(options.test_data, options.test_split, usual)


def _from_tables(options: Vit) -> Sources:
    import datasets

    tables = load_tables(options, options.test_data, options.test_split)
    trained: Any = tables.train
    kinds = getattr(trained, "features", {})
    pictures = [name for name, kind in kinds.items() if isinstance(kind, datasets.Image)]
    image, label = options.image_column or next(iter(pictures), ""), options.label_column
    if image not in pictures:
        asked = f"no column {image!r} of images" if image else "no column of images"
        raise CommandError(f"{options.data}: there is {asked}; its columns are {', '.join(kinds) or 'plain text'}.")
    column(trained, label, (), options.data)
    named = tables.names.get(label, ())
    classes = named or class_names(trained[label], options.data)

    def source(rows: Any, where: str) -> ImageSource | None:
        if rows is None:
            return None
        for name in (image, label):
            column(rows, name, (), where)
        undecoded = rows.cast_column(image, datasets.Image(decode=False))
        labels = [class_index(classes, bool(named), value, where, i) for i, value in enumerate(undecoded[label])]
        return ImageSource(where, classes, labels, undecoded.select_columns([image]))

    train = source(trained, options.data)
    assert train is not None
    return (
        train,
        source(tables.held_out, options.eval_data or options.data),
        source(tables.test, options.test_data or options.data),
    )


def _from_torchvision(options: Vit, root: Path) -> Sources:
    """Data in timm's notation, by timm's own reader: ``torch/cifar10``."""
    from timm.data import create_dataset

    if other := options.eval_data or options.test_data:
        raise CommandError(f"{other}: data of torchvision are parted by --eval-split and --test-split.")

    def part(split: str | None) -> ImageSource | None:
        if not split:
            return None
        with readable_errors(f"cannot load {options.data} from {root} (--download fetches what torchvision can)"):
            found: Any = create_dataset(options.data, root=str(root), split=split, download=options.download)
        where = f"{options.data}, {split}"
        if not (hasattr(found, "targets") and hasattr(found, "classes")):
            raise CommandError(f"{where}: this data set of torchvision does not list its classes and labels.")
        classes = tuple(name if isinstance(name, str) else str(name[0]) for name in found.classes)
        files = [Path(path) for path, _ in getattr(found, "imgs", ())]
        return ImageSource(where, classes, list(map(int, found.targets)), files or found)

    train = part(options.train_split)
    held_out = part(options.eval_split or ("" if options.test_split else "validation"))
    test = part(options.test_split)
    assert train is not None
    for source in (held_out, test):
        if source is not None and source.classes != train.classes:
            raise CommandError(f"{source.where}: the classes are not those of the training data.")
    return train, held_out, test


def _decodable(part: Part, workers: int, skipped: list[tuple[str, str]]) -> Part:
    """The images of a part that decode; each is decoded once to find out, and the others are added to ``skipped``."""
    probes = DataLoader(_Probe(part, lambda _: None), batch_size=None, num_workers=workers)
    shown = tqdm(probes, desc="decoding every image once", unit="image", disable=None, leave=False)
    said = dict(zip(part.indices, shown, strict=True))
    skipped += [(part.source.name(index), why) for index, why in said.items() if why]
    return Part(part.source, [index for index, why in said.items() if not why])


class _Probe(ImageSet):
    """What is said of an image that cannot be decoded, or nothing."""

    def __getitem__(self, position: int) -> Any:
        try:
            self.part.source.open(self.part.indices[position])
        except CommandError as error:
            return str(error)
        return ""


def _is_image_folder(folder: Path, train: str) -> bool:
    """Class folders, or train/ with class folders; a folder of data files is for `datasets`."""
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return False
    data = any(path.suffix in {".parquet", ".arrow", ".jsonl", ".json", ".csv"} for path in folder.rglob("*"))
    inner = sources.class_folders(folder)
    if (folder / train).is_dir():
        inner = [path for path in inner if path.name.casefold() not in SPLITS] + sources.class_folders(folder / train)
    return not data or any(map(sources.has_images, inner))
