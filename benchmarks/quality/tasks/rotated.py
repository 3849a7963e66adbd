"""Digits turned by 90°, by a small classifier that knows upright ones: no transformer, every layer adapted."""

import functools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import unilora_torch
from quality.tasks import Data, Task, _mnist, split
from quality.tasks._classifier import accuracy, kept, loss
from quality.training import fit

Example = tuple[Tensor, int]
"""Pixels (784,) in 0 … 1, and the label."""


@functools.cache
def parts() -> tuple[list[Example], list[Example]]:
    """Upright digits for the base, and other digits turned."""
    rest, upright, _ = split(_mnist.digits(), 6000)
    turned = [(torch.rot90(pixels), label) for pixels, label in rest]
    scaled = [[(pixels.flatten().float() / 255, label) for pixels, label in part] for part in (upright, turned)]
    return scaled[0], scaled[1]


def read() -> Data:
    """2,000 turned digits to draw from, 500 to choose on, 1,500 to judge on."""
    turned = parts()[1]
    return Data(turned[:2000], turned[2000:2500], turned[2500:])


def collate(examples: list[Example], _rng: np.random.Generator | None) -> tuple[Tensor, Tensor]:
    """Pixels (n, 784) and labels (n,)."""
    return torch.stack([pixels for pixels, _ in examples]), torch.tensor([label for _, label in examples])


def model(folder: Path) -> nn.Module:
    """784-256-256-10, trained here once, then kept."""
    return kept(folder / "upright.safetensors", make, train)


def make() -> nn.Module:
    """With random weights."""
    return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def train(net: nn.Module) -> None:
    """Six epochs of upright digits."""
    groups = [{"params": list(net.parameters()), "lr": 2e-3}]
    fit(net, groups, parts()[0], collate, loss, epochs=6, batch=32, seed=0, title="the base")


TASK = Task(
    title="Turned digits, classifier",
    kind="images",
    metric="accuracy",
    higher=True,
    data=read,
    model=model,
    collate=collate,
    loss=loss,
    figures=functools.partial(accuracy, collate=collate),
    attach=functools.partial(unilora_torch.attach, targets="all-linear"),
    layers=("0", "2", "4"),
    head=(),
    examples=2000,
    epochs=4,
    batch=32,
    rate=1e-2,
    head_rate=0.0,
    full_rate=1e-3,
)
