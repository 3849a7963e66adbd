"""Images with a small ViT that knows five classes of CIFAR-10: trained here once, then kept."""

import functools
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from common import SMOKE
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import pad

import unilora_timm
from quality.tasks import Data, Task, data_folder
from quality.tasks._classifier import accuracy, kept, loss
from quality.training import fit

EXAMPLES, EPOCHS, BATCH, RATE = (128, 1, 64, 1e-3) if SMOKE else (10_000, 12, 64, 1e-3)
"""Of the base's own training."""

Example = tuple[Tensor, int]
"""Pixels (3, 32, 32) uint8, and the label."""


def task(title: str, read: Callable[[], Data], *, classes: int, augmented: bool, **sizes: Any) -> Task:
    """A task of images of 32 × 32; ``augmented``: cropped and flipped in training."""
    return Task(
        title=title,
        kind="images",
        metric="accuracy",
        higher=True,
        data=read,
        model=functools.partial(model, classes=classes),
        collate=functools.partial(collate, augmented=augmented),
        loss=loss,
        figures=functools.partial(accuracy, collate=functools.partial(collate, augmented=False)),
        attach=unilora_timm.attach,
        layers=("qkv",),
        head=("head",),
        rate=5e-3,
        head_rate=5e-3,
        full_rate=5e-4,
        **sizes,
    )


def model(folder: Path, *, classes: int) -> nn.Module:
    """The base, with a fresh head."""
    made = kept(folder / "small_vit.safetensors", vit, functools.partial(train, folder=folder))
    made.reset_classifier(classes)
    return made


def vit() -> nn.Module:
    """timm's ViT with 16 patches of 8 × 8, six blocks of width 128, 1.2 million parameters."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4}
    return timm.create_model("vit_tiny_patch16_224", num_classes=5, **sizes)


def train(base: nn.Module, folder: Path) -> None:
    """12 epochs on every second class of CIFAR-10; what came of it goes into the folder."""
    groups = [{"params": list(base.parameters()), "lr": RATE, "weight_decay": 0.05}]
    images, cropped = cifar("train", 0)[:EXAMPLES], functools.partial(collate, augmented=True)
    fit(base, groups, images, cropped, loss, epochs=EPOCHS, batch=BATCH, seed=0, title="the base")
    base.eval()
    with torch.inference_mode():
        known = accuracy(base, cifar("test", 0), functools.partial(collate, augmented=False))
    (folder / "small_vit.json").write_text(json.dumps(known) + "\n", encoding="utf-8")


def collate(examples: list[Example], rng: np.random.Generator | None, *, augmented: bool) -> tuple[Tensor, Tensor]:
    """Pixels (n, 3, 32, 32) in ±1 and labels (n,)."""
    pixels = torch.stack([each for each, _ in examples]).float()
    if augmented and rng is not None:
        pixels = crop_and_flip(pixels, rng)
    return pixels / 127.5 - 1, torch.tensor([label for _, label in examples])


def crop_and_flip(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Each image moved by up to 4 pixels (reflected at the border), and half of them mirrored."""
    n, _, height, width = pixels.shape
    padded = pad(pixels, (4, 4, 4, 4), mode="reflect").permute(0, 2, 3, 1)
    down, right = torch.from_numpy(rng.integers(0, 9, (2, n, 1)))
    columns = torch.arange(width).expand(n, width)
    columns = torch.where(torch.from_numpy(rng.random((n, 1)) < 0.5), columns, columns.flip(1)) + right
    rows = torch.arange(height) + down
    return padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def cifar(part: str, first: int) -> list[Example]:
    """Every second class in alphabetical order, from the ``first``, 0 or 1; ``part``: train or test."""
    classes = [images for (where, _), images in _archive().items() if where == part][first::2]
    return [(image, label) for label, images in enumerate(classes) for image in images]


@functools.cache
def _archive() -> dict[tuple[str, str], Tensor]:
    """(train or test, class) → pictures (n, 3, 32, 32)."""
    found: dict[tuple[str, str], list[np.ndarray]] = {}
    with tarfile.open(data_folder("cifar10_a") / "cifar10_a.tar.xz") as archive:
        for member in archive:
            file = archive.extractfile(member) if member.name.endswith(".jpg") else None
            if file is not None:
                part, label, _ = member.name.split("/")
                found.setdefault((part, label), []).append(np.asarray(Image.open(io.BytesIO(file.read()))))
    return {key: torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) for key, images in sorted(found.items())}
